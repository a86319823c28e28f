"""The checkpoints of one training beside each other: the same seeds, the held-out loss, and how near the samples come to what was learned.

A model that memorises draws its training tiles, so its samples come nearer to them than real tiles of different cases come to each other.
Where a live front end is, a checkpoint can be clicked: that writes the choice into the recipe, and the next run takes it without training.
Reads what `loop.fit` left in its folder; nothing is trained or sampled here.
"""

import html
import textwrap

import numpy as np
import pandas as pd
import torch

from histokit.core import pictures
from histokit.select import scoring, screening
from histokit.show.panel import recipe_writer
from histokit.tiles import augment, data
from histokit.training import checkpoints, finetuning, settings
from histokit.vision import features

SAMPLE = 300  # real tiles that stand for all
SIDE, SMALL, MOST, BAND = 132, 96, 12, 64  # px of a sample, of one among more than four rows; rows of samples; px of text beneath
LABEL = 96  # px for the names of the classes
INK, FAINT, MARK = "#222222", "#666666", "#d98a29"


def compare(folder, history, tiles, training, encoder="mini-ssl", device="cpu"):
    """One row per sheet of a training: what is said beneath it.

    The copy distance of a sample is its cosine distance, in [0, 2], to the nearest tile in `tiles` in any of 8 symmetries, by features with
    mean 0 and deviation 1 over real tiles; higher is farther from a copy.

    Args:
        folder: of `loop.fit`.
        history: what it returned.
        tiles: manifest rows that were learned from.
        training: all training tiles of the dataset; at most `SAMPLE` of them say how much a feature varies.
        encoder: of the distances, see `features.load`.

    Returns:
        DataFrame with step, held_out and loss (NaN where there is none), distance (median of its samples), nearest (of the nearest one),
        kept (its weights are), taken; `attrs` hold the copy distances of real tiles to the nearest one of another case (`real`)
        and of disguised copies of the tiles (`near_duplicates`), and `usual`, the step that is taken where nobody chooses.
    """
    eye = features.load(encoder, device)
    some = training.sample(min(SAMPLE, len(training)), random_state=0)
    alike = features.scaling(features.embed(eye, some))
    learned = alike(features.embed(eye, tiles))
    losses = history.loc[history["lr"].notna(), ["step", *(name for name in history if name.startswith("loss_"))]]
    kept, rows = checkpoints.kept(folder), []
    for path in sorted(folder.glob("sheets/step_*.png")):
        step = int(path.stem.removeprefix("step_"))
        samples = _read(path)
        flat = samples.reshape(-1, *samples.shape[2:])
        views = alike(torch.stack([eye(augment.pixel_symmetry(flat, k)) for k in range(8)], dim=1).numpy())
        distance = 1 - scoring.nearest_similarity(views, learned)[0].numpy()
        held = kept.get(step) if kept.get(step) is not None else _at(history, step)
        mean = losses[losses["step"].le(step)].iloc[-5:, 1:].sum(axis=1).mean()
        rows.append((step, held, mean, np.median(distance), distance.min(), step in kept, step == history.attrs["step"]))
    table = pd.DataFrame(rows, columns=["step", "held_out", "loss", "distance", "nearest", "kept", "taken"])
    table["held_out"] = table["held_out"].astype(float)
    usual = history.attrs["best_step"] or int(history["step"].max())
    copied = alike(features.embed(eye, tiles, codec=screening.KnownCopy()))
    copies = 1 - scoring.nearest_similarity(copied, learned)[0].numpy()
    table.attrs |= {"real": _real(eye, tiles, alike, learned), "copies": copies, "usual": usual}
    return table


def _read(path):
    """Samples uint8 [prompts, n, H, W, 3] of a sheet."""
    from PIL import Image

    return finetuning.cut(np.asarray(Image.open(path).convert("RGB")))


def _at(history, step):
    """The held-out loss of a step that was validated, else NaN."""
    rows = history[history["step"].eq(step)]
    return float(rows["val"].iloc[0]) if "val" in history and len(rows) else np.nan


def _real(eye, tiles, alike, learned):
    """Copy distances [n] of real tiles to the nearest learned tile of another case; empty where there is one case alone."""
    at = np.sort(np.random.default_rng(0).permutation(len(tiles))[:SAMPLE])
    views, cases = alike(features.embed(eye, tiles.iloc[at], augment="symmetries")), tiles["case_id"].to_numpy()
    found = 1 - scoring.real_similarity(views, learned, at, cases[at], cases)
    return found[~np.isnan(found)]


def sentence(table):
    """What the copy distances say, beside those of real tiles."""
    real, copies = table.attrs["real"], np.median(table.attrs["copies"])
    disguised = f"Copies of these tiles, cut out and recoloured a little: copy distance {copies:.2f}."
    if not len(real):
        return f"{disguised} All tiles are of one case, so there are no real ones of different cases to compare with."
    low = float(np.quantile(real, 0.05))
    said = f"Real tiles of different cases: {np.median(real):.2f}, one in twenty nearer than {low:.2f} ({len(real)} tiles). {disguised}"
    near = table[table["step"].gt(0) & table["distance"].lt(low)]
    if len(near):
        steps = ", ".join(f"{step:,}" for step in near["step"])
        said += f" At step {steps} half of the samples are nearer to a training tile than that: the model may be repeating its tiles."
    return said


def picture(table, folder, names, title=""):
    """PIL picture of the sheets side by side, a column each, the one taken framed; and the width in px of its labels and of a column.

    Args:
        table: of `compare`.
        names: what each prompt of a sheet is called.
    """
    from PIL import Image, ImageDraw

    seeds = max(1, min(settings.SHEET_SAMPLES, MOST // len(names)))
    label, gap, head = LABEL if len(names) > 1 else 8, 6, 44
    rows = len(names) * seeds
    side = min(SIDE if rows <= settings.SHEET_SAMPLES else SMALL, (1000 - label) // len(table) - gap)
    side = max(side, 84)  # room for the text beneath
    bold, plain = pictures.font(11, bold=True), pictures.font(11)
    last = textwrap.wrap(sentence(table), 110)
    wide = max(label + len(table) * (side + gap), *(16 + int(plain.getlength(text)) for text in (title, *last)))
    sheet = Image.new("RGB", (wide, head + rows * (side + gap) + BAND + 16 * len(last)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), title, INK, bold)
    for n, name in enumerate(names if len(names) > 1 else []):
        draw.text((8, head + n * seeds * (side + gap) + side // 2 - 6), pictures.short(name, 14), INK, plain)
    for k, row in enumerate(table.itertuples()):
        left = label + k * (side + gap)
        samples = _read(checkpoints.sheet_path(folder, row.step))[:, :seeds]
        for i, sample in enumerate(samples.reshape(rows, *samples.shape[2:])):
            tile = Image.fromarray(sample).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left, head + i * (side + gap)))
        draw.text((left, head - 17), f"step {row.step:,}" + (", taken" if row.taken else ""), MARK if row.taken else INK, bold)
        below = head + rows * (side + gap)
        for n, text in enumerate((_loss(row), f"copy dist. {row.distance:.2f}", f"nearest {row.nearest:.2f}")):
            draw.text((left, below + 16 * n), text, FAINT, plain)
        if row.taken:
            draw.rectangle((left - 3, head - 3, left + side + 2, below - gap + 2), None, MARK, 3)
    for n, text in enumerate(last):
        draw.text((8, head + rows * (side + gap) + BAND - 8 + 16 * n), text, FAINT, plain)
    return sheet, label, side + gap


def _loss(row):
    if row.held_out == row.held_out:
        return f"held out {row.held_out:.4f}"
    return f"training {row.loss:.4f}" if row.loss == row.loss else ""


# --- a click ---------------------------------------------------------------------------------------------------------


class Chooser:
    """The picture, and a button under each checkpoint that writes it into the recipe. `widget` is what a live front end shows."""

    def __init__(self, table, folder, names, run, checkpoint, title=""):
        self.table, self.title, self.checkpoint = table, title, checkpoint
        self.sheet, self.label, self.column = picture(table, folder, names, title)
        self.writer = recipe_writer.RecipeWriter(run, _say)
        self._build()

    def _build(self):
        import ipywidgets as w

        self.buttons, usual, refused = [], self.table.attrs["usual"], self.writer.refused()
        for row in self.table.itertuples():
            value = 0 if row.step == usual else row.step
            there = bool(row.step) and (row.kept or not value)
            layout = w.Layout(width=f"{self.column - 6}px", margin="2px 6px 2px 0")
            words = "before" if not row.step else f"take {row.step:,}" if there else "not kept"
            one = w.Button(description=words, layout=layout, disabled=not there or bool(refused), tooltip=_say({"checkpoint": value}))
            one.value = value
            one.on_click(lambda button: self._told(*self.writer.write({"checkpoint": button.value}, {"checkpoint": self.checkpoint})))
            self.buttons.append(one)
        self.back = w.Button(description="Undo", icon="undo", layout=w.Layout(width="auto", display="none"))
        self.back.on_click(lambda _: self._told(self.writer.undo(), "") if self.writer.written else None)
        self.said = w.HTML(
            _line(
                refused[1]
                if refused
                else f"A button writes its step into {self.writer.run.recipe}; the next run takes it without training."
            )
        )
        row = w.HBox(self.buttons, layout=w.Layout(margin=f"0 0 0 {self.label}px"))
        self.widget = w.VBox([row, self.said, self.back])
        self.widget.add_class("hk-checkpoints")

    def _told(self, sentence, difference):
        rows = [row for row in difference.splitlines() if row[:1] in "+-" and row[:3] not in ("---", "+++")]
        text = "\n".join(html.escape(row) for row in rows)
        self.said.value = _line(sentence) + (f"<pre style='margin:0;line-height:1.3'>{text}</pre>" if text else "")
        self.back.layout.display = "" if self.writer.written else "none"

    def show(self):
        from IPython.display import display

        text = self.table.drop(columns=["kept"]).round(4).to_string(index=False)
        data = {"image/png": pictures.base64(pictures.png(self.sheet)), "text/plain": f"{self.title}\n{text}\n{sentence(self.table)}"}
        display(data, raw=True, metadata={"image/png": {"width": self.sheet.width}})
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        words = "buttons that take a checkpoint appear here when the notebook runs in JupyterLab"
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": words}, raw=True)


def _say(values):
    return f"step {values['checkpoint']:,}" if values["checkpoint"] else "the best validated step, else the last"


def _line(text):
    return f"<div style='line-height:1.4;color:{FAINT}'>{html.escape(text)}</div>"


def show(folder, history, tiles, manifest, names, run, checkpoint=0, title="Samples at the same seeds"):
    """Shows the checkpoints of a training beside each other, with buttons where a live front end is.

    Args:
        folder, history, tiles: see `compare`.
        manifest: of 00_dataset.
        names: class names, in the order of the prompts.
        run: gives recipe (path, or "" for none), class_name, step and device.
        checkpoint: the parameter this notebook goes on with.
    """
    table = compare(folder, history, tiles, data.training(manifest), device=run.device)
    if len(table):
        Chooser(table, folder, names, run, checkpoint, title).show()
