"""Panels for a notebook: sliders around a function that draws. No science, no model, no file but the recipe of the button.

A panel draws once at its starting values, as a plain picture that any reader of the notebook shows, then answers the sliders
where a live front end is. Nothing is read back: the cells below go on with the parameters, the button writes for the next run.
"""

import math
from collections import namedtuple

from histokit.runs.recipe_edit import apply

__all__ = ["apply", "tuner"]

Limits = namedtuple("Limits", "value low high step")


def tuner(previewer, run, *, sweep="strength", across="guidance_scale", points=5, readings=None, looks=(), **sliders):
    """Shows one tile and what the settings make of it: a preview at fixed seed beside its source, sliders, a sweep, a button.

    Draws once when called, a preview and one row of the sweep, also without a front end. The button writes the values of the sliders
    into the recipe of `run`, under `classes:`, this class and this step.

    Args:
        previewer: previewer(name=value, ..., on_step=...) for every slider returns an object with `images` (uint8 [n, H, W, 3]),
            `sources` (the tiles they were made from, or None), `true_steps` and `jobs` (DataFrame of n rows: tile_id, prompt). It calls
            `on_step(k, n, x0)` after step k of n, x0 the latents so far, a picture (uint8 [H, W, 3]) or None. For the sweep,
            previewer.sweep([value], job=index label, name=value, ..., on_step=...) returns images [1, H, W, 3] of one job, cheaply.
            ValueError means that these settings draw nothing. Where `on_step` returns True and previewer.can_end is set, it ends there,
            and the object's `ended` has the settings it then stands for. If there: previewer.known(name=value, ...) returns at once what
            was drawn before, or None; previewer.steps(name=value, ...) the step count; previewer.draft(x0) uint8 [n, h, w, 3] or None;
            previewer.rest() gives a GPU's memory back until something is drawn again, offered where previewer.can_rest.
        run: gives recipe (path, or "" for none), class_name and step.
        sweep: slider over which the sweep goes; "" for none, as always where there are no sources.
        across: slider of the rows of the sweep; none where there is no such slider.
        points: previews in a row of the sweep.
        readings: readings(images, jobs) -> for each picture `good` (bool), `said` (a sentence) and `rows`, (name, value, what is asked) as
            text; called in idle time where a live front end shows the panel. Its `remark`, if there, is shown beneath. None for none.
        looks: sliders that choose what is looked at; the button leaves them out.
        sliders: name=(value, min, max, step). A value outside its range widens the range.
    """
    limits = {name: widened(name, Limits(*given)) for name, given in sliders.items()}
    if sweep and sweep not in limits:
        raise ValueError(f"the sweep goes over {sweep!r}, which is no slider; there is: {', '.join(limits) or 'none'}")
    from histokit.show.panel import slider_panel

    slider_panel.Tuner(previewer, run, limits, sweep, across if across in limits else "", points, readings, looks=looks).show()


def widened(name, limits):
    """Limits checked, and the range stretched to hold the value, which a slider would otherwise move without a word."""
    value, low, high, step = limits
    if not (all(map(math.isfinite, limits)) and low < high and step > 0):
        raise ValueError(f"{name} takes (value, min, max, step) with min < max and step > 0, got {tuple(limits)}")
    return Limits(value, min(low, value), max(high, value), step)
