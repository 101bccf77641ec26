"""The pictures of an evaluation and of a set of pairs."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmatch.evaluation import tables

COLOURS = {  # distinct for colour-blind readers, and in grey
    "teacher": "#5b6b7f",
    "student": "#d1495b",
}
DARK = "#333333"
FRAME = "#cccccc"
MARKERS = {"teacher": "o", "student": "s"}
POINTS = 2000  # most points in a scatter plot
MOSAIC = 4  # images per side of a mosaic
GUTTER = (128, 128, 128, 90)  # between its images: red, green, blue, opacity
ROW = 8  # pairs of images side by side
GREY: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
BESIDE: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 9}


def curve(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Save `curve_figure` as a PNG.

    Args:
        path: The file.
        result: The content of metrics.json.
    """
    curve_figure(result, 7.2, 4.3).savefig(path, metadata={"Software": None})


def curve_figure(result: Mapping[str, Any], wide: float, high: float, title: bool = True) -> Any:
    """Draw the distance to real data against network evaluations, log-log.

    The dashed line is the distance of the converged teacher, the dotted line that between real data
    and real data.

    Args:
        result: The content of metrics.json.
        wide: Width in inches.
        high: Height in inches.
        title: Whether the picture stands alone: with a title, and the words "lower is better".

    Returns:
        A matplotlib figure.
    """
    figure, axes = canvas(wide, high)
    ticks = set()
    for name, colour in COLOURS.items():
        rows = [row for row in result[name]["rows"] if row["steps"] is not None]
        x, y = [row["evaluations"] for row in rows], [row["distance"] for row in rows]
        axes.plot(x, y, marker=MARKERS[name], color=colour, linewidth=2, markersize=6, label=name)
        ticks |= set(x)
    converged = result["teacher"]["rows"][-1]
    floor = result["floor"]
    lines = [
        ("--", COLOURS["teacher"], converged["distance"], _converged(converged)),
        (":", DARK, floor["distance"], f"{tables.REAL}, n = {floor['samples']:,}"),
    ]
    for style, colour, y, label in lines:
        axes.axhline(y, linestyle=style, color=colour, linewidth=1.2, label=label, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks), [str(x) for x in sorted(ticks)])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    if decades < 1.5:  # too few labels to read values from
        shown = "25" if decades > 0.7 else "23456789"
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in shown else "")
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("network evaluations per sample")
    name = tables.DISTANCES[result["protocol"]["distance"]]
    axes.set_ylabel(f"{name}\n(lower is better)" if title else name)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(tables.finding(result), loc="left", fontsize=11, fontweight="bold")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return figure


def grid(path: str | os.PathLike[str], samples: Mapping[str, Mapping[int | None, Tensor]]) -> None:
    """Draw samples, a row per model and a column per number of steps, and save a PNG.

    Args:
        path: The file.
        samples: Model -> steps (None: converged) -> images [N, C, H, W] in [-1, 1], or points [N, D].
            Sample i comes from the same noise in every panel.
    """
    columns = list(next(iter(samples.values())))
    figure, axes = canvas(
        1.55 * len(columns) + 0.5, 1.55 * len(samples) + 0.35, len(samples), len(columns)
    )
    last = next(iter(samples.values()))[columns[-1]]
    limit = 1.15 * float(last.abs().max()) or 1.0
    for row, (name, found) in enumerate(samples.items()):
        for column, steps in enumerate(columns):
            panel = axes[row, column]
            panel.set_xticks([])
            panel.set_yticks([])
            x = found[steps].float().cpu()
            if x.ndim == 4:
                panel.imshow(mosaic(x[: MOSAIC**2].numpy()), interpolation="nearest")
                panel.spines[:].set_visible(False)
            else:
                x = on_plane(x[:POINTS])
                colour = COLOURS.get(name, DARK)
                panel.scatter(x[:, 0], x[:, 1], s=1.5, color=colour, alpha=0.5, linewidths=0)
                panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
                panel.spines[:].set_color(FRAME)
            if row == 0:
                panel.set_title(tables.steps_name(steps), fontsize=10)
            if column == 0:
                colour = COLOURS.get(name, DARK)
                panel.set_ylabel(name, fontsize=11, fontweight="bold", color=colour)
    figure.savefig(path, metadata={"Software": None})


def drawable(x: Tensor) -> Tensor:
    """Return samples as they are drawn: the middle frame of video and volumes, signals as points.

    Args:
        x: [N, ...].

    Returns:
        [N, C, H, W] or [N, D].
    """
    if x.ndim == 5:
        return x[:, :, x.shape[2] // 2]
    return x if x.ndim == 4 else x.flatten(1)


def on_plane(x: Tensor) -> Tensor:
    """Return the first two values of points, padded with 0. x: [..., D] -> [..., 2]."""
    return torch.nn.functional.pad(x, (0, max(0, 2 - x.shape[-1])))[..., :2]


def mosaic(x: np.ndarray) -> np.ndarray:
    """Arrange images in a square, separated by one pixel of translucent grey.

    The grey is visible between white images and between black ones, on light ground and on dark.

    Args:
        x: [N, C, H, W] in [-1, 1]. With other than 1 or 3 channels (latents) the first one is shown.

    Returns:
        Red, green, blue and opacity, uint8 [height, width, 4].
    """
    x = x if x.shape[1] in (1, 3) else x[:, :1]
    n, _, high, wide = x.shape
    side = math.ceil(math.sqrt(n))
    sheet = np.zeros((side * (high + 1), side * (wide + 1), 4), dtype=np.uint8)
    pixels = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for i, image in enumerate(pixels):
        top, left = (i // side) * (high + 1), (i % side) * (wide + 1)
        sheet[top : top + high + 1, left : left + wide + 1] = GUTTER
        sheet[top : top + high, left : left + wide, :3] = image
        sheet[top : top + high, left : left + wide, 3] = 255
    return sheet[:-1, :-1]


def pairs(
    path: str | os.PathLike[str],
    x0: np.ndarray,
    x1: np.ndarray,
    label: Sequence[Any] | None = None,
    latent: bool | None = None,
) -> None:
    """Draw pairs of noise and sample, and save a PNG.

    Images are drawn as a row of noise above a row of samples; points as lines from noise to sample,
    in their first two dimensions.

    Args:
        path: The file.
        x0: Noise: images [N, C, H, W], or points [N, D].
        x1: Samples, like x0; or pictures of them, where x0 are latents.
        label: Labels or names [N], written above the images.
        latent: Whether x1 are latents, not images; default: if they have neither 1 nor 3 channels.
    """
    if x0.ndim < 4:
        _lines(path, x0.reshape(len(x0), -1), x1.reshape(len(x1), -1))
        return
    n, channels = x1.shape[:2]
    columns = min(n, ROW)
    rows = 2 * -(-n // columns)
    figure, axes = canvas(0.75 * columns + 0.7, 0.78 * rows + 0.5, rows, columns)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[], visible=False)
        panel.spines[:].set_color(FRAME)  # the border of a white picture
    kept = slice(0, 3) if channels > 2 else slice(0, 1)
    latent = (
        channels not in (1, 3) if latent is None else latent
    )  # images lie in [-1, 1], latents anywhere
    scales = (3.0, float(np.quantile(np.abs(x1), 0.995)) or 1.0 if latent else 1.0)
    for i in range(n):
        row, column = 2 * (i // columns), i % columns
        for down, (x, scale) in enumerate(zip((x0, x1), scales, strict=True)):
            panel = axes[row + down, column]
            panel.set_visible(True)
            own = slice(0, 3) if x.shape[1] > 2 else slice(0, 1)
            picture = ((x[i, own] / scale).clip(-1, 1) + 1).transpose(1, 2, 0) / 2
            panel.imshow(picture.squeeze(2) if picture.shape[2] == 1 else picture, **GREY)
            if column == 0:
                words = ("noise", "sample")[down]
                panel.text(-0.12, 0.5, words, **BESIDE, transform=panel.transAxes)
        if label is not None:
            axes[row, column].set_title(str(label[i]), fontsize=8, pad=2)
    shown = f", channels 1 to {kept.stop} of {channels}" if latent else ""
    figure.suptitle(f"The first {n} pairs{shown}", fontsize=11, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})


def _lines(path: str | os.PathLike[str], x0: np.ndarray, x1: np.ndarray) -> None:
    from matplotlib.collections import LineCollection

    figure, axes = canvas(5.2, 5.4)
    dimensions = x0.shape[1]
    a, b = (np.pad(x, ((0, 0), (0, max(0, 2 - dimensions))))[:, :2] for x in (x0, x1))
    axes.add_collection(
        LineCollection(list(np.stack([a, b], axis=1)), colors="#999999", linewidths=0.5, alpha=0.5)
    )
    axes.scatter(*a.T, s=7, color=COLOURS["teacher"], linewidths=0, label="noise x0", zorder=2)
    axes.scatter(*b.T, s=7, color=COLOURS["student"], linewidths=0, label="sample x1", zorder=3)
    axes.set_aspect("equal")
    axes.spines[:].set_color(FRAME)
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    shown = "" if dimensions == 2 else f", the first 2 of {dimensions} dimensions"
    title = f"The first {len(a)} pairs{shown}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})


def costs(path: str | os.PathLike[str], cost: np.ndarray, at_random: np.ndarray) -> None:
    """Draw the histograms of |x1 - x0|^2 of pairs and of a random pairing, and save a PNG.

    Args:
        path: The file.
        cost: Of the pairs, [N].
        at_random: Of the same noises and samples, paired at random, [N].
    """
    figure, axes = canvas(6.4, 3.6)
    low, high = np.quantile(np.concatenate([cost, at_random]), [0, 0.999])
    edges = np.linspace(low, max(high, low + 1e-6), 61)
    shown = (("paired at random", at_random, "teacher"), ("these pairs", cost, "student"))
    for name, values, colour in shown:
        style = {"histtype": "stepfilled", "alpha": 0.45, "color": COLOURS[colour]}
        axes.hist(values, edges, label=f"{name}, mean {values.mean():.4g}", **style)
        axes.axvline(values.mean(), color=COLOURS[colour], linewidth=1.5)
    axes.set_xlabel(r"transport cost $|x_1 - x_0|^2$")
    axes.set_ylabel(f"pairs (of {len(cost):,})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    title = f"The pairs cost {cost.mean() / at_random.mean():.2f} times a random pairing"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})


def canvas(
    wide: float, high: float, rows: int = 1, columns: int = 1, dpi: int = 150
) -> tuple[Any, Any]:
    """Create a figure without a window, independent of the configured backend.

    Args:
        wide: Width in inches.
        high: Height in inches.
        rows: Rows of panels.
        columns: Columns of panels.
        dpi: Pixels per inch.

    Returns:
        The figure, and its axes: an array [rows, columns], or a single one for one panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    if rows == columns == 1:
        return figure, figure.subplots()
    return figure, figure.subplots(rows, columns, squeeze=False)


def _converged(row: Mapping[str, Any]) -> str:
    return f"teacher converged, {row['evaluations']} evaluations"
