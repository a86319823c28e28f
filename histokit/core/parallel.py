"""Work side by side on a CPU: each piece in a thread of its own with one core, instead of one after the other with all cores.

Small networks share a core's work badly: two threads inside one convolution wait for each other more than they work. Two batches, or two
halves of one, each on a core of its own, lose nothing; torch works outside Python's lock.
"""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

MOST = 2**27  # gradients that the parts of a batch may hold together, half a GiB


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


def rows(call, *batch, parameters=()):
    """`call(*batch)`, its rows computed in parts, each on a core of its own; on a GPU, or with one core, as it is.

    On two cores a training step of mini's UNet with its LoRA takes some 0.8 of the time of two threads inside each layer, a sampling step
    as well (`bench_generator.py`); more cores were not measured. Equal to the whole up to rounding, and the same each
    time for the same number of cores.

    Args:
        call: a function of tensors [B, ...] that returns one [B, ...] whose row i follows from row i of each; it draws no random number.
        batch: tensors [B, ...]; one of another length is given to each part whole.
        parameters: of `call`; those that take a gradient get it, once (no second derivatives).
    """
    first, cores = batch[0], torch.get_num_threads()
    parts = min(cores, len(first)) if first.device.type == "cpu" else 1
    trained = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (*batch, *trained))
    if parts < 2 or (learns and parts * sum(p.numel() for p in trained) > MOST):
        return call(*batch)
    cut = [x.chunk(parts) if x.ndim and len(x) == len(first) else (x,) * parts for x in batch]
    pieces = list(zip(*cut, strict=False))  # chunks may be fewer than asked for: 4 rows by 3 are 2 and 2
    if not learns:
        return torch.cat(_each(lambda piece: call(*piece), pieces))
    return _Rows.apply(call, len(pieces), len(trained), *trained, *(x for piece in pieces for x in piece))


class _Rows(torch.autograd.Function):
    """Forwards and backwards of the pieces, each in a thread; their gradients of the parameters add up in the pieces' order."""

    @staticmethod
    def forward(ctx, call, pieces, trained, *tensors):
        parameters, given = tensors[:trained], tensors[trained:]
        width = len(given) // pieces

        def begin(k):
            own = [x.detach().requires_grad_(x.requires_grad) for x in given[k * width : (k + 1) * width]]
            with torch.enable_grad():
                return own, call(*own)

        ctx.parameters, ctx.graphs = parameters, _each(begin, range(pieces))
        return torch.cat([found.detach() for _, found in ctx.graphs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        slopes = slope.split([len(found) for _, found in ctx.graphs])

        def end(k):
            own, found = ctx.graphs[k]
            wanted = [x for x in (*ctx.parameters, *own) if x.requires_grad]
            return list(torch.autograd.grad(found, wanted, slopes[k], allow_unused=True))

        gradients, trained = _each(end, range(len(ctx.graphs))), len(ctx.parameters)
        of_parameters = [_sum(own) for own in zip(*(piece[:trained] for piece in gradients), strict=True)]
        of_batch = []
        for (own, _), piece in zip(ctx.graphs, gradients, strict=True):
            left = iter(piece[trained:])
            of_batch += [next(left) if x.requires_grad else None for x in own]
        ctx.graphs = None
        return None, None, None, *of_parameters, *of_batch


def _sum(gradients):
    """Their sum, in their order; None where a parameter took no part in any piece."""
    there = [gradient for gradient in gradients if gradient is not None]
    for gradient in there[1:]:
        there[0].add_(gradient)
    return there[0] if there else None


def _each(work, pieces):
    """[work(piece), ...], each in a thread of its own with its share of the cores, in the caller's arithmetic and gradient mode."""
    cores, learns = torch.get_num_threads(), torch.is_grad_enabled()
    half, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def alone(place, piece):
        torch.set_num_threads(max(1, cores // len(pieces) + (place < cores % len(pieces))))
        with torch.set_grad_enabled(learns), torch.autocast("cpu", dtype, enabled=half):
            return work(piece)

    try:
        with ThreadPoolExecutor(len(pieces)) as pool:
            return list(pool.map(alone, range(len(pieces)), pieces))
    finally:
        torch.set_num_threads(cores)
