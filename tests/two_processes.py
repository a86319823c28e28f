"""One of two processes that train together (gloo, CPU): python two_processes.py RANK STORE FOLDER STEPS; prints nothing."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model

from histokit.training import loop, unconditional


def batches(k):
    return {"latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(k))}


def validate():
    return 1.0


def train(folder, steps, accumulate=2):
    """The weights of a tiny prior after `steps` updates of two micro-batches."""
    model = tiny_model()
    model.unet.requires_grad_(True)
    loop.fit(
        [unconditional.player(model, 1e-3)], batches, steps, 0, folder=folder, accumulate=accumulate, ema=0.99, checkpoint_every=2,
        clip=0.5, validate=validate, validate_every=2,
    )  # fmt: skip
    return [p.detach().clone() for p in model.unet.parameters()]


if __name__ == "__main__":
    rank, store, folder, steps = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    weights = train(folder, steps)
    from histokit.core import files

    files.write_tensors(folder.with_name(f"rank{rank}.safetensors"), {str(i): p for i, p in enumerate(weights)})
    dist.destroy_process_group()
