"""A stage from the command line to its plan: errors as exit codes, one folder, one content.

Resume means: repeat the command. The same content resumes, a sealed folder says so and is left alone,
other content is an error that lists the keys.
"""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch

from flowmatch import config as configs
from flowmatch import manifest, stores
from flowmatch.config import Config, NotReady, UserError, option, required
from flowmatch.stores import Store

PREEMPTED = 75  # EX_TEMPFAIL: what a stage exits with after SIGTERM, its work saved
USER_ERROR = 2
REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class StageConfig(Config):
    """What every stage has."""

    run_dir: str = required("the stage's own folder, made if absent", run=True)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "where networks run; auto takes a GPU where there is one", run=True
    )
    seed: int = option(0, "key of every random number of the stage", ge=0, lt=2**63)


def rank() -> int:
    """Number this process within the job."""
    return int(os.environ.get("RANK", "0"))


def leads() -> bool:
    """Tell whether this process speaks for the job (rank 0)."""
    return rank() == 0


def world_size() -> int:
    """Count the processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_log() -> bool:
    """Tell whether what this process prints is its own: rank 0 of a launcher, or no launcher's."""
    return leads() or "LOCAL_RANK" not in os.environ


def say(text: str) -> None:
    """Print on rank 0 alone."""
    if leads():
        print(text, flush=True)


def bar_options() -> dict[str, Any]:
    """Options of tqdm: rank 0 alone, and seldom where the output is a log and no terminal."""
    return {"disable": not leads(), "mininterval": 1 if sys.stderr.isatty() else 30}


def pick_device(device: str) -> str:
    """Resolve `auto`; raise UserError where a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda': torch sees no GPU here; use device=auto or device=cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def worker_device(device: str) -> str:
    """Give this process its own GPU of the machine, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind a stage that has nothing to save, and exit 75."""

    def leave(number: int, frame: Any) -> None:
        sys.exit(PREEMPTED)

    signal.signal(signal.SIGTERM, leave)


def heed_sigterm() -> Callable[[], None]:
    """Note SIGTERM from now on; the call returned exits 75 once it came.

    For a stage that holds leases: between making one and knowing of it, nothing may unwind.
    """
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: asked.set())

    def look() -> None:
        if asked.is_set():
            sys.exit(PREEMPTED)

    return look


S = TypeVar("S", bound=StageConfig)


def command(name: str, model: type[S], body: Callable[[S, bool], None], summary: str) -> None:
    """Run a stage from the command line: `body(config, dry_run)` with its errors as exit codes."""
    argv = sys.argv[1:]
    try:
        config, call = configs.load(model, argv)
        if config is None:
            say(configs.usage(model, name, summary))
            return
        body(config, call.dry_run)
    except NotReady as error:
        if "--dry-run" not in argv:
            _fail(name, error)
        for line in error.faults:
            say(f"{name}: later: {line}")
    except UserError as error:
        _fail(name, error)
    except Exception as error:
        # safetensors' own error, which is no OSError, has the number in its words
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in REFUSED:
            raise
        again = (
            "free space there or make it writable, and repeat the command: what is whole is kept"
        )
        _fail(name, UserError(f"the disk refuses: {error}; {again}"))


def _fail(name: str, error: UserError) -> None:
    if has_log():
        for line in error.faults:
            print(f"{name}: {line}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


def begin(
    name: str,
    config: StageConfig,
    inputs: Mapping[str, str],
    plan: list[str],
    dry_run: bool,
    unfinished: Callable[[], bool] | None = None,
) -> bool:
    """Hold the folder against the config, print the plan, and tell whether there is work to do.

    unfinished: given by a stage whose sealed folder may be reopened; tells whether it lacks
    something, and then unseals it. Raises UserError where the folder was made with other content,
    listing the keys, or where a sealed file has changed.
    """
    folder = stores.at(config.run_dir)
    if unfinished is None and stores.is_url(folder):
        raise UserError(f"run_dir={folder}: only pairs go into a store; use a local folder")
    sealed = manifest.find(folder, "run_dir", (name,))
    if sealed is not None:
        before = configs.complete(sealed["config"], type(config))
        _refuse_other(folder, before, sealed["inputs"], config, inputs)
        if unfinished is None:
            manifest.verify(folder, "run_dir", sealed)
        if unfinished is None or not unfinished():
            say(f"{name}: {folder} is sealed: nothing to do")
            return False
    early = folder.read_all(["config.yaml"])[0]
    if early is not None:
        written, before_inputs = read_config(folder, early, type(config))
        _refuse_other(folder, configs.content(written), before_inputs, config, inputs)
    if dry_run:
        say(configs.dump(config))
    for line in plan:
        say(f"{name}: {line}")
    if sealed is not None and not dry_run:
        folder.remove(manifest.NAME)
    return not dry_run


def _refuse_other(
    folder: Store, old: Any, old_inputs: Any, config: StageConfig, inputs: Mapping[str, str]
) -> None:
    changed = configs.differences(old, configs.content(config))
    changed += [f"(input) {line}" for line in configs.differences(old_inputs, dict(inputs))]
    if changed:
        way_out = "set them back, or use another run_dir"
        raise UserError(
            [f"run_dir={folder} was made with other settings; {way_out}:"]
            + [f"  {line}" for line in changed]
        )


def read_config(folder: Store, text: bytes, model: type[S]) -> tuple[S, dict[str, str]]:
    """Read the text of a run folder's config.yaml, and the digests of its inputs."""
    import yaml

    try:
        values = yaml.safe_load(text)
        inputs = values.pop("inputs")
        return configs.validate(model, values), inputs
    except (yaml.YAMLError, KeyError, AttributeError, UserError) as error:
        raise UserError(
            f"run_dir={folder}: config.yaml is not one that this stage wrote ({error}); "
            "use another run_dir"
        ) from None


def write_config(config: StageConfig, inputs: Mapping[str, str]) -> None:
    """Write config.yaml: the resolved config, and the digests of the inputs under `inputs`."""
    lines = ["inputs:"] if inputs else ["inputs: {}"]
    lines += [f"  {name}: {digest}" for name, digest in sorted(inputs.items())]
    text = configs.dump(config) + "\n".join(lines) + "\n"
    stores.at(config.run_dir).write("config.yaml", text)
