"""Samples of an exported pipeline that reads prompts, called as its card says."""

from pathlib import Path
from typing import Any

import torch

from flowmatch.config import UserError
from flowmatch.models.pipeline import open_pipeline


def draw(
    folder: Path, facts: dict[str, Any], steps: int, prompt: str | None, count: int, seed: int
) -> list[Any]:
    """Sample an export.

    Args:
        folder: The export.
        facts: Of its manifest.
        steps: One of the numbers of steps that it was checked with.
        prompt: Of all samples; None is the one of its card.
        count: Number of samples, drawn one by one.
        seed: Of the noise of the first; that of the next is one more.

    Returns:
        What the pipeline makes: pictures, lists of pictures, arrays.

    Raises:
        UserError: The export was not checked with so many steps.
    """
    import diffusers

    import flowmatch

    ways = facts["ways"]
    if str(steps) not in ways:
        raise UserError(f"--steps {steps}: this export takes {', '.join(ways)} steps")
    way, pipe = ways[str(steps)], open_pipeline(folder, "export")
    library = flowmatch if way["class"] == "RectifiedFlowScheduler" else diffusers
    kind = getattr(library, way["class"])
    pipe.scheduler = kind.from_pretrained(folder, subfolder=way["place"])
    if facts["guider"]:
        pipe.guider.disable()
    pipe.set_progress_bar_config(disable=True)
    samples = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        output = pipe(prompt=prompt or facts["prompt"], generator=generator, **way["call"])
        samples.append(output[0][0])
    return samples


def write(samples: list[Any], out: Path) -> str:
    """Write samples: a picture as `00.png`, frames as `00-000.png`, all else as `samples.npy`.

    Returns:
        A line that says what was written.
    """
    import numpy as np
    from PIL.Image import Image

    out.mkdir(parents=True, exist_ok=True)
    films = [one if isinstance(one, list) else [one] for one in samples]
    if not all(isinstance(frame, Image) for film in films for frame in film):
        array = np.stack([np.asarray(one) for one in samples])
        np.save(out / "samples.npy", array)
        return f"wrote {out / 'samples.npy'}: {list(array.shape)}"
    for number, film in enumerate(films):
        for place, frame in enumerate(film):
            name = f"{number:02d}-{place:03d}" if len(film) > 1 else f"{number:02d}"
            frame.save(out / f"{name}.png")
    return f"wrote {sum(map(len, films))} images into {out}"
