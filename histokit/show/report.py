"""One page for a person who was not there: question, data, verdict, cost, copies, and what was not checked.

Reads what a finished 07_evaluate, the 08_fidelity it names and the steps before them wrote; measures nothing anew. The page holds its
figures and needs no network. `share` leaves out every real tile and gives cases and tiles names of the page's own.
"""

import base64
import io
from pathlib import Path

import pandas as pd

from histokit.arms import comparison
from histokit.core import files
from histokit.evaluate import verdict
from histokit.fidelity import closest_pairs
from histokit.runs import places, provenance
from histokit.show import arm_plots, plots, report_tables
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
    if "fidelity" not in results:
        raise ValueError(f"{place} was written by an earlier version of histokit; run its recipe again, only {place.name} will be redone")
    looked = places.find(experiment, results["fidelity"]["step"], "") if results["fidelity"]["step"] else None
    seen = files.read_json(looked / "results.json") if looked else {}
    rows, same = report_tables.arm_rows(arms)
    title = dataset.name if share else f"{dataset.name}: {experiment}"
    return {
        "title": f"histokit report: {title}",
        "question": f"Does {judged} find the rare classes ({', '.join(dataset.tail) or 'none'}) more often than {baseline}?",
        "sentence": results["sentence"],
        "demo": results["demo"],
        "lines": list(results["classes"].values()),
        "classes": report_tables.class_rows(dataset),
        "dataset": report_tables.dataset_sentence(dataset, results["n"]),
        "budget": report_tables.rare_on_purpose(tiles),
        "preflight": ahead.get("warnings", []),
        "differences": report_tables.difference_rows(results),
        "controls": results["controls"],
        "worth": [row["text"] for row in results["worth"]],
        "probe": report_tables.probe_rows(seen),
        "signs": [*seen.get("signs_said", []), *(line for part in ("lpips", "structures") for line in seen.get(part, {}).get("lines", []))],
        "external": results["external"]["lines"],
        "stain": report_tables.stain_rows(place, judged, baseline),
        "alarms": report_tables.alarm_rows(results),
        "prevalence": f"{100 * results['alarms'][0]['prevalence']:g}" if results["alarms"] else "",
        "detection": results.get("detection", {}).get("lines", []),
        "changes": report_tables.change_rows(changes),
        "acceptance": report_tables.acceptance_rows(record),
        "likeness": report_tables.likeness_rows(seen),
        "copies": report_tables.copy_rows(seen, share),
        "copies_said": report_tables.copy_sentences(seen),
        "unchecked": list(report_tables.unchecked_sentences(results, dataset, arms, specs)),
        "removed": REMOVED if share else [],
        "arms": rows,
        "same": same,
        "interval": "Intervals: {method}; {B} resamples; unit: {unit}.".format(**results["interval"]),
        "runs": report_tables.run_rows(experiment, place, share),
        "figures": _figures(place, looked, results, dataset, tiles, changes, specs, share),
    }  # fmt: skip


def _parent(record, wanted):
    folders = [files.root() / name for request in record["parents"] for name in request["found"]]
    return next(folder for folder in folders if wanted(folder))


def _closest(looked, dataset, tiles):
    """The closest pairs of 08 with the rows of their synthetic and training tiles; None where there are none, or files are gone."""
    pairs = files.read_table(looked / "closest_pairs.csv") if looked else []
    if not len(pairs):
        return None
    tables, record = [], places.read(looked)
    for name in {name for request in record["parents"] for name in request["found"]}:
        if path := provenance.manifest(files.root() / name):
            tables.append(files.read_table(path))
    made = pd.concat([table[table["source"].eq("synthetic")] for table in tables]).drop_duplicates("tile_id", ignore_index=True)
    made = data.located(made, dataset, files.root() / "outputs" / record["experiment"]).set_index("tile_id", drop=False)
    left, right = made.reindex(pairs["tile_id"]), tiles.set_index("tile_id", drop=False).reindex(pairs["nearest"])
    there = left["path"].notna().all() and right["path"].notna().all()
    return (pairs, left, right) if there and all(Path(path).is_file() for path in [*left["path"], *right["path"]]) else None


def _figures(place, looked, results, dataset, tiles, changes, specs, share):
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
        if found_pairs := _closest(looked, dataset, tiles):
            pairs, left, right = found_pairs
            shown = data.pixels(left, dataset.tile_px), data.pixels(right)
            plots.pairs(*shown, closest_pairs.captions(pairs), "The closest pairs: synthetic | training tile")
            keep("pairs")
    return found
