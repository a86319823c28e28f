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
    if len(pieces) < 2:
        for piece in pieces:
            yield from piece
        return
    found, left, room = queue.SimpleQueue(), threading.Event(), threading.Semaphore(len(pieces))
    cores = torch.get_num_threads()
    threads = [threading.Thread(target=_work, args=(piece, found, room, left), daemon=True) for piece in pieces]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            kind, value = found.get()
            if kind == "error":
                raise value
            running -= kind == "end"
            if kind == "value":
                yield value
                room.release()
    finally:
        left.set()
        room.release(len(threads))  # whoever waits for room sees that nobody asks for more
        for thread in threads:
            thread.join()
        torch.set_num_threads(cores)  # a thread's own number reaches parts of torch that all threads share


def _work(piece, found, room, left):
    torch.set_num_threads(1)
    try:
        for value in piece:
            found.put(("value", value))
            room.acquire()  # two values of each piece may wait for the caller, no more
            if left.is_set():
                return
        found.put(("end", None))
    except BaseException as error:  # the one who waits shall know
        found.put(("error", error))
