"""The table and the pictures of evaluation, and the pictures of a set of pairs."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLOURS = {
    "teacher": "#5b6b7f",
    "student": "#d1495b",
}  # told apart by the colour-blind, and in grey
DARK = "#333333"
MARKERS = {"teacher": "o", "student": "s"}
NAMES = {"frechet": "Frechet distance", "sliced_wasserstein": "sliced Wasserstein-2 distance"}
QUALITIES = {  # what images are scored by beside the distance: name, format
    "kernel": ("kernel distance", ".3g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "nearest": ("nearest training image", ".3g"),
}
ONE_STEP = "The student was trained for one step alone: its other rows show what it is not for."
POINTS = 2000  # shown of a set of 2-D samples
MOSAIC = 4  # images a side in one panel
ROW = 8  # pairs of images side by side
GREY: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
BESIDE: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 9}


def table(result: dict[str, Any]) -> str:
    """Write the result as a Markdown table: a row for each number of evaluations."""
    teacher, student = result["teacher"], result["student"]
    converged = teacher["rows"][-1]["distance"]
    protocol, floor = result["protocol"], result["floor"]
    solver, reference = protocol["solver"].split("; converged: ")
    rounded = protocol.get("arithmetic", "fp32")
    weights = "EMA weights" + ("" if rounded == "fp32" else f" in {rounded}")
    if "student_solver" in protocol:
        solver = f"teacher {solver}, student {protocol['student_solver']}"
    lines = [
        "| steps | evaluations | teacher | student | student / teacher converged |",
        "|---|---|---|---|---|",
    ]
    for a, b in zip(teacher["rows"], student["rows"], strict=True):
        steps = a["steps"] or f"converged ({reference})"
        lines.append(
            f"| {steps} | {evaluations(a, b)} | {a['distance']:.3g} | {b['distance']:.3g} "
            f"| {b['distance'] / converged:.2f} |"
        )
    lines += [
        "",
        f"{protocol['distance']} distance, {protocol['samples']} samples against "
        f"{protocol['real_samples']} real ones, {weights}, {solver}; real against real, "
        f"{floor['samples']} each: {floor['distance']:.3g}. Straightness, normalised (0 is straight): "
        f"teacher {teacher['normalised']:.3g}, student {student['normalised']:.3g}.",
    ]
    if "one_step" in student:
        lines += ["", ONE_STEP]
    shown = [name for name in QUALITIES if name in floor]
    if shown:
        lines += [
            "",
            f"| teacher / student | {' | '.join(QUALITIES[name][0] for name in shown)} |",
            f"|---|{'---|' * len(shown)}",
        ]
        for a, b in zip(teacher["rows"], student["rows"], strict=True):
            cells = [f"{quality(name, a)} / {quality(name, b)}" for name in shown]
            lines.append(f"| {steps_name(a['steps'])} | {' | '.join(cells)} |")
        cells = [quality(name, floor) for name in shown]
        lines += [f"| real against real | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def evaluations(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Write what a row cost, for each model where their samplers differ in it."""
    a, b = teacher["evaluations"], student["evaluations"]
    return f"{a}" if a == b else f"{a} / {b}"


def quality(name: str, measured: Mapping[str, float]) -> str:
    """Write a measure as the tables show it. measured: a row, or the floor."""
    return f"{measured[name]:{QUALITIES[name][1]}}"


def curve(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Draw distance to real data against network evaluations, log-log, and save a PNG."""
    curve_figure(result, 7.2, 4.3).savefig(path, metadata={"Software": None})


def curve_figure(result: Mapping[str, Any], wide: float, high: float, title: bool = True) -> Any:
    """Draw distance to real data against network evaluations, log-log, in a figure of some inches.

    result: what `evaluate` writes to metrics.json: rows of teacher and student, floor, protocol. The
    dashed line is the teacher's converged distance, the dotted one that of real data to real data.
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
    if title:
        axes.set_title(finding(result), loc="left", fontsize=11, fontweight="bold")
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return figure


def grid(path: str | os.PathLike[str], samples: Mapping[str, Mapping[int | None, Tensor]]) -> None:
    """Draw samples, rows teacher and student, columns numbers of steps, and save a PNG.

    samples: model -> steps (None: converged) -> x: [N, C, H, W] in [-1, 1], or points [N, D]; sample i
    comes from the same noise in every panel.
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
                picture = mosaic(x[: MOSAIC**2].numpy())
                panel.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                panel.spines[:].set_visible(False)
            else:
                x = on_plane(x[:POINTS])
                colour = COLOURS.get(name, DARK)
                panel.scatter(x[:, 0], x[:, 1], s=1.5, color=colour, alpha=0.5, linewidths=0)
                panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
                panel.spines[:].set_color("#cccccc")
            if row == 0:
                panel.set_title(steps_name(steps), fontsize=10)
            if column == 0:
                colour = COLOURS.get(name, DARK)
                panel.set_ylabel(name, fontsize=11, fontweight="bold", color=colour)
    figure.savefig(path, metadata={"Software": None})


def on_plane(x: Tensor) -> Tensor:
    """Give the first two values of points, a lone one beside 0. x: [..., D] -> [..., 2]."""
    return torch.nn.functional.pad(x, (0, max(0, 2 - x.shape[-1])))[..., :2]


def mosaic(x: np.ndarray) -> np.ndarray:
    """Lay images out in a square, one pixel of white between them.

    x: [N, C, H, W] in [-1, 1] -> uint8 [side, side] for one channel, [side, side, 3] for three. Of any
    other number of channels, as latents have, the first is shown.
    """
    x = x if x.shape[1] in (1, 3) else x[:, :1]
    n, channels, high, wide = x.shape
    side = math.ceil(math.sqrt(n))
    sheet = np.full((side * (high + 1) - 1, side * (wide + 1) - 1, channels), 255, dtype=np.uint8)
    pixels = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for i, image in enumerate(pixels):
        top, left = (i // side) * (high + 1), (i % side) * (wide + 1)
        sheet[top : top + high, left : left + wide] = image
    return sheet[:, :, 0] if channels == 1 else sheet


def pairs(
    path: str | os.PathLike[str], x0: np.ndarray, x1: np.ndarray, label: np.ndarray | None = None
) -> None:
    """Draw pairs, noise and sample, and save a PNG.

    x0, x1: images [N, C, H, W], a row of noise over a row of samples; or [N, D] with D > 1, joined by
    lines in their first two dimensions. label: [N], written above.
    """
    if x0.ndim < 4:
        _lines(path, x0.reshape(len(x0), -1), x1.reshape(len(x1), -1))
        return
    n, channels = x0.shape[:2]
    columns = min(n, ROW)
    rows = 2 * -(-n // columns)
    figure, axes = canvas(0.75 * columns + 0.7, 0.78 * rows + 0.5, rows, columns)
    for panel in axes.flat:
        panel.set_axis_off()
    kept = slice(0, 3) if channels > 2 else slice(0, 1)
    latent = channels not in (1, 3)  # images lie in [-1, 1], latents anywhere
    scales = (3.0, float(np.quantile(np.abs(x1), 0.995)) or 1.0 if latent else 1.0)
    for i in range(n):
        row, column = 2 * (i // columns), i % columns
        for down, (x, scale) in enumerate(zip((x0, x1), scales, strict=True)):
            panel = axes[row + down, column]
            picture = ((x[i, kept] / scale).clip(-1, 1) + 1).transpose(1, 2, 0) / 2
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
    axes.spines[:].set_color("#cccccc")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, fontsize=9)
    shown = "" if dimensions == 2 else f", the first 2 of {dimensions} dimensions"
    title = f"The first {len(a)} pairs{shown}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})


def costs(path: str | os.PathLike[str], cost: np.ndarray, at_random: np.ndarray) -> None:
    """Draw the histogram of |x1 - x0|^2, beside that of the same points at random, and save a PNG.

    cost, at_random: [N].
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
    axes.set_ylabel(f"pairs, of {len(cost):,}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    title = f"The pairs cost {cost.mean() / at_random.mean():.2f} of a random pairing"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.savefig(path, metadata={"Software": None})


def canvas(
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


def steps_name(steps: int | None) -> str:
    if steps is None:
        return "converged"
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def _converged(row: Mapping[str, Any]) -> str:
    return f"teacher converged, {row['evaluations']} evaluations"


def finding(result: Mapping[str, Any]) -> str:
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
