"""The charts of the report, embedded in the page: one for light screens and one for dark ones."""

import base64
import html
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from flowmatch.evaluation import figures

FAINT = "#e6e6e6"
ON_DARK = {  # colour on light ground -> colour on dark ground
    figures.DARK: "#d5d9de",
    FAINT: "#3a4048",
    figures.COLOURS["teacher"]: "#a9bccf",
    figures.COLOURS["student"]: "#ff8093",
}
WIDE = 4.9  # inches: text stays legible where the page is 360 pixels wide
TRACED = 6  # values drawn along t
SHOWN = 32  # paths of points drawn

Paths = Mapping[str, tuple[Tensor, Tensor]]  # model -> (times [T], x [T, N, ...])


def uri(kind: str, content: bytes) -> str:
    """Encode a file as a data URI.

    Args:
        kind: Subtype of image, svg+xml or png.
        content: The file.
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(make: Callable[[], Any], alt: str) -> str:
    """Draw a figure as an HTML <picture> that follows the colour scheme of the screen.

    Args:
        make: Creates the matplotlib figure.
        alt: Description for readers who cannot see it.
    """
    import matplotlib

    ink: Any = dict.fromkeys(
        ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"],
        figures.DARK,
    )
    file = io.StringIO()
    with matplotlib.rc_context(ink):
        make().savefig(file, format="svg", transparent=True, metadata={"Date": None})
    light = file.getvalue()
    dark = light
    for old, new in ON_DARK.items():
        dark = dark.replace(old, new)
    return (
        '<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{uri("svg+xml", dark.encode())}">'
        f'<img src="{uri("svg+xml", light.encode())}" alt="{html.escape(alt)}"></picture>'
    )


def mosaic(x: Tensor) -> bytes:
    """Encode `figures.mosaic` as a PNG. x: [N, C, H, W] in [-1, 1]."""
    from PIL import Image

    file = io.BytesIO()
    picture = Image.fromarray(figures.mosaic(x.numpy()))
    picture = picture if x.shape[1] == 3 else picture.convert("LA")  # grey: a smaller file
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def scatter(x: Tensor, limit: float, colour: str) -> bytes:
    """Draw the first two values of samples as dots, in an SVG.

    Args:
        x: [N, D].
        limit: Both axes go from -limit to limit.
        colour: Of the dots, as CSS writes it.
    """
    dots = (100 + 96 / limit * figures.on_plane(x[: figures.POINTS]).numpy() * [1, -1]).round(1)
    path = "".join(f"M{a:g} {b:g}h0" for a, b in dots.clip(0, 200))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 200" width="200" height="200">'
        f'<path d="{path}" stroke="{colour}" stroke-width="2.4" stroke-linecap="round" '
        'stroke-opacity="0.75" fill="none"/></svg>'
    ).encode()


def point_paths(paths: Paths) -> Any:
    """Draw the first two values of points from noise (ring) to data (dot), one panel per model."""
    figure, axes = figures.canvas(WIDE, WIDE / 2 + 0.3, 1, len(paths))
    limit = max(1.08 * float(x[:, :SHOWN, :2].abs().max()) for _, x in paths.values())
    for panel, (name, (_, states)) in zip(axes[0], paths.items(), strict=True):
        colour, x = figures.COLOURS[name], figures.on_plane(states)
        panel.plot(*x[:, :SHOWN].unbind(-1), color=colour, linewidth=0.9, alpha=0.8)
        panel.plot(*x[0, :SHOWN].T, "o", color=colour, markersize=3.5, markerfacecolor="none")
        panel.plot(*x[-1, :SHOWN].T, "o", color=figures.DARK, markersize=2.5)
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        panel.set_title(name, fontsize=11, fontweight="bold", color=colour)
        panel.spines[:].set_color(FAINT)
    return figure


def value_paths(paths: Paths) -> Any:
    """Draw the values of a few pixels along t, each of another sample, one panel per model.

    The pixels have evenly spaced ranks among the quarter that varies most between the samples of the
    teacher.
    """
    figure, axes = figures.canvas(WIDE, WIDE / 2 + 0.3, 1, len(paths))
    ends = paths["teacher"][1][-1].flatten(1)  # [N, values]
    varied = ends.std(0).argsort(descending=True)
    chosen = varied[np.linspace(0, max(0, len(varied) // 4 - 1), TRACED).astype(int)]
    for panel, (name, (times, x)) in zip(axes[0], paths.items(), strict=True):
        lines = x.flatten(2)[:, range(TRACED), chosen]  # [T, TRACED]
        panel.plot(times, lines, color=figures.COLOURS[name], linewidth=1.4, alpha=0.9)
        straight = lines[0] + (times[:, None] - times[0]) / (times[-1] - times[0]) * (
            lines[-1] - lines[0]
        )
        panel.plot(times, straight, ":", color=figures.DARK, linewidth=0.8)
        panel.set_title(name, fontsize=11, fontweight="bold", color=figures.COLOURS[name])
        panel.set_xlabel("t, from noise (0) to data (1)")
        _tidy(panel)
    axes[0, 0].set_ylabel("value")
    for panel in axes[0, 1:]:
        panel.sharey(axes[0, 0])
        panel.tick_params(labelleft=False)
    return figure


def losses(curves: Mapping[str, list[dict[str, float]]]) -> Any:
    """Draw the training losses, one panel per model, because their scales differ."""
    figure, axes = figures.canvas(WIDE, WIDE / 2 + 0.1, 1, len(curves))
    panels = np.atleast_2d(axes)[0]  # canvas returns a single panel by itself
    for panel, (name, lines) in zip(panels, curves.items(), strict=True):
        steps, values = [line["step"] for line in lines], [line["loss"] for line in lines]
        panel.plot(steps, values, color=figures.COLOURS[name], linewidth=1.4)
        if max(values) > 10 * min(values) > 0:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.tick_params(labelsize=9, which="both")
        panel.set_title(name, fontsize=11, fontweight="bold", color=figures.COLOURS[name])
        panel.set_xlabel("step")
        _tidy(panel)
    panels[0].set_ylabel("loss")
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(which="major", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
