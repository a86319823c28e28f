"""The gallery of a selection: one page that needs nothing but a browser, or live in JupyterLab. Both are `gallery.js`."""

import base64
import json
from pathlib import Path

import jinja2

from histokit import data, deck, desk, files, places, provenance


def page(step, path, *, blind=False, seed=0):
    """Write the page of a finished selection, and its key; returns how many tiles it shows.

    Args:
        step: folder of a finished 05_select: of one class, or above those of all classes.
        path: HTML file.
        blind, seed: see `deck.deal`.
    """
    rows, runs = provenance.selection(step)
    experiment = places.read(runs[0])["experiment"]
    home = files.root() / "outputs" / experiment
    dataset = data.read_frozen(home / "00_dataset" / "dataset.json")
    rows, tiles = (data.located(table, dataset, home) for table in (rows, provenance.real_tiles(experiment)))
    shown = deck.deal(rows, tiles, dataset, blind=blind, seed=seed)
    deck.keep(shown, experiment)
    addresses = [f"data:image/jpeg;base64,{base64.b64encode(held).decode('ascii')}" for held in deck.thumbs(shown.pictures)]
    told = json.dumps(deck.given(shown) | {"pictures": addresses})
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
        desk.Desk(run.experiment, rows, tiles, dataset).show()
    else:
        print("There is no synthetic tile to look at.")
