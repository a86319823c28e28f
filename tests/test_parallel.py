"""Work side by side comes through whole, and ends: whoever fails, whoever leaves, nobody is left waiting."""

import collections
import gc
import itertools
import subprocess
import sys
import threading

import pytest
import torch
from patience import HANGS

from histokit.core import parallel


def soon(work):
    """What `work()` returns or raises, from a thread of its own; a test that hangs fails."""
    found = []

    def run():
        try:
            found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANGS)
    assert found, "it hangs"
    assert not any("_work" in other.name for other in threading.enumerate()), "a thread is left over"
    value, error = found[0]
    if error is not None:
        raise error
    return value


def numbered(k):
    return ((k, i) for i in range(20 * k))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_value_comes_through_and_those_of_a_piece_in_their_order(n):
    cores = torch.get_num_threads()
    found = soon(lambda: list(parallel.merged([numbered(k) for k in range(n)])))
    assert sorted(found) == [(k, i) for k in range(n) for i in range(20 * k)]
    assert all([i for k, i in found if k == piece] == list(range(20 * piece)) for piece in range(n))
    assert torch.get_num_threads() == cores and soon(lambda: list(parallel.merged([]))) == []


def test_values_that_mean_something_elsewhere_are_values_here():
    odd = [None, StopIteration(), ValueError("a value"), ("end", None)]
    assert soon(lambda: list(parallel.merged([odd, []]))) == odd


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), StopIteration("no end")], ids=repr)
def test_what_one_raises_is_raised_while_others_wait_for_the_caller(error):
    class Broken:
        def __iter__(self):
            raise error

    pieces = [itertools.count(), itertools.count(), Broken()]
    with pytest.raises((type(error), RuntimeError)) as caught:  # Python makes a RuntimeError of a StopIteration inside a generator
        soon(lambda: collections.deque(parallel.merged(pieces), maxlen=0))
    assert error in (caught.value, caught.value.__cause__)


def test_a_caller_that_leaves_ends_those_that_wait_for_it_and_those_at_work():
    begun, goes_on = threading.Event(), threading.Event()

    def at_work():
        begun.set()
        goes_on.wait(HANGS)
        yield "late"

    def leave():
        made = parallel.merged([itertools.count(), at_work(), itertools.count()])
        first = next(made)
        begun.wait(HANGS)
        threading.Timer(0, goes_on.set).start()
        made.close()
        return first, list(made)

    assert soon(leave) == (0, [])


def test_pieces_do_not_run_ahead_of_a_caller_that_holds_a_value():
    taken, made = [0, 0], None

    def counted(k):
        for i in itertools.count():
            taken[k] += 1
            yield i

    def hold():
        nonlocal made
        made = parallel.merged([counted(0), counted(1)])
        ahead = [sum(taken) - number for number, _ in zip(range(200), made, strict=False)]
        made.close()
        return max(ahead)

    assert soon(hold) <= 2 * 2 + 1  # two waiting values of each piece, and the one in hand


def test_a_piece_is_closed_when_the_caller_leaves():
    closed = []

    def piece():
        try:
            yield from itertools.count()
        finally:
            closed.append(1)

    def leave():
        made = parallel.merged([piece(), piece()])
        next(made)
        made.close()
        gc.collect()

    soon(leave)
    assert closed == [1, 1]


def test_a_process_that_ends_with_work_in_hand_ends():
    code = (
        "import itertools; from histokit.core import parallel; made = parallel.merged([itertools.count(), itertools.count()]); next(made)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=HANGS).returncode == 0


@pytest.fixture
def two_cores():
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2, "the caller's number of threads is not what it was"
    torch.set_num_threads(cores)


def network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 3))
    net.unused = torch.nn.Parameter(torch.ones(2))
    net[1].weight.requires_grad_(False)
    return net


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_rows_cut_in_parts_have_the_values_and_gradients_of_the_whole(two_cores, count):
    net, scale = network(), torch.rand(count, 1, 1, 1, requires_grad=True)
    x, shared = torch.randn(count, 3, 9, 9), torch.randn((), requires_grad=True)

    def call(x, scale, shared):
        return net(x * scale) + shared

    def asked(find):
        found = find(call, x, scale, shared)
        return [found, *torch.autograd.grad(found.square().mean(), [net[0].weight, net[3].bias, scale, shared])]

    whole = asked(lambda call, *batch: call(*batch))
    parts, again = (asked(lambda call, *batch: parallel.rows(call, *batch, parameters=net.parameters())) for _ in range(2))
    for one, other, third in zip(whole, parts, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert torch.equal(other, third), "two runs differ"
    with torch.no_grad():
        torch.testing.assert_close(parallel.rows(call, x, scale, shared), whole[0].detach(), rtol=1e-4, atol=1e-6)


def test_gradients_reach_what_takes_one_and_nothing_else(two_cores):
    net = network()
    parallel.rows(net, torch.randn(4, 3, 9, 9), parameters=net.parameters()).sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == {"1.weight", "unused"}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found = parallel.rows(net, torch.randn(4, 3, 9, 9), parameters=net.parameters()).sum()
        with torch.no_grad():
            net[3].weight.mul_(2)
        found.backward()


def test_parts_run_at_the_same_time_with_a_core_each_and_in_the_callers_arithmetic(two_cores):
    net, seen, both = network(), [], threading.Barrier(2)

    def call(x):
        found = net(x)
        if len(x) == 2:
            both.wait(HANGS)
        seen.append((threading.get_ident(), torch.get_num_threads(), found.dtype))
        return found

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert parallel.rows(call, torch.randn(4, 3, 9, 9)).dtype == torch.bfloat16
    assert len({thread for thread, _, _ in seen} - {threading.get_ident()}) == 2 and {cores for _, cores, _ in seen} == {1}
    torch.set_num_threads(1)
    parallel.rows(call, torch.randn(4, 3, 9, 9))
    assert seen[-1][0] == threading.get_ident() and len(seen) == 3
    torch.set_num_threads(2)


def test_what_a_part_raises_is_raised(two_cores):
    def call(x):
        if x[-1] == 3:
            raise ValueError("the last row")
        return x

    with pytest.raises(ValueError, match="the last row"):
        parallel.rows(call, torch.arange(4.0))
