"""One page for a person who was not there: question, data, verdict, cost, copies, and what was not checked.

Reads what a finished 07_evaluate and the steps before it wrote; measures nothing anew. The page holds its figures and needs no network.
`share` leaves out every real tile and gives cases and tiles names of the page's own.
"""

import base64
import io
import json
from pathlib import Path

import pandas as pd

from histokit.arms import comparison
from histokit.core import files
from histokit.evaluate import verdict
from histokit.fidelity import closest_pairs
from histokit.runs import places, provenance, reasons
from histokit.show import arm_plots, plots
from histokit.tiles import data

VERSION = 2
SHOWN = 12  # tiles of each kind, in the order of the table: nobody picks
REMOVED = [
    "Pictures of real tiles: those that changed, and the pairs of synthetic and training tile.",
    "Names of tiles, cases, patients, folders, machines and recipes; a case here has a number of this page's own.",
]


def build(experiment, step="07_evaluate", share=False):
    """The page as text.

    Args:
        experiment: folder below outputs/ that holds a finished `step`.
        share: for people who may not see patients' tiles or names.

    Raises:
        FileNotFoundError: `step` is not finished there.
    """
    import jinja2

    place = places.find(experiment, step, "")
    if place is None:
        raise FileNotFoundError(f"no finished {step} in outputs/{experiment}; run its recipe first")
    facts = _gather(experiment, place, share)
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text("utf-8"))
    return template.render(**facts)


def _gather(experiment, place, share):
    record, results = places.read(place), files.read_json(place / "results.json")
    dataset_place = places.find(experiment, "00_dataset", "")
    dataset = data.read_frozen(dataset_place / "dataset.json")
    ahead = files.read_json(dataset_place / "preflight.json") if (dataset_place / "preflight.json").is_file() else {}
    arms_place = _parent(record, lambda folder: next(folder.glob("*/*/model.json"), None))
    arms, specs = files.read_json(arms_place / "results.json"), places.read(arms_place)["parameters"]["arms"]
    judged, baseline = results["arm"], results["baseline"]
    tiles = data.located(provenance.real_tiles(experiment), dataset, files.root() / "outputs" / experiment)
    changes = files.read_table(place / "tiles.csv")
    if "main_arms" not in results:
        raise ValueError(f"{place} was written by an earlier version of histokit; run its recipe again, only {place.name} will be redone")
    rows, same = _arms(arms)
    title = dataset.name if share else f"{dataset.name}: {experiment}"
    return {
        "title": f"histokit report: {title}",
        "question": f"Does {judged} find the rare classes ({', '.join(dataset.tail) or 'none'}) more often than {baseline}?",
        "sentence": results["sentence"],
        "demo": results["demo"],
        "lines": list(results["classes"].values()),
        "classes": _classes(dataset),
        "dataset": _dataset(dataset, results["n"]),
        "preflight": ahead.get("warnings", []),
        "differences": _differences(results),
        "controls": results["controls"],
        "worth": [row["text"] for row in results["worth"]],
        "probe": _probe(results),
        "signs": [*results["signs_said"], *results.get("lpips", {}).get("lines", [])],
        "external": results["external"]["lines"],
        "stain": _stain(place, judged, baseline),
        "alarms": _alarms(results),
        "prevalence": f"{100 * results['alarms'][0]['prevalence']:g}" if results["alarms"] else "",
        "detection": results.get("detection", {}).get("lines", []),
        "changes": _changes(changes),
        "acceptance": _acceptance(record),
        "likeness": _likeness(results),
        "copies": _copies(results, share),
        "copies_said": _copies_said(results),
        "unchecked": list(_unchecked(results, dataset, arms, specs)),
        "removed": REMOVED if share else [],
        "arms": rows,
        "same": same,
        "interval": "Intervals: {method}; {B} resamples; unit: {unit}.".format(**results["interval"]),
        "runs": _runs(experiment, place, share),
        "figures": _figures(place, record, results, dataset, tiles, changes, specs, share),
    }  # fmt: skip


def _parent(record, wanted):
    folders = [files.root() / name for request in record["parents"] for name in request["found"]]
    return next(folder for folder in folders if wanted(folder))


def _classes(dataset):
    rows = []
    for name in dataset.classes:
        held = dataset.counts.get(name, {})
        shown = {part: "{tiles} / {cases}".format(**held[part]) if part in held else "none" for part in ("train", "val", "test")}
        rows.append({"class": name, "role": "rare" if name in dataset.tail else "common", **shown})
    return rows


def _dataset(dataset, n):
    cases = f"{n['cases']} cases" if n["cases"] else "no case ids: a tile counts as its own case, and intervals are too narrow"
    scale = f"{dataset.mpp} um per pixel" if dataset.mpp else "pixel size unknown"
    return (
        f"{dataset.tile_px} px tiles, {scale}. Test: {n['tiles']} tiles, {cases}. Licence of the data: {dataset.licence or 'not stated'}."
    )


def _points(value, low=None, high=None):
    if value is None:
        return ""
    return f"{100 * value:+.1f}" + (f" [{100 * low:+.1f} to {100 * high:+.1f}]" if low is not None else "")


def _differences(results):
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


def _alarms(results):
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


def _changes(changes):
    counted = (
        changes[changes["change"].fillna("").ne("")]
        .groupby(["change", "label"])
        .agg(tiles=("tile_id", "size"), cases=("case_id", "nunique"))
    )
    return [
        {"change": change, "class": label, "tiles": int(row.tiles), "cases": int(row.cases)} for (change, label), row in counted.iterrows()
    ]


def _acceptance(record):
    rows = []
    for name in {name for request in record["parents"] for name in request["found"]}:
        place = files.root() / name
        held = files.read_json(place / "results.json") if (place / "results.json").is_file() else {}
        if isinstance(held, dict) and "acceptance" in held:
            label = places.read(place)["class_name"] or "all"
            shown = [row | {"class": label, "why": reasons.caption(row["why"])} for row in held["acceptance"]]
            rows += [{name: row[name] for name in ("class", "status", "why", "tiles")} for row in shown]
    return sorted(rows, key=lambda row: (row["class"], row["status"]))


def _likeness(results):
    rows = []
    for row in results["likeness"]:
        kid = "" if row["kid_at_n"] is None else f"{1000 * row['kid_at_n']:.0f}, real {1000 * row['floor']:.0f}, {row['n']:.0f} a side"
        n = f"{row['synthetic']} synthetic, {row['real']} real"
        rows.append({"class": row["class"], "encoder": row["encoder"], "tiles": n, "KID x 1000": kid, "reading": row["reading"]})
    return rows


def _probe(results):
    return [
        {"class": row["class"], "encoder": row["encoder"], "AUROC": f"{row['auroc']:.2f}"}
        for row in results["probe"]
        if row["auroc"] is not None
    ]


def _stain(place, judged, baseline):
    table = files.read_table(place / "stain_range.csv")
    return [
        {"cases stained": row["group"], "tiles / cases": f"{row['tiles']:.0f} / {row['cases']:.0f}", baseline: _share(row[baseline])}
        | {judged: _share(row[judged])}
        for row in table.to_dict("records")
        if row["group"] in ("inside", "outside")
    ]


def _share(value):
    return f"{100 * value:.1f} %"


def _copies(results, share):
    rows = []
    for row in results["copies"]["rows"]:
        if row["cut"] is None:
            rows.append({"class": row["class"], "space": row["space"], "copies": "not calibrated", "excess": "", "most copied": ""})
            continue
        most = f"{row['most_copied_times']:.0f} times" + ("" if share else f" {row['most_copied']}") if row["copies"] else ""
        by = " by the ratio test" if row.get("test") == "ratio" else ""
        copied = f"{row['copies']:.0f} of {row['synthetic']}{by}, {100 * row['expected']:.1f} % expected"
        excess = _points(row["excess"], row["low"], row["high"])
        rows.append({"class": row["class"], "space": row["space"], "copies": copied, "excess": excess, "most copied": most})
    return rows


def _copies_said(results):
    for name, gate in results["copies"]["gates"].items():
        why = f": {'; '.join(gate['reasons'])}" if gate["reasons"] else ""
        said = {"pass": "may be exported", "blocked": "may not be exported", "uncalibrated": "may be exported only on somebody's word"}
        yield f"{name}: {gate['state']}, {said[gate['state']]}{why}."
    yield from results.get("membership", {}).get("lines", [])


def _unchecked(results, dataset, arms, specs):
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
    if not any((spec or {}).get("labels") == "shuffled" for spec in specs.values()):
        yield "No arm with wrong labels, which must not help, was among them."
    if results.get("looks", {}).get("opened_before"):
        looks = results["looks"]
        times = f"{looks['opened_before']} time{'s' * (looks['opened_before'] != 1)}"
        yield f"These test tiles had been opened {times} before, with {len(looks['plans'])} plans: not untouched."
    there = results["external"]["lines"]
    yield "Other scanners, laboratories and hospitals than those in the data" + (" and in the external tiles." if there else ".")


def _arms(arms):
    """(rows, what is the same in all of them)."""
    table = pd.DataFrame(arms["trials"]).groupby("arm", sort=False).first().reset_index()
    columns = ["mode", "encoder", "sampler", "loss", "augment", "synthetic", "n_real", "n_synthetic", "n_recoloured", "updates"]
    alike = [name for name in columns if len(table) > 1 and table[name].nunique(dropna=False) == 1]
    table, same = table[["arm", *(name for name in columns if name not in alike)]], table[alike].head(1).to_dict("records")
    titles = {name: f"{name.removeprefix('n_')} tiles" for name in columns if name.startswith("n_")}
    shown = table.rename(columns=titles)
    return json.loads(shown.to_json(orient="records")), ", ".join(f"{titles.get(k, k)} {v or 'none'}" for k, v in (same or [{}])[0].items())


def _runs(experiment, place, share):
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


def _closest(place, record, dataset, tiles):
    """The closest pairs of 07 with the rows of their synthetic and training tiles; None where there are none, or files are gone."""
    pairs = files.read_table(place / "closest_pairs.csv") if (place / "closest_pairs.csv").is_file() else []
    if not len(pairs):
        return None
    tables = []
    for name in {name for request in record["parents"] for name in request["found"]}:
        if path := provenance.manifest(files.root() / name):
            tables.append(files.read_table(path))
    made = pd.concat([table[table["source"].eq("synthetic")] for table in tables]).drop_duplicates("tile_id", ignore_index=True)
    made = data.located(made, dataset, files.root() / "outputs" / record["experiment"]).set_index("tile_id", drop=False)
    left, right = made.reindex(pairs["tile_id"]), tiles.set_index("tile_id", drop=False).reindex(pairs["nearest"])
    there = left["path"].notna().all() and right["path"].notna().all()
    return (pairs, left, right) if there and all(Path(path).is_file() for path in [*left["path"], *right["path"]]) else None


def _figures(place, record, results, dataset, tiles, changes, specs, share):
    import matplotlib.pyplot as plt

    found, arms = {}, list(results["arms"])

    def keep(name):
        held = io.BytesIO()
        plt.gcf().savefig(held, format="png", dpi=130, bbox_inches="tight")
        plt.close("all")
        found[name] = base64.b64encode(held.getvalue()).decode()

    with plt.ioff():
        table, main = files.read_table(place / "differences.csv"), results["main_arms"]
        arm_plots.forest(table[table["arm"].isin(main)], dataset.roles, arms)
        keep("forest")
        if len(arms) > len(main):
            arm_plots.arm_differences(table, verdict.TAIL, comparison.described(specs, results["baseline"]))
            keep("arms")
        points = files.read_table(place / "tile_curves.csv")
        if len(points):
            arm_plots.tile_curves(points)
            keep("curves")
        table = files.read_table(place / "confusion.csv")
        pair = {
            arm: table[table["arm"].eq(arm)]
            .pivot(index="true", columns="called", values="share")
            .loc[dataset.classes, dataset.classes]
            .to_numpy()
            for arm in (results["baseline"], results["arm"])
        }
        arm_plots.confusions(pair, dataset.classes)
        keep("confusion")
        one, other = pair.values()
        arm_plots.confusion_difference(
            other - one, dataset.classes, f"{results['arm']} minus {results['baseline']}, points of each true class"
        )
        keep("moved")
        if share:
            return found
        kinds = {"missed": "still missed", "flagged": "newly flagged", "found": "newly found", "lost": "lost"}
        for name, change in kinds.items():
            rows = changes[changes["change"].eq(change)].head(SHOWN)
            pictures = tiles.set_index("tile_id", drop=False).loc[rows["tile_id"]]
            if len(rows) and all(Path(path).is_file() for path in pictures["path"]):
                title = f"{change}: {len(rows)} of {changes['change'].eq(change).sum()}, in the order of their names"
                plots.image_grid(data.pixels(pictures, dataset.tile_px), title, list(rows["label"]), cols=6)
                keep(name)
        if found_pairs := _closest(place, record, dataset, tiles):
            pairs, left, right = found_pairs
            shown = data.pixels(left, dataset.tile_px), data.pixels(right)
            plots.pairs(*shown, closest_pairs.captions(pairs), "The closest pairs: synthetic | training tile")
            keep("pairs")
    return found
