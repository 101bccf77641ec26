"""Draw a flow in the plane: paths in panels, and curves over a number."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from flowmatch.evaluation.figures import canvas

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito's
PALE = "#c9ccd1"


def paths(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Tensor]],
    ground: Tensor | None = None,
) -> None:
    """Draw paths in the plane, in panels of one scale, and save a PNG.

    A ring marks the start of a path, a dot its end, small dots the points between where they are few.
    A panel with several labels has a legend.

    Args:
        path: the PNG file.
        panels: title -> label -> points [T, N, 2], N paths of T points that share a colour.
        ground: points [M, 2] drawn under the paths.
    """
    side = min(3.6, 8.8 / len(panels))
    figure, axes = canvas(side * len(panels), side + 0.28, 1, len(panels), dpi=125)
    shown = [points for bundles in panels.values() for points in bundles.values()]
    shown += [] if ground is None else [ground[None]]
    limit = 1.06 * max(float(points.abs().max()) for points in shown)
    for panel, (title, bundles) in zip(axes[0], panels.items(), strict=True):
        if ground is not None:
            panel.scatter(*ground.cpu().T, s=2, color=PALE, linewidths=0, zorder=0)
        for (label, points), colour in zip(bundles.items(), PALETTE, strict=False):
            length, n, _ = points.shape
            x, y = points.detach().cpu().unbind(2)
            style = {"color": colour, "linewidth": 2.2 if n == 1 else 1 if n <= 24 else 0.6}
            panel.plot(x, y, ".-" if 2 < length <= 17 else "-", markersize=3.5, **style)
            panel.plot([], [], color=colour, linewidth=2, label=label)
            ring = {"s": 18 if n <= 24 else 9, "linewidth": 1.2 if n <= 24 else 0.8}
            panel.scatter(x[0], y[0], facecolor="white", edgecolor=colour, zorder=3, **ring)
            panel.scatter(x[-1], y[-1], s=13, color=colour, linewidths=0, zorder=4)
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        panel.spines[:].set_color("#cccccc")
        panel.set_title(title, fontsize=10, loc="left")
        if len(bundles) > 1:
            panel.legend(frameon=False, fontsize=8, loc="upper left", borderaxespad=0.2)
    _save_small(figure, path)


def curves(
    path: str | os.PathLike[str],
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    across: str,
    up: str,
    log: bool = False,
) -> None:
    """Draw up to five named curves and save a PNG.

    Args:
        path: the PNG file.
        lines: label -> (x, y).
        title: the finding.
        across: label of the x axis, with its unit.
        up: label of the y axis, with its unit.
        log: whether both axes are logarithmic, with ticks at the x of the curves.
    """
    figure, axes = canvas(7.6, 3.3, dpi=125)
    for (label, (x, y)), colour in zip(lines.items(), PALETTE, strict=False):
        marker = "o" if len(x) < 20 else None
        axes.plot(x, y, marker=marker, color=colour, linewidth=2, markersize=5, label=label)
    if log:
        axes.set(xscale="log", yscale="log")
        ticks = sorted({value for x, _ in lines.values() for value in x})
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.set_xticks([], minor=True)
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlabel=across, ylabel=up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    _save_small(figure, path)


def _save_small(figure: Any, path: str | os.PathLike[str]) -> None:
    """Save a PNG with 256 colours, which are enough for lines and dots and halve its size."""
    from PIL import Image

    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
