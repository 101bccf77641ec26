"""Pictures as the states of a pipeline: encoded by its VAE, and scaled as the pipeline scales them.

How the pipeline turns its last state into what its VAE decodes is learnt by watching (for each channel
z = scale x + shift), so that no class of pipeline and no key of a VAE's config is named.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data.dataset import Data
from flowmatch.models.learn import WORDS
from flowmatch.models.script import dtype_of, few_steps, unguided
from flowmatch.models.watch import Stop, noise_like, quiet, run

if TYPE_CHECKING:
    from flowmatch.models.text import TextTeacher

CHUNK = 64  # pictures that are encoded together where all are kept


def encoded(teacher: "TextTeacher", data: Data, memory: int, key: str) -> Data:
    """Replace pictures by the states of a pipeline that its VAE turns into them.

    A picture becomes the mean of what the VAE's encoder says of it.

    Args:
        teacher: The pipeline.
        data: The pictures.
        memory: MiB up to which all states are kept in memory.
        key: `KEY=VALUE` of the pipeline, for the messages.

    Returns:
        The data, with states as samples.

    Raises:
        UserError: The pipeline has no VAE, or its states are not the VAE's latents.
    """
    vae, name = getattr(teacher.pipe, "vae", None), teacher.script.pipeline
    if not callable(getattr(vae, "encode", None)) or not callable(getattr(vae, "decode", None)):
        raise UserError(f"{key}: {name} has no VAE that encodes pictures; it cannot train on them")
    shape = tuple(data.shape)
    scale, shift = scaling(teacher, key)
    try:
        z = encode(vae, torch.zeros(1, *shape))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data: pictures of {list(shape)} cannot be encoded by the VAE of {name}: {reason[:200]}"
        ) from None
    if tuple(z.shape[1:]) != teacher.shape:
        raise UserError(
            f"data: pictures of {list(shape)} become latents of {list(z.shape[1:])}; the state of "
            f"{name} is {list(teacher.shape)}; set data.size, or call.height and call.width"
        )
    read = Reader(data, vae, scale, shift, memory << 20)
    label = None if data.label is None else data.label[np.arange(len(data)) % data.count]
    return replace(
        data,
        read=read,
        count=len(data),
        shape=teacher.shape,
        label=label,
        latents=True,
        flip=False,
    )


def scaling(teacher: "TextTeacher", key: str) -> tuple[Tensor, Tensor]:
    """Watch how a pipeline turns its last state x into what its VAE decodes, z = scale x + shift.

    Returns:
        Scale and shift, [C, 1, 1] each.

    Raises:
        UserError: What is decoded is no such function of the state.
    """
    pipe, script, seen = teacher.pipe, teacher.script, list[Tensor]()

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(z.detach().clone())
        raise Stop

    like = torch.zeros((), dtype=dtype_of(pipe, script.network), device=pipe._execution_device)
    x = noise_like((len(WORDS), *script.shape), 0, like)
    call = few_steps(pipe, teacher.whole_call | script.off, 2)
    pipe.vae.decode = decode  # on the object, not on its class
    try:
        with quiet(), unguided(pipe, script):
            run(pipe, WORDS, call, x, inject=script.inject, network=script.network, end=x)
    finally:
        del pipe.vae.decode
    if not seen or seen[0].shape != x.shape or x.dim() != 4:
        shown = f"; it decodes {list(seen[0].shape)}, its state is {list(x.shape)}" if seen else ""
        raise UserError(
            f"{key}: the states of {script.pipeline} are not laid out like the latents of its VAE{shown}"
        )
    a, b = (y.double().movedim(1, 0).flatten(1) for y in (x, seen[0]))  # [C, B * H * W]
    centred = a - a.mean(1, keepdim=True)
    scale = (centred * b).sum(1) / centred.square().sum(1)
    shift = b.mean(1) - scale * a.mean(1)
    rest = (scale[:, None] * a + shift[:, None] - b).abs().max()
    if not rest <= (1e-4 if x.dtype == torch.float32 else 2e-2) * b.abs().max():
        raise UserError(
            f"{key}: what the VAE of {script.pipeline} decodes is not its state, scaled and shifted by "
            "channel"
        )
    return scale.float()[:, None, None].cpu(), shift.float()[:, None, None].cpu()


@torch.no_grad()
def encode(vae: Any, x: Tensor) -> Tensor:
    """Encode pictures, [B, C, H, W] in [-1, 1], to the mean of their latents, float32 on the CPU."""
    weights = next(vae.parameters())
    found = vae.encode(x.to(weights.device, weights.dtype))
    if hasattr(found, "latent_dist"):
        found = found.latent_dist.mode()
    else:
        found = getattr(found, "latents", None) if hasattr(found, "latents") else found.latent
    return found.float().cpu()


class Reader:
    """Reads pictures by their numbers, as states; all are kept where the memory suffices.

    Args:
        data: The pictures.
        vae: Encodes them.
        scale: Of `scaling`.
        shift: Likewise.
        memory: Bytes up to which all states are kept.
    """

    def __init__(self, data: Data, vae: Any, scale: Tensor, shift: Tensor, memory: int):
        self.data, self.vae, self.scale, self.shift = data, vae, scale, shift
        self.memory, self.kept = memory, np.empty(0, np.float32)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Return states, float32 [B, C, h, w]; ids: int64 [B]."""
        if len(self.kept):
            return self.kept[ids]
        first = self._encode(ids[:1])
        if first.nbytes * len(self.data) > self.memory:
            return self._encode(ids)
        # consecutive ones together: a state is then a function of the data alone
        parts = np.split(np.arange(len(self.data)), range(CHUNK, len(self.data), CHUNK))
        self.kept = np.concatenate([self._encode(part) for part in parts])
        return self.kept[ids]

    def _encode(self, ids: np.ndarray) -> np.ndarray:
        z = encode(self.vae, self.data.batch(ids)["x1"])
        return ((z - self.shift) / self.scale).numpy()
