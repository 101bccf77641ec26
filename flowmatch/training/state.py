"""What training changes: weights, optimizer, EMA, the step, and what is known of the loss."""

import shutil
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models import networks
from flowmatch.models.teachers import NETS
from flowmatch.runs.folder import RunFolder
from flowmatch.runs.process import leads
from flowmatch.training import compilation, ema, sharding
from flowmatch.training.config import FitConfig

ADAMW = ("step", "exp_avg", "exp_avg_sq")  # what it keeps of a parameter
SCALER = ("scale", "_growth_tracker")  # what fp16's scaler has learnt
EMA = dict(zip(NETS, ("ema", "ema_2"), strict=True))  # what a checkpoint calls them
MAX_SKIPPED = 40  # fp16 updates skipped in a row: the scale has fallen by 2^40, it is not the scale


class State:
    """The state of a training run, restored from its newest checkpoint if there is one.

    Loss and finiteness are kept on the device and read together, seldom: no update waits for them.
    """

    def __init__(self, net: Any, config: FitConfig, accelerator: Any, run: RunFolder):
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.net, self.config, self.accelerator, self.run = net, config, accelerator, run
        self.names = [name for name, _ in net.named_parameters()]
        device = accelerator.device
        self.step, saved = run.restore()  # every rank reads
        if saved:
            net.load_state_dict(saved["net"])
        self.kind = type(net)  # to which sharding adds
        if config.checkpointing:
            net.enable_gradient_checkpointing()
        if config.channels_last:
            net.to(memory_format=torch.channels_last)
        if config.shard:
            sharding.shard(net, device)
        net.to(device).train()
        if config.compile:
            compilation.compile_forward(net, device)
        self.parameters = list(net.parameters())  # walking the modules each step is not free
        self.adamw = torch.optim.AdamW(
            net.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            # the fused one can skip an update on the device; fp16's scaler needs the other
            fused=config.precision != "fp16",
        )
        decay = "constant_with_warmup" if config.decay == "constant" else config.decay
        self.factor = get_scheduler(
            decay,
            self.adamw,
            num_warmup_steps=config.warmup,
            num_training_steps=max(config.steps, config.warmup + 1),
        ).lr_lambdas[0]
        self.gammas = [ema.gamma(width) for width in config.ema]
        self.emas = {
            name: EMAModel(net.parameters(), decay=config.ema_decay, foreach=True)
            for name in NETS[: max(1, len(self.gammas))]
        }
        for average in self.emas.values():
            average.to(device=device, dtype=torch.float32)
        # sums of losses and of the coupling's costs, updates
        self.window = torch.zeros(3, dtype=torch.float64, device=device)
        self.bad_step = torch.zeros((), device=device)  # the first update that was not finite
        self.skipped = 0  # fp16 updates in a row
        if saved:
            # the fused AdamW counts on the device, the other one reads its count on the CPU
            counter = "cpu" if config.precision == "fp16" else device
            like = {"step": torch.zeros((), device=counter)}
            for name, parameter in net.named_parameters():
                if f"{name}/step" not in saved["optimizer"]:
                    continue  # a frozen one, such as the frequencies of a Fourier embedding
                old = {key: saved["optimizer"][f"{name}/{key}"] for key in ADAMW}
                self.adamw.state[parameter] = {
                    key: sharding.lay_out(old[key], like.get(key, parameter)) for key in ADAMW
                }
            for folder, average in self.emas.items():
                average.shadow_params = [
                    sharding.lay_out(saved[EMA[folder]][name], parameter)
                    for name, parameter in zip(self.names, self.parameters, strict=True)
                ]
            self.window.copy_(saved["progress"]["window"])
            if "scaler" in saved:
                found = {key: saved["scaler"][key].item() for key in SCALER}
                accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | found)
        # sharded, a network needs no wrapper: no more than autocast is prepared
        self.model = accelerator.prepare_model(net, evaluation_mode=config.shard)
        # its state lies where AdamW reads it
        self.optimizer = accelerator.prepare_optimizer(self.adamw, device_placement=False)

    @property
    def lr(self) -> float:
        """The learning rate of the next update: a function of the step alone."""
        return self.config.lr * self.factor(self.step)

    def update(self, loss: Tensor, cost: Tensor) -> bool:
        """Make one update from the gradients at hand; tell whether it counts.

        loss, cost (of the coupling, E|x1 - x0|^2): this process's means over its share of the global
        batch, on the device. A loss or gradient that is not finite masks this update and all later ones
        on the device, until `read` looks.
        With fp16 an update that the scaler skips does not count: it is repeated at half the scale.
        """
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if self.config.shard:
            norm = norm.full_tensor()
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        if self.config.precision != "fp16":
            finite = torch.isfinite(norm + loss)
            first = (self.bad_step == 0) & ~finite
            self.bad_step = torch.where(first, self.step + 1, self.bad_step)
            self.adamw.found_inf = (self.bad_step > 0).float()  # type: ignore[attr-defined]
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
        for number, average in enumerate(self.emas.values()):
            average.optimization_step = self.step - 1  # its decay is a function of the step, too
            if self.gammas:
                decay = ema.power_decay(self.step, self.gammas[number])
                average.decay = average.min_decay = decay
            average.step(self.parameters)
        return True

    def read(self) -> dict[str, float]:  # collective: every rank
        """Read the window's mean loss and cost; raise UserError if an update was not finite."""
        mean = self.window[:2] / self.window[2].clamp(min=1)
        loss, cost = self.accelerator.reduce(mean, "mean").tolist()
        bad = self.accelerator.gather(self.bad_step.reshape(1))
        if bad.any():
            raise UserError(self._not_finite(int(bad[bad > 0].min())))
        return {"loss": loss, "coupling_cost": cost}

    def _not_finite(self, step: int) -> str:
        return (
            f"loss or gradient is not finite at step {step}; the newest checkpoint is from before it. "
            "Look at the data of that step, lower fit.lr, or use fit.precision=fp32"
        )

    def save(self) -> None:  # collective: every rank
        """Write a checkpoint of this step, after the last look at the loss."""
        self.read()
        window = self.accelerator.reduce(self.window, "mean")
        optimizer = {
            f"{name}/{key}": tensor
            for name, parameter in self.net.named_parameters()
            for key, tensor in self.adamw.state[parameter].items()
        }
        tensors = {
            "net": self.net.state_dict(),
            "optimizer": optimizer,
            "progress": {"window": window},
        }
        for folder in self.emas:
            tensors[EMA[folder]] = self.averaged(folder)
        if self.config.precision == "fp16":
            scaler = self.accelerator.scaler.state_dict()
            tensors["scaler"] = {key: torch.tensor(scaler[key]) for key in SCALER}
        whole = {stem: sharding.gather(group) for stem, group in tensors.items()}
        if leads():
            self.run.save(self.step, whole, self.config.keep)
        self.accelerator.wait_for_everyone()

    def averaged(self, folder: str) -> dict[str, Tensor]:
        """Give the averaged parameters that are saved in a folder."""
        return dict(zip(self.names, self.emas[folder].shadow_params, strict=True))

    def finish(self) -> list[str]:  # collective: every rank
        """Write the EMA networks, to `net/` and perhaps `net_2/`.

        Returns their files, relative to the run (rank 0).
        """
        files = []
        for folder in self.emas:
            whole = sharding.gather(self.net.state_dict() | self.averaged(folder))
            if not leads():
                continue
            net = self.kind.from_config(self.net.config)
            net.load_state_dict(whole)
            temporary, final = self.run.folder / f"{folder}.tmp", self.run.folder / folder
            for path in (temporary, final):
                shutil.rmtree(path, ignore_errors=True)
            files += [f"{folder}/{name}" for name in networks.save(net, temporary)]
            temporary.rename(final)
        return files

    def close(self) -> None:
        """Let go of what `prepare` wrapped, before the process group ends.

        A DDP wrapper freed after its group joins the group's thread while it holds the GIL, for which
        that thread may be waiting: one rank then hangs at its end.
        """
        del self.model, self.optimizer
        self.accelerator.free_memory()
