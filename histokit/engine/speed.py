"""How fast this machine is at what the notebooks are made of: a training step, a denoising pass, a feature, a kernel's start.

Half a minute, with the base and the encoders of a recipe, so that `histokit run --dry-run` can say how long it will take.
"""

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

from histokit.core import files, machine
from histokit.engine import warm

VERSION = 4
KERNEL = (
    "ipykernel",
    "papermill",
    "histokit.diffusion.backbone",
    "histokit.vision.features",
    "histokit.show.plots",
    "histokit.evaluate.verdict",
)
SECONDS = 30  # of measuring, where a single step of the base does not take longer


@dataclass(frozen=True)
class Rates:
    """Seconds that one of each takes here, and bytes; None where it could not be tried, and `lacking` says why."""

    start: float  # a kernel with its imports
    read: float | None = None  # a real tile opened, hashed and resized
    see: dict = field(default_factory=dict)  # one view of a tile, by encoder
    head: float | None = None  # one update of a linear head
    train: float | None = None  # one image in one step of LoRA
    denoise: float | None = None  # one image in one pass of the UNet
    code: float | None = None  # one image through half the autoencoder
    lora_bytes: int = 0  # of a LoRA of rank 16
    latent_bytes: int = 0  # of one cached latent
    lacking: str = ""


def rates(parameters, seconds=SECONDS, *, measure=True, say=print):
    """Rates of this machine for the bases and encoders of some jobs; measured once and kept in outputs/.cache. None without `measure`.

    What is measured beside other work may be slower than the run will be, by any factor; it is used, but not kept.

    Args:
        parameters: of each job, a dict.
        seconds: of measuring altogether; a single step that takes longer is not cut.
        say: called with one line when measuring begins.
    """
    base = next((p["base_model"] for p in parameters if p.get("base_model")), "")
    batch = next((p["batch_size"] for p in parameters if "batch_size" in p and ("rank" in p or "n_vectors" in p)), 8)
    arms = [arm for p in parameters for arm in p.get("arms", {}).values() if arm]
    encoders = sorted({one["encoder"] for one in [*parameters, *arms] if one.get("encoder")})
    device = machine.device()
    key = [VERSION, base, batch, encoders, device, machine.threads(), machine.versions()]
    kept = files.cache("rates") / f"{files.digest(*key)[:24]}.json"
    if kept.is_file():
        return Rates(**files.read_json(kept))
    if not measure:
        return None
    busy = machine.busy()
    remark = "; it was busy just now, so the times may be too long, and are tried again next time" if busy else ""
    say(f"trying how fast this machine is, for about {seconds} s{remark} ...")
    measured = measure_all(base, batch, encoders, device, seconds)
    if not (measured.lacking or busy):
        files.write_json(kept, asdict(measured))
    return measured


def cost(units, rates):
    """(seconds, bytes, files) of a Counter of `work`; seconds None where a rate is lacking."""
    each = {**asdict(rates), "seconds": 1.0} | {("see", name): rate for name, rate in rates.see.items()}
    plain, seconds = {"bytes", "files", "latents", "loras"}, 0.0
    for name, number in units.items():
        if name in plain or not number:
            continue
        rate = each.get(("see", name[1]) if isinstance(name, tuple) else name)
        if rate is None:
            seconds = None
            break
        seconds += number * rate
    size = units["bytes"] + units["latents"] * rates.latent_bytes + units["loras"] * rates.lora_bytes
    return seconds, int(size), int(units["files"])


def once(all_units):
    """The same Counters, in order, without views of tiles that an earlier job has put into the cache."""
    known, out = set(), []
    for units in all_units:
        kept = Counter()
        for name, number in (units or {}).items():
            shared = isinstance(name, tuple) and name[0] in ("real", "made", "coded")
            kept[name] = 0 if shared and name in known else number
            known |= {name} if shared else set()
        out.append(kept if units is not None else None)
    return out


def measure_all(base, batch, encoders, device, seconds):
    """Rates as they are found now; what cannot be loaded is left out and named in `lacking`."""
    share = seconds / (5 + len(encoders))
    _head(1)  # the first optimiser of a process imports for seconds, and 50 updates would be said to take them
    found = {"start": _kernel(), "read": _clock(_read, 20, share), "head": _clock(_head, 50, share), "see": {}}
    lacking = []
    for name in encoders:
        try:
            found["see"][name] = _encoder(name, device, share)
        except (ValueError, OSError) as error:
            lacking.append(str(error))
    if base:
        try:
            found |= _base(base, batch, device, share)
        except (ValueError, OSError) as error:
            lacking.append(str(error))
    return Rates(**found, lacking="; ".join(lacking))


def _clock(work, times, share):
    """Seconds of one of the `times` that work(times) does: the median of what fits into `share` seconds, three tries at most."""
    tries, begun = [], time.perf_counter()
    while len(tries) < 3 and (not tries or time.perf_counter() - begun + tries[-1] < share):
        start = time.perf_counter()
        work(times)
        tries.append(time.perf_counter() - start)
    return statistics.median_low(tries) / times


def _kernel():
    """Seconds of a kernel's imports, without those that a warm one has behind it."""
    import subprocess
    import sys

    ahead = [name for name in (warm.libraries() if warm.pays() else []) if find_spec(name.partition(".")[0])]
    code = (
        f"import {', '.join(['time', *ahead])}; begun = time.perf_counter(); import {', '.join(KERNEL)}; print(time.perf_counter() - begun)"
    )
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1])


def _read(times):
    """A tile of 256 px opened, hashed and resized; files of a slow disk take longer."""
    import tempfile
    from pathlib import Path

    import numpy as np
    import pandas as pd

    from histokit.tiles import data

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tile.png"
        files.write_png(path, np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8))
        row = pd.DataFrame({"path": [str(path)], "tile_px": [128], "fit": ["resize"], "mpp": [float("nan")], "tile_id": ["tile"]})
        for _ in range(times):
            files.sha256(path)
            data.pixels(row)


def _head(times, batch=64, width=384, classes=8):
    import torch

    head, x = torch.nn.Linear(width, classes), torch.randn(batch, width)
    optimiser = torch.optim.AdamW(head.parameters())
    for _ in range(times):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(x), torch.zeros(batch, dtype=torch.int64)).backward()
        optimiser.step()


def _encoder(name, device, share):
    import numpy as np

    from histokit.vision import features

    encoder, n = features.load(name, device), 16 if device == "cpu" else 128
    pixels = np.random.default_rng(0).integers(0, 255, (n, 128, 128, 3), np.uint8)
    encoder(pixels[:1])  # warm up
    return _clock(lambda times: encoder(pixels[:times]), n, share)


def _base(base, batch, device, share):
    """Rates of a base model: a LoRA step, a pass with guidance, half an autoencoder; and the sizes of what it leaves."""
    import torch

    from histokit.diffusion import adapters, backbone, losses, sampling
    from histokit.training import lora

    model = backbone.load(base, device)
    model.need("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    shape, together = (model.unet.config.in_channels, model.latent_px, model.latent_px), sampling.batch_size(model)
    words, wait = backbone.embed(model, [""]).detach(), torch.cuda.synchronize if device == "cuda" else lambda: None
    t = torch.tensor(500, device=device)

    def draw(times):
        z = torch.randn(times, *shape, device=device)
        with torch.no_grad():
            sampling.guided(model, words.expand(times, -1, -1))(z, t, 0)
        wait()

    def code(times):
        backbone.decode(model, torch.randn(times, *shape, device=device), min(times, 4))
        wait()

    draw(1), code(1)  # warm up
    found = {"denoise": _clock(draw, 2 * together, share), "code": _clock(code, together, share)}
    params = adapters.add_lora(model, 16, targets=lora.Settings.targets)
    for p in params:
        p.requires_grad_(True)

    def train(times):
        z = torch.randn(times, *shape, device=device)
        with model.autocast():
            at = torch.full((times,), 500, device=device)
            loss = losses.diffusion_loss(model.unet, model.scheduler, z, words.expand(times, -1, -1), at, torch.randn_like(z))
        loss.backward()
        for p in params:
            p.grad = None
        wait()

    train(1)
    found |= {"train": _clock(train, batch, share), "lora_bytes": 4 * sum(p.numel() for p in params)}
    return found | {"latent_bytes": 2 * 4 * shape[0] * shape[1] * shape[2]}
