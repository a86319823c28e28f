"""The gallery of a selection: one page that needs nothing but a browser, or live in JupyterLab. Both are `gallery.js`.

The browser holds the pictures, the order and the verdicts, so a key acts at once whatever the kernel does. In JupyterLab it sends one
message at a time with all that was decided since the last one and says "saved" once that is answered. Verdicts go into the reviews;
those of blind mode, which answer another question, beside the key of the tiles that were dealt, where `histokit import-verdicts` takes
them from.
"""

import base64
import io
import json
from pathlib import Path

import jinja2
from PIL import Image

from histokit.core import files
from histokit.runs import places, provenance
from histokit.select import rater_agreement, review_set, reviews
from histokit.tiles import data

AT_ONCE = 40  # pictures in one message


def page(step, path, *, blind=False, seed=0):
    """Write the page of a finished selection, and its key; returns how many tiles it shows.

    Args:
        step: folder of a finished 05_select: of one class, or above those of all classes.
        path: HTML file.
        blind, seed: see `review_set.deal`.
    """
    rows, runs = provenance.selection(step)
    experiment = places.read(runs[0])["experiment"]
    home = files.root() / "outputs" / experiment
    dataset = data.read_frozen(home / "00_dataset" / "dataset.json")
    rows, tiles = (data.located(table, dataset, home) for table in (rows, provenance.real_tiles(experiment)))
    shown = review_set.deal(rows, tiles, dataset, blind=blind, seed=seed)
    review_set.keep(shown, experiment)
    addresses = [f"data:image/jpeg;base64,{base64.b64encode(held).decode('ascii')}" for held in review_set.thumbs(shown.pictures)]
    told = json.dumps(review_set.given(shown) | {"pictures": addresses})
    template, style, script = ((Path(__file__).parent / f"gallery.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    text = (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            title=f"{dataset.name}: {len(shown.cards)} tiles",
            style=style,
            script=script,
            given=told.replace("<", "\\u003c").replace("&", "\\u0026"),  # a class name that looks like HTML stays text
        )
    )
    files.write_text(path, text)
    return len(shown.cards)


def show(run, manifest, tiles, dataset):
    """The gallery in JupyterLab, over the tiles of a selection that need not be finished; each verdict is written down at once.

    Without a live front end it is one line of text; pictures and scores go to the browser when it asks and never into the notebook.

    Args:
        run: gives the experiment.
        manifest: of `screening.screen`.
        tiles: manifest of 00_dataset.
        dataset: its Dataset.
    """
    rows = manifest[manifest["source"].eq("synthetic")]
    if len(rows):
        LiveGallery(run.experiment, rows, tiles, dataset).show()
    else:
        print("There is no synthetic tile to look at.")


class LiveGallery:
    """The kernel's half of the gallery in JupyterLab: `hear` is called with each message of a browser; see `show`."""

    def __init__(self, experiment, rows, tiles, dataset):
        self.experiment, self.data, self.decks = experiment, (rows, tiles, dataset), {}
        self.count = len(rows)

    def show(self):
        import anywidget
        from IPython.display import display

        script, style = ((Path(__file__).parent / f"gallery.{kind}").read_text("utf-8") for kind in ("js", "css"))
        self.widget = type("Gallery", (anywidget.AnyWidget,), {"_esm": script, "_css": style})()
        self.widget.on_msg(self.hear)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        said = f"{self.count} tiles to look at: the gallery appears here when the notebook runs in JupyterLab"
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": said}, raw=True)

    def hear(self, widget, asked, buffers):
        """Answers one message {ask, view, key, ...} to the view that sent it; what cannot be done is said there."""
        answers = {"open": self._open, "pictures": self._pictures, "full": self._full, "save": self._save, "score": self._score}
        told = {"tell": asked.get("ask"), "view": asked.get("view"), "key": asked.get("key")}
        try:
            answer, pictures = answers[asked["ask"]](asked)
        except (OSError, ValueError, KeyError) as error:
            answer, pictures = {"refused": str(error)}, []
        widget.send(told | answer, pictures)

    def _dealt(self, blind):
        found = [one for one in self.decks.values() if one.blind == blind]
        if not found:
            rows, tiles, dataset = self.data
            found = [review_set.deal(rows, tiles, dataset, blind=blind)]
            self.decks[found[0].key] = found[0]
        return found[0]

    def _open(self, asked):
        own, dealt = self._dealt(False), self._dealt(bool(asked["blind"]))
        if dealt.blind:
            review_set.keep(dealt, self.experiment)
            verdicts, where = self._said(dealt.key, asked["rater"]), review_set.place(self.experiment, dealt.key).parent
        else:
            verdicts, where = self._reviewed(dealt), reviews.file_of(self.experiment)
        facts = {"desk": own.key, "where": places.relative(where)}  # one shelf in the browser's store for both
        return {"given": review_set.given(dealt) | facts, "verdicts": verdicts, "rater": asked.get("rater", "")}, []

    def _reviewed(self, dealt):
        stands, verdicts = reviews.standing(self.experiment), {}
        for card, one in zip(dealt.cards, dealt.truth, strict=True):
            if line := stands.get(one["sha256"]):
                told = {"verdict": line["verdict"], "rater": line["reviewer"], "note": line["note"]}
                verdicts[card["id"]] = told | {"reasons": _reasons(line["note"].split(", "))}
        return verdicts

    def _pictures(self, asked):
        first = int(asked["first"])
        return {"first": first}, review_set.thumbs(self.decks[asked["key"]].pictures.iloc[first : first + AT_ONCE])

    def _full(self, asked):
        """All pixels of one tile, at the dataset's size."""
        number, stream = int(asked["number"]), io.BytesIO()
        Image.fromarray(data.pixels(self.decks[asked["key"]].pictures.iloc[[number]])[0]).save(stream, format="PNG")
        return {"number": number}, [stream.getvalue()]

    def _save(self, asked):
        """Write rows {key, blind, id, verdict ("" where it was taken back), reasons, note (an earlier one that stands again), rater}."""
        lines, blind = [], {}
        for row in asked["rows"]:
            if row["blind"]:
                blind.setdefault((row["key"], row["rater"]), {})[row["id"]] = row
            else:
                sha = self.decks[row["key"]].truth[int(row["id"])]["sha256"]
                verdict, note = row["verdict"] or reviews.WITHDRAWN, row["note"] or ", ".join(_reasons(row["reasons"]))
                lines.append({"sha256": sha, "verdict": verdict, "reviewer": row["rater"], "note": note})
        if lines:
            reviews.add_reviews(self.experiment, lines)
        for (key, rater), rows in blind.items():
            held = sorted((self._said(key, rater) | rows).items())
            verdicts = [{"id": i, "verdict": row["verdict"], "reasons": []} for i, row in held if row["verdict"]]
            files.write_json(self._place(key, rater), {"gallery": key, "rater": rater, "verdicts": verdicts})
        return {}, []

    def _place(self, key, rater):
        return review_set.place(self.experiment, f"{key}-{files.slug(rater)}")

    def _said(self, key, rater):
        """{id: verdict} of one person in blind mode."""
        path = self._place(key, rater)
        return {one["id"]: one | {"rater": rater} for one in files.read_json(path)["verdicts"]} if path.is_file() else {}

    def _score(self, asked):
        """How well this person told real from made so far."""
        path = self._place(asked["key"], asked["rater"])
        said = rater_agreement.told(rater_agreement.read([path])) if path.is_file() else []
        return {"text": said[0] if said else "Nothing is decided yet."}, []


def _reasons(names):
    return [name for name in names if name in review_set.REASONS]
