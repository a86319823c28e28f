"""The panel of `widgets.tuner`: a preview that follows its sliders and never blocks, rungs to jump to, a button for the recipe.

Callbacks only ask the `studio`, whose one thread draws. A picture that was drawn before comes at once; else the old one dims, steps are
counted, every third one shows a draft, and Cancel ends it at the next step. Idle time fills the ladder, cheapest rung first.
"""

import html
import time
from collections import namedtuple
from pathlib import Path

import numpy as np

from histokit import pen, pictures, studio

STAGE, THUMB, PINS = 256, 104, 4  # px on screen: source and preview, a rung; settings that can be pinned
Drawn = namedtuple("Drawn", "preview values seconds")
Rung = namedtuple("Rung", "image values true_steps")


class Tuner:
    """`picture()` is the plain figure, `widget` what a live front end shows.

    Args:
        previewer, run, rungs: see `widgets.tuner`.
        sliders: {name: widgets.Limits}, checked.
        ladder: slider over which the ladder goes, "" for none; `across`: slider of its rows, "" for one row.
        patience: of the studio.
    """

    def __init__(self, previewer, run, sliders, ladder="strength", across="", rungs=5, patience=studio.PATIENCE):
        self.previewer, self.run, self.rungs, self.limits = previewer, run, rungs, sliders
        self.values, self.tile = {name: _typed(limits, limits.value) for name, limits in sliders.items()}, 0
        began = time.perf_counter()
        self.start = self.drawn = Drawn(previewer(**self.values), dict(self.values), time.perf_counter() - began)
        self.names = [str(name) or "no source" for name in self.drawn.preview.jobs["tile_id"]]
        self.over = ladder if self.start.preview.sources is not None else ""  # without a source there is nothing to climb away from
        self.across = across if self.over and across != ladder else ""
        self.climbed, self.pinned, self.asked = {}, [], None
        for values in self._ladder(self.values)[: self.rungs] if self.over else []:
            self._climb(values)
        self.rungs_at_start = list(self.climbed.values())
        self.pen = pen.Pen(run, self._say)
        self.studio = studio.Studio(patience)
        self._build()

    # ---- drawing

    def _ladder(self, values):
        """The settings of all rungs [dict], the row of `values` first, in each row the cheapest first."""
        steps = [share / self.rungs for share in range(1, self.rungs + 1)]
        columns = [_on_grid(self.limits[self.over], share) for share in steps]
        rows = [values[self.across]] if self.across else [None]
        if self.across:
            low, high = self.limits[self.across][1:3]
            start = values[self.across]
            others = [_rounded(self.limits[self.across], (start + end) / 2) for end in (low, high)]
            rows += [value for value in dict.fromkeys(others) if value != start]
        fixed = {name: value for name, value in values.items() if name not in (self.over, self.across)}
        row_of = lambda row: {self.across: row} if self.across else {}  # noqa: E731
        return [{**fixed, **row_of(row), self.over: column} for row in rows for column in columns]

    def _climb(self, values, on_step=None, tile=None):
        """Draw one rung; what cannot be drawn is left out."""
        tile = self.tile if tile is None else tile
        job, count = int(self.drawn.preview.jobs.index[tile]), getattr(self.previewer, "steps", None)
        others = {name: value for name, value in values.items() if name != self.over}
        try:
            image = self.previewer.ladder([values[self.over]], job=job, on_step=on_step, **others)[0]
        except ValueError:
            return None
        rung = Rung(image, values, _steps(count(**values)) if count else "")
        self.climbed[tile, tuple(sorted(values.items()))] = rung
        return rung

    def _rung(self, values):
        return self.climbed.get((self.tile, tuple(sorted(values.items()))))

    def picture(self):
        """PNG bytes of source, preview and ladder at the starting values, and the width in px it is meant for."""
        first = self.start.preview
        value = self.start.values.get(self.over)
        shown = [(first.images[0], value, _steps(first.true_steps))]
        if self.over:
            shown += [(r.image, r.values[self.over], r.true_steps) for r in self.rungs_at_start if r.values[self.over] != value]
            shown.sort(key=lambda rung: rung[1])
        tiles = [] if first.sources is None else [(first.sources[0], "source", pictures.short(self.names[0], 18), False)]
        for image, at, count in shown:
            tiles.append((image, self._say({self.over: at}) if self.over else "preview", count, at == value))
        return pictures.strip(tiles, f"{self._class()}: {self._say(self.start.values)}")

    def _say(self, values):
        """Such as "strength 0.35, guidance scale 2.0", with the decimals of each slider."""
        return ", ".join(f"{_words(name)} {value:.{decimals(self.limits[name].step)}f}" for name, value in values.items())

    def _class(self):
        return "every class" if self.run.class_name in ("", "all") else self.run.class_name

    # ---- the live panel

    def _build(self):
        import ipywidgets as w

        wide, beside = w.Layout(width="330px"), {"description_width": "100px"}
        self.sliders = {}
        for name, (value, low, high, step) in self.limits.items():
            self.sliders[name] = w.FloatSlider(
                value=value, min=low, max=high, step=step, description=_words(name), continuous_update=True, layout=wide,
                readout_format=f".{decimals(step)}f", style=beside,
            )  # fmt: skip
        options = [(f"{i + 1} of {len(self.names)}: {pictures.short(name, 22)}", i) for i, name in enumerate(self.names)]
        self.chooser = w.Dropdown(options=options, description="source tile", layout=wide, style=beside)
        refused = self.pen.refused()
        row = w.Layout(width="auto", margin="10px 6px 0 0")
        self.button = w.Button(
            description=refused[0] if refused else "Write into recipe", disabled=bool(refused), button_style="primary",
            icon="" if refused else "pencil", layout=w.Layout(width="auto", margin="10px 6px 0 104px"),
        )  # fmt: skip
        self.back = w.Button(description="Undo", icon="undo", layout=w.Layout(width="auto", margin="10px 6px 0 0", display="none"))
        self.stop = w.Button(description="Cancel", icon="stop", disabled=True, layout=row)
        can = w.Layout(width="auto", margin="10px 6px 0 0", display="" if getattr(self.previewer, "can_end", False) else "none")
        self.enough = w.Button(description="Keep this one", icon="check", disabled=True, layout=can)
        self.pin = w.Button(description="Pin", icon="thumb-tack", layout=row, tooltip="keep this picture and its settings in sight")
        where = refused[1] if refused else f"{self.run.recipe}, classes: {self.run.class_name}: {self.run.step}"
        self.head, self.left, self.right, self.others, self.title, self.said = (w.HTML() for _ in range(6))
        self.status = w.HTML(_line("The sliders answer while the kernel of this notebook runs."))
        self.row, self.pins = (w.GridBox(layout=w.Layout(grid_gap="4px 10px")) for _ in range(2))

        one = [self.chooser] if len(self.names) > 1 else []
        buttons = w.HBox([self.button, self.back]), w.HBox([self.stop, self.enough, self.pin], layout=w.Layout(margin="0 0 0 104px"))
        controls = w.VBox([self.head, *one, *self.sliders.values(), self.status, *buttons, w.HTML(_line(where))])
        controls.layout = w.Layout(width="360px")
        pair = w.HBox([self.left, self.right] if self.start.preview.sources is not None else [self.right])
        boxes = [w.HTML(STYLE), w.HBox([pair, controls], layout=w.Layout(flex_flow="row wrap")), self.said, self.pins, self.others]
        if self.over:
            boxes += [self.title, self.row]
        self.widget = w.VBox(boxes)
        self.widget.add_class("hk-tuner")
        self.widget._view_count = 0  # a front end counts up when it shows the panel

        for slider in self.sliders.values():
            slider.observe(self._moved, "value")
        self.chooser.observe(self._chosen, "value")
        for button, answer in (
            (self.stop, self._cancelled),
            (self.enough, self._kept),
            (self.pin, self._pin),
            (self.back, self._undone),
            (self.button, self._pressed),
        ):
            button.on_click(answer)
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
        self._refresh()
        if self.plain is not None:
            image, width = self.picture()
            data = pictures.base64(image)
            began = html.escape(f"{self._class()} at the start: {self._say(self.start.values)}")
            folded = f"<details><summary>{began}</summary><img width='{width}' src='data:image/png;base64,{data}'></details>"
            self.plain.update({"text/html": folded, "image/png": data, "text/plain": began}, raw=True)

    def _moved(self, _):
        self.values = {name: _typed(self.limits[name], slider.value) for name, slider in self.sliders.items()}
        values, known = dict(self.values), getattr(self.previewer, "known", None)
        if values == self.drawn.values or (known is not None and self._take(known, values)):
            self._rested()
            self._refresh()
            return
        self.widget.add_class("hk-busy")
        self.stop.disabled = self.enough.disabled = False
        self.status.value = _line(f"drawing {self._say(values)} ...")
        began = time.perf_counter()
        self.asked = wish = studio.Wish(
            lambda on_step: self.previewer(on_step=on_step, **values),
            lambda preview: self._done(wish, Drawn(preview, values, time.perf_counter() - began)),
            lambda error: self._failed(wish, values, error),
            lambda k, n, x0: self._stepped(wish, k, n, x0, began),
        )
        self.studio.ask(wish)

    def _take(self, known, values):
        """Show what was drawn before under these values, if it was."""
        try:
            found = known(**values)
        except ValueError:
            return False
        if found is not None:
            self.drawn = Drawn(found, values, 0.0)
        return found is not None

    def _rested(self):
        """Nothing is being drawn for the sliders any more."""
        self.asked = None
        self.studio.cancel()
        self.stop.disabled = self.enough.disabled = True
        self.widget.remove_class("hk-busy")

    def _stepped(self, wish, k, n, x0, began):
        if wish is not self.asked:
            return
        left = (time.perf_counter() - began) / k * (n - k)
        self.status.value = _line(f"step {k} of {n}, {left:.0f} s left")
        draft = getattr(self.previewer, "draft", None)
        if k < n and isinstance(x0, np.ndarray):  # a picture already
            self.right.value = pictures.figure(x0, "on the way", f"step {k} of {n}", STAGE, "hk-preview")
        elif k % 3 == 0 and k < n and x0 is not None and draft is not None and (images := draft(x0)) is not None:
            self.right.value = pictures.figure(images[self.tile], "preview", f"draft, step {k} of {n}", STAGE, "hk-preview")

    def _done(self, wish, drawn):
        if wish is not self.asked:
            return
        ended = {name: value for name, value in getattr(drawn.preview, "ended", {}).items() if name in self.sliders}
        self.drawn = drawn._replace(values={**drawn.values, **ended})
        self.values = dict(self.drawn.values)
        self._rested()
        self._set(self.values)
        self._refresh()

    def _failed(self, wish, values, error):
        if wish is self.asked:
            self._rested()
            self._refresh()
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self.status.value = _line(f"Nothing drawn for {self._say(values)}. {kind}{error}", "hk-bad")

    def _cancelled(self, _):
        if self.asked is not None:
            self._rested()
            self._refresh()
            self.status.value = _line(f"Stopped; the picture is that of {self._say(self.drawn.values)}.")

    def _kept(self, _):
        """The drawing ends after its next picture, and that one is taken; the sliders then say which it is."""
        if self.asked is not None:
            self.asked.enough.set()
            self.enough.disabled = True

    def _chosen(self, change):
        self.tile = change["new"] or 0
        self._refresh()

    def _go(self, values):
        """Set the sliders to values, drawing once."""
        self._set(values)
        self._moved(None)

    def _set(self, values):
        """Set the sliders to values, drawing nothing."""
        for name, slider in self.sliders.items():
            slider.unobserve(self._moved, "value")
            slider.value = values[name]
            slider.observe(self._moved, "value")

    def _pin(self, _):
        drawn = (self.drawn.values, self.tile)
        self.pinned = [one for one in self.pinned if one[0] != drawn][-PINS + 1 :] + [(drawn, self.drawn.preview.images[self.tile])]
        self._fill(self.pins, [(image, values, "") for (values, _), image in self.pinned], PINS)

    def _pressed(self, _):
        self._told(*self.write())

    def write(self):
        """Writes the values of the picture into the recipe; returns a sentence and the difference as text, and raises nothing."""
        if self.drawn.values != self.values:
            return f"Nothing was written: there is no picture of {self._say(self.values)}.", ""
        return self.pen.write(self.drawn.values, self.start.values)

    def _undone(self, _):
        if self.pen.written:
            self._told(self.pen.undo(), "")

    def _told(self, sentence, text):
        rows = [row for row in text.splitlines() if row[:3] not in ("---", "+++") and row[:2] != "@@"]
        body = "\n".join(f"<span class='{DIFF.get(row[:1], '')}'>{html.escape(row)}</span>" for row in rows)
        self.said.value = _line(sentence, "hk-said") + (f"<pre class='hk-diff'>{body}</pre>" if text else "")
        self.back.layout.display = "" if self.pen.written else "none"

    # ---- what is shown

    def _refresh(self):
        preview, values, seconds = self.drawn
        if preview.sources is not None:
            self.left.value = pictures.figure(preview.sources[self.tile], "source", self.names[self.tile], STAGE)
        self.right.value = pictures.figure(preview.images[self.tile], "preview", self._say(values), STAGE, "hk-preview")
        prompt = f"\n{preview.jobs['prompt'].iloc[self.tile]}" if "prompt" in preview.jobs else ""
        time_said = f"{seconds:.1f} s" if seconds else "drawn before"
        self.status.value = _line(f"{_steps(preview.true_steps)}, {time_said}{prompt}")
        others = [i for i in range(len(self.names)) if i != self.tile] if preview.sources is not None else []
        pairs = [pictures.pair(preview.sources[i], preview.images[i], f"source {i + 1}", self.names[i], THUMB) for i in others[:3]]
        head = "<b>Other sources</b> under the same settings; hold the pointer over one to see what it was made from"
        self.others.value = f"<div class='hk-part'>{head}</div><div class='hk-row'>{''.join(pairs)}</div>" if pairs else ""
        if self.over:
            self._refresh_ladder()

    def _refresh_ladder(self):
        """The rungs that are there, and the studio asked to draw the others while nobody moves a slider."""
        asked, tile = self._ladder(self.drawn.values), self.tile
        self._show_ladder(asked)
        lacking = [values for values in asked if self._rung(values) is None]
        lacking.sort(key=lambda values: (values.get(self.across) != self.drawn.values.get(self.across), values[self.over]))
        shown = lambda rung: self._show_ladder(asked) if tile == self.tile and self.asked is None else None  # noqa: E731
        self.studio.chores(
            [studio.Wish(lambda on_step, values=values: self._climb(values, on_step, tile), shown, shown) for values in lacking]
        )

    def _show_ladder(self, asked):
        rungs = [(rung.image, values, rung.true_steps) if (rung := self._rung(values)) else (None, values, "") for values in asked]
        fixed = {name: value for name, value in self.drawn.values.items() if name not in (self.over, self.across)}
        by = f" by {_words(self.across)}" if self.across else ""
        said = ", ".join(filter(None, (self._say(fixed), f"source {self.tile + 1}" if len(self.names) > 1 else "")))
        text = f"<b>{html.escape(_words(self.over).capitalize() + by)}</b>{html.escape(f' at {said}' if said else '')}"
        self.title.value = f"<div class='hk-part'>{text}; a button takes the sliders there</div>"
        self._fill(self.row, rungs, self.rungs)

    def _fill(self, grid, rungs, columns):
        """Pictures with a button each that takes the sliders there; one that is not drawn yet is a grey field."""
        import ipywidgets as w

        cells = []
        names = [name for name in (self.over, self.across) if name] or list(self.limits)
        for image, values, caption in rungs:
            label = " / ".join(f"{values[name]:.{decimals(self.limits[name].step)}f}" for name in names)
            button = w.Button(description=label, tooltip=f"take {self._say(values)}", layout=w.Layout(width=f"{THUMB}px"))
            button.on_click(lambda _, values=values: self._go(values))
            picture = pictures.figure(image, "", caption, THUMB) if image is not None else pictures.blank(THUMB)
            cells.append(w.VBox([w.HTML(picture), button]))
        grid.layout.grid_template_columns = f"repeat({min(columns, max(1, len(cells)))}, {THUMB + 8}px)"
        grid.children = cells


# ---- small parts


def _typed(limits, value):
    """A slider's value as its parameter wants it: a whole number where value, ends and step are whole numbers."""
    return round(value) if all(isinstance(part, int) for part in limits) else round(float(value), 6)


def _on_grid(limits, share):
    """The value at a share of a slider's range, on its grid."""
    return _rounded(limits, limits.low + (limits.high - limits.low) * share)


def _rounded(limits, value):
    """`value` on the slider's grid, without the dust of floats."""
    return _typed(limits, round(limits.low + round((value - limits.low) / limits.step) * limits.step, 10))


def decimals(step):
    """How many decimals a slider of this step shows."""
    return min((n for n in range(6) if abs(step * 10**n - round(step * 10**n)) <= 1e-9 * max(1, step * 10**n)), default=6)


def _words(name):
    return name.replace("_", " ")


def _steps(count):
    return f"{count} step" if count == 1 else f"{count} steps"


def _line(text, kind="hk-faint"):
    return f"<div class='hk-line {kind}'>{html.escape(text)}</div>"


DIFF = {"+": "hk-plus", "-": "hk-minus"}
STYLE = f"<style>\n{(Path(__file__).parent / 'panel.css').read_text(encoding='utf-8')}</style>"
