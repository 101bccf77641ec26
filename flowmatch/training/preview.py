"""Samples and a held-out loss while a network trains.

Both come from the averaged weights, at noises and times that are the same at each step, and from no
random stream of the training: the weights of a run are the same bytes with and without them.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.config import UserError
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
from flowmatch.data.dataset import Data
from flowmatch.flow import noise, path
from flowmatch.flow.config import SamplerConfig
from flowmatch.flow.trajectories import Lines
from flowmatch.models import autoencoder
from flowmatch.models.autoencoder import Autoencoder
from flowmatch.models.velocity import Velocity
from flowmatch.runs.folder import RunFolder
from flowmatch.runs.process import leads
from flowmatch.training import pictures
from flowmatch.training.state import State

IMAGES, POINTS = 10, 500  # samples of a row
HELD = 256  # most held-out samples
HELD_NOISE = 1 << 32  # id of their first noise, in the stream of evaluation
TIMES = tuple(k / 8 for k in range(8))  # at which their loss is taken
FOLDER, LOSSES = "samples", "held_out.jsonl"  # in the run folder

Decode = Callable[
    [Tensor, Tensor | None], Tensor
]  # states [B, ...], labels [B] -> pictures in [0, 1]


@dataclass(frozen=True)
class Preview:
    """What is sampled and measured.

    Attributes:
        x0: Noises of the samples, [N, ...].
        label: Their labels int64 [N], for a network that takes them.
        steps: Numbers of Euler steps, a row of the picture each.
        ends: Where the teacher carried these noises, the last row; or None.
        held: x0, x1, perhaps label and states of the held-out samples, [M, ...]; or None.
        times: Of the held-out loss, in [0, 1).
        decode: Makes pictures of states; None where they are pictures, points or latents.
        lines: Makes other ends of pairs with states, as in the loop.
        grids: Times of each of `steps`, [N + 1]; uniform where there are none.
    """

    x0: Tensor
    label: Tensor | None
    steps: Sequence[int]
    ends: Tensor | None = None
    held: Mapping[str, Tensor] | None = None
    times: Sequence[float] = TIMES
    decode: Decode | None = None
    lines: Lines | None = None
    grids: Sequence[Tensor] = ()


def count(shape: tuple[int, ...]) -> int:
    """Return how many samples of a shape a row of the picture has."""
    return POINTS if len(shape) == 1 else IMAGES


def held_out(reference: DataConfig, data: Data, vae: Autoencoder | None) -> dict[str, Tensor]:
    """Read samples that training does not see, for `of_noise`.

    Args:
        reference: Names them.
        data: The training data.
        vae: Of a model of latents; it encodes pictures.

    Returns:
        x1 [M, *shape], and label [M] where there are classes.

    Raises:
        UserError: They have another shape than the data, or other labels.
    """
    real = dataset.load(reference, "reference")
    coded = vae is not None and real.images  # pictures of a model of latents
    wanted = vae.picture if vae is not None and coded else data.shape
    if (real.shape, real.classes) != (wanted, data.classes):
        raise UserError(
            f"reference holds {list(real.shape)} with {real.classes or 'no'} classes; data holds "
            f"{list(wanted)} with {data.classes or 'none'}"
        )
    held = real.batch(np.linspace(0, len(real) - 1, min(len(real), HELD)).astype(np.int64))
    if vae is not None and coded:
        held["x1"] = torch.cat([vae.encode(x) for x in held["x1"].split(autoencoder.BATCH)])
    return held


def of_noise(
    shape: tuple[int, ...],
    classes: int | None,
    seed: int,
    held: Mapping[str, Tensor] | None = None,
    decode: Decode | None = None,
) -> Preview:
    """Preview stage one: 8 and 32 steps, and the loss on images that training does not see.

    Args:
        shape: Of one sample.
        classes: Number of classes, or of prompts; None without labels.
        seed: Of the run.
        held: x1 [M, *shape], and label [M] where there are classes.
        decode: As in `Preview`.
    """
    number = count(shape)
    x0 = torch.from_numpy(noise.normal(seed, range(number), shape, noise.EVALUATION))
    label = None if classes is None else torch.arange(number) % classes
    if held is not None:
        ids = range(HELD_NOISE, HELD_NOISE + len(held["x1"]))
        held = {**held, "x0": torch.from_numpy(noise.normal(seed, ids, shape, noise.EVALUATION))}
    return Preview(x0, label, (8, 32), None, held, decode=decode)


def of_pairs(
    first: Any,
    unseen: Sequence[tuple[Any, np.ndarray]],
    grids: Sequence[Tensor] = (),
    decode: Decode | None = None,
    lines: Lines | None = None,
) -> Preview:
    """Preview stage three: 1, 2 and 4 steps beside the teacher's end, and the loss on held-out pairs.

    Args:
        first: A set (`PairData`), of which the first pairs are drawn where none are held out.
        unseen: Sets, and the ids of their pairs that training does not see; the first is used.
        grids: Of the samplers whose times alone the network learns, [N + 1] each.
        decode: As in `Preview`.
        lines: Likewise.
    """
    if unseen:
        data, ids = unseen[0]
        held = data.batch(ids[:HELD])
        shown = {name: x[: count(data.shape)] for name, x in held.items()}
    else:
        held, shown = None, first.batch(np.arange(min(len(first), count(first.shape))))
    x0, label, ends = shown["x0"], shown.get("label"), shown["x1"]
    made = Preview(x0, label, (1, 2, 4), ends, held, TIMES, decode, lines)
    if grids:
        at = sorted({float(t) for grid in grids for t in grid[:-1]})
        return replace(made, steps=[len(grid) - 1 for grid in grids], times=at, grids=grids)
    return replace(made, steps=(lines.windows,)) if lines is not None and lines.windows else made


def planned(
    every: int | None,
    start: Any,
    run: str,
    first: Any,
    unseen: Sequence[tuple[Any, np.ndarray]],
    grids: Sequence[Tensor] = (),
    lined: Lines | None = None,
) -> tuple[Preview | None, list[str]]:
    """Choose what a stage on pairs draws and measures, and say so in its plan.

    Args:
        every: Updates from one preview to the next; None draws and measures nothing.
        start: The `Teacher` or `TextTeacher` from whose weights it starts.
        run: Its folder, from which the VAE of latents is sought.
        first: As in `of_pairs`.
        unseen: Likewise.
        grids: Likewise.
        lined: `lines` of `of_pairs`.
    """
    if every is None:
        return None, []
    decode, why = decoder(start, autoencoder.of_run(run, start.latents))
    made = of_pairs(first, unseen, grids, decode, lined)
    return made, lines(made, every, why)


def decoder(teacher: Any, vae: Any = None) -> tuple[Decode | None, str]:
    """Return what makes pictures of states, or why nothing does.

    Args:
        teacher: A `Teacher`, which has no pipeline, or a `TextTeacher`.
        vae: The `Autoencoder` whose latents the states are.
    """
    if vae is not None:
        return lambda x, label: vae.decode(x.float().cpu()) / 2 + 0.5, ""
    if not hasattr(teacher, "pipe"):
        return None, ""
    from flowmatch.models import decoding

    decode, _, why = decoding.find(teacher)
    if decode is None:
        return None, why
    texts = teacher.prompts.texts
    return lambda x, label: decode(x, [texts[i] for i in label.tolist()]), ""  # type: ignore[union-attr]


class Viewer:
    """Draws and measures a preview in the loop, on rank 0.

    Args:
        preview: What is sampled and measured.
        v: The velocity of the bare network that is trained.
        state: Its state.
        run: The run folder.
        batch: Most samples in a call of the network.
    """

    def __init__(self, preview: Preview, v: Velocity, state: State, run: RunFolder, batch: int):
        self.preview, self.v, self.state, self.run, self.batch = preview, v, state, run, batch
        device = state.accelerator.device
        if leads():
            self.preview = replace(
                preview,
                x0=preview.x0.to(device),
                label=_to(preview.label, device),
                held=None
                if preview.held is None
                else {n: _to(t, device) for n, t in preview.held.items()},
            )

    def begin(self, step: int) -> None:
        """Drop what an earlier attempt has drawn after the step at which this one begins."""
        if leads():
            self.run.cut_metrics(step, LOSSES)
            for file in (self.run.folder / FOLDER).glob("step_*.png"):
                if int(file.stem.partition("_")[2]) > step:
                    file.unlink()

    def show(self) -> float:
        """Draw and measure the averaged network of this step; return the seconds that it took."""
        if not leads():
            return 0.0
        began = time.perf_counter()
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            self.state.averaged_network(),
        ):
            rows = self._rows()
            loss = None if self.preview.held is None else self._loss(self.preview.held)
        self._write(pictures.draw(rows), loss)
        return time.perf_counter() - began

    def _rows(self) -> dict[str, np.ndarray]:
        preview, rows = self.preview, {}
        laid = [SamplerConfig(grid="list", points=grid.tolist()) for grid in preview.grids]
        for n, how in zip(
            preview.steps, laid or [SamplerConfig()] * len(preview.steps), strict=True
        ):
            x = self._batches(
                lambda x0, label, n=n, how=how: self.v.sample(
                    x0, how, n, _cond(label), seed=0, ids=range(len(x0))
                )
            )
            rows[f"{n} step{'s' * (n > 1)}"] = self._shown(x)
        if preview.ends is not None:
            rows["teacher"] = self._shown(preview.ends)
        return rows

    def _batches(self, sample: Callable[..., Tensor]) -> Tensor:
        """Sample the noises of the picture, batch by batch."""
        label, parts = self.preview.label, []
        for i in range(0, len(self.preview.x0), self.batch):
            few = slice(i, i + self.batch)
            parts.append(sample(self.preview.x0[few], None if label is None else label[few]))
        return torch.cat(parts)

    def _shown(self, x: Tensor) -> np.ndarray:
        """Turn states into points, or pictures [N, C, H, W] in [0, 1]."""
        if self.preview.decode is not None:
            shown = self.preview.decode(x, self.preview.label)
            return (shown[:, shown.shape[1] // 2] if shown.ndim == 5 else shown).cpu().numpy()
        return pictures.visible(x.float().cpu().numpy())

    def _loss(self, held: Mapping[str, Tensor]) -> float:
        """Return the mean of (v - (x1 - x0))^2 over values, samples and times."""
        total, count = 0.0, 0
        for t in self.preview.times:
            for i in range(0, len(held["x1"]), self.batch):
                x0, x1 = (held[name][i : i + self.batch] for name in ("x0", "x1"))
                if self.preview.lines is not None:
                    states, at = held["xt"][i : i + self.batch], x0.new_full((len(x0),), t)
                    x0, x1 = self.preview.lines(x0, states, x1, at)
                label = held["label"][i : i + self.batch] if "label" in held else None
                v = self.v(path.interpolate(x0, x1, t), t, _cond(label))
                error = (v - path.velocity(x0, x1)).square().flatten(1).mean(1)
                total, count = total + float(error.sum()), count + len(x0)
        return total / count

    def _write(self, drawn: Any, loss: float | None) -> None:
        """Write the picture and the loss, and give them to the trackers."""
        step, accelerator = self.state.step, self.state.accelerator
        if drawn is not None:
            folder = self.run.folder / FOLDER
            folder.mkdir(exist_ok=True)
            file = self.run.scratch.build(FOLDER) / f"step_{step:08d}.png"
            drawn.save(file)
            self.run.scratch.place(file, folder / file.name)
            flat = pictures.on_white(drawn)
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images(
                        {"samples": np.asarray(flat)[None]}, step, dataformats="NHWC"
                    )
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({"samples": [flat]}, step)
        if loss is not None:
            with open(self.run.folder / LOSSES, "a") as log:
                log.write(json.dumps({"step": step, "held_out_loss": loss}) + "\n")
            accelerator.log({"held_out_loss": loss}, step=step)


def lines(preview: Preview, every: int, why: str = "") -> list[str]:
    """Say in a plan what is sampled and measured. why: why a pipeline has no pictures."""
    rows = ", ".join(map(str, preview.steps)) + " steps"
    ends = " beside the teacher's ends" if preview.ends is not None else ""
    told = [f"every {every:,} updates: samples of the averaged network in {rows}{ends}"]
    if not pictures.drawable(tuple(preview.x0.shape[1:])) and preview.decode is None:
        why = why or f"none are drawn of {list(preview.x0.shape[1:])}"
        told = [f"every {every:,} updates: no pictures ({why})"]
    if preview.held is None:
        return [f"{told[0]}; no held-out loss"]
    return [f"{told[0]}; the loss on {len(preview.held['x1'])} held-out samples"]


def _cond(label: Tensor | None) -> dict[str, Tensor] | None:
    return None if label is None else {"label": label}


def _to(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x
