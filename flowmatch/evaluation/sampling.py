"""The rows of an evaluation: samples of a model from the same noise, at several numbers of steps.

Samples are generated in fixed batches that are distributed over the processes, so the samples do not
depend on the number of processes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.evaluation import metrics, tables
from flowmatch.flow import noise, samplers
from flowmatch.flow.config import SamplerConfig, SolverConfig
from flowmatch.models import teachers
from flowmatch.models.autoencoder import Autoencoder
from flowmatch.models.config import Precision
from flowmatch.models.precision import arithmetic
from flowmatch.runs.process import bar_options

Span = tuple[float, float]  # the times of noise and data
STRAIGHT, STRAIGHT_STEPS = 256, 64  # samples, at most, and Euler steps for the straightness
PATHS = 64  # of these samples, whose paths the report draws


def check(models: dict[str, teachers.Teacher], real: Data | None, guidance: float) -> None:
    """Check that models can be guided, and that they have the same classes.

    Args:
        models: The models, by key.
        real: The data; its classes count if it has labels and a model takes them.
        guidance: Scale of classifier-free guidance; 1 is none.

    Raises:
        UserError: If they cannot, or have not.
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
        faults.append(
            f"numbers of classes differ: {found}; use models and data with the same classes"
        )
    if faults:
        raise UserError(faults)


def check_names(opened: Mapping[str, Data | teachers.Teacher]) -> None:
    """Check that class 3 means the same in all data and models, by key. Raises UserError if not."""
    known = {name: found.names for name, found in opened.items() if found.names}
    if len(set(known.values())) > 1:
        told = "; ".join(f"{name} {', '.join(names)}" for name, names in known.items())
        raise UserError(f"the classes have other names: {told}; give all the same classes")


def check_shapes(
    sets: Mapping[str, Data],
    models: Mapping[str, teachers.Teacher],
    made: tuple[int, ...],
    vae: Autoencoder | None,
) -> None:
    """Check that data and models have the same shapes.

    Args:
        sets: The data as they are compared, by key.
        models: The models, by key.
        made: Shape of the data's samples as the models make them.
        vae: What decodes them, if they are latents.

    Raises:
        UserError: If they have not, or if a model makes latents of another VAE.
    """
    shape = sets["data"].shape
    opened: dict[str, Data | teachers.Teacher] = {**sets, **models}
    for name, found in opened.items():
        wanted = shape if name in sets else made
        if found.shape != wanted:
            raise UserError(
                f"{name} {'holds' if name in sets else 'makes samples of'} {list(found.shape)}; "
                f"data holds {list(wanted)}"
            )
    for name, model in models.items():
        if vae is not None and model.latents and model.latents != vae.facts:
            raise UserError(f"{name} was trained on latents of another VAE than data holds")


def evaluations(
    model: teachers.Teacher,
    guidance: float,
    steps: list[int],
    solver: SamplerConfig,
    converged: SolverConfig,
) -> int:
    """Count the network evaluations per sample of all rows of a model, without those of dopri5.

    Args:
        model: The model.
        guidance: Scale of classifier-free guidance; any value but 1 doubles the evaluations.
        steps: Numbers of steps, a row each.
        solver: How these rows are sampled.
        converged: How the row `converged` is sampled.
    """
    followed = samplers.evaluations(solver.name) * sum(steps) + (converged.evaluations or 0)
    last = model.velocity(guidance).extra * (len(steps) + 1)
    return (followed + last) * (1 if guidance == 1 else 2)


@dataclass(frozen=True)
class SampledRow:
    """The samples of one number of steps."""

    steps: int | None  # None: converged
    evaluations: int  # of the network, per sample, as counted
    x: Tensor  # [samples, ...] on the CPU of rank 0; no samples on other ranks


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
    name: str = ""  # of the model, for the progress bar

    def __post_init__(self) -> None:
        self.model.net.to(self.accelerator.device)

    @functools.cached_property
    def velocity(self) -> Any:
        """The velocity field of the model. It counts its evaluations."""
        return self.model.velocity(self.guidance)

    def arithmetic(self) -> AbstractContextManager[None]:
        """Return a context in which the network computes in the configured precision."""
        return arithmetic(self.precision, self.accelerator.device)

    def rows(
        self,
        steps: list[int],
        solver: SamplerConfig,
        converged: SolverConfig,
        done: Callable[[SampledRow], object] = lambda row: None,
    ) -> list[SampledRow]:
        """Generate all samples with every number of steps, then converged. Collective: every rank.

        Rank 0 shows a progress bar over the network evaluations of all samples.

        Args:
            steps: Numbers of steps.
            solver: The sampler of these rows.
            converged: The solver of the last row.
            done: Called with each row when it is there.

        Returns:
            The rows, in their order.
        """
        with self._bar(steps, solver, converged) as bar:
            ways: list[tuple[int | None, Callable[..., Tensor]]] = [
                (number, functools.partial(self.row, solver=solver, steps=number))
                for number in steps
            ]
            last = (None, lambda x0, cond, ids: self.velocity.integrate(x0, converged, cond))
            rows = []
            for number, carry in [*ways, last]:
                rows.append(self._sampled(number, carry, bar))
                with tqdm.external_write_mode():
                    done(rows[-1])
        return rows

    @contextmanager
    def _bar(
        self, steps: list[int], solver: SamplerConfig, converged: SolverConfig
    ) -> Iterator[tqdm]:
        total = None  # dopri5 chooses its steps
        if converged.evaluations is not None:
            per_sample = evaluations(self.model, self.guidance, steps, solver, converged)
            total = self.samples * per_sample
        with tqdm(total=total, unit="evaluation", unit_scale=True, **bar_options()) as bar:
            yield bar

    def _sampled(self, steps: int | None, carry: Callable[..., Tensor], bar: tqdm) -> SampledRow:
        bar.set_description(f"{self.name}, {tables.steps_name(steps)}".removeprefix(", "))
        x, evaluations = self.sample(carry, bar)
        return SampledRow(steps, evaluations, x)

    def row(
        self,
        x0: Tensor,
        cond: dict[str, Tensor] | None,
        ids: np.ndarray,
        *,
        solver: SamplerConfig,
        steps: int,
    ) -> Tensor:
        """Integrate the noise of some samples to data in a number of steps.

        Args:
            x0: Noise [B, ...].
            cond: The conditions of the network.
            ids: Numbers of the samples, int64 [B].
            solver: The sampler.
            steps: Number of steps.

        Returns:
            [B, ...].
        """
        return self.velocity.sample(x0, solver, steps, cond, seed=self.seed, ids=ids)

    @torch.inference_mode()
    def sample(self, carry: Callable[..., Tensor], bar: tqdm) -> tuple[Tensor, int]:
        """Integrate the noise of all samples. Collective: every rank.

        Args:
            carry: carry(x0, cond, ids) integrates a batch.
            bar: Progress bar over the network evaluations of all samples and ranks.

        Returns:
            x [samples, ...] on the CPU of rank 0, and the network evaluations per sample as counted;
            their rounded mean if they differ between batches.
        """
        batch, world = self.batch, self.accelerator.num_processes
        rounds = -(-self.samples // (batch * world))
        parts, counts = [], []
        for number in range(rounds):
            first = (number * world + self.accelerator.process_index) * batch
            ids = np.arange(first, first + batch)
            x0, cond = self.noise(ids)
            before = self.velocity.evaluations
            # the rest of the last batches is padding
            wanted = min(batch * world, self.samples - number * batch * world)
            with self.arithmetic():
                parts.append(carry(x0, cond, ids))
            bar.update((self.velocity.evaluations - before) * wanted)
            counts.append(self.velocity.evaluations - before)
        gathered = self.accelerator.gather(torch.stack(parts))  # [world * rounds, batch, ...]
        ordered = gathered.unflatten(0, (world, rounds)).transpose(0, 1).flatten(0, 2)
        counted = self.accelerator.gather(torch.tensor(counts, device=gathered.device))
        counted = counted.unflatten(0, (world, rounds)).T.flatten()[: -(-self.samples // batch)]
        kept = self.samples if self.accelerator.is_main_process else 0
        return ordered[:kept].cpu(), round(counted.double().mean().item())

    def noise(self, ids: np.ndarray) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Generate the noise and the labels of some samples.

        Args:
            ids: Numbers of the samples, int64 [B].

        Returns:
            x0 [B, ...], and the conditions of the network, None if it takes none.
        """
        device = self.accelerator.device
        x0 = torch.from_numpy(noise.normal(self.seed, ids, self.model.shape, noise.EVALUATION))
        cond = None
        if self.velocity.classes is not None:
            label = noise.labels(self.seed, ids, self.velocity.classes)
            cond = {"label": torch.from_numpy(label).to(device)}
        return x0.to(device), cond

    def straightness(self) -> dict[str, float]:
        """Estimate the straightness on the first 256 samples, or all, as `metrics.straightness` does."""
        return self._euler_paths[0]

    def paths(self) -> tuple[Tensor, Tensor]:
        """Return paths of the first samples, those that the straightness is estimated on.

        Returns:
            Times [T], from noise to data, and states [T, N, ...] on the CPU, N at most PATHS.
        """
        return self._euler_paths[1:]

    @functools.cached_property
    @torch.inference_mode()
    def _euler_paths(self) -> tuple[dict[str, float], Tensor, Tensor]:
        """Integrate some samples by Euler, and return their straightness, times and states."""
        x0, cond = self.noise(np.arange(min(STRAIGHT, self.samples)))
        start, end = self.velocity.span
        times = torch.linspace(start, end, STRAIGHT_STEPS + 1, dtype=torch.float64)
        states, last = [], x0[:0]

        def followed(x: Tensor, t: float) -> Tensor:
            nonlocal last
            velocity = self.velocity(x, t, cond)
            states.append(x[:PATHS].cpu())
            last = x[:PATHS] + (end - start) / STRAIGHT_STEPS * velocity[:PATHS]
            return velocity

        with self.arithmetic():
            straight = metrics.straightness(
                followed, x0, steps=STRAIGHT_STEPS, batch=STRAIGHT, span=self.velocity.span
            )
        return straight, times, torch.stack([*states, last.cpu()])
