"""torch.compile, trusted no further than its gradients agree with the eager network's.

A compiler's mistake is silent: outputs agree, the loss falls, and a part of the network stands still.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError

# largest error of a parameter's gradient, relative; a lost gradient has 1
TOLERANCES = {"fp32": 1e-2, "tf32": 0.1, "bf16": 0.5, "fp16": 0.5}
FLOOR = 1e-3  # of the whole gradient's norm: a smaller one may be rounding alone
SCALE = 1024.0  # of the loss: fp16 would round small gradients away


def compile_forward(net: Any, device: torch.device) -> None:
    """Compile a network that meets one shape: one graph, never another."""
    options: dict[str, Any] = {"fallback_random": True}  # eager's dropout masks, to be comparable
    if device.type == "cpu":
        # torch 2.13 loses a U-Net's gradients by propagating channels-last
        options["layout_optimization"] = False
    net.forward = torch.compile(net.forward, fullgraph=True, dynamic=False, options=options)


def check(errors: Callable[[], Tensor], net: Any, precision: str) -> None:
    """Raise UserError where compiled and eager gradients differ by more than rounding.

    errors: of one micro-batch, [B]; the same at each call, dropout included. Neither weights nor their
    gradients change. What is not finite is left to the loop, which names the step.
    """
    trained = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}

    def gradients() -> tuple[Tensor, ...]:
        weights = list(trained.values())
        return torch.autograd.grad(SCALE * errors().mean(), weights, materialize_grads=True)

    compiled = gradients()
    with torch.compiler.set_stance("force_eager"):
        eager = gradients()
    size = torch.stack(torch._foreach_norm(eager))
    error = torch.stack(torch._foreach_norm(torch._foreach_sub(compiled, eager)))
    floor = max(FLOOR * float(size.norm()), 1e-30)
    error = (error / size.clamp(min=floor)).nan_to_num(torch.inf)
    worst = int(error.argmax())
    if size.isfinite().all() and error[worst] > TOLERANCES[precision]:
        raise UserError(
            f"fit.compile=true: torch {torch.__version__} compiles this network wrongly: the gradient "
            f"of {list(trained)[worst]} is {error[worst]:.1%} off the eager one, and rounding in "
            f"{precision} explains {TOLERANCES[precision]:.0%}; use fit.compile=false, or another "
            "version of torch"
        )
