"""The folder of a student that reads prompts: opened, written, and checked in a fresh process."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data.config import PromptsConfig
from flowmatch.export import text_card
from flowmatch.export.text_export import EXACT, Choice, Trial, Way
from flowmatch.models import students, text
from flowmatch.models.adapters import COMFYUI, DIFFUSERS
from flowmatch.models.config import CallConfig
from flowmatch.models.diffusion import read_index
from flowmatch.models.teachers import read_made, run_of
from flowmatch.models.text import TextTeacher
from flowmatch.models.watch import quiet
from flowmatch.runs.files import allow_readers, write_atomic

UNMERGED = (
    1e-4  # the same as EXACT, of an adapter beside the weights: W x + B (A x) is not (W + B A) x
)


def open_student(
    path: str,
    prompts: PromptsConfig,
    call: CallConfig,
    pipeline: str | None,
    device: str,
    adapter: bool = False,
) -> TextTeacher:
    """Load a student into its teacher's pipeline.

    Args:
        path: A sealed training stage of a pipeline that reads prompts.
        prompts: Those of the reflow; more may have been added at the end.
        call: Arguments of the pipeline's call; those of the reflow where none are given.
        pipeline: The teacher's pipeline.
        device: Where to put it.
        adapter: Whether it has to be an adapter.

    Raises:
        UserError: It is no such student, or prompts, call and pipeline are not those of its training.
    """
    where = f"student={path}"
    sealed = read_made(path, "student")
    facts = sealed["facts"]
    if "script" not in facts:
        raise UserError(f"{where} was trained without prompts; leave prompts, call, pipeline out")
    if pipeline is None:
        raise UserError(
            f"{where} is one network; set pipeline= to its teacher's {facts['script']['pipeline']}"
        )
    if adapter and facts.get("base") is None:
        raise UserError(
            f"adapter=true: {where} has the whole network, as it was trained without lora or with "
            "lora.merge=true; leave adapter out"
        )
    if read_index(pipeline, "pipeline").get("_class_name") != facts["script"]["pipeline"]:
        raise UserError(
            f"pipeline={pipeline} is not that of {where}, a {facts['script']['pipeline']}"
        )
    given, count = call.model_dump() or facts["call"], facts["prompts"]["count"]
    if given != facts["call"]:
        raise UserError(f"call={given}: {where} was trained with call={facts['call']}; give that")
    teacher = text.load(pipeline, "pipeline", prompts, CallConfig(**given), device=device)
    student = students.load(teacher, path, "student")
    setattr(student.pipe, student.script.network, student.net)
    listed = student.prompts
    if sealed["stage"] == "train_flow":  # on captions, not on a list of prompts
        return student
    if count > len(listed) or listed.digest_of(count) != facts["prompts"]["digest"]:
        raise UserError(
            f"{where} was trained with {count:,} prompts, which are not the first ones of prompts=; "
            "name the list of its training"
        )
    return student


def save(student: TextTeacher, choice: Choice, folder: Path) -> list[str]:
    """Write the pipeline and its schedulers.

    Returns:
        The names of the files, relative to the folder.
    """
    pipe, before = student.pipe, student.pipe.scheduler
    student.net.register_to_config(_name_or_path="")
    pipe.scheduler = choice.folder.scheduler
    try:
        with quiet():
            pipe.save_pretrained(folder, safe_serialization=True)
    finally:
        pipe.scheduler = before
    parts = [p.name for p in folder.iterdir() if p.is_dir() and p.name in pipe.components]
    return finish(folder, choice, ["model_index.json"], parts)


def save_adapter(path: str, choice: Choice, folder: Path) -> list[str]:
    """Write an adapter alone, and the schedulers; return as `save` does.

    Args:
        path: The run folder of the student.
        choice: What the folder holds.
        folder: Where to write.
    """
    run, name = run_of(path)
    for file in (DIFFUSERS, COMFYUI):
        shutil.copyfile(run / name / file, folder / file)
    return finish(folder, choice, [DIFFUSERS, COMFYUI], [])


def finish(folder: Path, choice: Choice, names: list[str], parts: list[str]) -> list[str]:
    """Write the schedulers beside some files and the folders of some parts; list all files."""
    for place, scheduler in choice.schedulers.items():
        scheduler.save_pretrained(folder / place)
    names = [*names]
    for part in {*parts, *choice.schedulers}:
        names += [str(p.relative_to(folder)) for p in (folder / part).rglob("*") if p.is_file()]
    for name in names:  # where the parts were before is no one's business
        if name.endswith(".json") and name.count("/") <= 1:
            forget_path(folder / name)
    allow_readers(*(folder / name for name in names))
    return sorted(names)


def forget_path(file: Path) -> None:
    """Remove the path that a part was loaded from, from its config."""
    values = json.loads(file.read_text())
    if isinstance(values, dict) and {"_name_or_path", "name_or_path"} & values.keys():
        kept = {k: v for k, v in values.items() if k not in ("_name_or_path", "name_or_path")}
        write_atomic(file, json.dumps(kept, indent=2) + "\n")


def facts(trial: Trial, choice: Choice) -> dict[str, Any]:
    """Return what the manifest holds: how to sample the folder in each number of steps."""
    ways = {
        str(n): {
            "place": found.way.place,
            "class": found.way.name,
            "call": trial.arguments(n, found.way),
        }
        for n, found in choice.steps.items()
        if found.way is not None
    }
    guider = trial.script.guider
    return {"ways": ways, "guider": guider, "prompt": trial.prompts[0]}


def expected(trial: Trial, choice: Choice) -> list[tuple[int, Way, Tensor]]:
    """List all ways of an export with their last states: (steps, way, state)."""
    ways = []
    for n, found in choice.steps.items():
        if found.way is None:
            continue
        for way in dict.fromkeys([found.way, choice.folder]):
            seen = trial.seen(n, way)
            if isinstance(seen, str):
                continue
            if trial.script.inject:  # the class takes no noise of ours: that of a generator
                with torch.no_grad():
                    seen = trial.stock(n, way, given=False)
            ways.append((n, way, seen.steps[-1].after))
    return ways


def task(
    trial: Trial, ways: list[tuple[int, Way, Tensor]], folder: Path, place: Path
) -> dict[str, Any]:
    """Write what a fresh process has to do: the code of the card, and calls from the trial's noise.

    Args:
        trial: Of the choice.
        ways: From `expected`.
        folder: The export.
        place: Working folder of the process, for the noise.
    """
    torch.save(trial.noise.cpu(), place / "noise.pt")
    known = inspect.signature(trial.pipe.__call__).parameters
    latent = {"output_type": "latent"} if "output_type" in known else {}
    adapter, base = bool(trial.base), trial.base
    if base and Path(base).is_dir():
        base = str(Path(base).resolve())
    codes = [text_card.imports(way, adapter) for _, way, _ in ways]
    load = "\n".join([*dict.fromkeys(codes), text_card.load_code(trial.pipe, base)])
    return {
        "folder": str(folder),
        "load": load.replace("FOLDER", str(folder.resolve())),
        "flowmatch": any("flowmatch" in code for code in codes),
        "ways": [
            {
                "code": text_card.way_code(way, trial.script.guider, adapter).replace(
                    "FOLDER", str(folder.resolve())
                ),
                "call": trial.arguments(n, way) | latent,
            }
            for n, way, _ in ways
        ],
        "prompts": trial.prompts,
        "seed": trial.seed,
        "noise": not trial.script.inject,
        "generator": "generator" in known,
        "device": str(trial.noise.device),
    }


def check(
    folder: Path, ways: list[tuple[int, Way, Tensor]], samples: dict[str, Any], most: float = EXACT
) -> str:
    """Compare the samples of a fresh process with those of this one, to a relative difference.

    Returns:
        The name of the samples in the pipeline's output.

    Raises:
        UserError: They differ.
    """
    for number, (n, way, state) in enumerate(ways):
        mine, theirs = state.cpu().float(), samples[str(number)].float()
        apart = float((theirs - mine).abs().max() / mine.abs().max().clamp(min=1e-30))
        if not apart <= most:
            raise UserError(
                f"run_dir={folder}: loaded again, the export differs by {apart:.2g} at {n} steps with "
                f"{way.place}/, expected at most {most:g}; check that this diffusers release is a "
                "supported one"
            )
    return str(samples["output"])
