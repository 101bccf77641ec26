"""Pictures of samples: a row for each number of steps, drawn with Pillow alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np

TILE, LARGEST = 56, 256  # smallest and largest side of a picture of the sheet, in pixels
PANEL = 220  # side of a plot of points
GAP, LABEL = 4, 72  # between pictures; room for the name of a row
INK = (128, 128, 128, 255)  # readable on a light ground and on a dark one
DOT = (192, 58, 80, 190)
SCALE = 3.0  # the latent that is drawn as white; -SCALE is black


def drawable(shape: tuple[int, ...]) -> bool:
    """Return whether samples of a shape are drawn: points [D], and images or latents [C, H, W]."""
    return len(shape) in (1, 3)


def visible(x: np.ndarray) -> np.ndarray:
    """Turn samples into what is drawn.

    Args:
        x: Points [N, D]; images [N, C, H, W] in [-1, 1] with 1 or 3 channels; or latents with another
            number of channels, of which the first ones are drawn.

    Returns:
        Points as they are; pictures [N, 1 or 3, H, W] in [0, 1].
    """
    if x.ndim != 4:
        return x
    latent = x.shape[1] not in (1, 3)
    kept = x[:, : 3 if x.shape[1] > 2 else 1] / (SCALE if latent else 1)
    return (kept / 2 + 0.5).clip(0, 1)


def draw(rows: Mapping[str, np.ndarray]) -> Any:
    """Draw a sheet.

    Args:
        rows: Name of a row -> points [N, D] or pictures [N, C, H, W] in [0, 1]. Samples in the same
            place of all rows come from the same noise.

    Returns:
        A Pillow image with a transparent ground; None for samples that are neither.
    """
    first = next(iter(rows.values()))
    if not drawable(first.shape[1:]):
        return None
    return _plots(rows) if first.ndim == 2 else _sheet(rows)


def on_white(picture: Any) -> Any:
    """Lay a picture on a white ground, without transparency."""
    from PIL import Image

    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def _sheet(rows: Mapping[str, np.ndarray]) -> Any:
    from PIL import Image, ImageDraw

    count, _, high, wide = next(iter(rows.values())).shape
    factor = max(1, -(-TILE // min(high, wide)))  # whole, so that pixels stay square
    size = (wide * factor, high * factor)
    if max(size) > LARGEST:
        size = (
            max(1, wide * LARGEST // max(high, wide)),
            max(1, high * LARGEST // max(high, wide)),
        )
    across, down = size[0] + GAP, size[1] + GAP
    sheet = Image.new("RGBA", (LABEL + count * across, len(rows) * down), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for i, (name, x) in enumerate(rows.items()):
        pen.text((0, i * down + size[1] // 2), name, INK, font=_font(), anchor="lm")
        for j, one in enumerate((x * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)):
            tile = Image.fromarray(one.repeat(3, 2) if one.shape[2] == 1 else one, "RGB")
            way = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
            place = (LABEL + j * across, i * down)
            sheet.paste(tile.resize(size, way), place)
            corner = (place[0] + size[0], place[1] + size[1])
            pen.rectangle([place[0] - 1, place[1] - 1, *corner], outline=(*INK[:3], 90))
    return sheet


def _plots(rows: Mapping[str, np.ndarray]) -> Any:
    from PIL import Image, ImageDraw

    flat = {
        name: np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))[:, :2] for name, x in rows.items()
    }
    limit = 1.15 * max(float(np.quantile(np.abs(x), 0.99)) for x in flat.values()) or 1.0
    across, top = PANEL + 4 * GAP, 24
    sheet = Image.new("RGBA", (len(rows) * across, PANEL + top + 1), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for i, (name, x) in enumerate(flat.items()):
        left = i * across
        pen.text((left + PANEL // 2, top // 2), name, INK, font=_font(), anchor="mm")
        pen.rectangle([left, top, left + PANEL, top + PANEL], outline=INK)
        for a, b in x / limit:
            if abs(a) < 1 and abs(b) < 1:
                h, v = left + PANEL / 2 * (1 + a), top + PANEL / 2 * (1 - b)
                pen.ellipse([h - 1.5, v - 1.5, h + 1.5, v + 1.5], fill=DOT)
    return sheet


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(14)
