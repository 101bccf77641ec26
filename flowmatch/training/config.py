"""The config of the training loop."""

from typing import Any, Literal

import pydantic

from flowmatch.config import Config, UserError, option, required, used
from flowmatch.training.learning_rate import Decay


class MethodConfig(Config):
    """How a finish compares samples of the network with the data."""

    name: Literal["moments", "kernel", "dmd"] = option(
        "dmd",
        "dmd: distribution matching distillation, by the teacher's velocity and one that learns that of "
        "the samples (three networks in memory, with adapters one); moments: the Frechet distance of "
        "features; kernel: their energy distance",
    )
    moments: float = option(
        0.0,
        "dmd: weight of moments of `features` beside it, compared as by method.name=moments; 0: none",
        ge=0,
    )
    window: int = option(
        4096,
        "newest samples of the network that a batch is seen among: moments are averages over them, "
        "kernel compares them with as many of the data",
        ge=16,
        le=2**16,
    )
    fake_updates: int = option(
        1, "dmd: updates of the velocity of the samples, for each of the student", ge=1, le=16
    )
    fake_lr: float | None = option(
        None,
        "dmd: learning rate of that velocity, constant; default: ten times fit.lr, because it has to "
        "follow the student",
        gt=0,
    )

    guidance: float | None = option(
        None,
        "dmd: guidance of the teacher's velocity; default: that of the pairs, where their solver had it "
        "(required where they are a pipeline's own guided run)",
        gt=0,
    )

    @property
    def features(self) -> str:
        """How features are compared: moments, kernel, or empty where they are not."""
        if self.name == "dmd":
            return "moments" if self.moments else ""
        return self.name

    @pydantic.field_validator("moments", "fake_updates", "fake_lr", "guidance")
    @classmethod
    def _used(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        return used(cls, value, info, "name", "dmd")

    @pydantic.field_validator("window")
    @classmethod
    def _seen(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        return (
            value
            if info.data.get("moments")
            else used(cls, value, info, "name", "moments", "kernel")
        )


def keep_guidance(values: Any) -> Any:
    """Set fit.label_drop=0 in a config with prompts: its student needs no null prompt.

    Args:
        values: The config, as it was read; a label_drop in it stays.
    """
    if isinstance(values, dict) and values.get("prompts") and isinstance(values.get("fit"), dict):
        return values | {"fit": {"label_drop": 0.0} | values["fit"]}
    return values


class FitConfig(Config):
    """The training loop."""

    epochs: float | None = option(
        None,
        "passes over the data or the pairs, in place of steps, which the plan derives from it",
        run=True,
        gt=0,
    )
    steps: int = option(
        0,
        "optimizer updates (required without epochs); may grow in the same folder, always with "
        "decay=constant, else once the run has finished: the learning rate then starts at its peak and "
        "decays again",
        validate_default=True,
    )
    batch_size: int = required(
        "samples in an update, over all processes (the global batch)", ge=1, le=10**9
    )
    micro_batch: int | None = option(
        None,
        "largest number of samples in one forward pass of one process; null: its whole share",
        run=True,
        ge=1,
    )
    optimizer: Literal["adamw", "adamw_8bit"] = option(
        "adamw",
        "adamw_8bit (torchao) holds both averages of the gradient in one byte a parameter in place of "
        "four",
    )
    lr: float = option(1e-3, "peak learning rate of AdamW", gt=0)
    warmup: int = option(100, "updates over which the learning rate rises from 0", ge=0)
    decay: Decay = option(
        "cosine", "learning rate after the warm-up; linear and cosine fall to 0 at the last update"
    )
    weight_decay: float = option(0.0, "AdamW: decoupled weight decay", ge=0)
    beta1: float = option(0.9, "AdamW: decay of its average of the gradient", ge=0, lt=1)
    beta2: float = option(0.99, "AdamW: decay of its average of the squared gradient", ge=0, lt=1)
    max_grad_norm: float = option(1.0, "norm to which the gradient is clipped", gt=0)
    ema_decay: float = option(
        0.999, "decay of the EMA at update n: min(ema_decay, n / (9 + n))", ge=0, lt=1
    )
    ema: list[float] = option(
        [],
        "widths of power-function EMAs, which replace it (sigma_rel of EDM2, such as [0.05, 0.1]): the "
        "first is saved as net, a second as net_2; evaluate both to choose one",
        max_length=2,
    )
    label_drop: float = option(0.1, "share of labels that become the null class", ge=0, le=1)
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = option(
        "fp32",
        "precision of the network's products (tf32: float32 with fewer bits); weights, EMA and loss "
        "stay in float32",
    )
    compile: bool = option(
        False, "compile the network into one graph with torch.compile; changes rounding"
    )
    channels_last: bool = option(
        False, "store convolutions with the channels innermost; changes rounding"
    )
    checkpointing: bool = option(
        False,
        "compute activations again in the backward pass and do not store them: the same gradients "
        "with less memory and more time",
        run=True,
    )
    shard: bool | Literal["machine"] = option(
        False,
        "split weights, optimizer and EMA over the processes (FSDP2), where one GPU is too small; "
        "machine: over those of each machine, so that only gradients go over the network",
        run=True,
    )
    log_every: int = option(50, "updates between two readings of the loss", run=True, ge=1)
    save_every: int = option(1000, "updates between two checkpoints", run=True, ge=1)
    keep: int = option(2, "newest checkpoints kept", run=True, ge=1)
    sample_every: int | None = option(
        None,
        "updates between two pictures of samples by the averaged network, in samples/ and the trackers, "
        "and two values of the held-out loss (held_out.jsonl); the weights are the same without them; "
        "null: never",
        run=True,
        ge=1,
    )
    stall_seconds: float = option(
        30.0,
        "seconds without a sign of life after which one of several processes counts as lost and the job "
        "ends; slow work is not silence; 0: never",
        run=True,
        ge=0,
    )
    trackers: list[str] = option([], "Accelerate's trackers, such as [tensorboard]", run=True)

    def continues(self, steps: Any, step: int) -> bool:
        """Tell whether a run of this config may go on from update `step` of a run of fewer updates.

        A constant learning rate is the same in both. One that decays has fallen to 0 at the end of the
        shorter run, and only from there it decays again.
        """
        shorter = isinstance(steps, int) and steps < self.steps
        return shorter and (self.decay == "constant" or step == steps)

    @pydantic.field_validator("steps")
    @classmethod
    def _given(cls, steps: int, info: pydantic.ValidationInfo) -> int:
        if steps < 1 and (steps < 0 or info.data.get("epochs", 1) is None):
            raise ValueError("expected 1 or more; set steps, or epochs")
        return steps

    def over(self, count: int) -> "FitConfig":
        """Return the config with the updates that `epochs` asks for.

        Args:
            count: Samples in an epoch.

        Raises:
            UserError: `steps` is given, too, and is another number.
        """
        if self.epochs is None:
            return self
        steps = max(1, round(self.epochs * count / self.batch_size))
        if self.steps not in (0, steps):
            raise UserError(
                f"fit.epochs={self.epochs:g} of {count:,} samples are {steps:,} updates, and "
                f"fit.steps={self.steps}; leave one of them out"
            )
        return self.model_copy(update={"steps": steps})

    @pydantic.field_validator("ema")
    @classmethod
    def _one_kind(cls, value: list[float], info: pydantic.ValidationInfo) -> list[float]:
        decay = info.data.get("ema_decay")
        if value and decay not in (None, cls.model_fields["ema_decay"].default):
            raise ValueError(
                f"ema_decay={decay} is that of the exponential average, which ema replaces; leave one "
                "of them out"
            )
        return value
