"""Work side by side on a CPU: each piece in a thread of its own with one core, instead of one after the other with all cores.

Small networks share a core's work badly: two threads inside one convolution wait for each other more than they work. Two batches, each on
a core of its own, lose nothing; torch works outside Python's lock.
"""

import queue
import threading

import torch


def count(device, tile_px):
    """How many batches go side by side: one per core on a CPU; one on an accelerator, or where the pictures fill the memory."""
    return max(1, torch.get_num_threads()) if device.type == "cpu" and tile_px <= 256 else 1


def merged(pieces):
    """Yield what each of `pieces` (iterables) yields, in the order it comes.

    One piece runs here as it is. Several run in a thread each, with one core; what one raises is raised here, and when the caller leaves
    off the others end at their next value.
    """
    if len(pieces) == 1:
        yield from pieces[0]
        return
    found, left, cores = queue.Queue(maxsize=len(pieces)), threading.Event(), torch.get_num_threads()
    threads = [threading.Thread(target=_work, args=(piece, found, left), daemon=True) for piece in pieces]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            value, error = found.get()
            if error is None:
                yield value
            elif isinstance(error, StopIteration):
                running -= 1
            else:
                raise error
    finally:
        left.set()
        while any(thread.is_alive() for thread in threads):  # one may be waiting for its place in the queue
            try:
                found.get(timeout=0.1)
            except queue.Empty:
                pass
        torch.set_num_threads(cores)  # a thread's own number reaches parts of torch that all threads share


def _work(piece, found, left):
    torch.set_num_threads(1)
    try:
        for value in piece:
            if left.is_set():
                return
            found.put((value, None))
        found.put((None, StopIteration()))
    except BaseException as error:  # the one who waits shall know
        found.put((None, error))
