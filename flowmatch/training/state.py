"""What training changes: weights, optimizer, averages, the step, and the sums of the loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models import adapters, networks
from flowmatch.models.teachers import NETS
from flowmatch.runs import parts
from flowmatch.runs.folder import RunFolder
from flowmatch.runs.process import leads
from flowmatch.training import compilation, ema, sharding
from flowmatch.training.behind import Behind
from flowmatch.training.config import FitConfig
from flowmatch.training.ema import Average
from flowmatch.training.learner import Learner
from flowmatch.training.learning_rate import factor
from flowmatch.training.optimizers import OPTIMIZERS

SCALER = ("scale", "_growth_tracker")  # what changes in the state of fp16's scaler
WEIGHTS = "diffusion_pytorch_model"
# folder of an average -> where a checkpoint has it: its own folder is a model of the first
EMA = dict(zip(NETS, ("", f"{NETS[1]}/"), strict=True))
MAX_SKIPPED = 40  # fp16 updates in a row: the scale has fallen by 2^40 and is not the cause


class Writer(Protocol):
    """Writes the network of a finished run."""

    def keeps(self, name: str) -> bool:
        """Return whether a tensor of the network's state is written."""

    def write(self, kind: Any, net: Any, state: dict[str, Tensor], folder: Path) -> list[str]:
        """Write what `keeps` let pass; return the names of the files in the folder."""


class Whole:
    """Writes a network as diffusers does."""

    def keeps(self, name: str) -> bool:
        """Return True."""
        return True

    def write(self, kind: Any, net: Any, state: dict[str, Tensor], folder: Path) -> list[str]:
        """Write a network of a class, with the config of another one, and some weights."""
        fresh = kind.from_config(net.config)
        fresh.load_state_dict(state)
        return networks.save(fresh, folder)


class State:
    """The state of a training run, restored from its newest checkpoint if there is one.

    Sums of the loss and the first update that is not finite stay on the device; `read` reads both, so
    that no update waits for them.

    Args:
        net: A diffusers model with its start weights. It is trained in place.
        config: The training loop.
        accelerator: Accelerate's Accelerator of this process.
        run: The run folder, whose checkpoints are read and written.
        writer: Writes the network at the end.
        learner: What learns beside the network, whose tensors are in the checkpoints, too.
    """

    def __init__(
        self,
        net: Any,
        config: FitConfig,
        accelerator: Any,
        run: RunFolder,
        writer: Writer | None = None,
        learner: Learner | None = None,
    ):
        self.learner = learner
        self.net, self.config, self.accelerator, self.run = net, config, accelerator, run
        self.writer = writer or Whole()
        self.adapted = any(adapters.is_adapters(name) for name, _ in net.named_parameters())
        self.step, saved = run.checkpoints.restore(config.steps)  # every rank reads
        self.learnt = saved.get("learner")  # until the learner has begun
        if saved and not config.shard:
            own = {name: parts.whole(tensor) for name, tensor in saved["net"].items()}
            net.load_state_dict(own, strict=not self.adapted)
        self.kind = type(net)  # sharding changes it
        net.register_to_config(_name_or_path="")
        self.net_config = net.to_json_string()
        self._place_network()
        if saved and config.shard:  # no process holds a whole tensor
            now = net.state_dict()
            for name, tensor in saved["net"].items():
                sharding.fill(now[name], tensor)
        self.behind = Behind(run.checkpoints, config.keep)
        trained = adapters.trained(net)
        self.names = list(trained)
        self.parameters = list(trained.values())  # listing them takes time, at each step
        self.adamw = OPTIMIZERS[config.optimizer](self.parameters, config, accelerator.device)
        decays = [partial(ema.power_decay, exponent=ema.gamma(width)) for width in config.ema]
        usual = partial(ema.exponential_decay, longest=config.ema_decay)
        self.averages = {
            folder: Average(self.parameters, decay)
            for folder, decay in zip(NETS, decays or [usual], strict=False)
        }
        # sums of the losses and of the coupling's costs, and the number of updates
        wide = (
            torch.float32 if accelerator.device.type == "mps" else torch.float64
        )  # it has no more
        self.window = torch.zeros(3, dtype=wide, device=accelerator.device)
        self.bad_step = torch.zeros((), device=accelerator.device)  # the first that is not finite
        self.skipped = 0  # fp16 updates in a row
        if saved:
            self._restore(saved)
        # a sharded network needs no wrapper: only its autocast is prepared
        self.model = accelerator.prepare_model(net, evaluation_mode=bool(config.shard))
        # the optimizer's state is where AdamW reads it
        self.optimizer = accelerator.prepare_optimizer(self.adamw.optimizer, device_placement=False)

    def _place_network(self) -> None:
        """Bring the network to the device, in the form that is trained."""
        net, config, device = self.net, self.config, self.accelerator.device
        if config.checkpointing:
            net.enable_gradient_checkpointing()
        if config.channels_last:
            net.to(memory_format=torch.channels_last)
        if config.shard:
            sharding.shard(net, device, sharding.processes_of(config.shard))
        net.to(device).train()
        if config.compile:
            compilation.compile_forward(net, device)

    def _restore(self, saved: dict[str, dict[str, Any]]) -> None:
        """Restore all but the weights from the files of a checkpoint."""
        # parameters without a gradient, on which the network's answer does not depend, have no state
        numbers = {name: number for number, name in enumerate(self.names)}
        states: dict[int, dict[str, Any]] = {}
        for key, tensor in saved["optimizer"].items():
            name, _, part = key.rpartition("/")
            states.setdefault(numbers[name], {})[part] = tensor
        self.adamw.restore(states)
        for folder, average in self.averages.items():
            average.tensors = [
                sharding.lay_out(saved[EMA[folder] + WEIGHTS][name], parameter)
                for name, parameter in zip(self.names, self.parameters, strict=True)
            ]
        self.window.copy_(saved["progress"]["window"])
        if "scaler" in saved:
            scaler = self.accelerator.scaler
            changed = {key: saved["scaler"][key].item() for key in SCALER}
            scaler.load_state_dict(scaler.state_dict() | changed)

    @property
    def lr(self) -> float:
        """The learning rate of the next update: a function of the step alone."""
        config = self.config
        begin = self.run.checkpoints.earlier[-1:]
        return config.lr * factor(self.step, config.steps, config.warmup, config.decay, *begin)

    def update(self, loss: Tensor, cost: Tensor) -> bool:
        """Make one update from the gradients of the parameters.

        A loss or gradient that is not finite masks this update and all later ones on the device, until
        `read` raises. With fp16 the scaler may skip an update, which does not count: the loop repeats it
        at half the scale.

        Args:
            loss: Mean loss of this process's share of the global batch, on the device.
            cost: Mean |x1 - x0|^2 of that share, likewise.

        Returns:
            Whether the update counts.

        Raises:
            UserError: fp16's scaler has skipped too many updates in a row.
        """
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if self.config.shard:
            norm = norm.full_tensor()
        self.adamw.set_lr(self.lr)
        if self.config.precision != "fp16":
            finite = torch.isfinite(norm + loss)
            first = (self.bad_step == 0) & ~finite
            self.bad_step = torch.where(first, self.step + 1, self.bad_step)
            self.adamw.mask(self.bad_step > 0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.optimizer_step_was_skipped:
            self.skipped += 1
            if self.skipped > MAX_SKIPPED:
                raise UserError(self._not_finite(self.step + 1))
            return False
        self.skipped = 0
        self.step += 1
        self.window += torch.stack([loss, cost, torch.ones_like(loss)])
        for average in self.averages.values():
            average.update(self.parameters, self.step)
        return True

    def note(self, finite: Tensor | None) -> None:
        """Take the last update as one that is not finite, unless it is, or None is known of it."""
        if finite is not None:
            first = (self.bad_step == 0) & ~finite
            self.bad_step = torch.where(first, self.step, self.bad_step)

    def read(self) -> dict[str, float]:  # collective: every rank
        """Return the mean loss and cost since they were last set to 0.

        Raises:
            UserError: An update was not finite; the message names its step.
        """
        mean = self.window[:2] / self.window[2].clamp(min=1)
        loss, cost = self.accelerator.reduce(mean, "mean").tolist()
        bad = self.accelerator.gather(self.bad_step.reshape(1))
        if bad.any():
            raise UserError(self._not_finite(int(bad[bad > 0].min())))
        return {"loss": loss, "coupling_cost": cost}

    def _not_finite(self, step: int) -> str:
        return (
            f"loss or gradient is not finite at step {step}; the newest checkpoint is from before it. "
            "Check the data of that step, lower fit.lr, or use fit.precision=fp32"
        )

    def save(self) -> None:  # collective: every rank
        """Write a checkpoint of this step; of a sharded network, begin to write it.

        Raises:
            UserError: An update was not finite.
        """
        self.read()
        self.behind.settle()
        if leads() and self.config.shard:
            self.run.checkpoints.begin(self.step)
        window = self.accelerator.reduce(self.window, "mean")
        optimizer = {
            f"{name}/{key}": tensor
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, tensor in self.adamw.state_of(parameter).items()
        }
        tensors = {
            "net": self._kept(adapters.is_adapters if self.adapted else Whole().keeps),
            "optimizer": optimizer,
            "progress": {"window": window},
        }
        if self.learner is not None:
            tensors["learner"] = self.learner.tensors()
        for folder in self.averages:
            kept = {} if self.adapted else self.net.state_dict()
            tensors[EMA[folder] + WEIGHTS] = kept | self.averaged(folder)
        if self.config.precision == "fp16":
            scaler = self.accelerator.scaler.state_dict()
            tensors["scaler"] = {key: torch.tensor(scaler[key]) for key in SCALER}
        if self.config.shard:
            self.accelerator.wait_for_everyone()
            self.behind.save(self.step, tensors)
            return
        if leads():
            texts = {f"{EMA[folder]}config.json": self.net_config for folder in self.averages}
            models = {} if self.adapted else texts  # an adapter alone is no model
            self.run.checkpoints.save(self.step, tensors, self.config.keep, models)
        self.accelerator.wait_for_everyone()

    def _kept(self, keeps: Callable[[str], bool]) -> dict[str, Tensor]:
        """Return the tensors of the network's state that something keeps."""
        return {name: tensor for name, tensor in self.net.state_dict().items() if keeps(name)}

    def averaged(self, folder: str) -> dict[str, Tensor]:
        """Return the averaged parameters that are saved in a folder, by name."""
        return dict(zip(self.names, self.averages[folder].tensors, strict=True))

    @contextmanager
    def averaged_network(self) -> Iterator[None]:
        """Exchange the weights of the network with their first average, in eval mode.

        Afterwards both are what they were, to the last bit.
        """
        self._exchange()
        self.net.eval()
        try:
            yield
        finally:
            self.net.train()
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters, self.averages[NETS[0]].tensors, strict=True):
            assert parameter.dtype == average.dtype, "a narrower one would round the other"
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def finish(self) -> list[str]:  # collective: every rank
        """Write the networks of the averaged weights, to `net/` and, for a second width, `net_2/`.

        Returns:
            Their files, relative to the run folder (rank 0).
        """
        files = []
        for folder in self.averages:
            kept = self._kept(self.writer.keeps) | self.averaged(folder)
            whole = sharding.gather(kept)
            if not leads():
                continue
            built = self.run.scratch.build(folder)
            written = self.writer.write(self.kind, self.net, whole, built)
            files += [f"{folder}/{name}" for name in written]
            self.run.scratch.place(built, self.run.folder / folder)
        return files

    def close(self) -> None:
        """Free what `prepare` wrapped, before the process group ends.

        A DDP wrapper that is freed after its group joins the group's thread while it holds the GIL, for
        which that thread may be waiting: one rank then hangs at its end.
        """
        del self.model, self.optimizer
        self.accelerator.free_memory()
