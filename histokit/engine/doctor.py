"""What this machine has: versions, device, memory, weights found or missing, and a picture from a base model in half a minute."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

from histokit.core import files, machine

PROMPT = "a histology image of colorectal adenocarcinoma"  # mini knows it, and to Stable Diffusion it says "tissue"
KEYS = ("base_model", "encoder")  # parameters that name weights


def report(base=""):
    """Print the report; with `base` also draw a sample. Returns the exit status: 1 when built-in weights are missing."""
    for name, text in facts():
        print(f"{name:<10} {text}")
    print()
    missing = 0
    with _offline():  # looking for weights must not fetch them
        found = list(weights())
    for name, kind, problem, recipes in found:
        whose = f" for {', '.join(recipes)}" if recipes and problem else ""
        print(f"{'missing' if problem else 'found':<10} {kind} {name}{whose}" + (f"\n{'':<10} {problem}" if problem else ""))
        missing += bool(problem) and name.startswith("mini")
    if base:
        print("\n" + sample(base, files.root() / "outputs" / "doctor.png"))
    return int(missing > 0)


@contextlib.contextmanager
def _offline():
    from huggingface_hub import constants  # read at each request; the environment variable only once

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def facts():
    """(name, text) lines about versions, device, memory, disk and folders."""
    import psutil
    import torch

    found = machine.versions()
    shown = ("histokit", "python", "torch", "diffusers", "transformers", "peft", "papermill", "jupyterlab")
    yield "versions", ", ".join(f"{name} {found[name]}" for name in shown if name in found)
    yield "python", sys.executable
    busy = "; other programs keep them busy, so a run takes longer than said" if machine.busy() else ""
    yield "processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch{busy}"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    device = machine.device()
    if device == "cuda":
        room = torch.cuda.mem_get_info()
        device = f"{torch.cuda.get_device_name()}, {room[0] / 2**30:.1f} of {room[1] / 2**30:.1f} GiB free"
    yield "device", device
    if machine.notice():
        yield "notice", machine.notice()
    yield "root", f"{files.root()}, {shutil.disk_usage(files.root()).free / 1e9:.1f} GB of disk free"
    yield "kernel", _kernel()


def _kernel():
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel:
        return "no Jupyter kernel python3; install ipykernel into this environment"
    same = Path(command) in (Path(sys.executable), Path("python"), Path("python3"))  # a bare python is ours, by jupyter_client
    return "python3 runs this Python" if same else f"python3 runs another Python, {command}; run `python -m ipykernel install --sys-prefix`"


def weights():
    """(name, kind, problem, recipes) of the built-in weights and of every base or encoder that a recipe in params/ names.

    A recipe whose dataset is not described yet, as those for one's own tiles, is nobody's need.
    """
    from histokit.diffusion import pretrained
    from histokit.vision import encoders

    named = dict.fromkeys([("mini", "base model"), ("mini-ssl", "encoder"), ("mini-sup", "encoder")], ())
    for path in sorted((files.root() / "params").glob("*.yaml")):
        for one in _named(path):
            named[one] = tuple(dict.fromkeys((*named.get(one, ()), f"params/{path.name}")))
    for (name, kind), recipes in named.items():
        problem = ""
        try:
            pretrained.locate(name) if kind == "base model" else encoders.load(name)
        except (OSError, ValueError) as error:
            problem = str(error)
        except Exception as error:  # what a broken file or a foreign library raises must not hide the rest
            problem = f"cannot be read ({type(error).__name__}: {error})"
        yield name, kind, problem, recipes


def _named(path):
    """(name, kind) of the weights one recipe names, wherever in it."""
    from histokit.runs import recipe

    try:
        trees = [recipe.read_yaml(path)]
    except recipe.RecipeError:
        return
    shared = trees[0].get("shared") if isinstance(trees[0], dict) else None
    described = shared.get("dataset") if isinstance(shared, dict) else None
    if described and not (files.root() / str(described)).is_file():
        return
    listed = trees[0].get("steps") if isinstance(trees[0], dict) else None
    steps = {name for step in listed or () for name in (step if isinstance(step, dict) else [step])}  # they train weights themselves
    while trees:
        tree = trees.pop()
        if isinstance(tree, dict):
            for key, value in tree.items():
                if isinstance(value, str) and value and value not in steps and str(key).startswith(KEYS):
                    yield str(value), "base model" if str(key).startswith("base_model") else "encoder"
                else:
                    trees.append(value)
        elif isinstance(tree, list):
            trees += tree


def sample(base, path, seconds=30):
    """Draw four tiles (one on a slow machine) with a base model into `path`; returns a line that says what to look for."""
    import numpy as np
    import torch

    from histokit.diffusion import backbone, sampling

    model = backbone.load(base, machine.device())
    model.need("vae", "unet", "text_encoder", "tokenizer", "scheduler")
    with torch.no_grad():
        words = backbone.embed(model, [PROMPT, ""])
        shape = (model.unet.config.in_channels, model.latent_px, model.latent_px)
        once = sampling.guided(model, words[:1], words[1:], 3.0)
        sampling.denoise(once, _noise(shape, 1, model), model.scheduler, sampling.schedule(model.scheduler, 1))  # warm up
        start = time.time()
        sampling.denoise(once, _noise(shape, 1, model), model.scheduler, sampling.schedule(model.scheduler, 1))
        step = time.time() - start
        count = 4 if 4 * 10 * step < seconds else 1
        steps = int(min(30, max(4, seconds / count / step)))
        predict = sampling.guided(model, words[:1].expand(count, -1, -1), words[1:], 3.0)
        z = sampling.denoise(predict, _noise(shape, count, model), model.scheduler, sampling.schedule(model.scheduler, steps))
        pixels = backbone.decode(model, z)  # [count, H, W, 3]
    took = time.time() - start
    files.write_png(path, np.concatenate(list(pixels), axis=1))
    line = f"{path}: {count} tiles of {model.tile_px} px, {steps} steps, {took:.0f} s on {model.device}. Does it look like tissue?"
    if pixels.std() < 8 or not np.isfinite(pixels).all():
        line += f"\nThe tiles are almost one colour (spread {pixels.std():.1f} of 255): these weights do not work here."
    return line


def _noise(shape, count, model):
    import torch

    from histokit.diffusion import sampling

    generators = [torch.Generator().manual_seed(files.seed("doctor", i)) for i in range(count)]
    return sampling.noise(generators, shape, model.device)
