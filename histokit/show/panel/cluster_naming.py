"""A row for each cluster: its middle tiles and a field for a person's words; the button writes them, see `morphology.cluster_names`."""

import html

import numpy as np

from histokit.core import pictures
from histokit.morphology import cluster_names
from histokit.runs import places
from histokit.show.plots import FAINT

TILES, SIDE = 5, 72  # tiles of a row, and their side in px on screen


class ClusterNaming:
    """The fields, and the button; `widget` is what a live front end shows.

    Args:
        experiment: whose names these are.
        held: clusters.Clusters.
        shown: of `clusters.examples`. pixels: uint8 [n, H, W, 3], one for each row of it.
        called: {(class or ALL, cluster): words without a person}.
    """

    def __init__(self, experiment, held, shown, pixels, called):
        import ipywidgets as w

        self.experiment, self.held, self.called = experiment, held, called
        stands, rows, self.fields = self._standing(), [], {}
        for where, part in shown[shown["role"].eq("medoid")].groupby(["key", "cluster"], sort=False):
            key, k = where
            strip = pictures.png(
                pictures.image(np.concatenate(list(pixels[shown.index.get_indexer(part.index)][:TILES]), axis=1), TILES * SIDE)
            )
            text = w.Text(value=stands.get(where, ""), placeholder=called[where], layout=w.Layout(width="280px"), continuous_update=True)
            text.add_class("hk-cluster-name")
            label = f"{html.escape(key)} {k}" if key else f"{k}"
            words = w.HTML(f"<div style='width:130px'>{label}<br><span style='color:{FAINT}'>{part['tiles'].iloc[0]} tiles</span></div>")
            rows.append(w.HBox([words, w.Image(value=strip, format="png"), text], layout=w.Layout(align_items="center", margin="2px 0")))
            self.fields[key, int(k)] = text
        self.button = w.Button(description="Save names", icon="save", layout=w.Layout(width="auto"))
        self.button.add_class("hk-save-names")
        self.button.on_click(lambda _: self.save())
        self.said = w.HTML()
        self.widget = w.VBox([*rows, w.HBox([self.button, self.said])])
        self._say(f"Names go into {places.relative(cluster_names.file_of(experiment))}; `words: descriptors` puts them into captions.")

    def _standing(self):
        from histokit.morphology import clusters

        try:
            return cluster_names.standing(self.experiment, clusters.digest(self.held))
        except ValueError:
            return {}

    def save(self):
        """Write what the fields say; a sentence says what came of it, and nothing is written where one of them is refused."""
        stands = self._standing()
        told = {where: field.value.strip() for where, field in self.fields.items() if field.value.strip() != stands.get(where, "")}
        if not told:
            return self._say("Nothing has changed.")
        try:
            path = cluster_names.add(self.experiment, self.held, told)
        except (ValueError, OSError) as error:
            return self._say(f"Not saved: {error}")
        self._say(f"Saved {len(told)} in {places.relative(path)}; run this notebook again with `words: descriptors`.")

    def _say(self, text):
        self.said.value = f"<span style='color:{FAINT}'>{html.escape(text)}</span>"

    def show(self):
        """The fields where a live front end is, else one line of text."""
        from IPython.display import display

        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        words = f"{len(self.fields)} clusters to name: the fields appear here when the notebook runs in JupyterLab"
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": words}, raw=True)
