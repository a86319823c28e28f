"""The panel of `widgets.tuner`: a preview that follows its sliders and never blocks, points to jump to, a button for the recipe.

Callbacks only ask the `preview_worker`, whose one thread draws. A picture that was drawn before comes at once; else the old one dims, steps
are counted, every third one shows a draft, and Cancel ends it at the next step. Idle time fills the sweep, cheapest point first.
"""

import html
import time
from collections import namedtuple

import numpy as np

from histokit.core import pictures
from histokit.show.panel import panel_html, panel_layout, preview_worker, recipe_writer, sweep
from histokit.show.panel.panel_html import decimals, line, words
from histokit.show.panel.panel_layout import THUMB

STAGE, PINS = 256, 4  # px on screen of source and preview; settings that can be pinned
Drawn = namedtuple("Drawn", "preview values seconds")


class Tuner(panel_layout.PanelLayout):
    """A panel that answers: `picture()` is the plain figure, `widget` what a live front end shows.

    Args:
        previewer, run, points, readings: see `widgets.tuner`.
        sliders: {name: widgets.Limits}, checked.
        over: slider along the sweep, "" for none; `across`: slider of its rows, "" for one row.
        patience: of the preview worker. looks: sliders that the button leaves out.
    """

    def __init__(
        self, previewer, run, sliders, over="strength", across="", points=5, readings=None, patience=preview_worker.PATIENCE, looks=()
    ):
        self.previewer, self.run, self.limits, self.readings, self.looks = previewer, run, sliders, readings, tuple(looks)
        self.values, self.tile = {name: sweep.typed(limits, limits.value) for name, limits in sliders.items()}, 0
        began = time.perf_counter()
        self.start = self.drawn = Drawn(previewer(**self.values), dict(self.values), time.perf_counter() - began)
        over = over if self.start.preview.sources is not None else ""  # without a source there is nothing to climb away from
        self.sweep = sweep.Sweep(previewer, sliders, over, across, points)
        at_start = [self.sweep.climb(values, self._job()) for values in self.sweep.settings(self.values)[:points]]
        self.points_at_start = [point for point in at_start if point.image is not None]
        self.pinned, self.asked, self.read = [], None, {}
        self.writer = recipe_writer.RecipeWriter(run, self._say)
        self.worker = preview_worker.PreviewWorker(patience)
        super().__init__(
            sliders,
            self._options(),
            self.writer.refused(),
            self.writer.place(),
            can_end=getattr(previewer, "can_end", False),
            can_rest=getattr(previewer, "can_rest", False),
            with_source=self.start.preview.sources is not None,
            with_sweep=bool(self.sweep.over),
        )
        self._listen()

    @property
    def names(self):
        """What the sources of the picture are called."""
        return [str(name) or "no source" for name in self.drawn.preview.jobs["tile_id"]]

    def _key(self):
        return tuple(sorted(self.drawn.values.items()))

    def _job(self):
        """Index label of the tile that is looked at, in the table of its picture."""
        return int(self.drawn.preview.jobs.index[self.tile])

    def picture(self):
        """PNG bytes of source, preview and sweep at the starting values, and the width in px it is meant for."""
        first, over = self.start.preview, self.sweep.over
        value = self.start.values.get(over)
        shown = [(first.images[0], value, sweep.steps_said(first.true_steps))]
        if over:
            shown += [(r.image, r.values[over], r.true_steps) for r in self.points_at_start if r.values[over] != value]
            shown.sort(key=lambda point: point[1])
        source = str(first.jobs["tile_id"].iloc[0]) or "no source"
        tiles = [] if first.sources is None else [(first.sources[0], "source", pictures.short(source, 18), False)]
        for image, at, count in shown:
            tiles.append((image, self._say({over: at}) if over else "preview", count, at == value))
        return pictures.strip(tiles, f"{self._class()}: {self._say(self.start.values)}")

    def _say(self, values):
        """Such as "strength 0.35, guidance scale 2.0", with the decimals of each slider."""
        return ", ".join(f"{words(name)} {value:.{decimals(self.limits[name].step)}f}" for name, value in values.items())

    def _class(self):
        return "every class" if self.run.class_name in ("", "all") else self.run.class_name

    # ---- the live panel

    def _listen(self):
        for slider in self.sliders.values():
            slider.observe(self._moved, "value")
        self.chooser.observe(self._chosen, "value")
        for button, answer in (
            (self.stop, self._cancelled),
            (self.enough, self._kept),
            (self.pin, self._pin),
            (self.free, self._freed),
            (self.back, self._undone),
            (self.button, self._pressed),
        ):
            button.on_click(answer)
        self.keys.on_msg(lambda *_: self._cancelled(None))
        self.widget.observe(self._seen, "_view_count")

    def show(self):
        """Displays the plain picture, then the panel without its pictures: those follow once a front end shows it."""
        from IPython.display import display

        image, width = self.plain_picture = self.picture()
        text = f"{self._class()}: {self._say(self.start.values)}, {sweep.steps_said(self.start.preview.true_steps)}"
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
            image, width = self.plain_picture
            data = pictures.base64(image)
            began = html.escape(f"{self._class()} at the start: {self._say(self.start.values)}")
            folded = f"<details><summary>{began}</summary><img width='{width}' src='data:image/png;base64,{data}'></details>"
            self.plain.update({"text/html": folded, "image/png": data, "text/plain": began}, raw=True)

    def _moved(self, _):
        self.values = {name: sweep.typed(self.limits[name], slider.value) for name, slider in self.sliders.items()}
        values, known = dict(self.values), getattr(self.previewer, "known", None)
        if values == self.drawn.values or (known is not None and self._take(known, values)):
            self._rested()
            self._refresh()
            return
        self.widget.add_class("hk-busy")
        self.stop.disabled = self.enough.disabled = False
        self.status.value = line(f"drawing {self._say(values)} ...")
        began = time.perf_counter()
        self.asked = wish = preview_worker.Wish(
            lambda on_step: self.previewer(on_step=on_step, **values),
            lambda preview: self._done(wish, Drawn(preview, values, time.perf_counter() - began)),
            lambda error: self._failed(wish, values, error),
            lambda k, n, x0: self._stepped(wish, k, n, x0, began),
        )
        self.worker.ask(wish)

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
        self.worker.cancel()
        self.stop.disabled = self.enough.disabled = True
        self.widget.remove_class("hk-busy")

    def _stepped(self, wish, k, n, x0, began):
        if wish is not self.asked:
            return
        left = (time.perf_counter() - began) / k * (n - k)
        self.status.value = line(f"step {k} of {n}, {left:.0f} s left")
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
            kind, text = "" if isinstance(error, ValueError) else f"{type(error).__name__}: ", str(error)
            if "OutOfMemory" in kind:
                getattr(self.previewer, "rest", lambda: None)()  # what is left of the attempt goes, and the kernel stays usable
                kind, text = "", "The memory does not suffice; shut down other notebooks that hold some. This kernel goes on."
            self.status.value = line(f"Nothing drawn for {self._say(values)}. {kind}{text}", "hk-bad")

    def _cancelled(self, _):
        """The sliders go back to the picture, so that what is seen is what the button writes."""
        if self.asked is not None:
            self._rested()
            self.values = dict(self.drawn.values)
            self._set(self.values)
            self._refresh()
            self.status.value = line(f"Stopped; back at {self._say(self.values)}.")

    def _kept(self, _):
        """The drawing ends after its next picture, and that one is taken; the sliders then say which it is."""
        if self.asked is not None:
            self.asked.enough.set()
            self.enough.disabled = True

    def _freed(self, _):
        """In the worker's thread, since the model may be at work: whoever presses waits for nothing."""
        self._rested()
        self.status.value = line("The memory will be free in a moment ...")
        said = "The memory of the GPU is free; the next picture takes it again."
        self.asked = wish = preview_worker.Wish(lambda on_step: self.previewer.rest(), lambda _: self._free_said(wish, said))
        self.worker.chores([])
        self.worker.ask(wish, 0)

    def _free_said(self, wish, said):
        if wish is self.asked:
            self.asked = None
            self.status.value = line(said)

    def _chosen(self, change):
        self.tile = change["new"] or 0
        self._refresh()

    def _options(self):
        return [(f"{i + 1} of {len(self.names)}: {pictures.short(name, 22)}", i) for i, name in enumerate(self.names)]

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
        drawn, began = ({n: v for n, v in values.items() if n not in self.looks} for values in (self.drawn.values, self.start.values))
        return self.writer.write(drawn, began)

    def _undone(self, _):
        if self.writer.written:
            self._told(self.writer.undo(), "")

    def _told(self, sentence, text):
        self.said.value = line(sentence, "hk-said") + panel_html.difference(text)
        self.back.layout.display = "" if self.writer.written else "none"

    # ---- what is shown

    def _refresh(self):
        preview, values, seconds = self.drawn
        if (options := self._options()) != list(self.chooser.options):  # another seed has other sources
            self.chooser.unobserve(self._chosen, "value")
            self.chooser.options = options
            self.chooser.value = self.tile = min(self.tile, len(options) - 1)
            self.chooser.observe(self._chosen, "value")
        own, under = preview.images[self.tile], None
        if preview.sources is not None:
            under = preview.sources[self.tile]
            self.left.value = pictures.figure(under, "source", self.names[self.tile], STAGE)
        self.right.value = pictures.figure(own, "preview", self._say(values), STAGE, "hk-preview", under)
        prompt = f"\n{preview.jobs['prompt'].iloc[self.tile]}" if "prompt" in preview.jobs else ""
        time_said = f"{seconds:.1f} s" if seconds else "drawn before"
        self.status.value = line(f"{sweep.steps_said(preview.true_steps)}, {time_said}{prompt}")
        others = [i for i in range(len(self.names)) if i != self.tile] if preview.sources is not None else []
        pairs = [
            pictures.figure(
                preview.images[i], f"source {i + 1}", pictures.short(self.names[i].rpartition("/")[2], 15), THUMB, under=preview.sources[i]
            )
            for i in others[:3]
        ]
        head = "<b>Other sources</b> under the same settings; the pointer over a picture wipes to what it was made from"
        self.others.value = f"<div class='hk-part'>{head}</div><div class='hk-row'>{''.join(pairs)}</div>" if pairs else ""
        self._idle()

    def _idle(self):
        """What is there of readings and sweep is shown; the worker does the rest while nobody moves a slider."""
        drawn, job, chores = self.drawn, self._job(), []
        if self.readings is not None:
            self._show_reading()
            if (key := self._key()) not in self.read:
                read = lambda _: self.readings(drawn.preview.images, drawn.preview.jobs)  # noqa: E731
                keep = lambda found: self._has_read(key, found)  # noqa: E731
                chores.append(preview_worker.Wish(read, keep, keep))
        if self.sweep.over:
            self._show_sweep(drawn.values, job)
            shown = lambda _: self._show_sweep(drawn.values, job) if drawn is self.drawn and job == self._job() else None  # noqa: E731
            chores += [
                preview_worker.Wish(lambda on_step, values=values: self.sweep.climb(values, job, on_step), shown, shown)
                for values in self.sweep.lacking(drawn.values, job)
            ]
        self.worker.chores(chores)

    def _has_read(self, key, found):
        self.read[key] = found
        if key == self._key():
            self._show_reading()

    def _show_reading(self):
        """The reading of the picture; that of another one never stays."""
        found = self.read.get(self._key())
        one, remark = (found[self.tile], getattr(self.readings, "remark", "")) if isinstance(found, list) else (found, "")
        self.reading.value = panel_html.reading(one, remark)

    def _show_sweep(self, values, job):
        over, across = self.sweep.over, self.sweep.across
        points = [(point, self.sweep.point(point, job)) for point in self.sweep.settings(values)]
        fixed = {name: value for name, value in values.items() if name not in (over, across)}
        by = f" by {words(across)}" if across else ""
        said = ", ".join(filter(None, (self._say(fixed), f"source {self.tile + 1}" if len(self.names) > 1 else "")))
        text = f"<b>{html.escape(words(over).capitalize() + by)}</b>{html.escape(f' at {said}' if said else '')}"
        self.title.value = f"<div class='hk-part'>{text}; a button takes the sliders there</div>"
        pictures_of = [(found.image if found else None, point, found.true_steps if found else "") for point, found in points]
        self._fill(self.row, pictures_of, self.sweep.count)

    def _fill(self, grid, points, columns):
        """Pictures with a button each that takes the sliders there; one that is not drawn yet is a grey field."""
        cells = []
        names = [name for name in (self.sweep.over, self.sweep.across) if name] or list(self.limits)
        for image, values, caption in points:
            label = " / ".join(f"{values[name]:.{decimals(self.limits[name].step)}f}" for name in names)
            picture = pictures.figure(image, "", caption, THUMB) if image is not None else pictures.blank(THUMB, caption)
            cells.append((picture, label, f"take {self._say(values)}", lambda _, values=values: self._go(values)))
        self.fill(grid, cells, columns)
