"""Panels for a notebook: sliders around a function that draws. No science, no model, no file but the recipe of the button.

A panel draws once at its starting values, as a plain picture that any reader of the notebook shows, then answers the sliders
where a live front end is. Nothing is read back: the cells below go on with the parameters, the button writes for the next run.
"""

import contextlib
import html
import math
import threading
import time
from collections import namedtuple

from histokit import amend, files, pictures
from histokit.amend import apply

__all__ = ["apply", "tuner"]

STAGE, THUMB = 256, 104  # px on screen: source and preview, a rung of the ladder
Drawn = namedtuple("Drawn", "preview values seconds")
Rung = namedtuple("Rung", "image value true_steps")
Limits = namedtuple("Limits", "value low high step")


def tuner(previewer, run, *, ladder="strength", rungs=5, **sliders):
    """Shows one tile and what the settings make of it: a preview at fixed seed beside its source, sliders, a ladder, a button.

    Draws once when called, a preview and a ladder, also without a front end. The button writes the values of the sliders into the
    recipe of `run`, under `classes:`, this class and this step.

    Args:
        previewer: previewer(name=value, ...) for every slider returns an object with `images` (uint8 [n, H, W, 3]), `sources` (the
            tiles they were made from, or None), `true_steps` and `jobs` (DataFrame of n rows: tile_id, prompt). For the ladder,
            previewer.ladder([value], job=index label, name=value, ...) returns images [1, H, W, 3] of one job, cheaply, and
            previewer.steps(name=value, ...), if there, their step count. ValueError means that these settings draw nothing.
        run: gives recipe (path, or "" for none), class_name and step.
        ladder: slider over which the ladder goes; "" for none, as always where there are no sources.
        rungs: previews in the ladder.
        sliders: name=(value, min, max, step). A value outside its range widens the range.
    """
    panel = Tuner(previewer, run, {name: Limits(*given) for name, given in sliders.items()}, ladder, rungs)
    panel.show()


class Tuner:
    """The panel of `tuner`. `picture()` is the plain figure, `widget` what a live front end shows."""

    def __init__(self, previewer, run, sliders, ladder="strength", rungs=5):
        if ladder and ladder not in sliders:
            raise ValueError(f"the ladder goes over {ladder!r}, which is no slider; there is: {', '.join(sliders) or 'none'}")
        self.previewer, self.run, self.rungs = previewer, run, rungs
        self.limits = {name: _widened(name, limits) for name, limits in sliders.items()}
        self.values, self.tile = {name: _typed(limits, limits.value) for name, limits in self.limits.items()}, 0
        self.start = self.drawn = self._draw()
        self.names = [str(name) or "no source" for name in self.drawn.preview.jobs["tile_id"]]
        self.over = ladder if self.start.preview.sources is not None else ""  # without a source there is nothing to climb away from
        self.climbed = self.rungs_at_start = self._draw_ladder() if self.over else None
        self.known = self._in_recipe()
        self.lock = threading.Lock()  # one drawing at a time: the model behind the previewer is one
        self._build()

    # ---- drawing

    def _draw(self):
        began, values = time.perf_counter(), dict(self.values)
        return Drawn(self.previewer(**values), values, time.perf_counter() - began)

    def _draw_ladder(self):
        """Rungs over the ladder's slider, the other values and the tile as they are; what cannot be drawn is left out."""
        low, high, step = self.limits[self.over][1:]
        others = {name: value for name, value in self.values.items() if name != self.over}
        job, count = int(self.drawn.preview.jobs.index[self.tile]), getattr(self.previewer, "steps", None)
        rungs = []
        for share in range(1, self.rungs + 1):
            value = _rounded(low + (high - low) * share / self.rungs, low, step)
            with contextlib.suppress(ValueError):
                image = self.previewer.ladder([value], job=job, **others)[0]
                rungs.append(Rung(image, value, _steps(count(**others, **{self.over: value})) if count else ""))
        return {"rungs": rungs, "others": others, "tile": self.tile}

    def picture(self):
        """PNG bytes of source, preview and ladder at the starting values, and the width in px it is meant for."""
        first = self.start.preview
        value = self.start.values.get(self.over)
        shown = [Rung(first.images[0], value, _steps(first.true_steps))]
        if self.over:
            shown += [rung for rung in self.rungs_at_start["rungs"] if rung.value != value]
            shown.sort(key=lambda rung: rung.value)
        tiles = [] if first.sources is None else [(first.sources[0], "source", pictures.short(self.names[0], 18), False)]
        for rung in shown:
            name = self._say({self.over: rung.value}) if self.over else "preview"
            tiles.append((rung.image, name, rung.true_steps, rung.value == value))
        return pictures.strip(tiles, f"{self._class()}: {self._say(self.start.values)}")

    def _say(self, values):
        """Such as "strength 0.35, guidance scale 2.0", with the decimals of each slider."""
        return ", ".join(f"{_words(name)} {value:.{_decimals(self.limits[name].step)}f}" for name, value in values.items())

    def _class(self):
        return "every class" if self.run.class_name in ("", "all") else self.run.class_name

    # ---- the recipe

    def _target(self):
        return files.root() / self.run.recipe

    def _in_recipe(self):
        """What the recipe says now, None when it cannot be read."""
        try:
            return amend.current(self._target(), self.run.class_name, self.run.step) if self.run.recipe else None
        except (ValueError, OSError):
            return None

    def _cannot_write(self):
        if not self.run.recipe:
            return (
                "No recipe",
                "This notebook was opened by hand, without a recipe to write into; `histokit open RECIPE STEP` gives it one.",
            )
        if self.run.class_name in ("", "all"):
            return "One run for all classes", f"The values of this run belong to the step {self.run.step} in {self.run.recipe}."
        return None

    def write(self):
        """Writes the values into the recipe; returns a sentence and the difference as text, and raises nothing."""
        name, step, values = self.run.class_name, self.run.step, self.drawn.values
        if values != self.values:
            return f"Nothing was written: there is no picture of {self._say(self.values)}.", ""
        try:
            difference = amend.apply(self._target(), name, step, values, expected=self.known)
        except amend.RecipeChanged as error:
            self.known = self._in_recipe()
            return f"{_first(error)}. Press again to write {self._say(values)} instead.", ""
        except OSError as error:
            reason = f"{self.run.recipe}: {error.strerror}" if error.strerror else str(error)
            said = "" if "nothing was written" in reason else "; nothing was written"
            return f"{reason}{said}. To add by hand:", amend.lines(name, step, values)
        except ValueError as error:
            return str(error), ""
        self.known = self._in_recipe()
        if not difference:
            return f"{self.run.recipe} says so already: {self._say(values)} for {name}.", ""
        began = self._say(self.start.values)
        return f"Written into {self.run.recipe} for the next headless run. This notebook goes on with {began}.", difference

    # ---- the live panel

    def _build(self):
        import ipywidgets as w

        wide, beside = w.Layout(width="330px"), {"description_width": "100px"}
        self.sliders = {}
        for name, (value, low, high, step) in self.limits.items():
            self.sliders[name] = w.FloatSlider(
                value=value, min=low, max=high, step=step, description=_words(name), continuous_update=False, layout=wide,
                readout_format=f".{_decimals(step)}f", style=beside,
            )  # fmt: skip
        options = [(f"{i + 1} of {len(self.names)}: {pictures.short(name, 22)}", i) for i, name in enumerate(self.names)]
        self.chooser = w.Dropdown(options=options, description="source tile", layout=wide, style=beside)
        refused = self._cannot_write()
        self.button = w.Button(
            description=refused[0] if refused else "Write into recipe", disabled=bool(refused), button_style="primary",
            icon="" if refused else "pencil", layout=w.Layout(width="auto", margin="10px 0 0 104px"),
        )  # fmt: skip
        self.again = w.Button(description="Draw ladder again", icon="refresh", layout=w.Layout(width="auto", margin="0 0 0 12px"))
        where = refused[1] if refused else f"{self.run.recipe}, classes: {self.run.class_name}: {self.run.step}"
        self.head, self.left, self.right, self.row, self.title, self.said = (w.HTML() for _ in range(6))
        self.status = w.HTML(_line("The sliders answer while the kernel of this notebook runs."))

        one = [self.chooser] if len(self.names) > 1 else []
        rows = [self.head, *one, *self.sliders.values(), self.status, self.button, w.HTML(_line(where))]
        controls = w.VBox(rows, layout=w.Layout(width="350px"))
        pair = w.HBox([self.left, self.right] if self.start.preview.sources is not None else [self.right])
        boxes = [w.HTML(STYLE), w.HBox([pair, controls], layout=w.Layout(flex_flow="row wrap")), self.said]
        if self.over:
            boxes += [w.HBox([self.title, self.again], layout=w.Layout(align_items="center", margin="10px 0 0 0")), self.row]
        self.widget = w.VBox(boxes)
        self.widget.add_class("hk-tuner")
        self.widget._view_count = 0  # a front end counts up when it shows the panel

        for slider in self.sliders.values():
            slider.observe(self._moved, "value")
        self.chooser.observe(self._chosen, "value")
        self.again.on_click(self._climb)
        self.button.on_click(self._pressed)
        self.widget.observe(self._seen, "_view_count")

    def show(self):
        """Displays the plain picture, then the panel without its pictures: those follow once a front end shows it."""
        from IPython.display import display

        image, width = self.picture()
        text = f"{self._class()}: {self._say(self.start.values)}, {_steps(self.start.preview.true_steps)}"
        bundle = {"image/png": pictures.base64(image), "text/plain": text}
        self.plain = display(bundle, raw=True, metadata={"image/png": {"width": width}}, display_id=True)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        display(
            {"application/vnd.jupyter.widget-view+json": view, "text/plain": "sliders appear here when the notebook runs in JupyterLab"},
            raw=True,
        )

    def _seen(self, change):
        """Called when a live front end shows the panel: it takes the place of the plain picture, which folds away."""
        if not change["new"] or self.left.value or self.right.value:
            return
        self.head.value = f"<div class='hk-head'>{html.escape(self._class())}</div>"
        self._refresh_ladder()
        if self.plain is not None:
            image, width = self.picture()
            data = pictures.base64(image)
            began = html.escape(f"{self._class()} at the start: {self._say(self.start.values)}")
            folded = f"<details><summary>{began}</summary><img width='{width}' src='data:image/png;base64,{data}'></details>"
            self.plain.update({"text/html": folded, "image/png": data, "text/plain": began}, raw=True)

    def _moved(self, _):
        self.values = {name: _typed(self.limits[name], slider.value) for name, slider in self.sliders.items()}
        self._working(lambda: setattr(self, "drawn", self._draw()), self._refresh)

    def _chosen(self, change):
        self.tile = change["new"] or 0
        self._refresh()

    def _climb(self, _):
        self._working(lambda: setattr(self, "climbed", self._draw_ladder()), self._refresh_ladder)

    def _working(self, work, then):
        """Draws with the old picture dimmed; what goes wrong is said in the panel and the old picture stays."""
        with self.lock:
            self.widget.add_class("hk-busy")
            self.status.value = _line("drawing ...")
            try:
                work()
                then()
            except Exception as error:  # a panel has no cell to show a traceback in
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                self.status.value = _line(f"Nothing drawn for {self._say(self.values)}. {kind}{error}", "hk-bad")
            finally:
                self.widget.remove_class("hk-busy")

    def _pressed(self, _):
        sentence, text = self.write()
        rows = [row for row in text.splitlines() if row[:3] not in ("---", "+++") and row[:2] != "@@"]
        body = "\n".join(f"<span class='{DIFF.get(row[:1], '')}'>{html.escape(row)}</span>" for row in rows)
        self.said.value = _line(sentence, "hk-said") + (f"<pre class='hk-diff'>{body}</pre>" if text else "")

    def _refresh(self):
        preview, values, seconds = self.drawn
        if preview.sources is not None:
            self.left.value = pictures.figure(preview.sources[self.tile], "source", self.names[self.tile], STAGE)
        self.right.value = pictures.figure(preview.images[self.tile], "preview", self._say(values), STAGE, "hk-preview")
        prompt = f"\n{preview.jobs['prompt'].iloc[self.tile]}" if "prompt" in preview.jobs else ""
        self.status.value = _line(f"{_steps(preview.true_steps)}, {seconds:.1f} s{prompt}")
        self._refresh_title()

    def _refresh_ladder(self):
        if self.over:
            rungs = ((rung.image, self._say({self.over: rung.value}), rung.true_steps, THUMB) for rung in self.climbed["rungs"])
            self.row.value = f"<div class='hk-row'>{''.join(pictures.figure(*rung) for rung in rungs)}</div>"
        self._refresh()

    def _refresh_title(self):
        """Says with which other values the ladder was drawn, and whether those are still the sliders'."""
        if not self.over:
            return
        others, tile = self.climbed["others"], self.climbed["tile"]
        stale = tile != self.tile or any(self.values[name] != value for name, value in others.items())
        said = ", ".join(filter(None, (self._say(others), f"source {tile + 1}" if len(self.names) > 1 else "")))
        text = f"<b>{html.escape(_words(self.over).capitalize())}</b>{html.escape(f' at {said}' if said else '')}"
        self.title.value = f"<div class='{'hk-faint' if stale else ''}'>{text}{', before the last change' if stale else ''}</div>"


# ---- small parts


def _widened(name, limits):
    """Numbers checked, and the range stretched to hold the value, which a slider would otherwise move without a word."""
    value, low, high, step = limits
    if not (all(map(math.isfinite, limits)) and low < high and step > 0):
        raise ValueError(f"{name} takes (value, min, max, step) with min < max and step > 0, got {tuple(limits)}")
    return Limits(value, min(low, value), max(high, value), step)


def _typed(limits, value):
    """A slider's value as its parameter wants it: a whole number where value, ends and step are whole numbers."""
    return round(value) if all(isinstance(part, int) for part in limits) else round(float(value), 6)


def _rounded(value, low, step):
    """`value` on the slider's grid, without the dust of floats."""
    return round(low + round((value - low) / step) * step, 10)


def _decimals(step):
    return min((n for n in range(6) if math.isclose(step * 10**n, round(step * 10**n), abs_tol=1e-9)), default=6)


def _words(name):
    return name.replace("_", " ")


def _first(error):
    return str(error).partition("\n")[0]


def _steps(count):
    return f"{count} step" if count == 1 else f"{count} steps"


def _line(text, kind="hk-faint"):
    return f"<div class='hk-line {kind}'>{html.escape(text)}</div>"


DIFF = {"+": "hk-plus", "-": "hk-minus"}
STYLE = """<style>
.hk-tuner { padding: 6px 4px; }
.hk-tuner .hk-figure { margin: 0 14px 0 0; font-size: 12px; line-height: 1.4; overflow-wrap: anywhere; }
.hk-tuner .hk-figure img { display: block; border-radius: 3px; margin-bottom: 4px; }
.hk-tuner .hk-preview img { outline: 3px solid #d98a29; outline-offset: -1px; transition: opacity .15s; }
.hk-tuner.hk-busy .hk-preview img { opacity: .45; }
.hk-tuner .hk-row { display: flex; flex-wrap: wrap; }
.hk-tuner .hk-head { font-size: 16px; font-weight: 600; margin: 0 0 6px 4px; overflow-wrap: anywhere; line-height: 1.3; }
.hk-tuner .hk-line { line-height: 1.4; margin-left: 104px; overflow-wrap: anywhere; white-space: pre-wrap; }
.hk-tuner .hk-line.hk-said { margin: 6px 0 0 0; }
.hk-tuner .hk-faint { color: var(--jp-ui-font-color2, #666); }
.hk-tuner .hk-bad { color: var(--jp-error-color1, #b03030); }
.hk-tuner .hk-diff { font-size: 12px; line-height: 1.5; padding: 6px 8px; margin: 4px 0; white-space: pre-wrap;
  background: var(--jp-layout-color2, #f3f3f3); border-radius: 3px; }
.hk-tuner .hk-plus { color: var(--jp-success-color1, #2a7a2a); }
.hk-tuner .hk-minus { color: var(--jp-error-color1, #b03030); }
</style>"""
