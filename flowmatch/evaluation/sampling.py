"""The rows of an evaluation: samples of one model from the same noise, at any number of steps.

Samples are made in fixed batches that the processes share out, so their number changes nothing.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.evaluation import metrics
from flowmatch.flow import noise, samplers, solvers
from flowmatch.flow.config import SamplerConfig, SolverConfig
from flowmatch.flow.solvers import VelocityField
from flowmatch.models import teachers
from flowmatch.models.config import Precision
from flowmatch.models.precision import arithmetic

Span = tuple[float, float]  # the times of noise and data
PATHS, PATH_STEPS = 64, 32  # shown of the paths from noise to data


def check(models: dict[str, teachers.Teacher], real: Data | None, guidance: float) -> None:
    """Raise UserError where models cannot be guided so, or are of different classes.

    real: the data, whose classes count where it gives labels and a model takes them.
    """
    faults = []
    for name, model in models.items():
        try:
            model.velocity(guidance)
        except UserError as error:
            faults += [f"{name}: {fault}" for fault in error.faults]
    classes = {name: model.classes for name, model in models.items()}
    if real is not None and real.classes is not None and any(classes.values()):
        classes["data"] = real.classes
    if len(set(classes.values())) > 1:
        found = ", ".join(f"{name} {number or 'none'}" for name, number in classes.items())
        faults.append(f"numbers of classes differ: {found}; name what was trained on the same ones")
    if faults:
        raise UserError(faults)


def evaluations(
    model: teachers.Teacher,
    guidance: float,
    steps: list[int],
    solver: SamplerConfig,
    converged: SolverConfig,
) -> int:
    """Count the evaluations of the network that all rows take a sample, without those of dopri5."""
    followed = samplers.evaluations(solver.name) * sum(steps) + (converged.evaluations or 0)
    last = model.velocity(guidance).extra * (len(steps) + 1)
    return (followed + last) * (1 if guidance == 1 else 2)


@dataclass(frozen=True)
class SampledRow:
    """What one number of steps gives. steps: None is converged."""

    steps: int | None
    evaluations: int  # of the network, a sample, as counted
    x: Tensor  # [samples, ...] on rank 0's CPU; no samples on another rank


@dataclass(frozen=True)
class Sampler:
    """Samples of one model."""

    model: teachers.Teacher
    samples: int
    batch: int  # samples integrated together
    seed: int
    guidance: float
    precision: Precision
    accelerator: Any

    def __post_init__(self) -> None:
        self.model.net.to(self.accelerator.device)

    @functools.cached_property
    def velocity(self) -> Any:
        """The velocity field, which counts its evaluations."""
        return self.model.velocity(self.guidance)

    def arithmetic(self) -> AbstractContextManager[None]:
        """Let the network multiply in the precision asked for."""
        return arithmetic(self.precision, self.accelerator.device)

    def rows(
        self, steps: list[int], solver: SamplerConfig, converged: SolverConfig
    ) -> list[SampledRow]:
        """Sample with every number of steps, then converged."""
        found = []
        for number in steps:
            x, evaluations = self.sample(functools.partial(self.row, solver=solver, steps=number))
            found.append(SampledRow(number, evaluations, x))
        x, evaluations = self.sample(
            lambda x0, cond, ids: self.velocity.carry(
                x0, lambda v, x, span: solvers.solve(v, x, converged, span), cond
            )
        )
        return [*found, SampledRow(None, evaluations, x)]

    def row(
        self,
        x0: Tensor,
        cond: dict[str, Tensor] | None,
        ids: np.ndarray,
        *,
        solver: SamplerConfig,
        steps: int,
    ) -> Tensor:
        """Carry the noise of some samples to data in a number of steps."""
        return self.velocity.sample(x0, solver, steps, cond, seed=self.seed, ids=ids)

    @torch.inference_mode()
    def sample(  # collective: every rank
        self, carry: Callable[..., Tensor]
    ) -> tuple[Tensor, int]:
        """Carry the noise of all samples; (x [samples, ...] on rank 0, evaluations a sample).

        carry(x0, cond, ids) carries a batch.

        The evaluations are counted; where they differ between batches, their mean is rounded.
        """
        batch, world = self.batch, self.accelerator.num_processes
        rounds = -(-self.samples // (batch * world))
        parts, counts = [], []
        for number in range(rounds):
            first = (number * world + self.accelerator.process_index) * batch
            ids = np.arange(first, first + batch)
            x0, cond = self.noise(ids)
            before = self.velocity.evaluations
            with self.arithmetic():
                parts.append(carry(x0, cond, ids))
            counts.append(self.velocity.evaluations - before)
        gathered = self.accelerator.gather(torch.stack(parts))  # [world * rounds, batch, ...]
        ordered = gathered.unflatten(0, (world, rounds)).transpose(0, 1).flatten(0, 2)
        counted = self.accelerator.gather(torch.tensor(counts, device=gathered.device))
        counted = counted.unflatten(0, (world, rounds)).T.flatten()[: -(-self.samples // batch)]
        kept = self.samples if self.accelerator.is_main_process else 0
        return ordered[:kept].cpu(), round(counted.double().mean().item())

    def noise(self, ids: np.ndarray) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Give the noise of some samples, and their labels."""
        device = self.accelerator.device
        x0 = torch.from_numpy(noise.normal(self.seed, ids, self.model.shape, noise.EVALUATION))
        cond = None
        if self.velocity.classes is not None:
            label = noise.labels(self.seed, ids, self.velocity.classes)
            cond = {"label": torch.from_numpy(label).to(device)}
        return x0.to(device), cond

    @torch.inference_mode()
    def straightness(self) -> dict[str, float]:
        """Estimate the straightness on 256 samples."""
        x0, cond = self.noise(np.arange(256))
        span = self.velocity.span
        with self.arithmetic():
            return metrics.straightness(
                lambda x, t: self.velocity(x, t, cond), x0, steps=64, span=span
            )

    @torch.inference_mode()
    def paths(self) -> tuple[Tensor, Tensor]:
        """Follow some noises to data by Heun: (times [T], x [T, PATHS, ...]), on the CPU."""
        x0, cond = self.noise(np.arange(PATHS))
        start, end = self.velocity.span
        times = torch.linspace(start, end, PATH_STEPS + 1, dtype=torch.float64)
        states = []

        def follow(v: VelocityField, x: Tensor, span: Span) -> Tensor:
            states.append(x)
            for i in range(PATH_STEPS):
                states.append(solvers.integrate(v, states[-1], times[i : i + 2], "heun"))
            return states[-1]

        with self.arithmetic():
            self.velocity.carry(x0, follow, cond)
        return times, torch.stack(states).cpu()
