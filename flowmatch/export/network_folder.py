"""The folder of an exported network: written, and compared with our own solver in a fresh process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.export import model_card
from flowmatch.export.fresh import Fresh
from flowmatch.export.model_card import Kind
from flowmatch.flow import grids, solvers
from flowmatch.models import autoencoder, mlp, networks
from flowmatch.models.autoencoder import Autoencoder
from flowmatch.models.teachers import Teacher
from flowmatch.models.velocity import Velocity
from flowmatch.runs.files import write_atomic

TOLERANCE = 1e-6  # largest difference of a pixel in [0, 1] to our own solver, exact schedulers
NO_NAMES = "ID2LABEL: dict[int, str] = {}"  # in pipeline.py
DECODED = 1e-4  # of pictures that a VAE decodes from latents that differ by TOLERANCE
SAMPLES = 4  # of each check


def load_vae(student: Teacher, run: str, path: str | None) -> Autoencoder | None:
    """Load the VAE of a student of latents.

    Args:
        student: The student.
        run: Its run folder, which may name the VAE.
        path: The VAE's folder, if it is given.

    Raises:
        UserError: There is none, or it is another one than that of the latents.
    """
    if not student.latents:
        if path is not None:
            raise UserError(f"vae={path}: student={run} names no VAE; leave it out")
        return None
    found = path or autoencoder.find(run)
    if found is None:
        raise UserError(
            f"student={run} makes latents of a VAE whose folder was not found; set vae="
        )
    return autoencoder.load(found, "vae", (), student.latents)


def write(
    folder: Path, student: Teacher, kind: Kind, steps: list[int], vae: Autoencoder | None = None
) -> list[str]:
    """Write everything but the card; return the file names, relative to the folder."""
    from diffusers import (
        ConsistencyModelPipeline,
        DDPMPipeline,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        LDMPipeline,
    )

    from flowmatch.export import pipeline, scheduler

    net = student.net
    net.register_to_config(_name_or_path="")
    # DDIM is Euler on this path: first order in log-SNR is right to about 0.5% for any number of steps
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
    named_classes = dict(enumerate(student.names)) if student.names else None
    parts: dict[str, Callable[[], Any]] = {
        "DDPMPipeline": lambda: DDPMPipeline(unet=net, scheduler=named),
        "ConsistencyModelPipeline": lambda: ConsistencyModelPipeline(unet=net, scheduler=any_n),
        "ReflowPipeline": lambda: pipeline_of(student, vae),
        "LDMPipeline": lambda: LDMPipeline(vqvae=vae and vae.net, unet=net, scheduler=any_n),
    }
    parts[kind.name]().save_pretrained(folder, safe_serialization=True)
    for n in steps:
        exact: Any = FlowMatchEulerDiscreteScheduler(shift_terminal=1 / n if n > 1 else None)
        exact.save_pretrained(folder / f"scheduler_{n}")
    ours = scheduler.RectifiedFlowScheduler(reflow_round=student.round)
    ours.save_pretrained(folder / "scheduler_flowmatch")
    code = Path(pipeline.__file__).read_text()  # stock model_index.json have no place for the names
    if named_classes:
        code = code.replace(NO_NAMES, NO_NAMES.replace("{}", repr(named_classes)))
    write_atomic(folder / "pipeline.py", code)
    own = mlp.__file__ if type(net).__name__ == "VelocityMLP" else networks.code_of(net)
    if own is not None:  # its class travels with its weights
        shutil.copyfile(own, folder / "unet" / Path(own).name)
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = [Path(own).stem, type(net).__name__]
        write_atomic(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    names = ["model_index.json", "pipeline.py"]
    whole = ["unet", "scheduler", "scheduler_flowmatch", *(f"scheduler_{n}" for n in steps)]
    whole += [part for part in autoencoder.NAMES if (folder / part).is_dir()]
    for part in whole:
        names += [f"{part}/{p.name}" for p in (folder / part).iterdir() if p.is_file()]
    return sorted(set(names))


def pipeline_of(student: Teacher, vae: Autoencoder | None = None) -> Any:
    """Build our pipeline of a student."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from flowmatch.export.pipeline import ReflowPipeline

    more: dict[str, Any] = {"latent": True} if model_card.latent(student) else {}
    if vae is not None:
        more = {"vae": vae.net, "latents_scale": vae.scale, "latents_shift": vae.shift}
    if student.names:
        more["id2label"] = dict(enumerate(student.names))
    return ReflowPipeline(student.net, FlowMatchEulerDiscreteScheduler(), **more)


def compare(
    built: Path,
    student: Teacher,
    kind: Kind,
    steps: list[int],
    seed: int,
    fresh: Fresh,
    vae: Autoencoder | None = None,
) -> dict[int, dict[str, float]]:
    """Sample in a fresh process without flowmatch, and compare with our own solver.

    With a VAE both the latents and the pictures are compared.

    Returns the largest differences, in [0, 1] after the clamp for images: steps -> name -> difference.
    Raises UserError where the exact schedulers differ by more than TOLERANCE.
    """
    theirs = fresh.sample(
        {
            "folder": str(built.resolve()),
            "steps": steps,
            "pipeline": kind.name,
            "samples": SAMPLES,
            "seed": seed,
            "output_type": "latent" if model_card.latent(student) and vae is None else "np",
            "decodes": vae is not None,
            "labels": None if student.classes is None else labels(student).tolist(),
        }
    )
    differences: dict[int, dict[str, float]] = {}
    for n in steps:
        mine = own_samples(student, n, seed)
        own = dict.fromkeys(theirs[str(n)], mine)
        if vae is not None:
            own |= {name: vae.decode(mine) / 2 + 0.5 for name in own if name != "latent"}
        largest = {name: (x - own[name]).abs().max().item() for name, x in theirs[str(n)].items()}
        name, allowed = ("latent", TOLERANCE) if vae is not None else ("exact", TOLERANCE)
        if largest[name] <= allowed:
            name, allowed = "exact", TOLERANCE if vae is None else DECODED
        if not largest[name] <= allowed:
            raise UserError(
                f"at {n} steps the export differs from our solver by "
                f"{largest[name]:.2g}, expected at most {allowed}; check that this diffusers "
                "release is a supported one"
            )
        differences[n] = largest
    return differences


def labels(student: Teacher, count: int = SAMPLES) -> Tensor:
    """Labels of the check: the first classes in turn."""
    return torch.arange(count) % (student.classes or 1)


def own_samples(student: Teacher, steps: int, seed: int, count: int = SAMPLES) -> Tensor:
    """Sample with our solver, the noise drawn as DDPMPipeline draws it; pictures in [0, 1]."""
    from diffusers.utils.torch_utils import randn_tensor

    x0 = randn_tensor((count, *student.shape), generator=torch.Generator().manual_seed(seed))
    v = Velocity(student.net)
    cond = None if student.classes is None else {"label": labels(student, count)}
    with torch.no_grad():
        x = solvers.integrate(lambda x, t: v(x, t, cond), x0, grids.uniform_grid(steps))
    return x if x.ndim < 4 or model_card.latent(student) else (x / 2 + 0.5).clamp(0, 1)
