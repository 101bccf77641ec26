"""The loop of stages 1 and 3: draw a batch, walk the path, match the velocity, step.

`step` counts optimizer updates and is the only clock. The global batch is the setting; the micro-batch
only limits the memory of a device. What a sample is trained with (its noise, its time, whether its label
is dropped) is a function of (seed, step, position in the global batch), and depends neither on the
number of processes nor on restarts.
"""

import signal
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError, require
from flowmatch.flow import objectives, path
from flowmatch.flow.coupling import Coupling
from flowmatch.flow.times import Times
from flowmatch.flow.trajectories import Lines
from flowmatch.models import precision
from flowmatch.models.velocity import Velocity
from flowmatch.runs import checkpoints, group, stopping
from flowmatch.runs.folder import RunFolder
from flowmatch.runs.process import OTHERS, leads, pick_device, say, start_accelerator
from flowmatch.training import compilation, ema, hardware, sharding, trackers
from flowmatch.training.bar import Bar
from flowmatch.training.config import FitConfig
from flowmatch.training.draw import Ahead, Drawn, Stream, draw, mask_seed
from flowmatch.training.learner import Learner
from flowmatch.training.meter import Meter
from flowmatch.training.preview import Preview, Viewer
from flowmatch.training.state import State, Writer


def split_batch(config: FitConfig, processes: int) -> tuple[int, int]:
    """Split the global batch.

    Args:
        config: The training loop.
        processes: Number of processes.

    Returns:
        Samples in a micro-batch, and micro-batches of one process in an update.

    Raises:
        UserError: It does not split evenly.
    """
    share, rest = divmod(config.batch_size, processes)
    micro = min(config.micro_batch or share, share)
    if rest or not micro or share % micro:
        cap = config.micro_batch if config.micro_batch and config.micro_batch <= share else 1
        unit = processes * cap
        use = max(unit, round(config.batch_size / unit) * unit)
        per = f" x micro_batch {cap}" if cap > 1 else ""
        raise UserError(
            f"fit.batch_size={config.batch_size} is not a multiple of {processes} processes{per}; "
            f"use {use}"
        )
    return micro, share // micro


def check(config: FitConfig, device: str, processes: int) -> None:
    """Check that the device and the number of processes can do what a config needs.

    Args:
        config: The training loop.
        device: "cpu", "cuda", "xpu" or "mps".
        processes: Number of processes.

    Raises:
        UserError: They cannot.
    """
    for width in config.ema:
        ema.gamma(width)
    hardware.check(config, device)
    if config.precision == "fp16" and device == "cpu":
        raise UserError("fit.precision='fp16' needs a GPU; use bf16 or fp32 on a CPU")
    precision.check("fit.precision", config.precision, device)
    if config.optimizer == "adamw_8bit":
        require("torchao", "8bit", "fit.optimizer=adamw_8bit")
        if config.precision == "fp16" or config.shard:
            other = "fit.shard=true" if config.shard else "fit.precision='fp16'"
            raise UserError(
                f"fit.optimizer=adamw_8bit cannot be combined with {other}; leave one of them out"
            )
    if config.shard and processes == 1:
        raise UserError("fit.shard=true needs more than one process; leave it out")
    sharding.processes_of(config.shard)
    if config.shard and config.precision == "fp16":
        raise UserError(
            "fit.shard=true cannot be combined with fit.precision='fp16', whose gradients are scaled; "
            "use bf16 or fp32"
        )
    if config.shard and config.compile:
        raise UserError(
            "fit.shard=true cannot be combined with fit.compile=true, which needs one graph without "
            "communication; leave one of them out"
        )
    if config.shard and config.channels_last:
        raise UserError(
            "fit.shard=true cannot be combined with fit.channels_last=true; leave one of them out"
        )
    if config.shard and config.sample_every is not None:
        raise UserError(
            "fit.sample_every: one process draws the samples, and with fit.shard=true none has all "
            "weights; leave one of them out"
        )
    split_batch(config, processes)
    if config.trackers:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        here = {str(name) for name in get_available_trackers()}
        for name in config.trackers:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
                raise UserError(f"fit.trackers: {name} is unknown; Accelerate has {known}")
            if name not in here:
                raise UserError(f"fit.trackers: {name} is not installed; pip install {name}")


def check_net(config: FitConfig, net: Any, classes: int | None) -> None:
    """Check that a network can do what a config needs.

    Raises:
        UserError: It cannot.
    """
    kind = type(net).__name__
    if config.checkpointing:
        try:
            net.enable_gradient_checkpointing()
        except ValueError:
            raise UserError(
                f"fit.checkpointing=true: {kind} does not support it; leave it out"
            ) from None
        net.disable_gradient_checkpointing()
    if config.channels_last and all(p.dim() != 4 for p in net.parameters()):
        raise UserError(f"fit.channels_last=true: {kind} has no convolutions; leave it out")
    usual = FitConfig.model_fields["label_drop"].default
    if classes is None and config.label_drop != usual:
        raise UserError(
            f"fit.label_drop={config.label_drop}: this network takes no labels; leave it out"
        )


OnLog = Callable[[int, dict[str, float]], None]
Field = Callable[[Any], Velocity]  # a network, or its wrapper -> its velocity


def fit(
    net: Any,
    stream: Stream,
    coupling: Coupling,
    run: RunFolder,
    config: FitConfig,
    t_config: Times,
    objective: objectives.Objective | Learner,
    *,
    seed: int,
    device: str,
    field: Field = Velocity,
    writer: Writer | None = None,
    preview: Preview | None = None,
    on_log: OnLog | None = None,
    lines: Lines | None = None,
) -> list[str]:
    """Train a network's velocity, from the newest checkpoint of the run if it has one.

    Torch's flags and random states are restored at the end.

    Args:
        net: A diffusers model with its start weights, which a checkpoint replaces.
        stream: Returns the data of some global counters.
        coupling: Pairs noise with data.
        run: The run folder.
        config: The training loop.
        t_config: Density of the times, or the grids that they are from.
        objective: From `objectives.build`, or a `Learner`; a module in it is on the device already.
        seed: Seed of the noise, the times, the label drop and the dropout masks.
        device: "auto", "cpu", "cuda", "xpu" or "mps".
        field: Makes the velocity of the network, or of its wrapper.
        writer: Writes the averaged networks; default: as diffusers writes a network.
        preview: What is drawn and measured every `sample_every` updates, and at the end.
        on_log: Called on each rank with the step and what is logged there, and with `waited`: the
            seconds since the last call that the loop has waited for data.
        lines: Makes other ends of pairs with states, for an objective on trajectories.

    Returns:
        The files of the averaged networks, relative to the run folder (rank 0).

    Raises:
        UserError: Loss or gradient is not finite; the message names the step.
        SystemExit: With status 75 after a signal that asks to stop, with a checkpoint.
    """
    with stopping.heard(run.name, defer=True), precision.restored():
        accelerator = start_accelerator(
            pick_device(device, OTHERS),
            mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
            log_with=trackers.choose(config.trackers, run.folder) or None,
            project_dir=str(run.folder),
        )
        with precision.forked(accelerator.device):
            precision.allow_tf32(config.precision == "tf32")
            learner = objective if isinstance(objective, Learner) else None
            draw_at = partial(
                draw,
                stream,
                coupling,
                t_config,
                config.label_drop,
                field(net).null,
                seed,
                lines=lines,
                fresh=learner.noises if learner else 0,
            )
            state = State(net, config, accelerator, run, writer, learner)
            views = None
            if preview is not None and config.sample_every is not None:
                micro, _ = split_batch(config, accelerator.num_processes)
                views = Viewer(preview, field(net), state, run, micro)
            parts = (field, draw_at, accelerator, run, config, objective, seed, views, on_log)
            with closing(state.behind):
                return _train(state, *parts)


def _train(
    state: State,
    field: Field,
    draw_at: Callable[[np.ndarray], Drawn],
    accelerator: Any,
    run: RunFolder,
    config: FitConfig,
    objective: objectives.Objective | Learner,
    seed: int,
    viewer: Viewer | None,
    on_log: OnLog | None,
) -> list[str]:
    """Train; return the files of the averaged networks. Leaves the process where a signal asks it to."""
    rank, world = accelerator.process_index, accelerator.num_processes
    micro, accumulation = split_batch(config, world)
    v, plain = field(state.model), field(state.net)
    meter = Meter(accelerator.device, config.precision, micro)
    start = state.step
    if viewer is not None:
        viewer.begin(start)
    _check_one_folder(accelerator, run, start)
    if state.learner is not None:
        state.learner.begin(accelerator, plain, state.learnt)
        state.learnt = None
    _begin_logs(accelerator, run, config, start)

    def micro_batch(number: int) -> Drawn:  # number: of all micro-batches since step 0
        step, index = divmod(number, accumulation)
        position = (index * world + rank) * micro + np.arange(micro)
        return draw_at(step * config.batch_size + position)

    def errors(v: Velocity, batch: Drawn, index: int) -> Tensor:  # [B]
        masks = mask_seed(seed, state.step, index * world + rank)
        torch.manual_seed(masks)  # of dropout
        cond = None if batch.label is None else {"label": batch.label}
        if isinstance(objective, Learner):
            return objective.errors(v, batch, cond, state.step, index)
        return objective(v, plain, batch.x0, batch.x1, batch.t, batch.u, cond, masks)

    def asked() -> int:  # collective with several processes, when the loss is read
        here = stopping.asked() or 0
        if world == 1 or state.step % config.log_every:
            return here if world == 1 else 0
        return int(accelerator.gather(torch.tensor([here], device=accelerator.device)).max())

    with Ahead(micro_batch, start * accumulation) as batches, Bar(config, start) as bar:
        if start < config.steps:
            _warm_up(state, batches.peek, errors, v, meter)
        logged = drawn = start
        while True:
            # Log.
            if state.step % config.log_every == 0 and state.step > logged:
                logged = state.step
                rate = bar.rate()
                values = {**state.read(), "lr": state.lr, "images_per_second": rate}
                values |= meter.values(rate / world)
                values |= state.learner.read() if state.learner is not None else {}
                state.window.zero_()
                bar.show(values)
                accelerator.log(values, step=state.step)
                if leads():
                    run.log(state.step, **values)
                if on_log is not None:
                    on_log(state.step, values | {"waited": batches.waited})
                batches.waited = 0.0

            # Draw.
            done = state.step == config.steps
            often = config.sample_every or config.steps
            if viewer is not None and state.step > drawn and (done or state.step % often == 0):
                drawn = state.step
                bar.pause(viewer.show())

            # Save, and stop.
            stop = asked()
            due = done or stop or state.step % config.save_every == 0
            if due and state.step > start:  # before its first update a run has nothing to save
                state.save()
            if done or stop:
                break

            # Make one update.
            loss, cost = torch.zeros(2, device=accelerator.device)
            for index in range(accumulation):
                batch = batches.take().to(accelerator.device)
                last = index == accumulation - 1
                with nullcontext() if last else accelerator.no_sync(state.model):
                    error = errors(v, batch, index)
                    accelerator.backward(error.mean() / accumulation)
                loss += error.detach().mean() / accumulation
                square = path.velocity(batch.x0, batch.x1).square().flatten(1).sum(1)
                cost += square.mean() / accumulation
            if state.update(loss, cost):
                if state.learner is not None:
                    state.note(state.learner.learn(state.step - 1))
                bar.advance()
            else:  # fp16 has skipped it: the same samples again
                batches.go_to(state.step * accumulation)

    state.behind.settle()
    files = state.finish() if done else []
    del v
    state.close()
    accelerator.end_training()
    group.leave()
    if not done:
        at = f" at step {state.step:,} of {config.steps:,}"
        saved = ", which is saved" if checkpoints.folders(run.folder) else ": nothing to save yet"
        stopping.leave(at + saved, signal.Signals(stop))
    return files


def _check_one_folder(accelerator: Any, run: RunFolder, start: int) -> None:  # collective
    """Raise UserError where processes have found different checkpoints."""
    steps = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if other := [rank for rank, step in enumerate(steps) if step != steps[0]]:
        raise UserError(
            f"run_dir: process 0 resumes at step {steps[0]}, process {other[0]} at step "
            f"{steps[other[0]]}; use a folder that all machines share"
        )


def _begin_logs(accelerator: Any, run: RunFolder, config: FitConfig, start: int) -> None:
    """Say where a resumed run begins, cut the metrics back to there; open the trackers."""
    if leads():
        run.cut_metrics(start)
        hardware.note(run.folder, accelerator)
    if start:
        from_ = f"{run.folder}/checkpoints/step_{start:08d}"
        say(f"{run.name}: resumes at {start:,} of {config.steps:,}, from {from_}")
    if config.trackers:
        trackers.begin(accelerator, run.folder, run.config, resumed=start > 0)


def _warm_up(
    state: State,
    peek: Callable[[], Drawn],
    errors: Callable[..., Tensor],
    v: Velocity,
    meter: Meter,
) -> None:  # collective
    """Check a compiled network, settle DDP's buckets and count FLOPs, with the first micro-batch."""
    config, accelerator = state.config, state.accelerator
    settled = accelerator.num_processes == 1 or config.shard
    if settled and not (config.compile or meter.peak):
        return
    batch = peek().to(accelerator.device)
    if config.compile:
        with accelerator.no_sync(state.model):
            compilation.check(partial(errors, v, batch, 0), state.net, config.precision)
    if not settled or meter.peak:
        # DDP changes the layout of its buckets after its first pass, and the layout decides how a sum
        # over three processes is rounded. After an unused pass a resumed run and an undisturbed one
        # make all of their updates with the same layout. FLOPs are counted in an unused pass, too:
        # torch's counter changes how products are rounded.
        eager = config.compile and meter.peak
        with torch.compiler.set_stance("force_eager" if eager else "default"):
            with meter.counted() as forward_is_done:
                error = errors(v, batch, 0)
                forward_is_done()
                accelerator.backward(error.mean())
        state.optimizer.zero_grad(set_to_none=True)
