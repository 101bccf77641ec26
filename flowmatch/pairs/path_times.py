"""The times of the states that pairs keep: those that a config asks for, as the teacher has them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowmatch.config import UserError
from flowmatch.pairs.config import PairsConfig

if TYPE_CHECKING:
    from flowmatch.models.velocity import Velocity

NEAR = 1e-3  # a time may be written with three decimals


def of(config: PairsConfig, velocity: "Velocity") -> list[float]:
    """Find the times of the states of a config, as the velocity's solver has them; as in `exact`."""
    known = velocity.times(config.solver) if config.states else None
    return exact(config.states, known, velocity.span, config.solver.name)


def exact(
    asked: Sequence[float], times: Sequence[float] | None, span: tuple[float, float], solver: str
) -> list[float]:
    """Find the times of a solver that are meant.

    Args:
        asked: rising times in (0, 1).
        times: at which the solver has states; None where it has them at any time.
        span: the times of noise and data, for a solver of any time.
        solver: its name, for the message.

    Returns:
        The solver's own times, one for each that was asked for.

    Raises:
        UserError: a time is none of the solver's.
    """
    if times is None:
        if outside := [t for t in asked if not span[0] < t < span[1]]:
            raise UserError(
                f"states={outside}: expected times inside {span[0]:g} to {span[1]:g}, where the teacher "
                "is valid"
            )
        return list(asked)
    faults, found = [], []
    for t in asked:
        near = min(times, key=lambda time: abs(time - t), default=None)
        if near is None or abs(near - t) > NEAR:
            shown = ", ".join(f"{time:.4g}" for time in times)
            faults.append(f"states: {t:g} is no time of solver.name={solver}; its times: {shown}")
        else:
            found.append(near)
    if not faults and len(set(found)) < len(found):
        faults = [f"states={list(asked)}: two of them are one time of solver.name={solver}"]
    if faults:
        raise UserError(faults)
    return found
