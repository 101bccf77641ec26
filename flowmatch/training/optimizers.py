"""The optimizers of `fit.optimizer`: how an update is masked, and what a checkpoint holds of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowmatch.training import sharding
from flowmatch.training.config import FitConfig

STATE = ("step", "exp_avg", "exp_avg_sq")  # of a parameter
QUANTISED = ("codes", "scale")  # the parts of an average of one byte a parameter


class AdamW:
    """AdamW of torch.

    Args:
        parameters: What is trained.
        config: The training loop.
        device: Where its fused form counts updates.
    """

    def __init__(self, parameters: list[nn.Parameter], config: FitConfig, device: torch.device):
        # the fused one can skip an update on the device; fp16's scaler needs the other
        self.fused = config.precision != "fp16"
        self.parameters = parameters
        self.counter = device if self.fused else torch.device("cpu")
        self.optimizer: Any = self._make(
            lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )

    def _make(self, **values: Any) -> Any:
        return torch.optim.AdamW(self.parameters, fused=self.fused, **values)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def mask(self, bad: Tensor) -> None:
        """Skip the next update, on the device, where `bad` (a bool, []) is True; fp32 and bf16 alone."""
        self.optimizer.found_inf = bad.float()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what a checkpoint holds of a parameter, by name."""
        return dict(self.optimizer.state[parameter])

    def restore(self, saved: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Restore the state of some parameters, by their number."""
        like = {"step": torch.zeros((), device=self.counter)}
        for number, state in saved.items():
            parameter = self.parameters[number]
            self.optimizer.state[parameter] = {
                key: sharding.lay_out(state[key], like.get(key, parameter)) for key in STATE
            }


class AdamW8bit(AdamW):
    """AdamW of torchao, whose averages take a byte a parameter, and 4 more for 256 of them.

    Layers with fewer than 4,096 parameters keep them in float32 (Dettmers et al. 2021, arXiv
    2110.02861).
    """

    def _make(self, **values: Any) -> Any:
        from torchao.optim import AdamW8bit as Quantised

        return Quantised(self.parameters, **values)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update; it is a tensor, so that nothing is compiled anew."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr)

    def mask(self, bad: Tensor) -> None:
        """Take gradients away that are not finite; the weights go on by the averages alone."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(bad, 0.0)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what a checkpoint holds of a parameter, by name: codes and scales as they are."""
        found: dict[str, Tensor] = {}
        for key, value in self.optimizer.state[parameter].items():
            if hasattr(value, "codes"):
                found |= {f"{key}.{part}": getattr(value, part) for part in QUANTISED}
            else:
                found[key] = value
        return found

    @torch.no_grad()
    def restore(self, saved: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Restore the state of some parameters, by their number."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.set_lr(0.0)
        for number in saved:  # an update that changes nothing makes the state
            parameter = self.parameters[number]
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.set_lr(rates[0])
        for number, state in saved.items():
            for key, value in self.optimizer.state[self.parameters[number]].items():
                parts = QUANTISED if hasattr(value, "codes") else ("",)
                for part in parts:
                    place = getattr(value, part) if part else value
                    place.copy_(state[f"{key}.{part}" if part else key])


OPTIMIZERS = {"adamw": AdamW, "adamw_8bit": AdamW8bit}
