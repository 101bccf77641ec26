"""The loop of stages 1 and 3: draw a batch, walk the path, match the velocity, step.

`step` counts optimizer updates and is the only clock. The global batch is the setting; the micro-batch
only caps one device. What a sample is trained with (its noise, its time, whether its label is dropped)
is a function of (seed, step, position in the global batch), so neither the number of processes nor a
restart changes it.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch import config as configs
from flowmatch.config import UserError
from flowmatch.flow import objectives, path
from flowmatch.flow.config import TimesConfig
from flowmatch.flow.coupling import Coupling
from flowmatch.models import precision
from flowmatch.models.velocity import Velocity, classes_of
from flowmatch.runs.folder import RunFolder
from flowmatch.runs.process import bar_options, leads, start_accelerator
from flowmatch.training import compilation, ema
from flowmatch.training.config import FitConfig
from flowmatch.training.draw import Drawn, Stream, draw, mask_seed
from flowmatch.training.state import State


def split_batch(config: FitConfig, processes: int) -> tuple[int, int]:
    """Split the global batch: (micro-batch, accumulation). Raises UserError if it does not split."""
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
    """Raise UserError for what this machine or its number of processes cannot do, before any work."""
    for width in config.ema:
        ema.gamma(width)
    if config.precision == "fp16" and device == "cpu":
        raise UserError("fit.precision='fp16' needs a GPU; use bf16 or fp32 on a CPU")
    precision.check("fit.precision", config.precision, device)
    if config.shard and processes == 1:
        raise UserError("fit.shard=true shares out over processes, and there is one; leave it out")
    if config.shard and config.precision == "fp16":
        raise UserError("fit.shard=true does not scale gradients as fp16 needs; use bf16 or fp32")
    if config.shard and config.compile:
        raise UserError(
            "fit.shard=true gathers in the middle of what fit.compile=true makes one graph; leave one "
            "of them out"
        )
    if config.shard and config.channels_last:
        raise UserError("fit.shard=true cuts contiguous weights alone; leave fit.channels_last out")
    split_batch(config, processes)
    if config.trackers:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        here = {str(name) for name in get_available_trackers()}
        for name in config.trackers:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
                raise UserError(f"fit.trackers: {name} is none of Accelerate's: {known}")
            if name not in here:
                raise UserError(f"fit.trackers: {name} is not installed; pip install {name}")


def check_net(config: FitConfig, net: Any) -> None:
    """Raise UserError for what the network cannot do, before any work."""
    kind = type(net).__name__
    if config.checkpointing and not net._supports_gradient_checkpointing:
        raise UserError(f"fit.checkpointing=true: {kind} has no checkpointing; leave it out")
    if config.channels_last and all(p.dim() != 4 for p in net.parameters()):
        raise UserError(f"fit.channels_last=true: {kind} has no convolutions; leave it out")
    usual = FitConfig.model_fields["label_drop"].default
    if classes_of(net) is None and config.label_drop != usual:
        raise UserError(
            f"fit.label_drop={config.label_drop}: this network takes no labels; leave it out"
        )


def fit(
    net: Any,
    stream: Stream,
    coupling: Coupling,
    run: RunFolder,
    config: FitConfig,
    t_config: TimesConfig,
    objective: objectives.Objective,
    *,
    seed: int,
    device: str,
) -> list[str]:
    """Train a network's velocity, from the newest checkpoint of the run if it has one.

    net: a diffusers model with its start weights; they give way to a checkpoint's. objective:
    of `objectives.build`; a module in it is on the device already. Returns the files
    of the finished EMA network, relative to the run's folder (rank 0). Raises UserError naming the
    step where loss or gradient stopped being finite. Exits 75 after SIGTERM, with a checkpoint.
    """
    accelerator = start_accelerator(
        device,
        mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
        log_with=config.trackers or None,
        project_dir=str(run.folder),
    )
    precision.allow_tf32(config.precision == "tf32")
    rank, world = accelerator.process_index, accelerator.num_processes
    micro, accumulation = split_batch(config, world)
    state = State(net, config, accelerator, run)
    v, plain = Velocity(state.model), Velocity(net)
    null_label = classes_of(net)
    start = state.step
    steps = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if other := [rank for rank, step in enumerate(steps) if step != steps[0]]:
        raise UserError(
            f"run_dir={run.folder}: process 0 resumes at step {steps[0]}, process {other[0]} at step "
            f"{steps[other[0]]}; put it where all machines see the same folder"
        )
    if leads():
        run.cut_metrics(start)
    if config.trackers:
        told = configs.flatten(run.config.model_dump(mode="json"))
        told = {k: str(value) if isinstance(value, list) else value for k, value in told.items()}
        accelerator.init_trackers("flowmatch", told)  # TensorBoard refuses lists

    def batch_at(step: int, index: int) -> Drawn:
        position = (index * world + rank) * micro + np.arange(micro)
        counters = step * config.batch_size + position
        return draw(stream, coupling, t_config, config.label_drop, null_label, seed, counters)

    def stopping() -> bool:  # collective with several processes, whenever the loss is read
        if world == 1:
            return run.stop
        if state.step % config.log_every:
            return False
        flag = torch.tensor([float(run.stop)], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())

    def errors(v: Velocity, batch: Drawn, index: int) -> Tensor:  # [B]
        torch.manual_seed(mask_seed(seed, state.step, index * world + rank))  # dropout
        cond = None if batch.label is None else {"label": batch.label}
        return objective(v, plain, batch.x0, batch.x1, batch.t, batch.w, cond)

    with ThreadPoolExecutor(1, "batches") as pool, Bar(config, start) as progress:
        ahead = pool.submit(batch_at, state.step, 0)
        if start < config.steps and (config.compile or world > 1):
            first = ahead.result().to(accelerator.device)
            if config.compile:
                with accelerator.no_sync(state.model):
                    compilation.check(partial(errors, v, first, 0), net, config.precision)
            if world > 1 and not config.shard:
                # DDP lays out its buckets anew after its first pass, and how they lie decides how a
                # sum over three processes is rounded: a pass for nothing, so that a resumed run and
                # an undisturbed one make all their updates by the same layout
                accelerator.backward(errors(v, first, 0).mean())
                state.optimizer.zero_grad(set_to_none=True)
            del first
        logged = start
        while True:
            if state.step % config.log_every == 0 and state.step > logged:
                logged = state.step
                values = {
                    **state.read(),
                    "lr": state.lr,
                    "images_per_second": progress.rate(),
                }
                state.window.zero_()
                progress.show(values["loss"], values["images_per_second"])
                accelerator.log(values, step=state.step)
                if leads():
                    run.log(state.step, **values)
            done, stop = state.step == config.steps, stopping()
            due = done or stop or state.step % config.save_every == 0
            if due and state.step > start:  # before the first update there is nothing to keep
                state.save()
            if done or stop:
                break

            total, cost = torch.zeros(2, device=accelerator.device)
            for index in range(accumulation):
                batch = ahead.result().to(accelerator.device)
                last = index == accumulation - 1
                ahead = pool.submit(batch_at, state.step + last, 0 if last else index + 1)
                with nullcontext() if last else accelerator.no_sync(state.model):
                    error = errors(v, batch, index)
                    accelerator.backward(error.mean() / accumulation)
                total += error.detach().mean() / accumulation
                way = path.velocity(batch.x0, batch.x1).square().flatten(1).sum(1)  # |x1 - x0|^2
                cost += way.mean() / accumulation
            if state.update(total, cost):
                progress.advance()
            else:  # fp16 skipped it: the same samples again
                ahead = pool.submit(batch_at, state.step, 0)

    files = state.finish() if done else []
    del v
    state.close()
    accelerator.end_training()
    if not done:
        run.preempted()
    return files


class Bar:
    """A progress bar on rank 0, with the loss and images per second."""

    def __init__(self, config: FitConfig, start: int):
        from tqdm import tqdm

        self.batch_size, self.began, self.seen = config.batch_size, time.perf_counter(), 0
        self.bar = tqdm(total=config.steps, initial=start, unit="step", **bar_options())

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Count one update."""
        self.seen += self.batch_size
        self.bar.update()

    def rate(self) -> float:
        """Images a second since the last call."""
        now = time.perf_counter()
        rate, self.began, self.seen = self.seen / (now - self.began), now, 0
        return round(rate, 1)

    def show(self, loss: float, rate: float) -> None:
        """Put loss and images per second beside the bar."""
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
