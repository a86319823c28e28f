"""What can be turned in a training: each setting has its name, default and check here, and nowhere else.

A recipe says them flat (`options: {ema: 0.99, sheet_every: 50}`); here they are sorted into frozen objects, and a name that is none is
refused. Those of one method alone stand beside it, in `textual_inversion` and `lora`. Nothing here imports torch, so that `engine.forecast`
can read it.
"""

from dataclasses import asdict, dataclass, fields

from histokit.runs import recipe

SCHEDULES = ("constant", "cosine", "one_cycle")
SHEET_SAMPLES, SHEET_STEPS = 4, 20  # of a fine-tuning's sample sheet: images per prompt, denoising steps of each
HELD_OUT_DRAWS = 64  # noise draws of its held-out loss; more where there are more held-out tiles
HOLD_OUT = 0.125  # share of a class's training cases that it validates on


def names(kind):
    """Names of the settings of a dataclass, in order."""
    return [one.name for one in fields(kind)]


def apart(given, *kinds):
    """Flat settings (dict) as one object of each of `kinds`, dataclasses that share no name; ValueError for a name that none has."""
    owner = {name: kind for kind in kinds for name in names(kind)}
    for name in given:
        if name not in owner:
            raise ValueError(f"training has no setting {name!r}{recipe.nearest(name, owner)}")
    return [kind(**{name: value for name, value in given.items() if owner[name] is kind}) for kind in kinds]


def pace(steps):
    """How often a fine-tuning of so many steps is validated and drawn, unless a recipe says otherwise: ten times, and four times."""
    return {"validate_every": max(1, steps // 10), "sheet_every": max(1, steps // 4)}


def check_schedule(name):
    """Raises ValueError for a learning-rate schedule that there is not."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; use {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}")


def _at_least(settings, least, *which):
    for name in which:
        if getattr(settings, name) < least:
            raise ValueError(f"{name} is {getattr(settings, name)}; expected {least} or more")


def _compared(settings, joined):
    """All settings, {name: value}; of those that `joined` later only what is not the default, so that what was trained before goes on."""
    usual = {one.name: one.default for one in fields(settings)}
    return {name: value for name, value in asdict(settings).items() if name not in joined or value != usual[name]}


# --- of the loop -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Updates:
    """How weights are moved.

    Args:
        schedule: of the learning rate: `constant`, `cosine` or `one_cycle`, see `loop.rate`.
        warmup: first updates, over which the rate rises.
        accumulate: micro-batches of one update.
        clip: bound on the global gradient norm of each player, 0 turns it off; the norm before clipping is in the history.
        ema: decay of the running average of the weights, (1 + k) / (10 + k) in early steps; 0 turns it off. Where it is on,
            validation, sheets and result use it.
        weight_decay: of AdamW, for parameter groups that say nothing else.
    """

    schedule: str = "constant"
    warmup: int = 0
    accumulate: int = 1
    clip: float = 1.0
    ema: float = 0.0
    weight_decay: float = 1e-2

    def __post_init__(self):
        check_schedule(self.schedule)
        _at_least(self, 0, "warmup", "clip", "weight_decay")
        _at_least(self, 1, "accumulate")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay, from 0 (off) to below 1; got {self.ema}")

    def identity(self):
        """What a resumed run is compared by: every setting, see `_compared`."""
        return _compared(self, joined=("warmup", "weight_decay"))


@dataclass(frozen=True)
class Validation:
    """When held-out loss is asked for, and when training ends for want of a better one.

    Args:
        validate_every: steps from one validation to the next, 0 for none; the last step is always validated.
        patience: validations without a better one after which training ends, 0 for never.
        renewed: step from which they are counted.
    """

    validate_every: int = 0
    patience: int = 0
    renewed: int = 0

    def __post_init__(self):
        _at_least(self, 0, *names(Validation))


@dataclass(frozen=True)
class Sheets:
    """What is drawn while training goes on, and which step is the result.

    Args:
        sheet_every: steps from one sheet to the next, 0 for none; the first and the last step are always drawn.
        keep: whether the weights of every sheet are kept, in kept/, with their held-out loss; for what is small, such as an adapter.
        take: step whose kept weights are the result, 0 for the best validated, else the last; outside the identity, so a finished run is
            not trained again.
    """

    sheet_every: int = 0
    keep: bool = False
    take: int = 0

    def __post_init__(self):
        _at_least(self, 0, "sheet_every", "take")

    def kept(self, steps):
        """The steps, after the first, whose weights a run of `steps` keeps."""
        return (*range(self.sheet_every, steps, self.sheet_every), steps) if self.keep and self.sheet_every else ()


@dataclass(frozen=True)
class Records:
    """What is written down on the way; no result depends on it.

    Args:
        checkpoint_every: steps from one checkpoint, to resume from, to the next.
        log_every: steps that one row of the history is the mean of.
        tensorboard: whether the history also goes into tensorboard/.
    """

    checkpoint_every: int = 200
    log_every: int = 20
    tensorboard: bool = False

    def __post_init__(self):
        _at_least(self, 1, "checkpoint_every", "log_every")


@dataclass(frozen=True)
class Loop:
    """All settings of `loop.fit`."""

    updates: Updates = Updates()
    validation: Validation = Validation()
    sheets: Sheets = Sheets()
    records: Records = Records()

    @classmethod
    def of(cls, given):
        """Loop from flat settings (dict); ValueError for a name that is none."""
        return cls(*apart(given, *PARTS))


PARTS = (Updates, Validation, Sheets, Records)


# --- of a fine-tuning ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What textual inversion and LoRA have in common; each adds its own and says where its default is another.

    Args:
        steps: optimiser updates.
        batch_size: tiles per update.
        lr: step size as it is used, never scaled by batch or devices.
        n_vectors: vectors of each new token; each takes one of the prompt's 77 places.
        group_terms: {group: words} of captions; a group that is not in it goes by its own name.
        balance: what is drawn equally often: `class`, `class+group` or `none`.
        caption_dropout: share of empty captions, which keep the unconditional branch in step with the rest.
        timesteps: drawn `uniform`, weighted by min-SNR, or `structure`: more often where the layout is decided, see `losses.timestep_draw`.
        min_snr_gamma: of the weight of a uniformly drawn timestep, see `losses.min_snr_weight`; 0 weighs all alike.
        loss: `l2` or `l1` of the denoising error.
        hold_out: share of a class's training cases whose loss picks the best step, where it has twenty tiles or more.
    """

    steps: int = 1000
    batch_size: int = 8
    lr: float = 1e-4
    n_vectors: int = 4
    group_terms: dict | None = None
    balance: str = "class+group"
    caption_dropout: float = 0.1
    timesteps: str = "uniform"
    min_snr_gamma: float = 5.0
    loss: str = "l2"
    hold_out: float = HOLD_OUT

    def __post_init__(self):
        object.__setattr__(self, "group_terms", dict(self.group_terms or {}))
        _at_least(self, 1, "steps", "batch_size", "n_vectors")
        if self.loss not in ("l1", "l2"):
            raise ValueError(f"loss is {self.loss!r}; use l2 or l1")
        if self.timesteps not in ("uniform", "structure"):
            raise ValueError(f"timesteps is {self.timesteps!r}; use uniform or structure")
        for name in ("caption_dropout", "hold_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1; got {getattr(self, name)}")

    @classmethod
    def of(cls, given):
        """(settings of this method, Loop) from flat ones; ValueError for a name that neither has."""
        own, *loop = apart({**pace(given.get("steps", cls.steps)), "keep": True, **given}, cls, *PARTS)
        return own, Loop(*loop)

    def identity(self):
        """What a resumed run is compared by: every setting, see `_compared`."""
        return _compared(self, joined=("hold_out", "timesteps"))
