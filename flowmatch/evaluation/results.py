"""The files of an evaluation: metrics.json, the table, the pictures and the report."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmatch.data import dataset
from flowmatch.data.dataset import Data
from flowmatch.evaluation import figures, report, tables
from flowmatch.evaluation.sampling import SampledRow, Sampler
from flowmatch.runs.files import Scratch, write_atomic


def write_table(place: Path, result: dict[str, Any], scratch: Scratch) -> None:
    """Write the files that follow from metrics.json alone: table.md and curve.png.

    Args:
        place: the run folder.
        result: the content of metrics.json.
        scratch: of the run folder.
    """
    write_atomic(place / "table.md", tables.markdown(result))
    built = scratch.build("pictures") / "curve.png"
    figures.curve(built, result)
    scratch.place(built, place / built.name)


def write(
    place: Path,
    scratch: Scratch,
    result: dict[str, Any],
    rows: Mapping[str, list[SampledRow]],
    sampled: Mapping[str, Sampler],
    real: Data,
    folders: Mapping[str, Path],
    config: str,
    shown: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Write all files of an evaluation.

    Args:
        place: the run folder.
        scratch: of the run folder.
        result: the content of metrics.json.
        rows: the samples of "teacher" and "student".
        sampled: the samplers that drew them.
        real: the data that they are compared with.
        folders: the run folders of both models, for their training curves.
        config: the config as YAML, for the report.
        shown: what turns samples into what is drawn, such as pictures of latents.
    """
    drawn = figures.MOSAIC**2 if real.images else None
    samples = {
        name: {row.steps: figures.drawable(shown(row.x[:drawn])) for row in made}
        for name, made in rows.items()
    }
    write_atomic(place / "metrics.json", json.dumps(result, indent=1) + "\n")
    write_table(place, result, scratch)
    built = scratch.build("pictures") / "grid.png"
    figures.grid(built, samples)
    scratch.place(built, place / built.name)
    accelerator = sampled["student"].accelerator
    seen = dataset.reference(real, min(16 if real.images else 2000, real.count), 0)["x1"]
    page = report.page(
        place.absolute().parent.name,
        result,
        samples,
        real=figures.drawable(seen),
        paths={name: sampler.paths() for name, sampler in sampled.items()},
        folders=dict(folders),
        config=config,
        facts={
            f"{name}, network": f"{type(net).__name__}, {net.num_parameters():,} parameters"
            for name, net in ((name, sampler.model.net) for name, sampler in sampled.items())
        }
        | report.machine(accelerator.device, accelerator.num_processes),
    )
    write_atomic(place / "report.html", page)
