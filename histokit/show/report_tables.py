"""The tables and lists of the report page: what finished runs wrote, as rows and sentences for a reader.

Every function takes what `report` has read, or folders of runs to read; none draws, and none knows the page.
"""

import json

import pandas as pd

from histokit.core import files
from histokit.runs import places, selection_reasons


def class_rows(dataset):
    rows = []
    for name in dataset.classes:
        held = dataset.counts.get(name, {})
        shown = {part: "{tiles} / {cases}".format(**held[part]) if part in held else "none" for part in ("train", "val", "test")}
        rows.append({"class": name, "role": "rare" if name in dataset.tail else "common", **shown})
    return rows


def rare_on_purpose(tiles):
    """Which classes a budget made rare, and what it leaves of them; "" where there is none.

    Args:
        tiles: frozen manifest of real tiles, those withheld included.
    """
    train = tiles[tiles["split"].eq("train")]
    said = []
    for name in sorted(set(train.loc[train["use"].eq("withheld"), "label"])):
        own = train[train["label"].eq(name)]
        left = own[own["use"].eq("labelled")]
        said.append(f"{name} (a budget leaves {len(left)} of {len(own)} training tiles, of {left['case_id'].nunique()} cases)")
    return f"Made rare on purpose, to be able to check: {', '.join(said)}." if said else ""


def dataset_sentence(dataset, n):
    cases = f"{n['cases']} cases" if n["cases"] else "no case ids: a tile counts as its own case, and intervals are too narrow"
    scale = f"{dataset.mpp} um per pixel" if dataset.mpp else "pixel size unknown"
    return (
        f"{dataset.tile_px} px tiles, {scale}. Test: {n['tiles']} tiles, {cases}. Licence of the data: {dataset.licence or 'not stated'}."
    )


def difference_rows(results):
    rows = []
    for arm, of_arm in results["differences"].items():
        for endpoint, d in of_arm.items():
            n = f"{d['tiles']} / {d['cases']}"
            rows.append(
                {
                    "arm": arm,
                    "what": endpoint,
                    "points": _points(d["difference"], d["low"], d["high"]),
                    "tiles / cases": n,
                    "reading": d["text"].rpartition(": ")[2],
                }
            )
    return rows


def _points(value, low=None, high=None):
    if value is None:
        return ""
    return f"{100 * value:+.1f}" + (f" [{100 * low:+.1f} to {100 * high:+.1f}]" if low is not None else "")


def alarm_rows(results):
    def percent(value):
        return "" if value is None else f"{100 * value:.1f} %"

    return [
        {
            "arm": row["arm"],
            "rare tiles flagged": percent(row["flagged"]),
            "false alarms per 1,000": f"{row['false_alarms']:.0f}",
            "predictive value": percent(row["ppv"]),
        }
        for row in results["alarms"]
    ]


def change_rows(changes):
    counted = (
        changes[changes["change"].fillna("").ne("")]
        .groupby(["change", "label"])
        .agg(tiles=("tile_id", "size"), cases=("case_id", "nunique"))
    )
    return [
        {"change": change, "class": label, "tiles": int(row.tiles), "cases": int(row.cases)} for (change, label), row in counted.iterrows()
    ]


def acceptance_rows(record):
    rows = []
    for name in {name for request in record["parents"] for name in request["found"]}:
        place = files.root() / name
        held = files.read_json(place / "results.json") if (place / "results.json").is_file() else {}
        if isinstance(held, dict) and "acceptance" in held:
            label = places.read(place)["class_name"] or "all"
            shown = [row | {"class": label, "why": selection_reasons.caption(row["why"])} for row in held["acceptance"]]
            rows += [{name: row[name] for name in ("class", "status", "why", "tiles")} for row in shown]
    return sorted(rows, key=lambda row: (row["class"], row["status"]))


def likeness_rows(seen):
    rows = []
    for row in seen.get("likeness", []):
        kid = "" if row["kid_at_n"] is None else f"{1000 * row['kid_at_n']:.0f}, real {1000 * row['floor']:.0f}, {row['n']:.0f} a side"
        n = f"{row['synthetic']} synthetic, {row['real']} real"
        rows.append({"class": row["class"], "encoder": row["encoder"], "tiles": n, "KID x 1000": kid, "reading": row["reading"]})
    return rows


def probe_rows(seen):
    return [
        {"class": row["class"], "encoder": row["encoder"], "AUROC": f"{row['auroc']:.2f}"}
        for row in seen.get("probe", [])
        if row["auroc"] is not None
    ]


def stain_rows(place, judged, baseline):
    table = files.read_table(place / "stain_range.csv")
    return [
        {"cases stained": row["group"], "tiles / cases": f"{row['tiles']:.0f} / {row['cases']:.0f}", baseline: _share(row[baseline])}
        | {judged: _share(row[judged])}
        for row in table.to_dict("records")
        if row["group"] in ("inside", "outside")
    ]


def _share(value):
    return f"{100 * value:.1f} %"


def copy_rows(seen, share):
    rows = []
    for row in seen.get("copies", {}).get("rows", []):
        if row["cut"] is None:
            rows.append({"class": row["class"], "space": row["space"], "copies": "not calibrated", "excess": "", "most copied": ""})
            continue
        most = f"{row['most_copied_times']:.0f} times" + ("" if share else f" {row['most_copied']}") if row["copies"] else ""
        by = " by the ratio test" if row.get("test") == "ratio" else ""
        copied = f"{row['copies']:.0f} of {row['synthetic']}{by}, {100 * row['expected']:.1f} % expected"
        excess = _points(row["excess"], row["low"], row["high"])
        rows.append({"class": row["class"], "space": row["space"], "copies": copied, "excess": excess, "most copied": most})
    return rows


def copy_sentences(seen):
    for name, gate in seen.get("copies", {}).get("gates", {}).items():
        why = f": {'; '.join(gate['reasons'])}" if gate["reasons"] else ""
        said = {"pass": "may be exported", "blocked": "may not be exported", "uncalibrated": "may be exported only on somebody's word"}
        yield f"{name}: {gate['state']}, {said[gate['state']]}{why}."
    yield from seen.get("membership", {}).get("lines", [])


def unchecked_sentences(results, dataset, arms, specs):
    n = results["n"]
    if n["draws"] < 3:
        yield f"{n['draws']} draw of the rare tiles: another choice of them may turn the result (`histokit run --draws 3`)."
    if 0 < n["generators"] < 2:
        yield "One generator seed: another training of the generator may turn the result (`--generator-seeds 2`)."
    if not dataset.has_cases:
        yield "Tiles of one patient may lie on both sides of the split: there are no case ids."
    used = {row["encoder"] for row in arms["trials"]}
    if used <= {"mini-ssl", "mini-sup", "colour-texture"}:
        yield "No pathology encoder was given, the strongest baseline of real tiles alone."
    if n["generators"] and not results["fidelity"]["step"]:
        yield "Nobody looked whether the synthetic tiles are copies of training tiles: the recipe has no `08_fidelity` that 07 names."
    if not any((spec or {}).get("labels") == "shuffled" for spec in specs.values()):
        yield "No arm with wrong labels, which must not help, was among them."
    if results.get("looks", {}).get("opened_before"):
        looks = results["looks"]
        times = f"{looks['opened_before']} time{'s' * (looks['opened_before'] != 1)}"
        yield f"These test tiles had been opened {times} before, with {len(looks['plans'])} plans: not untouched."
    there = results["external"]["lines"]
    yield "Other scanners, laboratories and hospitals than those in the data" + (" and in the external tiles." if there else ".")


def arm_rows(arms):
    """(rows, what is the same in all of them)."""
    table = pd.DataFrame(arms["trials"]).groupby("arm", sort=False).first().reset_index()
    columns = ["mode", "encoder", "sampler", "loss", "augment", "synthetic", "n_real", "n_synthetic", "n_recoloured", "n_pseudo", "updates"]
    columns = [name for name in columns if name in table]
    alike = [name for name in columns if len(table) > 1 and table[name].nunique(dropna=False) == 1]
    table, same = table[["arm", *(name for name in columns if name not in alike)]], table[alike].head(1).to_dict("records")
    titles = {name: f"{name.removeprefix('n_')} tiles" for name in columns if name.startswith("n_")}
    shown = table.rename(columns=titles)
    return json.loads(shown.to_json(orient="records")), ", ".join(f"{titles.get(k, k)} {v or 'none'}" for k, v in (same or [{}])[0].items())


def run_rows(experiment, place, share):
    rows, seen, todo = [], set(), [place]
    while todo:
        folder = todo.pop()
        record = places.read(folder)
        if folder in seen or record is None:
            continue
        seen.add(folder)
        todo += [files.root() / name for request in record["parents"] for name in request["found"]]
        kept = {
            k: v
            for k, v in record["parameters"].items()
            if k not in ("experiment", "step", "recipe", "class_name", "seed", "dataset", "data_root")
        }
        row = {
            "step": record["step"],
            "class": record["class_name"],
            "seed": record["seed"],
            "finished": record["finished"][:16],
            "hash": record["outputs_sha256"][:12],
        }
        rows.append(row | ({} if share else {"settings": json.dumps(kept, ensure_ascii=False)}))
    return sorted(rows, key=lambda row: (row["finished"], row["step"], row["class"]))
