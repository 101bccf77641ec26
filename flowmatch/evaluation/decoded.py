"""What a feature loss sees: samples as they are, or the pictures that a VAE decodes from latents."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowmatch.config import UserError
from flowmatch.evaluation import features
from flowmatch.flow.config import LossConfig
from flowmatch.models import autoencoder, latents
from flowmatch.models.learn import FAILURES

PROBE = 8  # side of the latents that show how much larger a picture is


class Decoded(nn.Module):
    """The values that a feature loss compares, where samples are latents: those of their pictures.

    forward(x: [B, C, h, w]) -> [B, F]: the features of the decoder's picture of x / scale + shift.
    Gradients flow through decoder and features, which are frozen. The picture is not clamped: values
    outside of [-1, 1] keep their gradients.
    """

    def __init__(
        self, vae: Any, scale: Any, shift: Any, seen: nn.Module, checkpointing: bool = False
    ):
        """Put a decoder before features.

        Args:
            vae: An autoencoder of diffusers, frozen, in eval mode.
            scale: Of the latents: a number, or one for each channel.
            shift: Likewise.
            seen: Turns float32 pictures into the values to compare.
            checkpointing: Whether samples are decoded one by one, and again in the backward pass, so
                that the activations of one alone are in memory.
        """
        super().__init__()
        self.vae, self.seen, self.checkpointing = vae, seen, checkpointing
        self.scale, self.shift = (
            nn.Buffer(torch.as_tensor(value).float().reshape(-1, 1, 1)) for value in (scale, shift)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the values to compare, [B, F]."""
        if not self.checkpointing:
            return self._look(x)
        parts: list[Any] = [
            checkpoint(self._look, one, use_reentrant=False, preserve_rng_state=False)
            for one in x.split(1)
        ]
        return torch.cat(parts)

    def _look(self, x: Tensor) -> Tensor:
        z = x / self.scale + self.shift
        found: Tensor = self.seen(decode(self.vae, z))
        return found


def decode(vae: Any, z: Tensor) -> Tensor:
    """Decode latents in the dtype of an autoencoder; return float32 pictures, [B, C, H, W]."""
    found: Tensor = vae.decode(z.to(next(vae.parameters()).dtype)).sample
    return found.float()


def decoder(
    start: Any,
    known: dict[str, Any] | None,
    vae: str | None,
    runs: Sequence[str],
    key: str = "loss.name=feature",
) -> tuple[Any, Any, Any] | None:
    """Find what decodes the samples of a network.

    Args:
        start: A `Teacher`, or a `TextTeacher`, whose pipeline has it.
        known: What the manifests of the start or its pairs say of the latents; None where they are none.
        vae: Folder of the VAE, where the user names it.
        runs: Run folders from which the set of latents is sought.
        key: What asks for it, for the messages.

    Returns:
        The autoencoder, and scale and shift of its latents x / scale + shift; None for samples that are
        no latents.

    Raises:
        UserError: The decoder of latents is not found, or is another one.
    """
    pipe = getattr(start, "pipe", None)
    if pipe is not None or known is None:
        if vae is not None:
            why = "the pipeline has its own" if pipe is not None else "the pairs are no latents"
            raise UserError(f"loss.vae={vae}: {why}; leave it out")
        if pipe is None or not callable(getattr(getattr(pipe, "vae", None), "decode", None)):
            return None
        try:
            scale, shift = latents.scaling(start, key)
        except UserError:
            raise
        except FAILURES as error:  # such as a pipeline without its text encoders
            told = " ".join(str(error).split())[:200]
            raise UserError(
                f"{key}: {type(pipe).__name__} does not decode a state ({told}); leave conditions "
                "out, or do without"
            ) from None
        return pipe.vae, 1 / scale, shift
    found = next(filter(None, [vae, *map(autoencoder.find, runs)]), None)
    if found is None:
        raise UserError(
            f"{key}: the pairs are latents of a VAE whose folder was not found; set loss.vae="
        )
    made = autoencoder.load(found, "loss.vae", (), known or None)
    return made.net, made.scale, made.shift


@dataclass(frozen=True)
class Seen:
    """What a training stage sees by its loss.

    Attributes:
        module: What a feature loss compares; None for another loss.
        inputs: The digest of its features, by the name of the input.
        digests: Of all features that a loss of the student or its teachers used.
        lines: What a plan says of it.
    """

    module: nn.Module | None
    inputs: dict[str, str]
    digests: set[str]
    lines: list[str]


def check(config: LossConfig) -> None:
    """Check that the features of a loss exist (`features.check`), before a network is loaded."""
    if config.features is not None:
        features.check(config.features, "loss.features")


@dataclass(frozen=True)
class Pictures:
    """What makes pictures of samples that are latents.

    Attributes:
        module: Turns latents into pictures, [B, C, h, w] -> [B, C, H, W]; frozen, on the device.
        shape: Of a picture.
        line: What a plan says of it.
    """

    module: nn.Module
    shape: tuple[int, ...]
    line: str


def pictures(
    start: Any, run: str, sets: Sequence[Any], *, precision: str, device: str, key: str
) -> Pictures:
    """Find what makes pictures of the samples of a network; the arguments are those of `of_loss`.

    They are decoded one by one, and again in the backward pass, so that the activations of one alone are
    in memory.

    Args:
        key: What asks for it, for the messages.

    Raises:
        UserError: The samples are no latents, or their decoder is not found.
    """
    known = [start.latents, *(data.sealed["facts"].get("latents") for data in sets)]
    runs = [run, *(str(data.folder) for data in sets)]
    found = decoder(start, next((k for k in known if k is not None), None), None, runs, key)
    if found is None:
        raise UserError(
            f"{key}: the samples are no latents, or conditions= has left their VAE out; leave one out"
        )
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    vae, whole = _ready(found[0], start.shape, half, device, key)
    module = Decoded(vae, *found[1:], nn.Identity(), checkpointing=True).to(device)
    told = f"features see pictures of {list(whole)}, decoded by {type(vae).__name__} in {half}"
    return Pictures(module, whole, told.replace("torch.", ""))


def _ready(
    vae: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str, key: str
) -> tuple[Any, tuple[int, ...]]:
    """Return a frozen decoder in a dtype, on a device, and the shape of its pictures of samples."""
    if len(shape) != 3:
        raise UserError(
            f"{key}: latents of {list(shape)} are not decoded in training, only [C, h, w]; do without"
        )
    if next(vae.parameters()).dtype != dtype:
        vae = copy.deepcopy(vae)  # a pipeline keeps its own
    vae = vae.to(device, dtype).eval().requires_grad_(False)
    try:
        with torch.no_grad():
            shown = decode(vae, torch.zeros(1, shape[0], PROBE, PROBE, device=device))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {type(vae).__name__} does not decode latents of {list(shape)}: {reason}"
        ) from None
    times = shown.shape[-1] // PROBE
    return vae, (shown.shape[1], shape[1] * times, shape[2] * times)


def of_loss(
    config: LossConfig,
    start: Any,
    run: str,
    sets: Sequence[Any],
    batch: int,
    *,
    precision: str,
    device: str,
    seed: int,
) -> Seen:
    """Load what a loss compares.

    Args:
        config: The loss.
        start: The `Teacher` or `TextTeacher` from whose weights the training starts.
        run: Its folder.
        sets: The pairs, each a `PairData`.
        batch: Samples in a batch.
        precision: Of the training; with bf16 a decoder is held in bfloat16, else in float32.
        device: Where features are computed.
        seed: Of random features.

    Raises:
        UserError: The decoder or the features are not found, or do not fit the samples.
        NotReady: The folder of the features is not sealed.
    """
    facts = [data.sealed["facts"] for data in sets]
    used = {*start.features, *(name for each in facts for name in each.get("features", ()))}
    if config.features is None:
        return Seen(None, {}, used, [])
    known = [start.latents, *(each.get("latents") for each in facts)]
    runs = [run, *(str(data.folder) for data in sets)]
    found = decoder(start, next((k for k in known if k is not None), None), config.vae, runs)
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    module, digest, own, lines = load(config, start.shape, found, batch, half, device, seed)
    return Seen(module, {"features": digest}, {*used, own}, lines)


def load(
    config: LossConfig,
    shape: tuple[int, ...],
    found: tuple[Any, Any, Any] | None,
    batch: int,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> tuple[nn.Module, str, str, list[str]]:
    """Load the features of a feature loss, behind a decoder where there is one.

    Args:
        config: The loss.
        shape: Of a sample.
        found: From `decoder`.
        batch: Samples in a batch.
        dtype: Of the decoder.
        device: Where features are computed.
        seed: Of random features.

    Returns:
        The frozen module; the digest of `config.features`; that of the features themselves; lines of a
        plan.

    Raises:
        UserError: The features do not fit the samples, or the decoder does not.
        NotReady: The folder of the features is not sealed.
    """
    assert config.features is not None
    what, key, side = config.features, "loss.features", config.crop
    if side is not None and (len(shape) != 3 or side > min(shape[1:])):
        raise UserError(
            f"loss.crop={side}: a square of samples [C, H, W] that are no smaller; these have "
            f"{list(shape)}"
        )
    if found is None:
        if config.checkpointing:
            raise UserError("loss.checkpointing: the samples are no latents; leave it out")
        seen = shape if side is None else (shape[0], side, side)
        return *features.perceptual(what, key, batch, seen, device, seed, shape), []
    vae, scale, shift = found
    vae, whole = _ready(vae, shape, dtype, device, "loss.name=feature")
    times = whole[1] // shape[1]
    seen = whole if side is None else (whole[0], side * times, side * times)
    module, digest, own = features.perceptual(what, key, batch, seen, device, seed, whole)
    made = Decoded(vae, scale, shift, module, config.checkpointing).to(device)
    told = f"the loss sees pictures of {list(seen)}, decoded by {type(vae).__name__} in {dtype}"
    return made, digest, own, [told.replace("torch.", "")]
