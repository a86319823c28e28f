"""The training loop: resuming is exact, clipping clips, the best step wins, what is wrong is said."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from histokit.core import files, progress
from histokit.diffusion import losses
from histokit.training import checkpoints, loop


def player(seed=0, name="line", lr=1e-2):
    """Least squares on four weights, with noise from the step's generator, so that resuming has something to get wrong."""
    weight = torch.nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(seed)))

    def loss(batch, step, generator):
        noise = torch.randn(len(batch["x"]), generator=generator)
        return (batch["x"] @ weight - batch["x"].sum(-1) + 0.1 * noise).square().mean()

    return loop.Player(name, [{"params": [weight], "lr": lr}], loss), weight


def batches(k):
    return {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(files.seed("batch", k)))}


def test_a_line_is_learned():
    one, weight = player(lr=0.05)
    history = loop.fit([one], batches, 400, 0, schedule="one_cycle", clip=0, weight_decay=0)
    torch.testing.assert_close(weight.detach(), torch.ones(4), atol=0.05, rtol=0)
    assert history.loss_line.iloc[-1] < 0.1 * history.loss_line.iloc[0]


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [3, 7, 19])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, killed_at):
    def until(limit):
        def maybe(k):
            if k == limit:
                raise Killed
            return batches(k)

        return maybe

    def validate_with(weight):
        return lambda: (weight - 0.7).square().sum()

    settings = dict(ema=0.9, validate_every=4, checkpoint_every=5, accumulate=1, schedule="cosine", log_every=2)
    whole, straight = player()
    expected = loop.fit([whole], batches, 20, 0, folder=tmp_path / "a", validate=validate_with(straight), **settings)

    first, weight = player()
    with pytest.raises(Killed):
        loop.fit([first], until(killed_at), 20, 0, folder=tmp_path / "b", validate=validate_with(weight), **settings)
    again, resumed = player(seed=99 if killed_at > 5 else 0)  # the checkpoint decides, once there is one
    history = loop.fit([again], batches, 20, 0, folder=tmp_path / "b", validate=validate_with(resumed), **settings)

    assert torch.equal(straight, resumed)
    for name in ("checkpoint.safetensors", "best.safetensors"):
        a, b = (files.read_tensors(tmp_path / side / name) for side in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)
    columns = ["step", "loss_line", "grad_norm_line", "val"]
    assert expected[columns].equals(history[columns])


def test_running_statistics_are_resumed_and_kept_with_the_best(tmp_path):
    def build(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        one = loop.Player("net", [{"params": net.parameters(), "lr": 1e-2}], lambda b, s, g: net(b["x"]).square().mean(), net.buffers())
        return one, net

    whole, straight = build(0)
    loop.fit([whole], batches, 12, 0)
    half, _ = build(0)
    with pytest.raises(Killed):
        stop = lambda k: batches(k) if k < 8 else (_ for _ in ()).throw(Killed())  # noqa: E731
        loop.fit([half], stop, 12, 0, folder=tmp_path, checkpoint_every=6)
    again, resumed = build(1)
    loop.fit([again], batches, 12, 0, folder=tmp_path, checkpoint_every=6)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True))

    for folder in (None, tmp_path / "best"):
        one, net = build(0)
        seen = []
        judge = lambda net=net, seen=seen: seen.append(net[0].running_mean.clone()) or float(len(seen))  # noqa: E731
        loop.fit([one], batches, 6, 0, folder=folder, validate=judge, validate_every=2)
        assert torch.equal(net[0].running_mean, seen[0]) and not torch.equal(seen[0], seen[2])


def test_another_setting_is_refused_by_name(tmp_path):
    loop.fit([player()[0]], batches, 4, 0, folder=tmp_path, identity={"tiles": "abc"}, clip=1.0)
    with pytest.raises(ValueError, match="tiles = 'abc', now 'xyz'"):
        loop.fit([player()[0]], batches, 4, 0, folder=tmp_path, identity={"tiles": "xyz"}, clip=1.0)
    with pytest.raises(ValueError, match=r"clip = 1\.0, now 2\.0"):
        loop.fit([player()[0]], batches, 4, 0, folder=tmp_path, identity={"tiles": "abc"}, clip=2.0)


def test_clipping_bounds_the_gradient_that_is_applied():
    weight = torch.nn.Parameter(torch.zeros(3))
    norms = []
    weight.register_post_accumulate_grad_hook(lambda p: norms.append(p))
    applied = []

    class Spy(torch.optim.AdamW):
        def step(self, closure=None):
            applied.append(float(weight.grad.norm()))
            return super().step(closure)

    steep = loop.Player("steep", [{"params": (p for p in [weight]), "lr": 1e-3}], lambda b, s, g: 1000 * (weight - 1).sum())
    original, torch.optim.AdamW = torch.optim.AdamW, Spy
    try:
        history = loop.fit([steep], batches, 3, 0, clip=0.5, log_every=1)
    finally:
        torch.optim.AdamW = original
    assert all(norm <= 0.5 + 1e-6 for norm in applied)
    assert history.grad_norm_steep.iloc[0] == pytest.approx(1000 * math.sqrt(3), rel=1e-5), "the history shows the norm before clipping"


def test_an_iterator_of_parameters_is_not_consumed():
    weight = torch.nn.Parameter(torch.zeros(3))
    lazy = filter(lambda p: p.requires_grad, [weight])
    assert len(loop.Player("lazy", [{"params": lazy, "lr": 1e-3}], None).params) == 1


def test_accumulation_equals_one_larger_batch():
    big, a = player()
    big.loss = lambda batch, step, generator: (batch["x"] @ a - batch["x"].sum(-1)).square().mean()
    small, b = player()
    small.loss = lambda batch, step, generator: (batch["x"] @ b - batch["x"].sum(-1)).square().mean()
    joined = lambda k: {"x": torch.cat([batches(2 * k)["x"], batches(2 * k + 1)["x"]])}  # noqa: E731
    loop.fit([big], joined, 10, 0)
    loop.fit([small], batches, 10, 0, accumulate=2)
    torch.testing.assert_close(a, b)


def test_the_best_validated_step_is_the_result(tmp_path):
    for folder in (None, tmp_path):
        one, weight = player()
        seen = []

        def validate(weight=weight, seen=seen):
            seen.append(weight.detach().clone())
            return [3.0, 1.0, 2.0][len(seen) - 1]

        history = loop.fit([one], batches, 6, 0, folder=folder, validate=validate, validate_every=2)
        assert torch.equal(weight.detach(), seen[1]) and not torch.equal(seen[1], seen[2])
        assert history.attrs["best_step"] == 4


def test_the_average_of_all_updates_is_what_is_validated_and_returned():
    ema, steps = 0.3, 8  # the early decay, 0.1 rising to 0.31, passes 0.3 on the way

    def trajectory(ema, every):
        """What is validated every so many steps, and what is left at the end; the last validation is the best."""
        one, weight = player()
        seen = []
        validate = lambda: seen.append(weight.detach().clone()) or -float(len(seen))  # noqa: E731
        loop.fit([one], batches, steps, 0, ema=ema, validate=validate, validate_every=every)
        return seen, weight.detach()

    raw, last = trajectory(0.0, 1)
    average = [player()[1].detach()]
    for k, value in enumerate(raw):
        decay = min(ema, (1 + k) / (10 + k))
        average.append(decay * average[-1] + (1 - decay) * value)
    assert len(raw) == steps and torch.equal(raw[-1], last)
    assert (average[-1] - last).abs().max() > 1e-3, "the average must differ from the weights for this test to say anything"

    validated, result = trajectory(ema, 4)
    torch.testing.assert_close(torch.stack(validated), torch.stack([average[4], average[8]]))  # training went on unaveraged between
    torch.testing.assert_close(result, average[8])

    one, weight = player()
    loop.fit([one], batches, steps, 0, ema=ema)
    torch.testing.assert_close(weight.detach(), average[8])


def test_two_players_take_turns_on_their_own_losses():
    a, wa = player(name="a")
    b, _ = player(seed=1, name="b")
    history = loop.fit([a, b], batches, 50, 0, log_every=10)
    assert {"loss_a", "loss_b", "grad_norm_a", "grad_norm_b"} <= set(history)
    alone, w = player(name="a")
    loop.fit([alone], batches, 50, 0, log_every=10)
    assert torch.equal(w, wa), "a second player does not change the first one's random numbers"


def test_a_loss_that_is_not_finite_stops_with_its_step():
    weight = torch.nn.Parameter(torch.ones(2))
    broken = loop.Player("broken", [{"params": [weight], "lr": 1e-3}], lambda b, s, g: weight.sum() * (math.nan if s == 3 else 1))
    with pytest.raises(FloatingPointError, match=r"loss_broken.*step 4"):
        loop.fit([broken], batches, 8, 0, log_every=2)


def test_half_precision_weights_are_not_trained():
    with pytest.raises(ValueError, match="float32"):
        loop.Player("half", [{"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], "lr": 1e-3}], None)
    with pytest.raises(ValueError, match="nothing to train"):
        loop.Player("empty", [{"params": [], "lr": 1e-3}], None)


def test_one_cycle_rises_for_a_tenth_and_falls_to_a_hundredth():
    rates = [loop.rate(step, 100, "one_cycle") for step in range(100)]
    assert max(rates) == 1.0 and rates.index(1.0) in (9, 10) and rates[0] == pytest.approx(0.1) and rates[-1] < 0.02
    assert loop.rate(50, 100) == 1.0
    with pytest.raises(ValueError, match="one_cycle"):
        loop.rate(0, 10, "linear")


def test_min_snr_weight_is_the_papers_formula():
    alphas = torch.tensor([0.999, 0.5, 0.01])
    steps = torch.arange(3)
    snr = alphas / (1 - alphas)
    bounded = torch.minimum(snr, torch.tensor(5.0))
    torch.testing.assert_close(losses.min_snr_weight(alphas, steps, 5.0), bounded / snr)
    torch.testing.assert_close(losses.min_snr_weight(alphas, steps, 5.0, "v_prediction"), torch.minimum(snr, torch.tensor(5.0)) / (snr + 1))
    assert losses.min_snr_weight(alphas, steps, 0).tolist() == [1, 1, 1]


def test_training_ends_when_patience_is_spent_and_counts_anew_from_a_renewal(tmp_path):
    for renewed, ended, best in ((0, 6, 2), (5, 9, 2), (8, 12, 2)):
        seen = []
        validate = lambda seen=seen: seen.append(0) or (1.0 if len(seen) == 1 else 2.0)  # noqa: E731
        history = loop.fit([player()[0]], batches, 20, 0, validate=validate, validate_every=2, patience=2, renewed=renewed, log_every=1)
        assert (int(history["step"].max()), history.attrs["best_step"]) == (ended, best), renewed
    never = loop.fit([player()[0]], batches, 20, 0, validate=lambda: 1.0, validate_every=2, log_every=1)
    assert never["step"].max() == 20


def test_a_run_that_ended_early_ends_there_when_it_is_resumed(tmp_path):
    values = iter([1.0, *[2.0] * 9])
    how = {"validate_every": 2, "patience": 2, "checkpoint_every": 2, "folder": tmp_path, "log_every": 1}
    first = loop.fit([player()[0]], batches, 20, 0, validate=lambda: next(values), **how)
    again = loop.fit([player()[0]], batches, 20, 0, validate=lambda: pytest.fail("it had ended"), **how)
    assert first["step"].max() == again["step"].max() == 6 and again.attrs["best_step"] == 2


def test_a_further_factor_slows_the_rate_and_what_validation_says_is_logged():
    seen = {}
    for name, factor in (("plain", None), ("slow", lambda step: 0.1 if step >= 3 else 1.0)):
        said = loop.fit([player()[0]], batches, 6, 0, factor=factor, log_every=1, validate=lambda: (1.0, {"kappa": 0.5}), validate_every=3)
        seen[name] = said["lr"].tolist()
        assert said["kappa"].dropna().tolist() == [0.5, 0.5]
    assert seen["slow"] == pytest.approx([rate * (0.1 if step >= 3 else 1) for step, rate in enumerate(seen["plain"])])


def test_batches_made_ahead_are_those_made_when_asked_whatever_the_order():
    made = []

    def batch(k):
        made.append(k)
        return 10 * k

    with loop.ahead(batch, 5) as get:
        assert [get(k) for k in range(3)] == [0, 10, 20]
        assert get(1) == 10 and get(4) == 40  # a resumed run may ask for another one
    assert 3 in made and 5 not in made


# --- sheets, the weights behind them, and what is shown


def sheeted(folder, steps=8, seed=0, weight=None, **more):
    """A run with a sheet every second step: the weights as grey pixels."""
    one, weight = player()
    drawn = lambda step: (weight.detach().clamp(0, 1) * 255).byte().reshape(1, 4, 1).expand(4, 4, 3).numpy().copy()  # noqa: E731
    how = {"sheet": drawn, "sheet_every": 2, "keep": True, "folder": folder, "log_every": 1} | more
    return loop.fit([one], batches, steps, seed, **how), weight.detach()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_step_taken_is_bit_for_bit_what_a_run_that_stopped_there_had(tmp_path, ema):
    history, taken = sheeted(tmp_path / "long", take=4, ema=ema)
    _, stopped = sheeted(tmp_path / "short", steps=4, ema=ema)
    _, last = sheeted(tmp_path / "last", ema=ema)
    assert torch.equal(taken, stopped) and not torch.equal(taken, last)
    assert history.attrs["step"] == 4 and history["step"].max() == 8


def test_another_choice_of_step_trains_nothing_anew(tmp_path):
    _, last = sheeted(tmp_path)
    one, weight = player(seed=9)
    one.loss = lambda *_: pytest.fail("it was trained again")
    how = dict(folder=tmp_path, sheet=lambda step: pytest.fail("drawn again"), sheet_every=2, keep=True, log_every=1)
    for take, expected in ((2, 2), (8, 8), (0, 8)):
        assert loop.fit([one], batches, 8, 0, take=take, **how).attrs["step"] == expected
        assert torch.equal(weight.detach(), last) == (expected == 8)


def test_a_step_that_is_not_kept_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="no weights are kept of step 3; there are 2, 4, 6, 8, and 0 takes"):
        sheeted(tmp_path, take=3)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    with pytest.raises(ValueError, match="of step 2; there are none"):
        sheeted(tmp_path / "other", take=2, keep=False)


def test_every_sheet_has_its_weights_and_held_out_loss_and_so_has_the_best_step(tmp_path):
    values = iter([9.0, 5.0, 1.0, 8.0, 2.0, 7.0, 6.0])  # steps 0, 2, 3, 4, 6, 8; 3 and 6 validate and may be the best
    history, _ = sheeted(tmp_path, validate=lambda: next(values), validate_every=3)
    assert checkpoints.kept(tmp_path) == {0: 9.0, 2: 5.0, 4: 8.0, 6: 2.0, 8: 7.0}
    assert history.attrs["best_step"] == history.attrs["step"] == 3
    assert sorted(path.stem for path in (tmp_path / "sheets").iterdir()) == [f"step_{step:06d}" for step in (0, 2, 3, 4, 6, 8)]


def test_a_resumed_run_has_the_same_sheets_and_weights(tmp_path):
    sheeted(tmp_path / "a", checkpoint_every=3)
    one, weight = player()
    drawn = lambda step: (weight.detach().clamp(0, 1) * 255).byte().reshape(1, 4, 1).expand(4, 4, 3).numpy().copy()  # noqa: E731
    how = dict(folder=tmp_path / "b", sheet=drawn, sheet_every=2, keep=True, log_every=1, checkpoint_every=3)
    with pytest.raises(Killed):
        loop.fit([one], lambda k: batches(k) if k < 5 else (_ for _ in ()).throw(Killed()), 8, 0, **how)
    sheeted(tmp_path / "b", checkpoint_every=3)
    made = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").glob("*/step_*"))
    assert len(made) == 10
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in made)


class FrontEnd:
    """What a notebook would hold: one bundle per display_id."""

    def __init__(self, monkeypatch, broken=False):
        self.outputs, self.updates, self.broken = [], 0, broken
        monkeypatch.setitem(sys.modules, "ipykernel", object())
        monkeypatch.setattr("IPython.display.display", self.display)

    def display(self, data, raw, display_id):
        if self.broken:
            raise ConnectionError("the browser is gone")
        assert raw and display_id
        self.outputs.append(data)
        return self

    def update(self, data, raw):
        self.outputs[-1] = data
        self.updates += 1


def test_a_notebook_keeps_one_output_with_line_and_picture_however_long_the_run(tmp_path, monkeypatch):
    front = FrontEnd(monkeypatch)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # no second passes, so no line in between is due
    sheeted(tmp_path, steps=300, sheet_every=100, validate=lambda: 0.25, validate_every=50)
    (data,) = front.outputs
    assert data["text/plain"] == "300 steps of 300, step 50 is taken" and "text/html" in data
    assert data["text/html"].count("<img") == 1 and data["text/plain"] in data["text/html"]
    assert front.updates == 7, "of 300 logged steps the first and the last, three sheets more, that of the best step, and the end"


def test_a_terminal_gets_the_line_as_ever(tmp_path, capsys):
    sheeted(tmp_path, steps=4)
    assert "step 4/4   loss" in capsys.readouterr().out


@pytest.mark.parametrize("live", [True, False])
def test_a_sheet_that_fails_is_told_and_ends_nothing(tmp_path, monkeypatch, capsys, live):
    front = FrontEnd(monkeypatch) if live else None

    def fails(step):
        raise MemoryError("no room")

    _, weight = sheeted(tmp_path / "a", sheet=fails)
    _, expected = sheeted(tmp_path / "b")
    assert torch.equal(weight, expected) and list(checkpoints.kept(tmp_path / "a")) == [0, 2, 4, 6, 8]
    told = front.outputs[0]["text/plain"] if live else capsys.readouterr().out
    assert "no sheet at step 6: no room" in told


def test_a_front_end_that_goes_away_ends_nothing_and_floods_nothing(tmp_path, monkeypatch, capsys):
    FrontEnd(monkeypatch, broken=True)
    history, _ = sheeted(tmp_path, steps=300, sheet_every=100)
    assert history["step"].max() == 300
    assert len(capsys.readouterr().out.splitlines()) <= 3, "lines of a log, not one for each step"
