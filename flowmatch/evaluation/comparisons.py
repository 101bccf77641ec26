"""Pictures compared with the teacher's own, by networks whose weights the user names.

LPIPS comes from torchmetrics, DINO and CLIP from transformers: from a folder that `save_pretrained`
wrote, or by a name on the hub.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from flowmatch.config import UserError, require
from flowmatch.evaluation.config import EvaluatePromptsConfig
from flowmatch.models.digest import module_digest
from flowmatch.models.pipeline import with_lost
from flowmatch.models.watch import quiet

FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)


class Comparison(Protocol):
    """Measures of pictures beside the teacher's own of the same batch.

    Attributes:
        digest: Hash of its network.
    """

    digest: str

    def begin(self, own: Tensor, prompts: Sequence[str]) -> None:
        """Begin a batch: the teacher's own pictures [B, 3, H, W] in [0, 1], and their prompts."""

    def measure(self, pictures: Tensor) -> dict[str, Tensor]:
        """Measure pictures [B, 3, H, W] in [0, 1]: names -> [B]."""


class Lpips:
    """The learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924); 0 is equal.

    Args:
        name: alex, vgg or squeeze.
        device: Of its network.
    """

    def __init__(self, name: str, device: str):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.net = LearnedPerceptualImagePatchSimilarity(name).net.to(device)  # type: ignore[arg-type]
        self.device, self.digest = device, module_digest(self.net)

    def begin(self, own: Tensor, prompts: Sequence[str]) -> None:
        """Begin a batch, as in `Comparison`."""
        self.own = own.to(self.device)

    def measure(self, pictures: Tensor) -> dict[str, Tensor]:
        """Measure pictures, as in `Comparison`."""
        return {"lpips": self.net(pictures.to(self.device), self.own, normalize=True).flatten()}


class Dino:
    """The cosine similarity of an image network's class token; 1 is equal.

    Args:
        path: A folder, or a name on the hub, of any image model of transformers with a class token.
        device: Of its network.
    """

    def __init__(self, path: str, device: str):
        from transformers import AutoImageProcessor, AutoModel

        with quiet():
            self.net: Any = whole(AutoModel, path).to(device)
            self.process = AutoImageProcessor.from_pretrained(path)
        self.device, self.digest = device, module_digest(self.net)

    def embed(self, pictures: Tensor) -> Tensor:
        """Return features of unit length, [B, D]."""
        given = self.process(images=as_bytes(pictures), return_tensors="pt")["pixel_values"]
        found = self.net(pixel_values=given.to(self.device)).last_hidden_state[:, 0]
        return functional.normalize(found.float(), dim=1)

    def begin(self, own: Tensor, prompts: Sequence[str]) -> None:
        """Begin a batch, as in `Comparison`."""
        self.own = self.embed(own)

    def measure(self, pictures: Tensor) -> dict[str, Tensor]:
        """Measure pictures, as in `Comparison`."""
        return {"dino": (self.embed(pictures) * self.own).sum(1)}


class Clip:
    """CLIP's similarity to the teacher's own picture, 1 is equal, and to the prompt, times 100.

    Args:
        path: A folder, or a name on the hub, of a CLIPModel of transformers.
        device: Of its network.
    """

    def __init__(self, path: str, device: str):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        with quiet():
            self.net: Any = whole(CLIPModel, path).to(device)
            self.process = AutoImageProcessor.from_pretrained(path)
            self.tokenize = AutoTokenizer.from_pretrained(path)
        self.device, self.digest = device, module_digest(self.net)

    def embed(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return features of pictures and prompts, of unit length, [B, D] each."""
        given = self.process(images=as_bytes(pictures), return_tensors="pt")["pixel_values"]
        found = self.net(pixel_values=given.to(self.device), **self.tokens)
        return found.image_embeds.float(), found.text_embeds.float()

    def begin(self, own: Tensor, prompts: Sequence[str]) -> None:
        """Begin a batch, as in `Comparison`."""
        most = self.net.config.text_config.max_position_embeddings
        how: dict[str, Any] = dict(padding=True, truncation=True, max_length=most)
        self.tokens = self.tokenize(list(prompts), return_tensors="pt", **how).to(self.device)
        self.own, self.text = self.embed(own)
        self.own_text = 100 * (self.own * self.text).sum(1)

    def measure(self, pictures: Tensor) -> dict[str, Tensor]:
        """Measure pictures, as in `Comparison`."""
        found, _ = self.embed(pictures)
        text = 100 * (found * self.text).sum(1)
        return {
            "clip": (found * self.own).sum(1),
            "clip_text": text,
            "clip_text_difference": text - self.own_text,
        }


def whole(kind: Any, path: str) -> Any:
    """Load a model of transformers, which draws at random what its files lack: that is refused."""
    model, lost = with_lost(kind, path)
    if lost := [
        name for name in lost if not name.startswith("pooler.")
    ]:  # which nothing here reads
        raise ValueError(f"its files lack weights: {', '.join(lost[:3])}")
    return model.eval()


def as_bytes(pictures: Tensor) -> list[Any]:
    """Return pictures [B, 3, H, W] in [0, 1] as arrays of bytes [H, W, 3]."""
    return [*(pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def find(
    config: EvaluatePromptsConfig, shape: tuple[int, ...], reason: str, device: str
) -> dict[str, Comparison]:
    """Load the comparisons of a config, and try each on a picture.

    Args:
        config: Of the evaluation.
        shape: Of the pictures.
        reason: Why there are no pictures, or "".
        device: Of their networks.

    Returns:
        By the names of their keys.

    Raises:
        UserError: Weights are missing, or a network does not take such pictures.
    """
    made: dict[str, Comparison] = {}
    faults = []
    for key, kind in (("lpips", Lpips), ("dino", Dino), ("clip", Clip)):
        value = getattr(config, key)
        if value is None:
            continue
        where = f"{key}={value}"
        if reason:
            faults.append(f"{where}: there are no pictures to compare: {reason}; leave it out")
            continue
        try:
            if key == "lpips" and importlib.util.find_spec("torchvision") is None:
                raise UserError(f"{where} needs torchvision: pip install torchvision")
            if key != "lpips":
                require("transformers", "text", where)
        except UserError as error:
            faults += error.faults
            continue
        try:
            found = kind(value, device)
        except FAILURES as error:
            told = " ".join(str(error).split())[:200]
            way = (
                "torchvision keeps its weights in TORCH_HOME/hub/checkpoints; put the file there"
                if key == "lpips"
                else "give a folder that save_pretrained wrote, with its preprocessor, or a hub name"
            )
            faults.append(f"{where}: cannot be loaded: {type(error).__name__}: {told}; {way}")
            continue
        try:
            blank = coloured(torch.zeros(1, *shape[-3:]))
            with torch.inference_mode():
                found.begin(blank, ["a"])
                found.measure(blank)
        except FAILURES as error:
            told = " ".join(str(error).split())[:200]
            faults.append(f"{where}: takes no pictures of {list(shape[-3:])}: {told}; leave it out")
            continue
        made[key] = found
    if faults:
        raise UserError(faults)
    return made


def coloured(pictures: Tensor) -> Tensor:
    """Return pictures [B, 1 or 3, H, W] with three channels."""
    return pictures.expand(-1, 3, -1, -1)
