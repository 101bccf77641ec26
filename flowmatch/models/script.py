"""How a pipeline calls its network: what `learn` finds by watching it, as a few names and numbers."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowmatch.models.network import Network
from flowmatch.models.watch import Call, answer_of, run

REST = "(rest of the state)"  # constant channels that a pipeline puts behind the state


@dataclass(frozen=True)
class Script:
    """How a pipeline calls its network, and what becomes of the answer.

    Attributes:
        pipeline: Name of the pipeline's class.
        network: Name of the component.
        sample: Argument of the network that takes the state.
        time: Argument that takes the time.
        kind: What the model output is: "flow" (a derivative of the state by the noise level), or a
            diffusion's "epsilon", "v_prediction" or "sample".
        slope: The network's time is slope * clock + offset. The clock of a flow is the noise level,
            1 at noise and 0 at data; that of a diffusion is the scheduler's timestep.
        offset: See `slope`.
        integer: Whether the pipeline rounds a flow's noise levels to the scheduler's timesteps.
        sign: Model output = sign * answer.
        half: Whether only the first half of the answer's channels counts.
        entry: Shape of one sample where the network takes a list of samples, else None.
        direction: 1 where a flow's model output is the derivative by the noise level, -1 by the time.
        shape: Of the state of one sample.
        scale: State at the first step = scale * noise.
        inject: Whether noise is put in at the first step, for want of a fitting argument `latents`.
        off: Arguments of the pipeline's call that switch guidance off, so that the network is called
            once with one row a sample; empty where it is so anyway.
        guider: Whether the component `guider` has to be disabled for it.
        rides: Whether a sample depends on the longest prompt of its batch.
        steps: Steps of the call as given.
        evaluations: Rows of the network's input a sample, in all steps of the call as given.
        replayed: The difference of a replay to what was learnt, relative to the model output; no part of
            the entries.
    """

    pipeline: str
    network: str
    sample: str
    shape: tuple[int, ...]
    inject: bool = False
    scale: float = 1.0
    time: str = ""
    kind: str = "flow"
    slope: float = 1.0
    offset: float = 0.0
    integer: bool = False
    sign: float = 1.0
    half: bool = False
    entry: tuple[int, ...] | None = None
    direction: float = 1.0
    off: dict[str, float] = field(default_factory=dict)
    guider: bool = False
    rides: bool = False
    steps: int = 0
    evaluations: int = 0
    replayed: float | None = field(default=None, compare=False)

    def entries(self) -> dict[str, Any]:
        """Return the fields as JSON values; `Script.of` reads them back."""
        entries = asdict(self) | {
            "shape": list(self.shape),
            "entry": self.entry and list(self.entry),
        }
        entries.pop("replayed")
        return entries

    @classmethod
    def of(cls, entries: dict[str, Any]) -> "Script":
        """Make a script of what `entries` returned."""
        entry = entries["entry"]
        return cls(
            **entries
            | {"shape": tuple(entries["shape"]), "entry": None if entry is None else tuple(entry)}
        )

    def evaluate(self, net: Network, x: Tensor, clock: Tensor, cond: dict[str, Any]) -> Tensor:
        """Call a network as the pipeline does.

        Args:
            net: The network, or its wrapper.
            x: State, [B, *shape].
            clock: Noise levels of a flow, or timesteps, [B].
            cond: Its other arguments (`conditions`).

        Returns:
            The model output, [B, *shape].
        """
        return self.call(net, x, self.slope * clock + self.offset, cond)

    def call(self, net: Network, x: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """Call a network with times of its own, [B]; the rest is as in `evaluate`."""
        rest = cond.get(REST)
        more = {name: value for name, value in cond.items() if name != REST}
        state: Any = x if rest is None else torch.cat([x, rest.to(x)], dim=1)
        if self.entry is not None:
            state = [row.reshape(self.entry) for row in x]
        return self.output(answer_of(net(**{self.sample: state, self.time: time, **more})), x)

    def state(self, call: Call) -> Tensor:
        """Return the state in a call of the network, without constant channels behind it."""
        given = call.arguments[self.sample]
        x = torch.stack(given) if isinstance(given, list) else given
        return x if self.rest(call) is None else x[:, : self.shape[0]]

    def rest(self, call: Call) -> Tensor | None:
        """Return the channels behind the state in a call of the network, or None."""
        given = call.arguments[self.sample]
        if isinstance(given, list) or given.dim() != len(self.shape) + 1:
            return None
        return given[:, self.shape[0] :] if given.shape[1] > self.shape[0] else None

    def output(self, answer: Tensor | None, x: Tensor) -> Tensor:
        """Turn an answer of the network into the scheduler's model output, shaped like the state x."""
        assert answer is not None, "the network has answered with a tensor before"
        part = answer.chunk(2, dim=1)[0] if self.half else answer
        return self.sign * part.reshape(x.shape).to(x.dtype)


def few_steps(pipe: Any, call: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the arguments of a call with another number of steps, where it takes one."""
    known = "num_inference_steps" in inspect.signature(pipe.__call__).parameters
    fixed = any(call.get(name) is not None for name in ("timesteps", "sigmas"))
    return call | {"num_inference_steps": steps} if known and not fixed else call


def dtype_of(pipe: Any, network: str) -> torch.dtype:
    """Return the dtype of the weights of a component."""
    return next(getattr(pipe, network).parameters()).dtype


def conditions(
    pipe: Any, script: Script, call: dict[str, Any], prompts: Sequence[str]
) -> dict[str, Any]:
    """Run a pipeline to its network's first call, and keep the arguments that come from the prompts.

    Args:
        pipe: The pipeline.
        script: From `learn`.
        call: Arguments of the pipeline's call.
        prompts: One for each sample, [B].

    Returns:
        Keyword arguments of the network, without state and time.
    """
    device, dtype = pipe._execution_device, dtype_of(pipe, script.network)
    zeros = torch.zeros(len(prompts), *script.shape, device=device, dtype=dtype)
    how: dict[str, Any] = dict(inject=script.inject, network=script.network, first_only=True)
    with unguided(pipe, script):  # one step is too few for some classes
        seen = run(pipe, prompts, few_steps(pipe, call | script.off, 2), zeros, **how)
    first = seen.calls[-1]
    own = (script.sample, script.time)
    given = {name: value for name, value in first.arguments.items() if name not in own}
    rest = script.rest(first)
    return given if rest is None else given | {REST: rest}


@contextmanager
def answered_once(net: Any, answers: dict[Any, Any]) -> Iterator[None]:
    """Let a network answer each later call with that of the first of its kind, inside the block.

    Args:
        net: The network.
        answers: Keeps the answers, by the shape of the state.
    """
    own, before = net.forward, net.__dict__.get("forward")

    @functools.wraps(own)  # its signature is read
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        kind = tuple(given.shape) if isinstance(given, Tensor) else len(given)
        if kind not in answers:
            answers[kind] = own(*args, **kwargs)
        return answers[kind]

    net.forward = forward
    try:
        yield
    finally:
        del net.forward
        if before is not None:
            net.forward = before


@contextmanager
def unguided(pipe: Any, script: Script | None) -> Iterator[None]:
    """Disable the guider of a pipeline inside the block, where the script says so."""
    if script is None or not script.guider:
        yield
        return
    pipe.guider.disable()
    try:
        yield
    finally:
        pipe.guider.enable()
