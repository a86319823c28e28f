"""A real JupyterLab in a headless browser, for tests; conftest.py makes fixtures of `browser`, `page` and `lab`."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from patience import HANGS

from histokit.core import files

PATIENCE = 1000 * HANGS  # milliseconds


@pytest.fixture(scope="module")
def browser():
    """A headless browser; skips where there is none."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: JupyterLab is not driven")
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")))
    browser = os.environ.get("CHROME") or next(found, None)
    if not browser:
        pytest.skip("no Chromium on this machine: JupyterLab is not driven (apt-get install chromium)")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]
    with sync.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser, args=[*quiet, "--disable-sync", "--no-first-run"])
        yield running
        running.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1360, "height": 1000})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


@pytest.fixture
def lab(root):
    """Address of a JupyterLab whose root is this test's."""
    with serving(root, "jupyterlab", f"--ServerApp.root_dir={root}") as address:
        yield address


@contextlib.contextmanager
def serving(root, *module):
    """Address of the JupyterLab that `python -m module ...` starts, with settings of its own and no look at the news."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = root / ".jupyter"
    server = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "allow_root": True}
    files.write_json(own / "jupyter_server_config.json", {"ServerApp": server, "IdentityProvider": {"token": ""}})
    settings = own / "lab" / "user-settings" / "@jupyterlab"
    news, cells = settings / "apputils-extension" / "notification", settings / "notebook-extension" / "tracker"
    files.write_text(news.with_suffix(".jupyterlab-settings"), '{"fetchNews": "false", "checkForUpdates": false}')
    files.write_text(cells.with_suffix(".jupyterlab-settings"), '{"windowingMode": "none"}')  # every cell is on the page
    places = {
        "JUPYTER_CONFIG_DIR": own,
        "JUPYTER_DATA_DIR": own / "data",
        "JUPYTER_RUNTIME_DIR": own / "run",
        "IPYTHONDIR": own / "ipython",
    }
    tests = Path(__file__).resolve().parent
    code = os.pathsep.join((str(tests), str(tests.parent)))  # the package beside these tests, wherever another is installed
    environment = os.environ | {name: str(path) for name, path in places.items()} | {"PYTHONPATH": code}
    with open(root / "lab.log", "w") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", *module], env=environment, cwd=root, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, started, root / "lab.log")
        yield address
    finally:
        group = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        os.killpg(started.pid, signal.SIGTERM)  # not to the kernels: each has a group of its own, and Lab ends them before it ends
        _, left = psutil.wait_procs(group, 30)
        for process in left:
            process.kill()
        started.wait()


def _wait_for(address, server, log):
    until = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/api", timeout=HANGS):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(log.read_text())


def photograph(page, name):
    if os.environ.get("HISTOKIT_SCREENSHOTS"):
        page.screenshot(path=str(Path(os.environ["HISTOKIT_SCREENSHOTS"]) / f"{name}.png"))


def wait_until(true):
    """Waits for something that happens in the kernel, outside the page."""
    until = time.monotonic() + PATIENCE / 1000
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
