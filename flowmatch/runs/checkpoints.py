"""The checkpoints of a training run: whole, hashed, and of this run alone, or named and not used.

A checkpoint is a folder `checkpoints/step_%08d`. Its `checkpoint.json`, written last, holds the step,
the content and the inputs of the run, the sha256 of each file, and the sha256 of all that.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from flowmatch import config as configs
from flowmatch.config import Config, UserError
from flowmatch.runs.files import Scratch, write_atomic
from flowmatch.runs.manifest import fingerprint, sha256_file
from flowmatch.runs.process import leads, say

INDEX = "checkpoint.json"
BAD = ".bad"  # ending of a checkpoint that was set aside
PARTS = ("step", "config", "inputs", "files")
Saved = dict[str, dict[str, "Tensor"]]  # file stem -> name -> tensor


class Unsound(ValueError):
    """What is wrong with a checkpoint."""


def folders(run: Path) -> list[Path]:
    """List the checkpoints of a run folder, sound or not, oldest first."""
    return sorted(run.glob("checkpoints/step_" + "[0-9]" * 8))


def read_index(folder: Path) -> dict[str, Any]:
    """Read the `checkpoint.json` of a checkpoint. Raises Unsound."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        sound = index["fingerprint"] == fingerprint({part: index[part] for part in PARTS})
    except FileNotFoundError:
        missing = f"{INDEX} is missing" if any(folder.glob("*")) else "it is empty"
        raise Unsound(missing) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise Unsound(f"{INDEX} is damaged")
    if folder.name != _name(index["step"]):
        raise Unsound(f"it is of step {index['step']}")
    return index


def differences(index: Mapping[str, Any], config: Config, inputs: Mapping[str, str]) -> list[str]:
    """List the content and the inputs in which a checkpoint differs from a run."""
    content = configs.complete(index["config"], type(config))
    changed = configs.differences(content, configs.content(config))
    lines = configs.differences(index["inputs"], dict(inputs))
    return changed + [f"(input) {line}" for line in lines]


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
            changed.append(differences(read_index(folder), config, inputs))
    if found and all(any(f.glob("*.safetensors")) and not (f / INDEX).exists() for f in found):
        raise UserError(
            f"run_dir={run} holds a run that flowmatch 0.1.0 has not finished (its checkpoints have no "
            f"{INDEX}); finish it with 0.1.0, or use another run_dir, for reflow with the same start="
        )
    return changed[0] if changed and all(changed) else []


class Checkpoints:
    """The checkpoints of an open run folder.

    Args:
        stage: Its name, for messages.
        run: The run folder.
        config: The config of the stage.
        inputs: The digest of each input by its name.
        scratch: Of the run folder.
    """

    def __init__(
        self, stage: str, run: Path, config: Config, inputs: Mapping[str, str], scratch: Scratch
    ):
        self.stage, self.run, self.scratch = stage, run, scratch
        self.config, self.inputs = config, dict(inputs)
        self.begun = False  # whether the run was begun before

    def save(self, step: int, tensors: "Mapping[str, Mapping[str, Tensor]]", keep: int) -> None:
        """Write a checkpoint, and remove all but the newest ones (rank 0).

        Args:
            step: Of the checkpoint.
            tensors: File stem -> name -> tensor.
            keep: Number of checkpoints that are kept.
        """
        from safetensors.torch import save_file

        built = self.scratch.build(_name(step))
        files = {}
        for stem, group in tensors.items():
            file = built / f"{stem}.safetensors"
            save_file({name: t.detach().contiguous() for name, t in group.items()}, file)
            files[file.name] = sha256_file(file)
        index = {"step": step, "config": configs.content(self.config), "inputs": self.inputs}
        index["files"] = files
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
        from safetensors.torch import load_file

        index = read_index(folder)
        if index["step"] > last:
            raise Unsound(f"it is beyond the last step, {last}")
        if changed := differences(index, self.config, self.inputs):
            raise Unsound(f"it was made with other settings ({'; '.join(changed)})")
        for name, expected in index["files"].items():
            try:
                actual = sha256_file(folder / name)
            except (FileNotFoundError, IsADirectoryError):
                raise Unsound(f"{name} is missing") from None
            if actual != expected:
                raise Unsound(f"{name} is damaged (sha256 differs)")
        return index["step"], {Path(n).stem: load_file(folder / n) for n in sorted(index["files"])}


def _name(step: object) -> str:
    return f"step_{step:08d}" if isinstance(step, int) else ""


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it is never read again; return its new name."""
    target, number = folder.with_name(folder.name + BAD), 1
    while target.exists():
        target, number = folder.with_name(f"{folder.name}{BAD}.{number}"), number + 1
    return folder.rename(target)
