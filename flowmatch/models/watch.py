"""Watch a diffusers pipeline: what its network and its scheduler get and return at every step.

No class of pipeline is known here. Forward hooks on the components that are modules, and a wrapper
around `scheduler.step` of the one object, record a run; the same hooks replace the network's answer, put
noise in at the first step, and stop a run early, so that only what is needed is computed.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Stop(BaseException):
    """Ends a run from inside the pipeline, whose handlers of errors must not see it."""


@dataclass(frozen=True)
class Call:
    """One call of a component.

    Attributes:
        name: Of the component.
        arguments: By the names of its `forward`.
        answer: Its output as one tensor (`answer_of`).
    """

    name: str
    arguments: dict[str, Any]
    answer: Tensor | None


@dataclass(frozen=True)
class Step:
    """One step of the scheduler.

    Attributes:
        calls: Calls of components since the step before.
        output: The model output that `step` was given, [B, ...].
        timestep: That `step` was given.
        sigma: Of the scheduler's list at this step, or None where it has none.
        next_sigma: The one after it, or None.
        sample: The state before the step, [B, ...].
        after: The state after it, [B, ...].
    """

    calls: list[Call]
    output: Tensor
    timestep: float
    sigma: float | None
    next_sigma: float | None
    sample: Tensor
    after: Tensor


def answer_of(output: Any) -> Tensor | None:
    """Return the output of a network as one tensor: of a tuple the first, a list of samples stacked."""
    if hasattr(output, "sample") and isinstance(output.sample, Tensor | list):
        output = output.sample
    elif isinstance(output, tuple | list) and output and not isinstance(output[0], Tensor):
        return answer_of(output[0])
    elif isinstance(output, tuple) and output:
        output = output[0]
    if isinstance(output, list) and output and all(isinstance(x, Tensor) for x in output):
        return torch.stack(output)
    return output if isinstance(output, Tensor) else None


def replaced(output: Any, answer: Tensor) -> Any:
    """Return the output of a network with another answer in the place where `answer_of` found it."""
    if hasattr(output, "sample") and isinstance(output.sample, Tensor | list):
        output.sample = replaced(output.sample, answer)
        return output
    if isinstance(output, Tensor):
        return answer
    if isinstance(output, list) and all(isinstance(x, Tensor) for x in output):
        return list(answer)
    return type(output)([replaced(output[0], answer), *output[1:]])


@dataclass
class Watch:
    """A context in which a pipeline is watched.

    Args:
        pipe: The pipeline.
        network: Name of its network, where it is known.
        noise: State to put in at the first step, for pipelines that take no `latents`.
        answer: Replaces the network's answer: answer -> answer.
        first_only: Stop at the first call of the network.
        count: Stop after so many steps.
        before: Called before each call of the network; it may raise.
        end: Replaces the state after each step, and so what the pipeline decodes.

    Attributes:
        result: What the pipeline returned, where it ran to its end.
    """

    pipe: Any
    network: str | None = None
    noise: Tensor | None = None
    answer: Callable[[Tensor], Tensor] | None = None
    first_only: bool = False
    count: int | None = None
    before: Callable[[], None] | None = None
    end: Tensor | None = None
    result: Any = None
    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)  # since the last step
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                before = part.register_forward_pre_hook(
                    functools.partial(self._before, name), with_kwargs=True
                )
                after = part.register_forward_hook(
                    functools.partial(self._after, name), with_kwargs=True
                )
                self._undo += [before.remove, after.remove]
        scheduler = self.pipe.scheduler
        scheduler.step = self._wrapped(scheduler.step)  # on the object, not on its class
        self._undo.append(functools.partial(scheduler.__dict__.pop, "step"))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> bool:
        for undo in self._undo:
            undo()
        self._undo.clear()
        return kind is Stop

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if name != self.network:
            return None
        if self.before is not None:
            self.before()
        if self.first_only:
            self.calls.append(Call(name, bound(module, args, kwargs), None))
            raise Stop
        if self.noise is None or self.steps:
            return None
        given = list(args)  # the state is the first argument
        key = None if given else next(iter(bound(module, args, kwargs)))
        state = given[0] if given else kwargs[key]
        times = state.shape[0] // self.noise.shape[0]
        noise = torch.cat([self.noise] * times).to(state).reshape(state.shape)
        return ((noise, *given[1:]), kwargs) if given else (args, kwargs | {key: noise})

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        answer = answer_of(output)
        if name == self.network and self.answer is not None and answer is not None:
            answer = self.answer(answer)
            output = replaced(output, answer)
        given = bound(module, args, kwargs)
        if name == self.network or self.network is None:
            first = next(iter(given), None)  # the state, which some loops change in place
            if first is not None and isinstance(given[first], Tensor):
                given[first] = given[first].detach().clone()
        self.calls.append(Call(name, given, answer))
        return output

    def _wrapped(self, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)

        @functools.wraps(step)  # pipelines read its signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            if self.noise is not None and not self.steps:
                given.arguments["sample"] = self.noise.to(given.arguments["sample"])
            sample, output = given.arguments["sample"], given.arguments["model_output"]
            sigmas: Any = getattr(self.pipe.scheduler, "sigmas", None)
            i = len(self.steps)
            known = has_place(sigmas, i + 1)
            sigma, following = (float(sigmas[k]) if known else None for k in (i, i + 1))
            before = sample.detach().clone()
            result = step(*given.args, **given.kwargs)
            after = result[0] if isinstance(result, tuple) else result.prev_sample
            if self.end is not None:
                after = self.end.to(after)
                if isinstance(result, tuple):
                    result = (after, *result[1:])
                else:
                    result.prev_sample = after
            self.steps.append(
                Step(
                    self.calls,
                    output.detach().clone(),
                    float(given.arguments["timestep"]),
                    sigma,
                    following,
                    before,
                    after.detach().clone(),
                )
            )
            self.calls = []
            if len(self.steps) == self.count:
                raise Stop
            return result

        return watched


def has_place(sigmas: Any, i: int) -> bool:
    """Return whether a scheduler has a list of sigmas with a place i."""
    return sigmas is not None and hasattr(sigmas, "__len__") and len(sigmas) > i


def bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by the names of the module's `forward`."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    for name, value in list(given.items()):
        kind = inspect.signature(module.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name) if isinstance(value, dict) else {}
    return dict(given)


def run(
    pipe: Any,
    prompts: Sequence[str],
    call: dict[str, Any],
    latents: Tensor | None = None,
    *,
    seed: int = 0,
    inject: bool = False,
    network: str | None = None,
    answer: Callable[[Tensor], Tensor] | None = None,
    first_only: bool = False,
    count: int | None = None,
    before: Callable[[], None] | None = None,
    end: Tensor | None = None,
) -> Watch:
    """Run a pipeline on prompts and watch it.

    Pictures are not decoded where it can be helped, unless the state at the end is given: `end`.

    Args:
        pipe: The pipeline.
        prompts: One for each sample, [B].
        call: The other arguments of its call. A negative prompt is one string, for all samples.
        latents: The noise, [B, ...], in the layout of the state.
        seed: Of the generator that the pipeline gets for all other noise.
        inject: Put the noise in at the first step, instead of passing it as `latents`.
        network: As in `Watch`.
        answer: As in `Watch`.
        first_only: As in `Watch`.
        count: As in `Watch`.
        before: As in `Watch`.
        end: As in `Watch`; the result then holds arrays.

    Returns:
        What was seen.
    """
    known = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"prompt": list(prompts)} | call
    for name in [name for name in call if name.startswith("negative_prompt")]:
        if isinstance(call[name], str):  # some classes want the type of `prompt`
            arguments[name] = [call[name]] * len(prompts)
    usual = {
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent" if end is None else "np",
        "latents": None
        if inject or latents is None
        else latents.clone(),  # changed in place by some
    }
    arguments |= {name: value for name, value in usual.items() if name in known}
    pipe.set_progress_bar_config(disable=True)
    put = latents if inject else None
    watch = Watch(pipe, network, put, answer, first_only, count, before, end)
    with torch.random.fork_rng(devices=[]), watch as seen:
        torch.default_generator.manual_seed(seed)  # of what takes no generator
        seen.result = pipe(**arguments)
    return seen


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers and transformers from remarks on the prompts of these runs, and from bars."""
    import diffusers.utils.logging as theirs
    import transformers.utils.logging as texts

    libraries: tuple[Any, ...] = (theirs, texts)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, level, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def noise_like(shape: Sequence[int], seed: int, like: Tensor) -> Tensor:
    """Draw normal noise on the CPU, and return it on the device and in the dtype of another tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like)


def slope_of(x: Tensor, y: Tensor) -> float:
    """Return the number f for which f y is nearest to x."""
    a, b = x.detach().double().flatten(), y.detach().double().flatten()
    return float(a @ b / (b @ b).clamp(min=1e-30))


def ratio(x: Tensor, y: Tensor) -> float | None:
    """Return the number f for which x = f y but for rounding, or None; shapes may differ, not sizes."""
    if x.numel() != y.numel():
        return None
    f = slope_of(x, y)
    a, b = x.detach().double().flatten(), y.detach().double().flatten()
    wide = 1e-5 if x.dtype in (torch.float32, torch.float64) else 2e-2
    return f if float((a - f * b).abs().max()) <= wide * float(a.abs().max() + 1e-30) else None
