"""Evaluation: quality against number of evaluations, of teacher and student, on the same noise.

The noise comes from a stream of its own: a student scored on the noise of its pairs looks better than
it is. Every distance stands beside the distance of real data to real data.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowmatch import config as configs
from flowmatch import (
    data,
    draw,
    grids,
    manifest,
    metrics,
    noise,
    run,
    samplers,
    solvers,
    stage,
    teachers,
)
from flowmatch.config import UserError, option, required
from flowmatch.data import DataConfig
from flowmatch.samplers import SamplerConfig
from flowmatch.solvers import SolverConfig, VelocityField

Span = tuple[float, float]  # the times of noise and data


class EvaluateConfig(stage.StageConfig):
    """Config of the evaluation."""

    teacher: str = required("the teacher: a sealed training stage, or a diffusers model", run=True)
    student: str = required("the student: a sealed training stage, or a diffusers model", run=True)
    data: DataConfig = required(
        "real data to compare with; with labels where features are a classifier's"
    )
    samples: int = option(
        2000, "generated samples, and real ones; all real ones if they are fewer", ge=4
    )
    steps: list[int] = option([1, 2, 4, 8, 16, 32], "numbers of steps, a row each")
    solver: SamplerConfig = option(SamplerConfig(), "how the rows are sampled")
    student_solver: SamplerConfig | None = option(
        None, "how the student's rows are sampled, where that differs"
    )
    converged_solver: Literal["euler", "midpoint", "heun", "rk4", "ab2", "dopri5"] = option(
        "heun", "ODE solver of the reference 'converged', on uniform steps"
    )
    converged_steps: int = option(
        64, "steps of the reference 'converged', all solvers but dopri5", ge=1
    )
    converged_tolerance: float = option(1e-5, "dopri5: rtol and atol of 'converged'", gt=0, lt=1)
    guidance: float = option(1.0, "classifier-free guidance scale; 1 is none")
    compute_batch: int = option(256, "samples integrated together", ge=1)
    distance: Literal["auto", "frechet", "sliced_wasserstein"] = option(
        "auto", "distance of sets; auto: frechet for images, sliced_wasserstein for points"
    )
    features: Literal["classifier", "values", "inception"] = option(
        "classifier",
        "what frechet looks at: features of a classifier trained on the data here, the values "
        "themselves, or Inception's features where its weights are given",
    )
    inception_weights: str | None = option(
        None, "torch-fidelity's weights file of Inception; nothing is downloaded", run=True
    )

    def rows_of(self, name: str) -> tuple[str, SamplerConfig]:
        """Give the key and the config of how a model's rows are sampled. name: teacher or student."""
        if name == "student" and self.student_solver is not None:
            return "student_solver", self.student_solver
        return "solver", self.solver

    @property
    def converged(self) -> SolverConfig:
        """How the reference is integrated."""
        tolerance = self.converged_tolerance
        return SolverConfig(
            name=self.converged_solver, steps=self.converged_steps, rtol=tolerance, atol=tolerance
        )


def main(config: EvaluateConfig, dry_run: bool) -> None:
    """Plan, then sample, score, draw and seal."""
    faults = configs.Faults()
    inputs: dict[str, str] = {}
    with faults:
        device = stage.pick_device(config.device)
        if not config.steps or min(config.steps) < 1:
            raise UserError(f"steps={config.steps}: expected one or more numbers, from 1")
    for name in ("teacher", "student"):
        for steps in config.steps:
            with faults:
                grids.make(config.rows_of(name)[1], steps)
    with faults:
        real = data.load(config.data)
        inputs["data"] = real.digest
        needed = config.features == "classifier" and config.distance != "sliced_wasserstein"
        if needed and real.images and real.label is None:
            raise UserError("features='classifier' needs data.labels=true (or use features=values)")
    models: dict[str, teachers.Teacher] = {}
    for name in ("teacher", "student"):
        with faults:
            models[name] = teachers.load(getattr(config, name), name)
            inputs[name] = models[name].digest
            key, sampler = config.rows_of(name)
            samplers.check(sampler.name, models[name].round, f"{key}.name")
    if not faults.errors:
        with faults:
            for name, model in models.items():
                if model.shape != real.shape:
                    raise UserError(
                        f"{name} makes samples of {list(model.shape)}; data holds {list(real.shape)}"
                    )
    inception = None
    if config.features == "inception":
        with faults:
            inception = metrics.Inception(config.inception_weights or "(not given)")
            inputs["inception"] = metrics.module_digest(inception)
    faults.check()
    samples = min(config.samples, real.count)
    kind = config.distance
    if kind == "auto":
        kind = "frechet" if real.images else "sliced_wasserstein"
    each = [
        samplers.evaluations(config.rows_of(name)[1].name) * sum(config.steps) for name in models
    ]
    reference = config.converged.evaluations
    evaluations = samples * (sum(each) + 2 * (reference or 0))
    plan = [
        f"{samples} samples a row, {kind} distance to {samples} of {real.count} real ones",
        f"{evaluations:,} network evaluations{'' if reference else ', and those of dopri5,'} for "
        f"{len(config.steps) + 1} rows of 2 models, on {device}",
    ]
    if not stage.begin("evaluate", config, inputs, plan, dry_run):
        return
    accelerator = run.start_accelerator(config.device)
    with run.Run("evaluate", config, inputs) as folder:
        stage.exit_on_sigterm()
        sampled = {
            name: Sampler(model, config, config.rows_of(name)[1], samples, accelerator)
            for name, model in models.items()
        }
        rows = {name: sampler.rows() for name, sampler in sampled.items()}  # collective: every rank
        if stage.leads():
            result = score(config, real, sampled, rows, kind, inception)
            write(folder, result, rows)
    accelerator.end_training()


@dataclass(frozen=True)
class Row:
    """What one number of steps gives. steps: None is converged."""

    steps: int | None
    evaluations: int  # of the network, a sample, as counted
    x: Tensor  # [samples, ...] on rank 0's CPU


class Sampler:
    """Samples of one model, made in fixed batches that the processes share out."""

    def __init__(
        self,
        model: teachers.Teacher,
        config: EvaluateConfig,
        solver: SamplerConfig,
        samples: int,
        accelerator: Any,
    ):
        model.net.to(accelerator.device)
        self.config, self.solver = config, solver
        self.samples, self.accelerator = samples, accelerator
        self.shape, self.round = model.shape, model.round
        self.velocity = model.velocity(config.guidance if model.classes else 1.0)

    def rows(self) -> list[Row]:
        """Sample with every number of steps, then converged."""
        found = []
        for steps in self.config.steps:
            row = functools.partial(self.row, steps=steps)
            x, evaluations = self.sample(row)
            found.append(Row(steps, evaluations, x))
        x, evaluations = self.sample(
            lambda v, x0, span, ids: solvers.solve(v, x0, self.config.converged, span)
        )
        return [*found, Row(None, evaluations, x)]

    def row(
        self, v: VelocityField, x0: Tensor, span: Span, ids: np.ndarray, *, steps: int
    ) -> Tensor:
        """Carry the noise of some samples to data in a number of steps."""
        return samplers.sample(v, x0, self.solver, steps, span, seed=self.config.seed, ids=ids)

    @torch.inference_mode()
    def sample(  # collective: every rank
        self, solve: Callable[[VelocityField, Tensor, Span, np.ndarray], Tensor]
    ) -> tuple[Tensor, int]:
        """Carry the noise of all samples; (x [samples, ...], evaluations a sample).

        The evaluations are counted; where they differ between batches, their mean is rounded.
        """
        batch, world = self.config.compute_batch, self.accelerator.num_processes
        rounds = -(-self.samples // (batch * world))
        parts, counts = [], []
        for number in range(rounds):
            first = (number * world + self.accelerator.process_index) * batch
            ids = np.arange(first, first + batch)
            x0, cond = self.noise(ids)
            before = self.velocity.evaluations
            parts.append(self.velocity.carry(x0, functools.partial(solve, ids=ids), cond))
            counts.append(self.velocity.evaluations - before)
        gathered = self.accelerator.gather(torch.stack(parts))  # [world * rounds, batch, ...]
        ordered = gathered.unflatten(0, (world, rounds)).transpose(0, 1).flatten(0, 2)
        counted = self.accelerator.gather(torch.tensor(counts, device=gathered.device))
        counted = counted.unflatten(0, (world, rounds)).T.flatten()[: -(-self.samples // batch)]
        return ordered[: self.samples].cpu(), round(counted.double().mean().item())

    def noise(self, ids: np.ndarray) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Give the noise of some samples, and their labels."""
        device, seed = self.accelerator.device, self.config.seed
        x0 = torch.from_numpy(noise.normal(seed, ids, self.shape, noise.EVALUATION)).to(device)
        cond = None
        if self.velocity.classes is not None:
            label = noise.labels(seed, ids, self.velocity.classes)
            cond = {"label": torch.from_numpy(label).to(device)}
        return x0, cond

    @torch.inference_mode()
    def straightness(self) -> dict[str, float]:
        """Estimate the straightness on 256 samples."""
        x0, cond = self.noise(np.arange(256))
        span = self.velocity.span
        return metrics.straightness(lambda x, t: self.velocity(x, t, cond), x0, steps=64, span=span)


def score(
    config: EvaluateConfig,
    real: data.Data,
    sampled: dict[str, Sampler],
    rows: dict[str, list[Row]],
    kind: str,
    inception: metrics.Inception | None,
) -> dict[str, Any]:
    """Measure the distances of all rows, and write down the protocol."""
    n, device = sampled["teacher"].samples, sampled["teacher"].accelerator.device
    unflipped = dataclasses.replace(real, flip=False)
    reference = data.reference(unflipped, n, config.seed)["x1"].to(device)
    protocol: dict[str, Any] = {
        "distance": kind,
        "samples": n,
        "real_samples": n,
        "data": real.digest,
        "noise": f"Philox, seed {config.seed}, stream {noise.EVALUATION}",
        "weights": "EMA, float32",
        "solver": f"{samplers.describe(config.solver)}; converged: {config.converged_solver}",
        "guidance": config.guidance,
    }
    if config.student_solver is not None:
        protocol["student_solver"] = samplers.describe(config.student_solver)
    if kind == "sliced_wasserstein":
        distance: Callable[[Tensor, Tensor], float] = metrics.sliced_wasserstein
    else:
        net: Any = inception
        protocol["features"] = {"name": config.features}
        if config.features == "classifier":
            net, accuracy = metrics.train_classifier(real, config.seed)
            protocol["features"]["held_out_accuracy"] = accuracy
        if net is not None:
            protocol["features"]["sha256"] = metrics.module_digest(net)
            net.to(device)

        def distance(a: Tensor, b: Tensor) -> float:
            return metrics.frechet(a, b, net)

    floor, half = metrics.floor(reference, distance)
    result: dict[str, Any] = {"protocol": protocol, "floor": {"distance": floor, "samples": half}}
    truth = rows["teacher"][-1].x
    for name, found in rows.items():
        result[name] = {"round": sampled[name].round, **sampled[name].straightness(), "rows": []}
        for row in found:
            x = (row.x.clamp(-1, 1) if real.images else row.x).to(device)
            result[name]["rows"].append(
                {
                    "steps": row.steps,
                    "evaluations": row.evaluations,
                    "distance": distance(reference, x),
                    "rmse": (row.x - truth).square().mean().sqrt().item(),
                }
            )
    return result


def write(folder: run.Run, result: dict[str, Any], rows: dict[str, list[Row]]) -> None:
    """Write metrics.json, the table and the pictures, and seal."""
    place = Path(folder.folder)
    manifest.write_atomic(place / "metrics.json", json.dumps(result, indent=1) + "\n")
    manifest.write_atomic(place / "table.md", draw.table(result))
    draw.curve(place / "curve.png", result)
    draw.grid(place / "grid.png", {n: {r.steps: r.x for r in found} for n, found in rows.items()})
    folder.seal(["metrics.json"])
    stage.say(f"\n{draw.table(result)}\npictures: {place / 'curve.png'}, {place / 'grid.png'}")


if __name__ == "__main__":
    stage.command("evaluate", EvaluateConfig, main, __doc__)
