"""torch.compile, with a check of its gradients against the eager network.

A compiler's fault is silent: the outputs agree, the loss falls, and some weights do not train.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.models.network import Network

# largest error of a parameter's gradient, relative; a lost gradient has 1
TOLERANCES = {"fp32": 1e-2, "tf32": 0.1, "bf16": 0.5, "fp16": 0.5}
FLOOR = 1e-3  # of the whole gradient's norm: a smaller one may be rounding alone
SCALE = 1024.0  # of the loss: fp16 would round small gradients to 0


def compile_forward(net: Any, device: torch.device) -> None:
    """Compile a network, in place, into one graph for inputs of one shape.

    Args:
        net: A diffusers model.
        device: Where it is.
    """
    options: dict[str, Any] = {"fallback_random": True}  # the dropout masks of the eager network
    if device.type == "cpu":
        # torch 2.13 loses a U-Net's gradients when it propagates channels-last
        options["layout_optimization"] = False
    net.forward = torch.compile(net.forward, fullgraph=True, dynamic=False, options=options)


def check(errors: Callable[[], Tensor], net: Network, precision: str) -> None:
    """Check that compiled and eager gradients agree, but for rounding.

    Neither weights nor their gradients change. Gradients that are not finite are left to the loop,
    which names the step.

    Args:
        errors: Returns the errors of one micro-batch, [B]; the same at each call, dropout included.
        net: The network that `errors` evaluates.
        precision: "fp32", "tf32", "bf16" or "fp16".

    Raises:
        UserError: They differ by more than rounding.
    """
    trained = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}

    def gradients() -> tuple[Tensor, ...]:
        weights = list(trained.values())
        return torch.autograd.grad(SCALE * errors().mean(), weights, materialize_grads=True)

    compiled = gradients()
    with torch.compiler.set_stance("force_eager"):
        eager = gradients()
    size = torch.stack([gradient.norm() for gradient in eager])
    error = torch.stack([(one - two).norm() for one, two in zip(compiled, eager, strict=True)])
    floor = max(FLOOR * float(size.norm()), 1e-30)
    error = (error / size.clamp(min=floor)).nan_to_num(torch.inf)
    worst = int(error.argmax())
    if size.isfinite().all() and error[worst] > TOLERANCES[precision]:
        raise UserError(
            f"fit.compile=true: torch {torch.__version__} compiles this network wrongly: the gradient "
            f"of {list(trained)[worst]} differs from the eager one by {error[worst]:.1%}, and rounding "
            f"in {precision} explains {TOLERANCES[precision]:.0%}; use fit.compile=false, or another "
            "version of torch"
        )
