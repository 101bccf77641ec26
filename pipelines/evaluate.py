"""Evaluation: quality against number of evaluations, of teacher and student, on the same noise.

The noise comes from a stream of its own: a student scored on the noise of its pairs looks better than
it is. Every distance stands beside the distance of real data to real data.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowmatch import config as configs
from flowmatch import data, draw, manifest, metrics, nets, noise, run, solvers, stage, teachers
from flowmatch.config import UserError, option, required
from flowmatch.data import DataConfig


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
    steps: list[int] = option([1, 2, 4, 8, 16, 32], "numbers of Euler steps")
    converged_steps: int = option(
        64, "Heun steps of the reference 'converged' (2 evaluations each)", ge=1
    )
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


def main(config: EvaluateConfig, dry_run: bool) -> None:
    """Plan, then sample, score, draw and seal."""
    faults = configs.Faults()
    inputs: dict[str, str] = {}
    with faults:
        device = stage.pick_device(config.device)
        if not config.steps or min(config.steps) < 1:
            raise UserError(f"steps={config.steps}: expected one or more numbers, from 1")
    with faults:
        real = data.load(config.data)
        inputs["data"] = real.digest
        if config.features == "classifier" and real.images and real.label is None:
            raise UserError("features='classifier' needs data.labels=true (or use features=values)")
    models: dict[str, teachers.Teacher] = {}
    for name in ("teacher", "student"):
        with faults:
            models[name] = teachers.load(getattr(config, name), name)
            inputs[name] = models[name].digest
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
    evaluations = samples * 2 * (sum(config.steps) + 2 * config.converged_steps)
    plan = [
        f"{samples} samples a row, {kind} distance to {samples} of {real.count} real ones",
        f"{evaluations:,} network evaluations for {len(config.steps) + 1} rows of 2 models, on {device}",
    ]
    if not stage.begin("evaluate", config, inputs, plan, dry_run):
        return
    accelerator = run.start_accelerator(config.device)
    with run.Run("evaluate", config, inputs) as folder:
        stage.exit_on_sigterm()
        sampled = {
            name: Sampler(model, config, samples, accelerator) for name, model in models.items()
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
        self, model: teachers.Teacher, config: EvaluateConfig, samples: int, accelerator: Any
    ):
        model.net.to(accelerator.device)
        self.config, self.samples, self.accelerator = config, samples, accelerator
        self.shape, self.round = model.shape, model.round
        self.velocity = nets.Velocity(model.net, config.guidance if model.classes else 1.0)

    def rows(self) -> list[Row]:
        """Sample with every number of steps, then converged."""
        grids = [(n, "euler") for n in self.config.steps] + [(self.config.converged_steps, "heun")]
        found = []
        for steps, solver in grids:
            x, evaluations = self.sample(solvers.uniform_grid(steps), solver)
            found.append(Row(steps if solver == "euler" else None, evaluations, x))
        return found

    @torch.inference_mode()
    def sample(self, grid: Tensor, solver: str) -> tuple[Tensor, int]:  # collective: every rank
        """Integrate the noise of all samples; (x [samples, ...], evaluations a sample)."""
        batch, world = self.config.compute_batch, self.accelerator.num_processes
        rounds = -(-self.samples // (batch * world))
        parts, evaluations = [], 0
        for number in range(rounds):
            first = (number * world + self.accelerator.process_index) * batch
            x0, v = self.noise(np.arange(first, first + batch))
            before = self.velocity.evaluations
            parts.append(solvers.integrate(v, x0, grid, solver))
            evaluations = self.velocity.evaluations - before
        gathered = self.accelerator.gather(torch.stack(parts))  # [world * rounds, batch, ...]
        ordered = gathered.unflatten(0, (world, rounds)).transpose(0, 1).flatten(0, 2)
        return ordered[: self.samples].cpu(), evaluations

    def noise(self, ids: np.ndarray) -> tuple[Tensor, Callable[[Tensor, float], Tensor]]:
        """Give the noise of some samples, and the velocity under their labels."""
        device, seed = self.accelerator.device, self.config.seed
        x0 = torch.from_numpy(noise.normal(seed, ids, self.shape, noise.EVALUATION)).to(device)
        cond = None
        if self.velocity.classes is not None:
            label = noise.labels(seed, ids, self.velocity.classes)
            cond = {"label": torch.from_numpy(label).to(device)}
        return x0, lambda x, t: self.velocity(x, t, cond)

    @torch.inference_mode()
    def straightness(self) -> dict[str, float]:
        """Estimate the straightness on 256 samples."""
        x0, v = self.noise(np.arange(256))
        return metrics.straightness(v, x0, steps=64)


def score(
    config: EvaluateConfig,
    real: data.Data,
    samplers: dict[str, Sampler],
    rows: dict[str, list[Row]],
    kind: str,
    inception: metrics.Inception | None,
) -> dict[str, Any]:
    """Measure the distances of all rows, and write down the protocol."""
    n, device = samplers["teacher"].samples, samplers["teacher"].accelerator.device
    reference = data.reference(dataclasses.replace(real, flip=False), n, config.seed)["x1"].to(
        device
    )
    protocol: dict[str, Any] = {
        "distance": kind,
        "samples": n,
        "real_samples": n,
        "data": real.digest,
        "noise": f"Philox, seed {config.seed}, stream {noise.EVALUATION}",
        "weights": "EMA, float32",
        "solver": "euler, uniform steps; converged: heun",
        "guidance": config.guidance,
    }
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
        result[name] = {"round": samplers[name].round, **samplers[name].straightness(), "rows": []}
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


def table(result: dict[str, Any]) -> str:
    """Write the result as a Markdown table: a row for each number of evaluations."""
    teacher, student = result["teacher"], result["student"]
    converged = teacher["rows"][-1]["distance"]
    lines = [
        "| steps | evaluations | teacher | student | student / teacher converged |",
        "|---|---|---|---|---|",
    ]
    for a, b in zip(teacher["rows"], student["rows"], strict=True):
        steps = a["steps"] or "converged (heun)"
        lines.append(
            f"| {steps} | {a['evaluations']} | {a['distance']:.3g} | {b['distance']:.3g} "
            f"| {b['distance'] / converged:.2f} |"
        )
    protocol, floor = result["protocol"], result["floor"]
    lines += [
        "",
        f"{protocol['distance']} distance, {protocol['samples']} samples against "
        f"{protocol['real_samples']} real ones, EMA weights, Euler; real against real, "
        f"{floor['samples']} each: {floor['distance']:.3g}. Straightness, normalised (0 is straight): "
        f"teacher {teacher['normalised']:.3g}, student {student['normalised']:.3g}.",
    ]
    return "\n".join(lines) + "\n"


def write(folder: run.Run, result: dict[str, Any], rows: dict[str, list[Row]]) -> None:
    """Write metrics.json, the table and the pictures, and seal."""
    place = Path(folder.folder)
    manifest.write_atomic(place / "metrics.json", json.dumps(result, indent=1) + "\n")
    manifest.write_atomic(place / "table.md", table(result))
    draw.curve(place / "curve.png", result)
    draw.grid(place / "grid.png", {n: {r.steps: r.x for r in found} for n, found in rows.items()})
    folder.seal(["metrics.json"])
    stage.say(f"\n{table(result)}\npictures: {place / 'curve.png'}, {place / 'grid.png'}")


if __name__ == "__main__":
    stage.command("evaluate", EvaluateConfig, main, __doc__)
