"""Learn a pipeline by watching it: what becomes of prompts, noise, time and the network's answer.

`learn` runs a pipeline a few times on two prompts and finds how its network is called: the names of the
arguments, how the state and the time enter, how the answer becomes the scheduler's model output, and
what switches guidance off. `replay` runs it on other prompts, noise and numbers of steps; our own calls
must equal every model output that was seen.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models.evidence import (
    ROUNDING,
    falling,
    fit,
    in_half,
    is_flow,
    kind_of,
    levels,
    number_of,
    rows_of,
    same,
    tolerance,
)
from flowmatch.models.script import Script, conditions, dtype_of, few_steps, unguided
from flowmatch.models.watch import Call, Watch, noise_like, quiet, ratio, run, slope_of

OURS = ("prompt", "latents", "generator", "output_type", "return_dict")
WORDS = ("cat", "a red fox in deep snow at night")
LONG = ", ".join([WORDS[1]] * 5)
OTHERS = ("two small houses", "rain", "an old man reads a book")
FAILURES = (
    *(ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError),
    *(NotImplementedError, ImportError, OSError, ArithmeticError, MemoryError),
)
STEPS, REPLAYED = 3, 4  # numbers of steps of the runs that are watched


def allowed(pipe: Any) -> list[str]:
    """List the arguments of a pipeline's call that a config may give."""
    known = inspect.signature(pipe.__call__).parameters
    return sorted(name for name in known if name not in OURS and "callback" not in name)


def check_call(pipe: Any, call: dict[str, Any], key: str) -> None:
    """Check the arguments of a call by name.

    Raises:
        UserError: One is unknown, or is ours.
    """
    names = allowed(pipe)
    faults = [
        f"{key}.{name}: {'is set by flowmatch' if name in OURS else 'unknown argument'}; "
        f"{type(pipe).__name__} takes {', '.join(names)}"
        for name in call
        if name not in names
    ]
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        faults.append(f"{key}: {type(pipe).__name__} takes no prompt; flowmatch teaches by prompts")
    if faults:
        raise UserError(faults)


def learn(pipe: Any, call: dict[str, Any], key: str) -> Script:
    """Learn how a pipeline calls its network, by watching it, and check it by a replay.

    Args:
        pipe: A diffusers pipeline that takes prompts.
        call: Arguments of its call, beside prompt, latents, generator and output_type.
        key: `KEY=VALUE` of the config, for the messages.

    Returns:
        The script.

    Raises:
        UserError: It cannot be a teacher; the message gives the reason.
    """
    check_call(pipe, call, "call")
    looks = _Looks(pipe, call, key)
    with quiet():
        script = looks.answers(looks.inputs(looks.guidance_off(looks.first())))
        error = looks.replay(script)
        if not error <= tolerance(pipe):
            raise UserError(
                f"{key}: {script.pipeline} was watched, but a run on other prompts differs from what "
                f"was learnt by {error:.2g} of the model output, expected at most {tolerance(pipe):g}"
            )
        return replace(script, rides=looks.neighbours(script), replayed=error)


def replay(pipe: Any, script: Script, call: dict[str, Any], key: str) -> float:
    """Run a pipeline on other prompts, noise and steps, and call its network as the script says.

    Returns:
        The largest difference to a model output that was seen, relative to the largest value of it.
    """
    with quiet():
        return _Looks(pipe, call, key).replay(script)


@dataclass
class _Looks:
    """Runs of one pipeline with one call, a few steps each, and what they show."""

    pipe: Any
    call: dict[str, Any]
    key: str

    def run(
        self, script: Script | None, words: Sequence[str] = WORDS, steps: int = STEPS, **how: Any
    ) -> Watch:
        """Run without guidance, as a script says, from noise of its own. Raises UserError."""
        pipe, call = self.pipe, self.call | (script.off if script else {})
        if script is not None and "latents" not in how:
            like = torch.zeros(
                (), dtype=dtype_of(pipe, script.network), device=pipe._execution_device
            )
            how["latents"] = noise_like((len(words), *script.shape), steps, like)
        if script is not None:
            how = {"inject": script.inject, "network": script.network} | how
        with unguided(pipe, script):
            seen = self.watched(words, few_steps(pipe, call, steps), **how)
        if not seen.steps and not how.get("first_only"):
            raise UserError(
                f"{self.key}: {type(pipe).__name__} never calls scheduler.step; it cannot be watched"
            )
        return seen

    def watched(self, words: Sequence[str], call: dict[str, Any], **how: Any) -> Watch:
        """Run with a call as it is. Raises UserError for arguments that the pipeline fails on."""
        try:
            return run(self.pipe, words, call, **how)
        except FAILURES as error:
            told = " ".join(str(error).split())
            raise UserError(
                f"{self.key}: {type(self.pipe).__name__} fails on a prompt and the arguments of `call`: "
                f"{type(error).__name__}: {told[:300]}; set `call` to what you pass beside the prompt"
            ) from None

    def first(self) -> Script:
        """Find the network and the state, and refuse pipelines that add noise or take no noise."""
        pipe, key, name = self.pipe, self.key, type(self.pipe).__name__
        seen = self.run(None)
        last = [step.calls[-1].name if step.calls else None for step in seen.steps]
        if None in last or len(set(last)) > 1:
            change = next(i for i, one in enumerate(last) if one != last[0] or one is None)
            raise UserError(
                f"{key}: {name} calls {last[0]} before step 1 and {last[change]} before step "
                f"{change + 1}; only pipelines of one network can be distilled"
            )
        network, state = str(last[0]), seen.steps[0].sample
        if state.shape[0] != len(WORDS):
            raise UserError(
                f"{key}: {name} has a state of {state.shape[0]} rows for {len(WORDS)} prompts; set "
                "call.num_images_per_prompt=1"
            )
        script = Script(
            pipeline=name,
            network=network,
            sample=next(iter(seen.steps[0].calls[-1].arguments)),
            shape=tuple(state.shape[1:]),
            inject="latents" not in inspect.signature(pipe.__call__).parameters,
        )
        noise = noise_like(state.shape, 0, state)
        if not script.inject:  # or `latents` are wanted in another layout than the state's
            try:
                start = self.run(script, latents=noise, count=1).steps[0].sample
                script = replace(script, inject=ratio(start, noise) is None)
            except UserError:
                script = replace(script, inject=True)
        if script.inject and getattr(pipe.scheduler, "init_noise_sigma", 1.0) != 1.0:
            raise UserError(
                f"{key}: {name} takes no latents in the layout of its state, and its scheduler scales "
                "them; noise of ours cannot be put in"
            )
        one, two = (self.run(script, latents=noise, seed=seed) for seed in (0, 1))
        scale = ratio(one.steps[0].sample, noise)
        if scale is None:
            raise UserError(
                f"{key}: the state of {name} at its first step is not the noise that it is given"
            )
        apart = float((one.steps[-1].after - two.steps[-1].after).abs().max())
        if apart > tolerance(pipe) * float(one.steps[-1].after.abs().max()):
            raise UserError(
                f"{key}: {type(pipe.scheduler).__name__} adds noise: two runs from the same latents "
                f"differ by {apart:.2g}; give the pipeline a scheduler that adds none, such as "
                "DDIMScheduler"
            )
        rows = sum(rows_of(call) for call in one.steps[0].calls if call.name == network)
        whole: dict[str, Any] = dict(
            latents=noise, inject=script.inject, network=network, first_only=True
        )
        self.watched(WORDS, self.call, **whole)
        steps = len(pipe.scheduler.timesteps)
        if not steps:
            raise UserError(f"{key}: {name} takes no step with the arguments of `call`")
        return replace(script, scale=scale, steps=steps, evaluations=steps * rows // len(WORDS))

    def guidance_off(self, script: Script) -> Script:
        """Find the argument whose value 1 or 0 leaves one call of one row a sample."""

        def single(script: Script) -> bool:
            step = self.run(script, count=1).steps[0]
            calls = [one for one in step.calls if one.name == script.network]
            return len(calls) == 1 and rows_of(calls[0]) == step.sample.shape[0]

        if single(script):
            return script
        known = inspect.signature(self.pipe.__call__).parameters
        values = {name: self.call.get(name, known[name].default) for name in known}
        names = [
            name
            for name, value in values.items()
            if ("guidance" in name or "cfg" in name) and type(value) in (int, float)
        ]
        for off in [{name: value} for name in names for value in (1.0, 0.0)]:
            tried = replace(script, off=off)
            try:
                if single(tried):
                    return tried
            except UserError:
                continue
        if hasattr(getattr(self.pipe, "guider", None), "disable"):
            tried = replace(script, guider=True)
            if single(tried):
                return tried
        raise UserError(
            f"{self.key}: guidance of {script.pipeline} cannot be switched off by "
            f"{', '.join(names) or 'a number'} = 1 or 0, and a student would be guided twice; give "
            "`call` the arguments that switch it off"
        )

    def inputs(self, script: Script) -> Script:
        """Find how state and time enter the network; the rest must be the same at all steps."""
        seen, key, name = self.run(script), self.key, script.pipeline
        scheduler, calls = self.pipe.scheduler, [step.calls[-1] for step in seen.steps]
        flow, first = is_flow(scheduler), calls[0].arguments
        given = first[script.sample]
        script = replace(
            script,
            entry=tuple(given[0].shape) if isinstance(given, list) else None,
            kind=kind_of(scheduler, flow, key),
        )
        for call, step in zip(calls, seen.steps, strict=True):
            f = ratio(script.state(call), step.sample)
            if f is None or (flow and abs(f - 1) > 1e-3):
                raise UserError(
                    f"{key}: the input of {script.network} in {name} is not the state, and it cannot be "
                    "learnt by watching"
                )
        changing = [
            arg
            for arg in first
            if arg != script.sample
            and not all(same(first[arg], one.arguments.get(arg)) for one in calls)
        ]
        if len(changing) != 1 or number_of(first[changing[0]]) is None:
            raise UserError(
                f"{key}: of the arguments of {script.network} in {name}, "
                f"{', '.join(changing) or 'none'} change from step to step; expected the time alone"
            )
        script = replace(script, time=changing[0])
        times = [float(number_of(one.arguments[script.time]) or 0.0) for one in calls]
        clocks = [[step.timestep for step in seen.steps]]
        if flow:
            if any(step.sigma is None for step in seen.steps):
                raise UserError(f"{key}: {type(scheduler).__name__} has no list of sigmas")
            script = replace(script, direction=self.direction(seen))
            by_step = [t / scheduler.config.num_train_timesteps for t in clocks[0]]
            clocks = [levels(seen)]
            if by_step[0] > by_step[-1]:  # not those of inverted sigmas, which rise
                clocks.append(by_step)
        half = in_half(self.pipe)
        found = [fit(clock, times, half) for clock in clocks]
        best = min(range(len(found)), key=lambda i: found[i][2])
        slope, offset, rest = found[best]
        if rest <= (ROUNDING if half else 2e-3):
            return replace(script, slope=slope, offset=offset, integer=best == 1)
        raise UserError(
            f"{key}: the times that the network of {name} sees, {times}, are no linear function of the "
            f"scheduler's, {clocks[0]}"
        )

    def direction(self, seen: Watch) -> float:
        """Return the sign of a flow's model output as the derivative by the noise level."""
        step = seen.steps[0]
        width, exact = float(step.next_sigma or 0) - float(step.sigma or 0), 1e-2
        f = ratio(step.after - step.sample, step.output)
        if in_half(self.pipe):  # the state is rounded, and it is larger than its change
            f, exact = slope_of(step.after - step.sample, step.output), 1e-1
        if f is None or abs(abs(f) - abs(width)) > exact * abs(width):
            raise UserError(
                f"{self.key}: the first step of {type(self.pipe.scheduler).__name__} is not state + "
                "(difference of sigmas) * model output; expected a flow-matching scheduler"
            )
        return (1.0 if falling(seen) else -1.0) * (1.0 if f * width > 0 else -1.0)

    def answers(self, script: Script) -> Script:
        """Find sign and part of the network's answer in the model output, with answers of our own."""
        zero = self.run(script, count=1, answer=torch.zeros_like).steps[0]
        rest = float(zero.output.abs().max())
        if rest > 1e-6:
            raise UserError(
                f"{self.key}: {script.pipeline} prepares its network's answer (its model output is up "
                f"to {rest:.2g} where the network says 0); it cannot be learnt by watching"
            )
        drawn = self.run(script, count=1, answer=lambda a: noise_like(a.shape, 1, a)).steps[0]
        answer = drawn.calls[-1].answer
        assert answer is not None, "the network has answered with a tensor before"
        for half in (False, True):
            part = answer.chunk(2, dim=1)[0] if half else answer
            f = ratio(drawn.output, part)
            if f is not None and abs(abs(f) - 1) < 1e-2:
                return replace(script, sign=1.0 if f > 0 else -1.0, half=half)
        raise UserError(
            f"{self.key}: the model output of {script.pipeline} is neither its network's answer nor the "
            "first half of it; it cannot be learnt by watching"
        )

    def replay(self, script: Script) -> float:
        """Compare our calls of the network with a run on other prompts, noise and steps."""
        seen = self.run(script, OTHERS, REPLAYED, seed=3)
        cond = conditions(self.pipe, script, self.call, OTHERS)
        net, worst = getattr(self.pipe, script.network), 0.0
        clocks = [step.timestep for step in seen.steps]
        if script.kind == "flow":
            whole = self.pipe.scheduler.config.num_train_timesteps
            clocks = [t / whole for t in clocks] if script.integer else levels(seen)
        for clock, step in zip(clocks, seen.steps, strict=True):
            call = step.calls[-1]
            x = script.state(call).reshape(step.sample.shape)
            time = self.time(script, call, clock).to(x.device)
            with torch.no_grad():
                ours = script.call(net, x, time, cond)
            size = step.output.abs().max().clamp(min=1e-30)
            worst = max(worst, float((ours - step.output).abs().max() / size))
        return worst

    def time(self, script: Script, call: Call, clock: float) -> Tensor:
        """Return the times of a call, [B]: ours, or, in half precision, what they were rounded to."""
        time = torch.full((len(OTHERS),), script.slope * clock + script.offset)
        given = call.arguments[script.time]
        if not in_half(self.pipe) or not isinstance(given, Tensor):
            return time
        rounded = float(number_of(given) or 0.0)
        near = abs(rounded - float(time[0])) <= ROUNDING * max(abs(rounded), abs(float(time[0])))
        return torch.full_like(time, rounded, dtype=given.dtype) if near else time

    def neighbours(self, script: Script) -> bool:
        """Return whether the answer for a short prompt changes beside a longer one."""
        both = self.run(script, (WORDS[0], LONG), count=1)
        noise = both.steps[0].sample[:1] / script.scale
        alone = self.run(script, WORDS[:1], count=1, latents=noise).steps[0].output
        beside = both.steps[0].output[:1]
        apart = float((beside - alone).abs().max() / beside.abs().max().clamp(min=1e-30))
        return apart > 10 * tolerance(self.pipe)
