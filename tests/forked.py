"""Real processes that need no seconds of imports: forks of a helper that has them all.

`run(["pipelines.train_flow", "CONFIG", "key=value"])` does what `python -m` does with these words.
The helper is a process of its own, started once by each test process at the first call. It imports
torch, diffusers and the stages, holds one thread, runs nothing, and forks a child for each call, so
that a child starts with no locks, no sockets, no random state and no threads of the tests.

A child differs from a fresh interpreter in four points: its libraries were imported with the
environment of the helper (variables that are read at import are those of the first call), it leads a
session of its own, modules imported by the helper do not prove that the child imports them, and it ends
after its atexit functions: to take apart what it shares with the helper would take most of its time.
Tests of what a module imports, or of a GPU, start `python` instead.

`Program` is a script in a fork of another helper, which has imported torch and diffusers alone: the
fresh process in which an export is checked.
"""

import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
ROOT = Path(__file__).parents[1]
DIFFUSERS = [
    "torch",
    "diffusers.models.unets.unet_2d",
    "diffusers.pipelines.consistency_models.pipeline_consistency_models",
    "diffusers.pipelines.ddpm.pipeline_ddpm",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
]
LIBRARIES = """
    accelerate datasets fsspec omegaconf s3fs scipy.optimize sklearn.datasets torch torch.distributed
    torch.utils.data torch.utils.serialization torchdiffeq torchmetrics.image.fid tqdm.auto webdataset
    yaml PIL.JpegImagePlugin PIL.PngImagePlugin matplotlib.backends.backend_agg
    matplotlib.backends.backend_svg diffusers.models.unets.unet_2d diffusers.optimization
    diffusers.pipelines.consistency_models.pipeline_consistency_models
    diffusers.pipelines.ddpm.pipeline_ddpm diffusers.schedulers.scheduling_ddpm
    diffusers.schedulers.scheduling_dpmsolver_multistep
    diffusers.schedulers.scheduling_flow_match_euler_discrete diffusers.training_utils
    diffusers.models.unets.unet_2d_condition transformers.models.clip.modeling_clip
    diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
"""
MODULES = [
    *LIBRARIES.split(),
    *(f"{path.parent.name}.{path.stem}" for path in sorted(ROOT.glob("pipelines/[!_]*.py"))),
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted(ROOT.glob("flowmatch/*/[!_]*.py"))
        if path.stem != "sample_fresh"  # a program, not a module
    ),
]


class Popen:
    """A child of the helper, with the interface of subprocess.Popen.

    Args:
        argv: a module and its words, as after `python -m`.
        cwd: working directory, also the first place where modules are searched.
        env: the whole environment; that of the caller without it.
        stdout, stderr: None (the caller's), PIPE, DEVNULL or an open file; stderr also STDOUT.
    """

    KIND = "stages"

    def __init__(self, argv, *, cwd=ROOT, env=None, stdout=None, stderr=None):
        self.args, self.returncode = [str(word) for word in argv], None
        opened = []
        self.stdout, out = _output(stdout, 1, opened)
        self.stderr, err = (None, out) if stderr == STDOUT else _output(stderr, 2, opened)
        read, write = os.pipe()
        self._report, self._lock = os.fdopen(read, "rb", 0), threading.Lock()
        opened.append(write)
        request = {
            "argv": self.args,
            "cwd": str(cwd),
            "env": dict(os.environ if env is None else env),
        }
        try:
            socket.send_fds(_helper(self.KIND), [json.dumps(request).encode()], [out, err, write])
        finally:
            for file in opened:
                os.close(file)
        self.pid = self._reported()

    def _reported(self):
        number = self._report.read(8)
        if not number:
            raise RuntimeError("the helper that forks stages has ended; its error is on stderr")
        return int.from_bytes(number, "big", signed=True)

    def wait(self, timeout=None):
        """Wait until the child ends; return its exit status, -N where signal N ended it."""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._report], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                self.returncode = self._reported()
                self._report.close()
        return self.returncode

    def poll(self):
        """Return the exit status, or None while the child runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout=None):
        """Read what the child prints and wait until it ends; return (stdout, stderr)."""
        texts = {}
        readers = [
            threading.Thread(target=lambda f=file: texts.update({f: f.read()}), daemon=True)
            for file in (self.stdout, self.stderr)
            if file is not None
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts.get(self.stdout), texts.get(self.stderr)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.close()


class Program(Popen):
    """A script in a fork of a process that has imported torch and diffusers, but none of our modules.

    Args:
        argv: the interpreter, which is not used, and the path of a script.
        stdin: PIPE: `communicate` writes a text to it.
    """

    KIND = "diffusers"

    def __init__(self, argv, *, cwd, env, stdin, stdout, stderr, text):
        assert (stdin, stdout, stderr, text) == (PIPE, PIPE, PIPE, True)
        self._input = tempfile.TemporaryDirectory()
        self.stdin, words = None, [Path(self._input.name) / "stdin", *argv[1:]]
        os.mkfifo(words[0])
        super().__init__(words, cwd=cwd, env=env, stdout=stdout, stderr=stderr)

    def communicate(self, text):
        """Write the text, wait until the child ends; return (stdout, stderr)."""
        (Path(self._input.name) / "stdin").write_text(text)
        return super().communicate()


def run(argv, *, cwd=ROOT, env=None, check=False, timeout=None):
    """Run a module to its end; return subprocess.CompletedProcess with the texts that it printed.

    Raises:
        subprocess.CalledProcessError: with `check`, if the exit status is not 0.
        subprocess.TimeoutExpired: after `timeout` seconds; the child is killed.
    """
    return _run(argv, cwd, [env], check, timeout)[0]


def start_ranks(world, argv, *, env=None, **options):
    """Start a module as the processes of one job, with the environment that a launcher gives them."""
    return [Popen(argv, env=rank, **options) for rank in environments(world, env)]


def run_ranks(world, argv, *, cwd=ROOT, env=None, check=False, timeout=None):
    """Run a module like `run`, as the processes of one job; a process that fails ends the others."""
    return _run(argv, cwd, environments(world, env), check, timeout)


def environments(world, env=None):
    """Return the environments of the processes of a job on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env = dict(os.environ if env is None else env) | job | {"WORLD_SIZE": str(world)}
    return [env | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(world)]


def _run(argv, cwd, environments, check, timeout):
    end = None if timeout is None else time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        files = [
            [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            for _ in environments
        ]
        children = []
        try:
            for env, (out, err) in zip(environments, files, strict=True):
                children.append(Popen(argv, cwd=cwd, env=env, stdout=out, stderr=err))
            while running := [child for child in children if child.poll() is None]:
                if any(child.returncode for child in children):
                    break
                if end is not None and time.monotonic() > end:
                    raise subprocess.TimeoutExpired(children[0].args, timeout)
                select.select([child._report for child in running], [], [], 0.1)
        finally:
            for child in children:
                child.kill()
                child.wait()
        results = []
        for child, pair in zip(children, files, strict=True):
            for file in pair:
                file.seek(0)
            texts = [file.read() for file in pair]
            results.append(subprocess.CompletedProcess(child.args, child.returncode, *texts))
    for done in results if check else ():
        if done.returncode:
            words = (done.returncode, done.args, done.stdout, done.stderr)
            error = subprocess.CalledProcessError(*words)
            error.add_note(f"{done.stdout}{done.stderr}")
            raise error
    return results


def _output(wanted, own, opened):
    """Return the end of an output that the caller reads, or None, and the end that the child writes."""
    if wanted == PIPE:
        read, write = os.pipe()
        opened.append(write)
        return os.fdopen(read), write
    if wanted == DEVNULL:
        opened.append(os.open(os.devnull, os.O_WRONLY))
        return None, opened[-1]
    if wanted is None:
        return None, own
    return None, wanted if isinstance(wanted, int) else wanted.fileno()


_HELPERS = {}  # process id of the caller, kind -> helper: a fork of the tests starts its own


def _helper(kind):
    """Start the helper of a kind at the first call; return the socket to it."""
    if (key := (os.getpid(), kind)) not in _HELPERS:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        cache = tempfile.TemporaryDirectory()
        if (
            kind == "diffusers"
        ):  # read at import; each child copies the code of its folder there anew
            single["HF_MODULES_CACHE"] = cache.name
        single["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator has one
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", kind, str(theirs.fileno())],
            cwd=ROOT,
            env=os.environ | single,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        _HELPERS[key] = ours, process, cache
        atexit.register(_close, key)
    return _HELPERS[key][0]


def _close(key):
    """End the helper, which kills what still runs."""
    if key[0] == os.getpid():
        control, process, cache = _HELPERS.pop(key)
        control.close()
        process.wait()
        cache.cleanup()


def serve(control):
    """Fork a child for each request until the caller is gone; return in the children, with theirs."""
    reports = {}  # process id -> where its exit status is reported
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        ready = select.select([control, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            _report_ended(reports)
        if control not in ready:
            continue
        message, files, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not message:
            for pid in reports:
                os.kill(pid, signal.SIGKILL)
            sys.exit()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # ignored where the tests run in the background of a shell
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(files[0], 1)
            os.dup2(files[1], 2)
            control.close()
            for file in [*files, *reports.values(), woken, wake]:
                os.close(file)
            return json.loads(message)
        reports[pid] = files[2]
        _write(files[2], pid)
        for file in files[:2]:
            os.close(file)


def _report_ended(reports):
    while reports:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        _write(reports[pid], os.waitstatus_to_exitcode(status))
        os.close(reports.pop(pid))


def _write(file, number):
    with contextlib.suppress(BrokenPipeError):  # a test may not wait for its child
        os.write(file, number.to_bytes(8, "big", signed=True))


def become(kind, argv, cwd, env):
    """Be `python -m` with these words, or `python` with a script, in this forked process."""
    import numpy as np

    os.setsid()
    os.chdir(cwd)
    for name in set(os.environ) - set(env):
        del os.environ[name]
    os.environ.update(env)
    sys.path.insert(0, cwd)
    random.seed()
    np.random.seed()  # noqa: NPY002 (stages may draw from the global generator)
    module, code = argv[0], 0
    sys.argv[1:] = argv[1:]
    sys.modules.pop(module, None)  # `python -m` executes it once, as __main__
    try:
        if kind == "stages":
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            with open(module) as sys.stdin:
                runpy.run_path(argv[1], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # joins threads, as the end of Python does
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    os._exit(code & 0xFF)


def preload(modules):
    """Import modules; check that no import started a thread: a fork would not have it."""
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # transformers misses torchvision, and says so
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:  # the child that needs it says so
            traceback.print_exc()
    logging.disable(logging.NOTSET)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"an import started threads: {threading.enumerate()}, {threads}"
    gc.collect()
    gc.freeze()  # the children share these pages


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    preload(MODULES if kind == "stages" else DIFFUSERS)
    become(kind, **serve(socket.socket(fileno=int(sys.argv[1]))))
