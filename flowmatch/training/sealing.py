"""`flowmatch seal RUN`: close a training run as what it is, with its newest sound checkpoint."""

from pathlib import Path
from typing import Any

from flowmatch.config import UserError, expanded
from flowmatch.runs import checkpoints, command, folder, manifest
from flowmatch.runs.files import Scratch
from flowmatch.runs.process import say

USAGE = """usage: flowmatch seal RUN

Seal an unfinished run of flow, reflow or finish: the averaged weights of its newest sound checkpoint
become its network, and the stages after it go on from there. The manifest names the update. To train on
after all, delete RUN/manifest.json and repeat the command of the stage."""


def main(words: list[str]) -> None:
    """Run the command."""
    if set(words) & {"--help", "-h"}:
        print(USAGE)
        return
    with command.exit_codes("seal"):
        if len(words) != 1 or words[0].startswith("-"):
            raise UserError(
                f"{' '.join(words) or 'no folder'}: expected one run folder; {USAGE.splitlines()[0]}"
            )
        seal(Path(expanded(words[0])))


def seal(run: Path) -> None:
    """Seal a run folder.

    Args:
        run: A folder of train_flow, reflow or finish.

    Raises:
        UserError: It has no sound checkpoint, or another process works in it.
    """
    if not run.is_dir():
        raise UserError(f"{run} does not exist; expected the folder of a training run")
    if manifest.find(run, "run") is not None:
        say(f"seal: {run} is sealed: nothing to do")
        return
    if not checkpoints.folders(run):
        raise UserError(
            f"{run} holds no checkpoint; expected a run of flow, reflow or finish, stopped after its "
            "first one (fit.save_every). To end a set of pairs early, repeat its command with fewer "
            "shards"
        )
    lock, scratch = folder.hold(run), Scratch(run)
    with lock:
        try:
            scratch.sweep()
            _seal(run, scratch)
        finally:
            scratch.close()


def _seal(run: Path, scratch: Scratch) -> None:
    from flowmatch.models import networks
    from flowmatch.models.digest import network_digest
    from flowmatch.models.teachers import NETS

    step, index = newest(run)
    if "config.json" not in index["files"]:
        raise UserError(
            f"{run} trains an adapter, or split weights, which its own command writes: let it finish"
        )
    files, digests = [], []
    for name, source in zip(NETS, (step, step / NETS[1]), strict=True):
        if not (source / "config.json").is_file():
            continue
        net, built = networks.load(source, "run"), scratch.build(name)
        digests.append(network_digest(net))
        files += [f"{name}/{file}" for file in networks.save(net, built)]
        scratch.place(built, run / name)
    folder.cut_metrics("seal", run / "metrics.jsonl", index["step"])
    facts = index["facts"] | {"net": digests[0]}
    if index["earlier"]:
        facts["earlier_steps"] = index["earlier"]
    steps = index["config"]["fit"]["steps"]
    if index["step"] != steps:
        facts["step"] = index["step"]
    say(f"seal: {run} becomes what it is at update {index['step']:,} of {steps:,}")
    folder.seal(run, index["stage"], index["config"], index["inputs"], files, facts)


def newest(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest sound checkpoint of a run and its index.

    Raises:
        UserError: None is sound; the message says what is wrong with each.
    """
    faults = []
    for step in reversed(checkpoints.folders(run)):
        try:
            index = checkpoints.read_index(step)
            checkpoints.verify(step, index, index["files"])
        except checkpoints.Unsound as error:
            faults.append(f"{step} is not used: {error}")
            continue
        for fault in faults:
            say(f"seal: {fault}")
        return step, index
    raise UserError([*faults, f"{run}: no checkpoint is sound; repeat its stage"])
