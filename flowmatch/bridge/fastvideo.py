"""FastVideo's cache of teacher paths: a .pt file a sample.

`fastvideo/train/methods/knowledge_distillation/kd.py` of hao-ai-lab/FastVideo: samples/NNNNNNNN.pt with
trajectory_latents [S, F, C, H, W], the states before each step, trajectory_timesteps int64 [S], real
[F, C, H, W], text_embedding [L, D] and text_attention_mask [L]; metadata.json; COMPLETE.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmatch.bridge.sample import (
    Facts,
    Sample,
    array_of,
    check_frames,
    chosen_times,
    from_frames,
    read_pickle,
    tensor_of,
    to_frames,
)
from flowmatch.config import UserError

METADATA, COMPLETE, PROMPTS = "metadata.json", "COMPLETE", "prompts.jsonl"
SAMPLES = "samples"


class FastVideo:
    """The format."""

    name, half, pictures = "fastvideo", False, False

    def check(self, facts: Facts) -> list[str]:
        """As in `Format`."""
        check_frames(self.name, facts.shape)
        notes = []
        if not facts.embedding:
            notes.append(
                "text_embedding is left out, which its trainer needs; give --conditions, a folder of "
                "encode_prompts"
                if facts.prompts
                else "text_embedding is left out, which its trainer needs: the set has no prompts"
            )
        if not facts.times:
            notes.append(
                "the trajectory is the noise alone: one student step; states=[...] adds more"
            )
        return notes

    def write(
        self, folder: Path, k: int, first: int, samples: Iterable[Sample], facts: Facts
    ) -> None:
        """As in `Format`."""
        rank, texts = len(facts.shape), []
        steps = torch.tensor([round(1000 * (1 - t)) for t in [0.0, *facts.times]], dtype=torch.long)
        (folder / SAMPLES).mkdir()
        for number, sample in enumerate(samples, first):
            assert sample.x1 is not None
            row: dict[str, Any] = {
                "trajectory_latents": contiguous(to_frames(sample.path, rank)),
                "trajectory_timesteps": steps,
                "real": contiguous(to_frames(sample.x1, rank)),
            }
            if sample.embedding is not None:
                row["text_embedding"] = sample.embedding[0]
                row["text_attention_mask"] = torch.ones(len(sample.embedding[0]), dtype=torch.long)
                if len(sample.embedding) > 1:
                    row["text_pooled"] = sample.embedding[1]
            torch.save(row, folder / SAMPLES / f"{number:08d}.pt")
            if sample.text is not None:
                told = {"prompt": sample.text, "label": sample.label}
                texts.append(json.dumps(told, ensure_ascii=False) + "\n")
        if texts:
            (folder / f".texts-{k:06d}.jsonl").write_text("".join(texts))

    def join(self, folder: Path, built: Path, parts: list[int], facts: Facts) -> None:
        """Write the metadata, the prompts by number, and the mark of a whole cache."""
        about = {
            "total_samples": facts.count,
            "teacher": facts.teacher,
            "teacher_inference_steps": len(facts.times) + 1,
            "source_data_path": "",
        }
        (built / METADATA).write_text(json.dumps(about, indent=2) + "\n")
        names = [f".texts-{k:06d}.jsonl" for k in range(len(parts))]
        if facts.labels:
            with open(built / PROMPTS, "wb") as file:
                for name in names:
                    file.write((folder / name).read_bytes())
        (built / COMPLETE).touch()

    def read(self, folder: Path, told: dict[str, Any]) -> "CacheReader":
        """As in `Format`."""
        return CacheReader(folder, told)


def contiguous(array: np.ndarray) -> torch.Tensor:
    """Return an array as a tensor whose storage is in its order."""
    return tensor_of(np.ascontiguousarray(array))


class CacheReader:
    """Samples of a cache by their numbers."""

    def __init__(self, folder: Path, told: dict[str, Any]):
        self.folder, self.notes = folder, list[str]()
        try:
            self.count = int(json.loads((folder / METADATA).read_text())["total_samples"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / METADATA} cannot be read ({error!r}); expected FastVideo's cache"
            ) from None
        if not (folder / COMPLETE).exists():
            raise UserError(
                f"{folder} has no {COMPLETE}: the cache is not finished; finish it first"
            )
        lines = folder / PROMPTS
        self.lines = read_lines(lines) if lines.exists() else []
        self.names = [f"{SAMPLES}/{i:08d}.pt" for i in range(self.count)]
        self.names += [METADATA, *([PROMPTS] if self.lines else [])]
        if self.lines and len(self.lines) != self.count:
            raise UserError(f"{lines} has {len(self.lines)} lines for {self.count} samples")
        first = self._row(0)
        steps = first["trajectory_timesteps"].tolist()
        told = {"times": [1 - step / 1000 for step in steps[1:]]} | told
        self.times = chosen_times(len(steps) - 1, told, self.notes)
        if "text_embedding" in first:
            self.notes.append(
                "text_embedding is left out: flowmatch encodes prompts itself (encode_prompts)"
            )

    def _row(self, i: int) -> dict[str, Any]:
        path = self.folder / SAMPLES / f"{i:08d}.pt"
        try:
            row = read_pickle(path, str(path))
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        needed = {"trajectory_latents", "trajectory_timesteps", "real"}
        if not isinstance(row, dict) or not needed <= row.keys():
            raise UserError(f"{path} lacks {', '.join(sorted(needed))}; expected FastVideo's cache")
        return row

    def sample(self, i: int) -> Sample:
        """Read one sample."""
        row, where = self._row(i), f"{SAMPLES}/{i:08d}.pt"
        path = from_frames(array_of(row["trajectory_latents"], where))
        return Sample(
            path[0],
            from_frames(array_of(row["real"], where)),
            path[1:] if self.times else None,
            self.lines[i]["label"] if self.lines else None,
            self.lines[i]["prompt"] if self.lines else None,
        )

    def texts(self) -> list[str] | None:
        """As in `Reader`."""
        return [line["prompt"] for line in self.lines] or None

    def labels(self) -> list[int] | None:
        """As in `Reader`."""
        return [line["label"] for line in self.lines if line["label"] is not None] or None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read prompts and labels by number, which this module writes beside a cache."""
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            sound = isinstance(line["prompt"], str) and type(line.get("label")) in (int, type(None))
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise UserError(f"{path}: line {number} has no prompt; expected JSON with one")
        found.append({"prompt": line["prompt"], "label": line.get("label")})
    return found
