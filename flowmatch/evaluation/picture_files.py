"""Pictures of an evaluation as files, for benchmarks of others."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.evaluation.prompt_results import png
from flowmatch.runs.files import write_atomic

INDEX = "index.json"


def folder_of(number: int, prompt: str) -> str:
    """Return the name of a prompt's folder: its number, and its letters and digits."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    return f"{number:05d}-{words}".removesuffix("-")


def written(folder: str, fingerprint: str) -> bool:
    """Check whether a folder holds the pictures of an evaluation of this fingerprint.

    Raises:
        UserError: It holds something else.
    """
    place = Path(folder)
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    try:
        index = json.loads((place / INDEX).read_text())
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict) or index.get("fingerprint") != fingerprint:
        raise UserError(f"samples_to={folder} holds other files; use another folder")
    return True


class PictureFiles:
    """Writes pictures to ROW/PROMPT/NUMBER.png below a folder that appears when all are there.

    Args:
        folder: The folder.
        texts: The prompts.
    """

    def __init__(self, folder: str, texts: Sequence[str]):
        self.folder, self.texts = Path(folder), texts
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.names: dict[str, str] = {}

    def add(self, row: str, ids: np.ndarray, numbers: Tensor, pictures: Tensor) -> None:
        """Write a batch of a row; of frames each, as NUMBER-FRAME.png."""
        for i, number, shown in zip(ids.tolist(), numbers.tolist(), pictures, strict=True):
            name = folder_of(number, self.texts[number])
            self.names[name] = self.texts[number]
            place = self.partial / row / name
            place.mkdir(parents=True, exist_ok=True)
            frames = shown[None] if shown.ndim == 3 else shown
            for k, frame in enumerate(frames):
                mark = "" if shown.ndim == 3 else f"-{k:03d}"
                (place / f"{i:06d}{mark}.png").write_bytes(png(frame))

    def close(self, fingerprint: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the index: the prompt of each folder, the rows, and the evaluation's fingerprint."""
        index = {"fingerprint": fingerprint, "rows": list(rows), "prompts": self.names}
        write_atomic(self.partial / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")
        if self.folder.exists():
            self.folder.rmdir()  # it is empty
        self.partial.rename(self.folder)
