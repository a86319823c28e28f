"""Every test works in a folder of its own, offline, with few threads."""

import dataclasses
import os
import socket
import tempfile
from pathlib import Path

WORKER = "PYTEST_XDIST_WORKER" in os.environ
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1" if WORKER else os.environ.get(name, "2")  # a worker inherits the number of the process that starts it
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HISTOKIT_WARM", "0")  # a few small kernels start sooner cold
os.environ.pop("HISTOKIT_NOTEBOOK", None)
os.environ.pop("JPY_SESSION_NAME", None)

import pytest  # noqa: E402
from lab import browser, lab, page  # noqa: E402, F401  (fixtures)

_session = tempfile.TemporaryDirectory(prefix="histokit-tests-")
os.environ["HISTOKIT_ROOT"] = _session.name  # for fixtures that outlive a test; each test has its own


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """The working root of this test, empty but for params/."""
    (tmp_path / "params").mkdir(exist_ok=True)
    monkeypatch.setenv("HISTOKIT_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """No dry run stops to try how fast this machine is; the list holds what would have been measured."""
    from histokit.core import machine
    from histokit.engine import speed

    asked = []
    monkeypatch.setattr(machine, "busy", lambda: False)  # it is, with tests
    rates = speed.Rates(start=10, read=0.01, see={}, head=0.001, train=0.1, denoise=0.05, code=0.1, lora_bytes=10**6, latent_bytes=10**4)

    def instead(base, batch, encoders, device, seconds):
        asked.append((base, batch, encoders))
        return dataclasses.replace(rates, see=dict.fromkeys(encoders, 0.01))

    monkeypatch.setattr(speed, "measure_all", instead)
    return asked


@pytest.fixture(scope="session")
def repository():
    """The top folder of the repository: its params/ and notebooks/."""
    return Path(__file__).resolve().parent.parent


def _loopback(address):
    return not isinstance(address, tuple) or str(address[0]) in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", "None")


@pytest.fixture(autouse=True, scope="session")
def offline():
    """No test reaches the network: connections that leave this machine are refused, names are not looked up."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded(original):
        def call(self, address):
            if not _loopback(address):
                raise OSError(f"tests are offline, refused a connection to {address}")
            return original(self, address)

        return call

    def look_up(host, *args, **kwargs):
        if not _loopback((host,)):
            raise socket.gaierror(f"tests are offline, refused to look up {host}")
        return lookup(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded(connect))
    patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    patch.setattr(socket, "getaddrinfo", look_up)
    yield
    patch.undo()


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable; the longest files first, so that no worker is left with them at the end
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))


@pytest.fixture
def drafted(root, capsys):
    """`drafted(folder)` -> (what init printed, the rows that 00 would read)."""

    from histokit.tiles import data
    from histokit.tiles.ingest import autodescribe

    def of(folder, scan=True):
        path = root / "params" / "datasets" / "draft.yaml"
        path.unlink(missing_ok=True)
        assert autodescribe.draft(folder, path) == 0
        return capsys.readouterr().out, data.scan(data.describe(path)) if scan else None

    return of
