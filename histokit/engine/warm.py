"""Kernels that start warm: one process imports the libraries, and each job's kernel is forked from it instead of importing them again.

    batch   <-> the warm process    a pair of sockets; when the batch ends, so do the warm process and its kernels
    a worker <-> the warm process   a pair for each job, passed on by the batch: the kernel's command, its pid, its exit status

Torch, diffusers and their like take some ten seconds of one core in every kernel: a sixth of the demo. Only where that is safe and pays:
on Linux without a GPU, whose driver a forked process could not use if an import has touched it. Anything else, and a warm process that
has died, starts kernels as Jupyter does. Nothing of histokit is imported ahead: a file that changes while a recipe runs is read by the
next kernel, as ever.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

from histokit.core import machine

# what most notebooks import, and what of it imports itself late; pyplot chooses a backend when it is imported, so not that
INLINE = "module://matplotlib_inline.backend_inline"  # the backend that ipykernel asks for
LIBRARIES = """
numpy pandas pyarrow.parquet PIL.Image scipy.ndimage scipy.stats sklearn.linear_model sklearn.pipeline sklearn.neighbors
sklearn.model_selection matplotlib.figure safetensors.torch torch torch._dynamo ipykernel.kernelapp IPython.core.interactiveshell
diffusers.models.autoencoders.autoencoder_kl diffusers.models.unets.unet_2d_condition diffusers.schedulers.scheduling_ddim
transformers.models.clip.modeling_clip transformers.models.clip.tokenization_clip peft""".split()
PROVISIONER = "histokit-warm"


def libraries():
    """What is imported ahead: `LIBRARIES`, or what $HISTOKIT_WARM names; nothing, so that kernels start cold, where it is 0."""
    said = os.environ.get("HISTOKIT_WARM", "1")
    return LIBRARIES if said == "1" else [] if said in ("", "0") else said.split(",")


def pays():
    """Whether kernels may be forked here: on Linux, without a GPU, and with something to import ahead."""
    no_gpu = not machine.driver_sees() and not Path("/dev/kfd").exists()
    return sys.platform == "linux" and no_gpu and bool(libraries())


# --- in the batch ----------------------------------------------------------------------------------------------------


class Warm:
    """The batch's end: starts the warm process, and gives each job a line to it."""

    def __init__(self, root, env):
        self.control, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "histokit.engine.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], cwd=root, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self.asked = False

    def line(self):
        """A socket for a job's worker to inherit, or None where the warm process is gone; the caller closes it once it is inherited."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self.control, [b"."], [theirs.fileno()])
            except OSError:
                ours.close()
                return None
        self.asked = True
        return ours

    def close(self):
        """End the warm process and every kernel that is left."""
        self.control.close()
        if not self.asked:  # it may be importing still, and has no kernel
            self.process.kill()
        self.process.wait()


# --- in a job's worker -----------------------------------------------------------------------------------------------


def use(line):
    """Let Jupyter start its kernels by the warm process at the other end of `line`, a file descriptor."""
    from importlib.metadata import EntryPoint

    from jupyter_client.provisioning import KernelProvisionerFactory
    from jupyter_client.provisioning.local_provisioner import LocalProvisioner

    line = socket.socket(fileno=line)

    class Provisioner(LocalProvisioner):
        async def launch_kernel(self, cmd, **given):
            if cmd[:3] != [sys.executable, "-m", "ipykernel_launcher"]:
                return await super().launch_kernel(cmd, **given)
            try:
                self.process = Kernel(line, cmd, given.get("env") or dict(os.environ), given.get("cwd") or os.getcwd())
            except OSError:  # the warm process has died
                return await super().launch_kernel(cmd, **given)
            self.pid = self.pgid = self.process.pid
            self.cwd = given.get("cwd")
            return self.connection_info

    class Here(EntryPoint):
        def load(self):
            return Provisioner

    factory = KernelProvisionerFactory.instance()
    factory.provisioners[PROVISIONER] = Here(PROVISIONER, "histokit.engine.warm", KernelProvisionerFactory.GROUP_NAME)
    factory.default_provisioner_name = PROVISIONER


class Kernel:
    """A forked kernel as Jupyter looks after one: the part of `subprocess.Popen` that it asks for."""

    stdin = stdout = stderr = None

    def __init__(self, line, cmd, env, cwd):
        self.line, self.returncode = line, None
        request = json.dumps({"cmd": cmd, "env": env, "cwd": str(cwd)}).encode() + b"\n"
        socket.send_fds(line, [request[:1]], [1, 2])  # what libraries print goes where this process prints
        line.sendall(request[1:])
        said = _line(line)
        if not said:
            raise ConnectionError("the warm process has died")
        self.pid = json.loads(said)

    def poll(self):
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self.line], [], [], 0)[0]:
            said = _line(self.line)
            if not said:  # the warm process has died, and nobody else can say how its kernel ends
                _end(self.pid)
            self.returncode = json.loads(said) if said else -signal.SIGKILL
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None and not select.select([self.line], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("kernel", timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def _line(sock):
    """The next line that comes, without reading past it; b"" where the other end is gone."""
    found = b""
    while not found.endswith(b"\n"):
        try:
            more = sock.recv(1)
        except OSError:
            more = b""
        if not more:
            return b""
        found += more
    return found


# --- the warm process ------------------------------------------------------------------------------------------------


def main(control):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the batch hears it, and closes
    for name in libraries():
        with contextlib.suppress(Exception):  # what is broken fails in the kernel that needs it, with its own words
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection would copy every page it looks at
    serve(socket.socket(fileno=control))


def serve(control):
    """Fork a kernel for each request, tell each how it ends, and end with the batch."""
    lines = {}  # socket of a job: pid of its kernel, or None
    while True:
        for sock in select.select([control, *lines], [], [], 0.05 if any(lines.values()) else None)[0]:
            if sock is control:
                message, fds, _, _ = socket.recv_fds(control, 1, 1)
                if not message:
                    return _kill(lines.values())
                lines[socket.socket(fileno=fds[0])] = None
                continue
            first, fds, _, _ = socket.recv_fds(sock, 1, 2)
            if not first:  # the worker is gone, and nobody would hear its kernel
                _kill([lines.pop(sock)])
                sock.close()
                continue
            try:
                request = json.loads(first + _line(sock))
                pid = os.fork()
            except (ValueError, OSError):  # a worker that was killed while it asked, or no room for a process: it starts cold
                lines.pop(sock)
                sock.close()
                for fd in fds:
                    os.close(fd)
                continue
            if not pid:
                _become(request, fds, [control, *lines])
            for fd in fds:
                os.close(fd)
            lines[sock] = pid
            _tell(sock, pid)
        for sock, pid in lines.items():
            if pid and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                lines[sock] = None
                _tell(sock, os.waitstatus_to_exitcode(ended[1]))


def _tell(sock, number):
    with contextlib.suppress(OSError):
        sock.sendall(b"%d\n" % number)


def _kill(pids):
    for pid in filter(None, pids):
        _end(pid)
        os.waitpid(pid, 0)


def _end(pid):
    for kill in (os.killpg, os.kill):  # it may not lead a group of its own yet
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def _become(request, fds, sockets):
    """Turn this fork into the kernel that was asked for; never returns."""
    status = 1
    try:
        os.setsid()
        for sock in sockets:
            sock.close()
        for theirs, ours in zip(fds, (1, 2), strict=True):
            os.dup2(theirs, ours)
            os.close(theirs)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["env"])
        if "matplotlib" in sys.modules:  # it read the environment of the warm process
            sys.modules["matplotlib"].rcParams["backend"] = os.environ.get("MPLBACKEND") or INLINE
        os.chdir(request["cwd"])
        for name in [name for name in sys.modules if name.split(".")[0] == "histokit"]:
            del sys.modules[name]
        _own_numbers()
        sys.argv, sys.path[0] = [*request["cmd"][2:], f"--IPKernelApp.parent_handle={os.getppid()}"], request["cwd"]
        runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _own_numbers():
    """Random states of its own, as a process that starts has them, and the number of threads that its environment asks for."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # a new process draws it from the system; torch's is the same in every new process, and here
    if "torch" in sys.modules and os.environ.get("OMP_NUM_THREADS", "").isdigit():
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
