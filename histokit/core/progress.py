"""What a long loop shows: one line rewritten in place, and in a notebook the newest sample sheet with the losses beneath it.

One output of the notebook, however long the run; a terminal gets the line alone, a log a line in 30 s. Who started the kernel finds the
line in the file that `FILE` names. Nothing that goes wrong here ends the loop: hours of training are worth more than a picture of them.
"""

import html
import os
import sys
import time

from histokit.core import machine, pictures

FILE = "HISTOKIT_PROGRESS"  # environment variable: a file that holds the newest line
LINE, PICTURE, LOG = 0.2, 1.0, 30  # seconds between two updates: text alone, text that carries a picture, lines of a log
WIDE, HIGH = 640, 480  # px, of the sheet as it is shown while training


class Progress:
    """`progress(row, loss)` after a step, `draw(sheet)` when there is a new picture, `end(text)` at last; none of them raises.

    Args:
        steps: how many there are in all.
        history: rows of `loop.fit`, which appends to them; their losses are drawn beneath the picture.
    """

    def __init__(self, steps, history=()):
        self.steps, self.history, self.shown, self.handle = steps, history, -1e9, None
        self.live = "ipykernel" in sys.modules
        self.in_place = self.live or sys.stdout.isatty()
        self.start = time.perf_counter()
        self.first = None
        self.text, self.image, self.remarks = "", "", []

    def __call__(self, row, loss):
        now = time.perf_counter()
        self.first = row["step"] if self.first is None else self.first
        wait = LOG if not self.in_place else PICTURE if self.image else LINE
        if now - self.shown < wait and row["step"] < self.steps:
            return
        self.shown = now
        rest = (self.steps - row["step"]) * (now - self.start) / max(1, row["step"] - self.first + 1)
        rate = row["images_per_s"]
        pace = f"{rate:.1f} images/s" if rate >= 0.5 else f"{1 / max(rate, 1e-9):.0f} s an image"
        shown = "" if loss is None else f"loss {loss:.4f}   "
        held = next((f"held out {past['val']:.4f}   " for past in reversed(self.history) if "val" in past), "")
        speed = f"{pace}   {row['peak_gb']:.1f} GB   {_duration(rest)} left"
        self.text = f"step {row['step']:,}/{self.steps:,}   {shown}{held}{speed}"
        self._leave()
        self._tell(end="\r" if self.in_place and row["step"] < self.steps else "\n")

    def draw(self, sheet):
        """A new sheet: uint8 [H, W, 3]."""
        try:
            if self.live:
                self.image = self._picture(sheet)
                self._tell()
        except Exception as error:
            self.remark(f"the sheet cannot be shown ({error})")

    def remark(self, text):
        """A sentence that stays beneath the line."""
        self.remarks.append(text)
        if not self.live:
            self.text = f"\n{text}" if self.in_place else text
        self._tell()

    def end(self, text):
        """The line that stays, in a notebook."""
        if self.live:
            self.text = text
            self._tell()

    def _picture(self, sheet):
        """An <img> of the sheet and the losses so far; JPEG, since every new line sends it again."""
        top = pictures.image(sheet, WIDE)
        top.thumbnail((WIDE, HIGH))
        lines = [
            ([(row["step"], sum(v for k, v in row.items() if k.startswith("loss_"))) for row in self.history if "lr" in row], "training"),
            ([(row["step"], row["val"]) for row in self.history if "val" in row], "held out"),
        ]
        made = pictures.stacked([top, pictures.curve(lines, max(top.width, 360), self.steps)])
        data = pictures.base64(pictures.jpeg(made))
        return f"<img width='{made.width}' height='{made.height}' alt='sample sheet' src='data:image/jpeg;base64,{data}'>"

    def _leave(self):
        """The line for whoever started this kernel."""
        if path := os.environ.get(FILE):
            try:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(self.text)
            except OSError:
                pass

    def _tell(self, end="\n"):
        try:
            if not self.live:
                print(self.text, end=end, flush=True)
                return
            from IPython.display import display

            text = "\n".join([self.text, *self.remarks])
            data = {"text/plain": text}
            if self.image:
                data["text/html"] = f"<pre style='margin:0 0 6px'>{html.escape(text)}</pre>{self.image}"
            if self.handle is None:
                self.handle = display(data, raw=True, display_id=True)
            else:
                self.handle.update(data, raw=True)
        except Exception:  # a front end that went away, a pipe that was closed: from here on a log, in which nothing is rewritten
            self.live = self.in_place = False


def _duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{seconds:02d} min"


class Clock:
    """Seconds, images per second and peak memory since the last tick; earlier sessions of a resumed run are added up."""

    def __init__(self, history):
        self.before = max((row.get("seconds", 0) for row in history), default=0)
        self.start = self.last = time.perf_counter()

    def tick(self, images):
        now = time.perf_counter()
        out = {"seconds": self.before + now - self.start, "images_per_s": images / max(now - self.last, 1e-9), "peak_gb": machine.peak_gb()}
        self.last = now
        return out
