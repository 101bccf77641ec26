"""The table and pictures of evaluation, and pictures of a flow in the plane: paths, and curves."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

COLOURS = {
    "teacher": "#5b6b7f",
    "student": "#d1495b",
}  # told apart by the colour-blind, and in grey
DARK = "#333333"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito's
PALE = "#c9ccd1"
MARKERS = {"teacher": "o", "student": "s"}
NAMES = {"frechet": "Frechet distance", "sliced_wasserstein": "sliced Wasserstein-2 distance"}
POINTS = 2000  # shown of a set of 2-D samples
MOSAIC = 4  # images a side in one panel


def table(result: dict[str, Any]) -> str:
    """Write the result as a Markdown table: a row for each number of evaluations."""
    teacher, student = result["teacher"], result["student"]
    converged = teacher["rows"][-1]["distance"]
    protocol, floor = result["protocol"], result["floor"]
    solver, reference = protocol["solver"].split("; converged: ")
    if "student_solver" in protocol:
        solver = f"teacher {solver}, student {protocol['student_solver']}"
    lines = [
        "| steps | evaluations | teacher | student | student / teacher converged |",
        "|---|---|---|---|---|",
    ]
    for a, b in zip(teacher["rows"], student["rows"], strict=True):
        steps = a["steps"] or f"converged ({reference})"
        lines.append(
            f"| {steps} | {a['evaluations']} | {a['distance']:.3g} | {b['distance']:.3g} "
            f"| {b['distance'] / converged:.2f} |"
        )
    lines += [
        "",
        f"{protocol['distance']} distance, {protocol['samples']} samples against "
        f"{protocol['real_samples']} real ones, EMA weights, {solver}; real against real, "
        f"{floor['samples']} each: {floor['distance']:.3g}. Straightness, normalised (0 is straight): "
        f"teacher {teacher['normalised']:.3g}, student {student['normalised']:.3g}.",
    ]
    return "\n".join(lines) + "\n"


def curve(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Draw distance to real data against network evaluations, log-log, and save a PNG.

    result: what `evaluate` writes to metrics.json: rows of teacher and student, floor, protocol. The
    dashed line is the teacher's converged distance, the dotted one that of real data to real data.
    """
    figure, axes = _figure(7.2, 4.3)
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
        (":", DARK, floor["distance"], f"real against real data, n = {floor['samples']:,}"),
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
    if decades < 1.5:  # too few to be read without numbers in between
        shown = "25" if decades > 0.7 else "23456789"
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in shown else "")
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("network evaluations per sample")
    axes.set_ylabel(f"{NAMES[result['protocol']['distance']]} (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_finding(result), loc="left", fontsize=11, fontweight="bold")
    axes.legend(frameon=False, loc="best", fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def grid(path: str | os.PathLike[str], samples: Mapping[str, Mapping[int | None, Tensor]]) -> None:
    """Draw samples, rows teacher and student, columns numbers of steps, and save a PNG.

    samples: model -> steps (None: converged) -> x: [N, C, H, W] in [-1, 1], or [N, 2]; sample i comes
    from the same noise in every panel. Points of more than two dimensions show their first two.
    """
    columns = list(next(iter(samples.values())))
    figure, axes = _figure(
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
                picture = mosaic(x[: MOSAIC**2].numpy())
                panel.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                panel.spines[:].set_visible(False)
            else:
                x = x[:POINTS]
                colour = COLOURS.get(name, DARK)
                panel.scatter(x[:, 0], x[:, 1], s=1.5, color=colour, alpha=0.5, linewidths=0)
                panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
                panel.spines[:].set_color("#cccccc")
            if row == 0:
                panel.set_title(_steps(steps), fontsize=10)
            if column == 0:
                colour = COLOURS.get(name, DARK)
                panel.set_ylabel(name, fontsize=11, fontweight="bold", color=colour)
    figure.savefig(path, metadata={"Software": None})


def paths(
    path: str | os.PathLike[str],
    panels: Mapping[str, Mapping[str, Tensor]],
    ground: Tensor | None = None,
) -> None:
    """Draw paths in the plane, a panel beside the other on one scale, and save a PNG.

    panels: title -> label -> points [T, N, 2], N paths of T points that share a colour: a ring where
    they begin, a dot where they end, small dots at the points between where these are few. ground:
    [M, 2], points shown under the paths. A panel of several labels has a legend.
    """
    side = min(3.6, 8.8 / len(panels))
    figure, axes = _figure(side * len(panels), side + 0.28, 1, len(panels), dpi=125)
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
    """Draw up to five named curves, label -> (x, y), and save a PNG.

    title: the finding. across, up: what the axes show, with units. log: both axes logarithmic, with
    ticks at the x of the curves.
    """
    figure, axes = _figure(7.6, 3.3, dpi=125)
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


def mosaic(x: np.ndarray) -> np.ndarray:
    """Lay images out in a square, one pixel of white between them.

    x: [N, C, H, W] in [-1, 1] -> uint8 [side, side] for one channel, [side, side, 3] for three.
    """
    n, channels, high, wide = x.shape
    side = math.ceil(math.sqrt(n))
    sheet = np.full((side * (high + 1) - 1, side * (wide + 1) - 1, channels), 255, dtype=np.uint8)
    pixels = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for i, image in enumerate(pixels):
        top, left = (i // side) * (high + 1), (i % side) * (wide + 1)
        sheet[top : top + high, left : left + wide] = image
    return sheet[:, :, 0] if channels == 1 else sheet


def _figure(
    wide: float, high: float, rows: int = 1, columns: int = 1, dpi: int = 150
) -> tuple[Any, Any]:
    """Make a figure of some inches that no window shows, whatever backend is set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, high), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    if rows == columns == 1:
        return figure, figure.subplots()
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save_small(figure: Any, path: str | os.PathLike[str]) -> None:
    """Save a PNG of 256 colours, which lines and dots of a few do with: half the bytes."""
    from PIL import Image

    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def _steps(steps: int | None) -> str:
    if steps is None:
        return "converged"
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _converged(row: Mapping[str, Any]) -> str:
    return f"teacher converged, {row['evaluations']} evaluations"


def _finding(result: Mapping[str, Any]) -> str:
    """Say how many evaluations of the teacher the student's fewest beat."""
    first, beaten = result["student"]["rows"][0], 0
    for row in result["teacher"]["rows"]:
        if row["steps"] is None or row["distance"] <= first["distance"]:
            break
        beaten = row["evaluations"]
    few, plural = first["evaluations"], "s" if first["evaluations"] > 1 else ""
    if beaten <= few:
        return "Distance to real data against network evaluations"
    return f"{few} evaluation{plural} of the student beat{'' if plural else 's'} {beaten} of the teacher"
