"""One thread that draws for a panel: the latest wish wins, what runs can be stopped at its next step, idle time is used.

Callbacks of a panel only ask here. In JupyterLab they run beside busy cells, one after the other: a callback that draws would block the
one that cancels. Nothing here knows what is drawn; see `widgets`.
"""

import collections
import threading
import time

from histokit.core import machine

PATIENCE = 0.25  # seconds without another wish before the last one is drawn; a slider on its way asks many times


class Cancelled(Exception):
    """Raised inside a drawing at its next step when nobody wants it any more."""


class Wish:
    """Something to draw: `work(on_step)` -> picture, `done(picture)`, `failed(error)`, `step(k, n, x0)` while it goes on.

    `on_step` is called by the work at every step, as `sampling.sample` does; it raises Cancelled once the wish is dropped, and returns
    whether what is there is `enough`: work that can end early does so then.
    """

    def __init__(self, work, done, failed=None, step=None):
        self.work, self.done, self.failed, self.step = work, done, failed, step
        self.unwanted, self.enough, self.finished = threading.Event(), threading.Event(), False

    def on_step(self, k, n, x0=None):
        if self.unwanted.is_set():
            raise Cancelled
        if self.step is not None:
            self.step(k, n, x0)
        return self.enough.is_set()


class PreviewWorker:
    """`ask` for a drawing, `cancel` it, leave `chores` for idle time. All of these return at once.

    Args:
        patience: seconds, see `PATIENCE`.
    """

    def __init__(self, patience=PATIENCE):
        self.patience, self.turn = patience, threading.Condition()
        self.wish, self.due, self.current, self.left = None, 0.0, None, collections.deque()
        self.thread, self.cores = None, machine.threads()

    def ask(self, wish, patience=None):
        """Draw this next and nothing older: what waits is forgotten, what runs is stopped."""
        with self.turn:
            self.wish = wish
            self.due = time.monotonic() + (self.patience if patience is None else patience)
            self._stop_current()
            self._wake()

    def cancel(self):
        """Forget what waits and stop what runs; chores go on afterwards."""
        with self.turn:
            self.wish = None
            self._stop_current()
            self.turn.notify_all()

    def chores(self, wishes):
        """What to draw while there is no wish, in this order, instead of the chores left so far."""
        with self.turn:
            self.left = collections.deque(wishes)
            if self.current is not None and self.current[1]:
                self.current[0].unwanted.set()
            self._wake()

    def settle(self, timeout=900.0, chores=False):
        """Wait until nothing is wanted or drawn (with `chores`: nor left for idle time); False where that takes longer than `timeout`."""
        with self.turn:
            idle = lambda: self.wish is None and self.current is None and not (chores and self.left)  # noqa: E731
            return self.turn.wait_for(idle, timeout)

    # ---- the thread

    def _stop_current(self):
        if self.current is not None:
            self.current[0].unwanted.set()

    def _wake(self):
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="histokit previews", daemon=True)
            self.thread.start()
        self.turn.notify_all()

    def _run(self):
        machine.use_threads(
            self.cores
        )  # a thread starts with what is set by then, and a busy cell may have set one core for each of its parts
        while True:
            with self.turn:
                while (wait := self._waits()) != 0:
                    self.turn.wait(wait)
                if self.wish is not None:
                    wish, chores, self.wish = self.wish, None, None
                else:
                    wish, chores = self.left.popleft(), self.left
                self.current = wish, chores is not None
            self._draw(wish)
            with self.turn:
                if chores is not None and not wish.finished:
                    wish.unwanted.clear()
                    chores.appendleft(wish)  # begun again later, unless other chores have come
                self.current = None
                self.turn.notify_all()

    def _waits(self):
        """Seconds until there is something to draw; 0 now, None until somebody asks."""
        if self.wish is not None:
            return max(0.0, self.due - time.monotonic())
        return 0 if self.left else None

    def _draw(self, wish):
        """Draws a wish and says what came of it; nothing of one that is not wanted any more is shown."""
        try:
            picture = wish.work(wish.on_step)
            wish.finished = True
            if not wish.unwanted.is_set():
                wish.done(picture)
        except Cancelled:
            pass
        except Exception as error:  # a panel has no cell to show a traceback in
            wish.finished = True
            if wish.failed is not None and not wish.unwanted.is_set():
                wish.failed(error)
