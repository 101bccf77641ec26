"""The rows of an evaluation on prompts: runs of teacher and student from the same noise and prompts.

The teacher's own run is the target. Beside it stand the teacher with fewer steps, by its own scheduler,
and the student, by Euler on the grid that its export uses.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.flow import noise, solvers
from flowmatch.flow.config import SolverConfig
from flowmatch.models.learn import FAILURES
from flowmatch.models.script import few_steps
from flowmatch.models.text import TextTeacher
from flowmatch.models.text_velocity import TextVelocity
from flowmatch.models.watch import quiet, run

Carry = Callable[[Tensor, Tensor], Tensor]  # (noise [B, ...], numbers of prompts [B]) -> states


@dataclass(frozen=True)
class Row:
    """A run of a model.

    Attributes:
        model: teacher or student.
        steps: Of a run.
        evaluations: Rows of the network's input a sample.
        carry: Carries noise to data.
        own: Whether it is the teacher's own run.
    """

    model: str
    steps: int
    evaluations: int
    carry: Carry
    own: bool = False

    @property
    def name(self) -> str:
        """A name for files: teacher, teacher_1, student_1."""
        return self.model if self.own else f"{self.model}_{self.steps}"

    def entries(self) -> dict[str, Any]:
        """Return what metrics.json says of it beside its measures."""
        names = ("name", "model", "steps", "own", "evaluations")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Draw:
    """The noise and the prompts of an evaluation; sample i depends on (seed, i) and the list alone.

    Attributes:
        seed: Of the evaluation.
        samples: Number of samples.
        per_prompt: Consecutive samples with the same prompt.
        texts: The prompts.
        shape: Of the noise of one sample.
    """

    seed: int
    samples: int
    per_prompt: int
    texts: list[str]
    shape: tuple[int, ...]

    def numbers(self) -> np.ndarray:
        """Return the number of each sample's prompt, int64 [samples]: all in turn, in random order."""
        groups = np.arange(self.samples) // self.per_prompt
        return noise.Order(len(self.texts), self.seed)(groups)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Yield ids [B], noise [B, *shape] and numbers of prompts [B]; size: of a batch."""
        numbers = torch.from_numpy(self.numbers())
        for ids in np.split(np.arange(self.samples), range(size, self.samples, size)):
            x0 = noise.normal(self.seed, ids, self.shape, noise.EVALUATION)
            yield ids, torch.from_numpy(x0), numbers[torch.from_numpy(ids)]


def teacher_row(teacher: TextTeacher, own: bool = True) -> Row:
    """Return the run of a teacher with the arguments of its call."""
    velocity, script = teacher.velocity(), teacher.script

    def carry(x0: Tensor, numbers: Tensor) -> Tensor:
        return velocity.integrate(x0, SolverConfig(name="own"), {"label": numbers})

    return Row("teacher", script.steps, script.evaluations, carry, own)


def with_steps(teacher: TextTeacher, steps: int) -> TextTeacher:
    """Return a teacher whose own run has another number of steps.

    Raises:
        UserError: Its pipeline cannot run it.
    """
    pipe, script = teacher.pipe, teacher.script
    call = few_steps(pipe, teacher.call, steps)
    if call == teacher.call and steps != script.steps:
        raise UserError(f"{script.pipeline} is called with its own list of times")
    x0 = torch.zeros(2, *script.shape, device=pipe._execution_device)
    try:
        with quiet():
            how: dict[str, Any] = dict(
                inject=script.inject, network=script.network, first_only=True
            )
            prompts = teacher.prompts.texts[:1] * 2
            run(pipe, prompts, teacher.whole_call | call, x0.to(_dtype(teacher)), **how)
        taken = len(pipe.scheduler.timesteps)
        each = script.evaluations // script.steps
        shorter = replace(script, steps=taken, evaluations=taken * each)
        changed = replace(teacher, call=call, script=shorter)
        x = teacher_row(changed).carry(x0, torch.zeros(2, dtype=torch.long))
    except (*FAILURES, ArithmeticError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{script.pipeline} fails: {type(error).__name__}: {told[:200]}") from None
    if not x.isfinite().all():
        raise UserError(f"{script.pipeline} returns NaN or inf")
    return changed


def _dtype(teacher: TextTeacher) -> torch.dtype:
    return next(teacher.net.parameters()).dtype


def student_row(student: TextTeacher, steps: int) -> Row:
    """Return the run of a student: Euler, one evaluation a step, without guidance."""
    v = TextVelocity(student.net, student.script, student.conditions(), student.schedule)
    grid = student.student_grid(steps)

    def carry(x0: Tensor, numbers: Tensor) -> Tensor:
        return solvers.integrate(lambda x, t: v(x, t, {"label": numbers}), x0, grid)

    return Row("student", steps, steps, carry)


def all_rows(
    teacher: TextTeacher, student: TextTeacher | None, steps: Sequence[int]
) -> tuple[list[Row], dict[int, str]]:
    """List the rows of an evaluation, the teacher's own run first.

    Returns:
        The rows; and the numbers of steps that the teacher's pipeline cannot run, with the reason.
    """
    rows, refused = [teacher_row(teacher)], {}
    for number in steps:
        try:
            row = teacher_row(with_steps(teacher, number), own=False)
        except UserError as error:
            refused[number] = str(error)
        else:
            rows.append(replace(row, steps=number))
    if student is not None:
        rows += [student_row(student, number) for number in steps]
    return rows, refused
