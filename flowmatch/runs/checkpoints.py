"""The checkpoints of a training run: whole, hashed, and of this run alone, or named and not used.

A checkpoint is a folder `checkpoints/step_%08d`. Its `checkpoint.json`, written last, holds the step,
the content, the inputs and the facts of the run, the sha256 of each file, and the sha256 of all that.
It is a model folder too: its averaged weights lie where diffusers reads them.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from flowmatch import config as configs
from flowmatch.config import Config, UserError
from flowmatch.runs import parts
from flowmatch.runs.files import Scratch, write_atomic
from flowmatch.runs.manifest import fingerprint, sha256_file
from flowmatch.runs.process import leads, rank, say, world_size

INDEX = "checkpoint.json"
BAD = ".bad"  # ending of a checkpoint that was set aside
PARTS = {"step", "stage", "config", "inputs", "facts", "earlier", "files"}
Saved = dict[str, dict[str, Any]]  # file without its suffix -> name -> tensor, or parts.Rows


class Unsound(ValueError):
    """What is wrong with a checkpoint."""


def folders(run: Path) -> list[Path]:
    """List the checkpoints of a run folder, sound or not, oldest first."""
    return sorted(run.glob("checkpoints/step_" + "[0-9]" * 8))


def read_index(folder: Path) -> dict[str, Any]:
    """Read the `checkpoint.json` of a checkpoint. Raises Unsound."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        sound = index.pop("fingerprint") == fingerprint(index) and index.keys() >= PARTS
    except FileNotFoundError:
        missing = f"{INDEX} is missing" if any(folder.glob("*")) else "it is empty"
        raise Unsound(missing) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise Unsound(f"{INDEX} is damaged")
    if folder.name != _name(index["step"]):
        raise Unsound(f"it is of step {index['step']}")
    return index


def differences(index: Mapping[str, Any], config: Config, inputs: Mapping[str, str]) -> list[str]:
    """List the content and the inputs in which a run differs from a checkpoint beyond growth."""
    content = configs.complete(index["config"], type(config))
    if grows(index, config):
        content["fit"]["steps"] = config.fit.steps  # type: ignore[attr-defined]
    changed = configs.differences(content, configs.content(config))
    lines = configs.differences(index["inputs"], dict(inputs))
    return changed + [f"(input) {line}" for line in lines]


def grows(index: Mapping[str, Any], config: Config) -> bool:
    """Tell whether a run of more updates may continue a checkpoint: as far as its learning rates go."""
    fit = getattr(config, "fit", None)
    before = index["config"].get("fit", {}).get("steps")
    return fit is not None and fit.continues(before, index["step"])


def verify(folder: Path, index: Mapping[str, Any], names: Iterable[str]) -> None:
    """Hash files of a checkpoint again. Raises Unsound."""
    for name in names:
        try:
            actual = sha256_file(folder / name)
        except (FileNotFoundError, IsADirectoryError):
            raise Unsound(f"{name} is missing") from None
        if actual != index["files"][name]:
            raise Unsound(f"{name} is damaged (sha256 differs)")


def verify_together(folder: Path, index: Mapping[str, Any]) -> None:  # collective with parts
    """Hash a checkpoint again, each process its own share of the parts. Raises Unsound on all."""
    world = world_size()
    numbers = {name: parts.number_of(name) for name in index["files"]}
    if world == 1 or set(numbers.values()) == {None}:
        return verify(folder, index, numbers)
    import torch.distributed

    faults, fault = [""] * world, ""
    try:
        verify(folder, index, (n for n, k in numbers.items() if k is None or k % world == rank()))
    except Unsound as error:
        fault = str(error)
    torch.distributed.all_gather_object(faults, fault)
    for fault in filter(None, faults):
        raise Unsound(fault)


def check(run: Path, config: Config, inputs: Mapping[str, str]) -> list[str]:
    """Compare the checkpoints of a run folder with a run, without hashing them.

    Returns:
        The differences of the newest sound one; none where any of them is of this run, or none is sound.

    Raises:
        UserError: The checkpoints are of a version that wrote no `checkpoint.json`.
    """
    found, changed = folders(run), []
    for folder in reversed(found):
        with suppress(Unsound):
            changed.append(differences(index := read_index(folder), config, inputs))
            alone = [line.partition(":")[0] for line in changed[-1]] == ["fit.steps"]
            if alone and index["earlier"]:  # it has grown: an older checkpoint is of a shorter run
                return changed[-1]
    if found and all(any(f.glob("*.safetensors")) and not (f / INDEX).exists() for f in found):
        raise UserError(
            f"run_dir={run} holds a run that flowmatch 0.1.0 has not finished (its checkpoints have no "
            f"{INDEX}); finish it with 0.1.0, or use another run_dir, for reflow with the same start="
        )
    return changed[0] if changed and all(changed) else []


def continued(run: Path, config: Config, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the index of the newest checkpoint that a run can continue, without hashing its files."""
    for folder in reversed(folders(run)):
        with suppress(Unsound):
            if not differences(index := read_index(folder), config, inputs):
                return index
    return None


class Checkpoints:
    """The checkpoints of an open run folder.

    Args:
        stage: Its name, for messages.
        run: The run folder.
        config: The config of the stage.
        inputs: The digest of each input by its name.
        facts: What the manifest of the run will hold.
        scratch: Of the run folder.
    """

    def __init__(
        self,
        stage: str,
        run: Path,
        config: Config,
        inputs: Mapping[str, str],
        facts: Mapping[str, Any],
        scratch: Scratch,
    ):
        self.stage, self.run, self.scratch = stage, run, scratch
        self.config, self.inputs, self.facts = config, dict(inputs), dict(facts)
        self.begun = False  # whether the run was begun before
        self.earlier: list[int] = []  # numbers of updates at which the run ended before it grew

    def save(
        self,
        step: int,
        tensors: "Mapping[str, Mapping[str, Tensor]]",
        keep: int,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Write a checkpoint, and remove all but the newest ones (rank 0).

        Args:
            step: Of the checkpoint.
            tensors: File without its suffix -> name -> tensor.
            keep: Number of checkpoints that are kept.
            texts: File -> content.
        """
        from safetensors.torch import save_file

        built = self.scratch.build(_name(step))
        files = {}
        for stem, group in tensors.items():
            file = built / f"{stem}.safetensors"
            file.parent.mkdir(exist_ok=True)
            save_file({name: t.detach().contiguous() for name, t in group.items()}, file)
            files[f"{stem}.safetensors"] = sha256_file(file)
        for name, text in (texts or {}).items():
            write_atomic(built / name, text)
            files[name] = sha256_file(built / name)
        self.finish(step, files, keep)

    def begin(self, step: int) -> None:
        """Make the folder in which the processes write the parts of a checkpoint (rank 0)."""
        self.scratch.build(_name(step))

    def place_of(self, step: int) -> Path:
        """Return that folder."""
        return self.scratch.path / _name(step)

    def finish(self, step: int, files: Mapping[str, str], keep: int) -> None:
        """Place a checkpoint whose files are written, and remove all but the newest ones (rank 0).

        Args:
            step: Of the checkpoint.
            files: Name -> sha256.
            keep: Number of checkpoints that are kept.
        """
        built = self.place_of(step)
        index = {"step": step, "stage": self.stage, "config": configs.content(self.config)}
        index |= {"inputs": self.inputs, "facts": self.facts, "earlier": self.earlier}
        index["files"] = dict(files)
        index["fingerprint"] = fingerprint(index)
        write_atomic(built / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
        parent = self.run / "checkpoints"
        parent.mkdir(exist_ok=True)
        self.scratch.place(built, parent / built.name)
        for old in folders(self.run)[:-keep]:
            self.scratch.discard(old)

    def restore(self, last: int) -> tuple[int, Saved]:
        """Read the newest sound checkpoint (every rank), and set aside those after it (rank 0).

        Args:
            last: Step at which the run ends.

        Returns:
            Its step and tensors, on the CPU; (0, {}) where there never was a checkpoint.

        Raises:
            UserError: None of the checkpoints is sound.
        """
        unsound: dict[Path, str] = {}
        for folder in reversed(folders(self.run)):
            try:
                step, tensors = self._load(folder, last)
            except Unsound as error:
                unsound[folder] = f"{folder} is not used: {error}"
                continue
            for bad, line in unsound.items():
                if leads():
                    say(f"{self.stage}: {line}; set aside as {_set_aside(bad).name}")
            return step, tensors
        if unsound:
            way = f"delete {self.run / 'checkpoints'} to train from step 0, or use another run_dir"
            raise UserError(
                [*unsound.values(), f"run_dir={self.run}: no checkpoint is sound; {way}"]
            )
        if self.begun:
            say(f"{self.stage}: {self.run} has no checkpoint: starts at 0 of {last:,}")
        return 0, {}

    def _load(self, folder: Path, last: int) -> tuple[int, Saved]:
        """Read a checkpoint. Raises Unsound."""
        index = read_index(folder)
        if index["step"] > last:
            raise Unsound(f"it is beyond the last step, {last}")
        if changed := differences(index, self.config, self.inputs):
            raise Unsound(f"it was made with other settings ({'; '.join(changed)})")
        verify_together(folder, index)
        self.earlier = list(index["earlier"])
        if grows(index, self.config):
            self.earlier.append(index["config"]["fit"]["steps"])
        names = [name for name in sorted(index["files"]) if name.endswith(".safetensors")]
        return index["step"], parts.read(folder, names)


def _name(step: object) -> str:
    return f"step_{step:08d}" if isinstance(step, int) else ""


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it is never read again; return its new name."""
    target, number = folder.with_name(folder.name + BAD), 1
    while target.exists():
        target, number = folder.with_name(f"{folder.name}{BAD}.{number}"), number + 1
    return folder.rename(target)
