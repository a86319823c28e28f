"""The machine a run happens on: versions, device, memory, and a word when a GPU stands idle. torch is imported only when asked for."""

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from histokit import PACKAGE

PACKAGES = (
    "histokit torch torchvision diffusers transformers peft accelerate timm numpy pandas pyarrow pillow scikit-learn scipy papermill "
    "ipykernel ipywidgets jupyterlab safetensors"
).split()

# Threads that wait for each other soon sleep instead of spinning: on a busy machine a spinning one takes the core of the one it waits for.
# UNet step, 2 threads: alone 1.6 s for 1.3, beside one busy process 2.5 for 4.7.
_PASSIVE = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
# glibc keeps the memory of large tensors for the next ones: asking for new pages each time took a third to half of the autoencoder's time.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26)}
KERNEL = _PASSIVE | _KEEP_MEMORY  # environment of every kernel that is started, read by libraries before they do anything


def versions():
    """{"python": "3.11.7", "torch": "2.14.1", ...} of what matters to a result; a package that is missing is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit():
    """The git commit of the package's clone, with "+" when files differ from it; "" outside a clone."""
    top = PACKAGE.parent
    if not (top / ".git").exists():
        return ""
    try:
        ask = {"cwd": top, "capture_output": True, "text": True, "timeout": 10}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask).stdout.strip()
        git = ["git", "-c", "filter.nbstripout.clean=cat"]  # stripping nine notebooks takes ten seconds, and none is committed here
        changed = subprocess.run([*git, "status", "--porcelain", "-uno", "histokit", "notebooks"], **ask).stdout.strip()
        return head + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return ""


def device():
    """Where to compute, "cuda", "mps" or "cpu": $HISTOKIT_DEVICE when set, else the best that torch can use."""
    if os.environ.get("HISTOKIT_DEVICE"):
        return os.environ["HISTOKIT_DEVICE"]
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def threads():
    """Threads a computation uses; torch's count once it is loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def use_threads(number):
    """Let computations of the calling thread use `number` threads; nothing where torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(number)


def place():
    """(number of this process, how many there are) of a training on several devices; (0, 1) in a process of its own."""
    torch = sys.modules.get("torch")
    dist = torch and torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist and dist.is_available() and dist.is_initialized() else (0, 1)


def busy():
    """Whether others have kept half of the cores or more at work over the last minute; False where the system does not say."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] >= (os.cpu_count() or 1) / 2


def bfloat16(device):
    """torch.bfloat16 where the device multiplies it in hardware, else None: a CPU that emulates it takes ten times as long."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(able.get(name) for name in ("avx512_bf16", "amx_tile", "sve_bf16")) else None


def memory():
    """Peak memory of this process so far in GiB: {"ram": ..} and, once torch used a GPU, {"gpu": ..}."""
    peaks = {}
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks["ram"] = round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)
    except ImportError:  # Windows
        pass
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        peaks["gpu"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return peaks


def notice():
    """One plain line when the driver sees a GPU and torch cannot use it, else ""."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden on purpose
        return ""
    name = driver_sees()
    if not name:
        return ""
    try:
        import torch
    except ImportError:
        return f"The driver sees a GPU ({name}), but torch is not installed."
    if torch.cuda.is_available():
        return ""
    build = f"built for CUDA {torch.version.cuda}, newer than the driver allows" if torch.version.cuda else "a build without CUDA"
    return (
        f"The driver sees a GPU ({name}), but torch {torch.__version__} cannot use it ({build}): everything runs on the CPU. "
        "Install a torch that fits the driver (pytorch.org/get-started) and use `make demo TORCH=existing`."
    )


def driver_sees():
    """The GPU's name, or its device node, as the NVIDIA driver shows it; "" without one."""
    nodes = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    if not shutil.which("nvidia-smi"):
        return f"/dev/{nodes[0]}" if nodes else ""
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError):
        pass
    return f"/dev/{nodes[0]}" if nodes else ""


def peak_gb():
    """Peak memory in GB: of the accelerator where one is used, else of this process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)
