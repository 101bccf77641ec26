"""Export: the student as a folder that stock diffusers loads, checked before it is sealed.

A fresh process without flowmatch loads the folder and samples; its pictures must equal those of our
own solver. model_index.json names stock classes wherever diffusers has a pipeline for the network.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from flowmatch import config as configs
from flowmatch.config import UserError, option, required
from flowmatch.export import model_card
from flowmatch.export.model_card import Kind
from flowmatch.flow import grids, solvers
from flowmatch.models import teachers, two_time
from flowmatch.models.velocity import Velocity
from flowmatch.runs import command, manifest, process
from flowmatch.runs.config import StageConfig
from flowmatch.runs.files import write_atomic
from flowmatch.runs.folder import RunFolder, begin

FRESH = Path(model_card.__file__).with_name("sample_fresh.py")
TOLERANCE = 1e-6  # largest difference of a pixel in [0, 1] to our own solver, exact schedulers
WARNING = 0.01  # the same with the folder's own scheduler, above which the stage warns
SAMPLES = 4  # of each check


class ExportConfig(StageConfig):
    """Config of the export."""

    student: str = required("a sealed training stage (its EMA weights)", run=True)
    evaluation: str | None = option(
        None, "the student's sealed evaluation, whose table goes into the card", run=True
    )
    steps: list[int] = option([1, 2, 4], "numbers of steps that get an exact stock scheduler")


def main(config: ExportConfig, dry_run: bool) -> None:
    """Plan, then write the folder, try it, and seal."""
    faults = configs.Faults()
    inputs: dict[str, str] = {}
    with faults:
        if not config.steps or min(config.steps) < 1:
            raise UserError(f"steps={config.steps}: expected one or more numbers, from 1")
    with faults:
        student = teachers.load(config.student, "student")
        inputs["student"] = student.digest
        if student.diffusion is not None:
            raise UserError(
                f"student={config.student} is a diffusion model, which predicts "
                f"{student.diffusion.prediction}; an export is of a velocity: name a reflow of it"
            )
        if student.two_times:  # stock networks take one time: r = 1 goes into a bias
            folded = two_time.fold(student.net)
            student = dataclasses.replace(student, net=folded, one_step=True)
        if student.one_step and config.steps != [1]:
            raise UserError(
                f"steps={config.steps}: the student is for one step only; use steps=[1]"
            )
    table = "Not evaluated.\n"
    if config.evaluation is not None:
        with faults:
            evaluation = manifest.read(config.evaluation, "evaluation", ["evaluate"])
            inputs["evaluation"] = manifest.digest(config.evaluation)
            table = (Path(config.evaluation) / "table.md").read_text()
    if not faults.errors and config.evaluation is not None:
        with faults:
            if evaluation["inputs"]["student"] != student.digest:
                raise UserError(
                    f"evaluation={config.evaluation} scored another student than {config.student}"
                )
    faults.check()
    kind = model_card.kind_of(student)
    plan = [
        f"{type(student.net).__name__} of {student.net.num_parameters():,} parameters, as {kind.name}",
        f"checked in a fresh process without flowmatch at {config.steps} steps",
    ]
    pictures = [] if config.evaluation is None else sorted(Path(config.evaluation).glob("*.png"))
    shown = ", ".join(map(str, pictures)) or "none"
    snippet = kind.snippet.replace("FOLDER", config.run_dir)
    summary = f"\n{table}\npictures: {shown}\n\n{snippet}"
    if not begin("export", config, inputs, plan, dry_run):
        if manifest.sealed(config.run_dir):
            process.say(summary)
        return
    if not process.leads():
        return
    with RunFolder("export", config, inputs) as folder:
        command.exit_on_sigterm()  # there is nothing to save
        written = write(folder.folder, student, kind, config.steps)
        differences = check(folder.folder, student, kind, config.steps)
        text = model_card.text(student, kind, table, differences)
        write_atomic(folder.folder / "README.md", text)
        for steps, found in differences.items():
            process.say(
                f"export: {steps} steps: " + ", ".join(f"{k} {d:.2g}" for k, d in found.items())
            )
        if max(found.get("folder", 0) for found in differences.values()) > WARNING:
            process.say(
                f"export: warning: with the folder's own scheduler pixels differ by more than "
                f"{WARNING:.0%}; use scheduler_N/ where N is one of {config.steps}"
            )
        folder.seal(written, round=student.round)
        process.say(summary)


def write(folder: Path, student: teachers.Teacher, kind: Kind, steps: list[int]) -> list[str]:
    """Write everything but the card; return the files, relative to the folder."""
    from diffusers import (
        ConsistencyModelPipeline,
        DDPMPipeline,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
    )

    from flowmatch.export import pipeline, scheduler
    from flowmatch.models import mlp

    net = student.net
    net.register_to_config(_name_or_path="")
    # DDIM is Euler on this path: first order in log-SNR is right, to some .5%, for any number of steps
    any_n = DPMSolverMultistepScheduler(
        solver_order=1,
        algorithm_type="dpmsolver++",
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=1.0,
        final_sigmas_type="zero",
    )
    one_n = FlowMatchEulerDiscreteScheduler()  # its first step goes from 1000 to 0 where N = 1
    named = one_n if student.one_step else any_n
    parts = {
        "DDPMPipeline": lambda: DDPMPipeline(unet=net, scheduler=named),
        "ConsistencyModelPipeline": lambda: ConsistencyModelPipeline(unet=net, scheduler=any_n),
        "ReflowPipeline": lambda: pipeline.ReflowPipeline(net, one_n),
    }
    parts[kind.name]().save_pretrained(folder, safe_serialization=True)
    for n in steps:
        exact = FlowMatchEulerDiscreteScheduler(shift_terminal=1 / n if n > 1 else None)
        exact.save_pretrained(folder / f"scheduler_{n}")
    ours = scheduler.RectifiedFlowScheduler(reflow_round=student.round)
    ours.save_pretrained(folder / "scheduler_flowmatch")
    shutil.copyfile(pipeline.__file__, folder / "pipeline.py")
    if type(net).__name__ == "VelocityMLP":  # its class travels with its weights
        shutil.copyfile(mlp.__file__, folder / "unet" / "mlp.py")
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["mlp", "VelocityMLP"]
        write_atomic(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    names = ["model_index.json", "pipeline.py"]
    for part in ("unet", "scheduler", "scheduler_flowmatch", *(f"scheduler_{n}" for n in steps)):
        names += [f"{part}/{p.name}" for p in (folder / part).iterdir() if p.is_file()]
    return sorted(set(names))


def check(
    folder: Path, student: teachers.Teacher, kind: Kind, steps: list[int]
) -> dict[int, dict[str, float]]:
    """Sample in a fresh process without flowmatch, and compare with our own solver.

    Returns the largest differences, in [0, 1] after the clamp for images: steps -> name -> difference.
    Raises UserError where the exact schedulers differ by more than TOLERANCE.
    """
    task = {
        "folder": str(folder.resolve()),
        "steps": steps,
        "pipeline": kind.name,
        "samples": SAMPLES,
        "output_type": "latent" if model_card.latent(student) else "np",
        "labels": None if student.classes is None else labels(student).tolist(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, str(FRESH), json.dumps(task)],
            cwd=scratch,
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "HF_MODULES_CACHE": f"{scratch}/modules",  # other folders ship a pipeline.py, too
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(
                f"run_dir={folder}: a fresh process could not load or sample the export: "
                f"{done.stderr.strip().splitlines()[-1]}"
            )
        theirs = torch.load(Path(scratch) / "samples.pt", weights_only=True)
    found: dict[int, dict[str, float]] = {}
    for n in steps:
        mine = own_samples(student, n)
        found[n] = {name: (x - mine).abs().max().item() for name, x in theirs[str(n)].items()}
        if not found[n]["exact"] <= TOLERANCE:
            raise UserError(
                f"run_dir={folder}: at {n} steps the export differs from our solver by "
                f"{found[n]['exact']:.2g}, expected at most {TOLERANCE}; is this diffusers "
                "release a supported one?"
            )
    return found


def labels(student: teachers.Teacher) -> Tensor:
    """Labels of the check: the first classes in turn."""
    return torch.arange(SAMPLES) % (student.classes or 1)


@torch.no_grad()
def own_samples(student: teachers.Teacher, steps: int) -> Tensor:
    """Sample with our solver, the noise drawn as DDPMPipeline draws it; pictures in [0, 1]."""
    from diffusers.utils.torch_utils import randn_tensor

    x0 = randn_tensor((SAMPLES, *student.shape), generator=torch.Generator().manual_seed(0))
    v = Velocity(student.net)
    cond = None if student.classes is None else {"label": labels(student)}
    x = solvers.integrate(lambda x, t: v(x, t, cond), x0, grids.uniform_grid(steps))
    return x if x.ndim < 4 or model_card.latent(student) else (x / 2 + 0.5).clamp(0, 1)


if __name__ == "__main__":
    command.command("export", ExportConfig, main, __doc__)
