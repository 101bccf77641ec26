"""The files of an evaluation on prompts: metrics.json, the table, the pictures and the report."""

import html
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flowmatch.evaluation import charts, figures, report, tables
from flowmatch.runs.files import write_atomic

TITLES = {  # measure -> its title, its format
    "rms": ("error to own run", ".3g"),
    "diversity": ("diversity", ".2f"),
    "psnr": ("PSNR, dB", ".1f"),
    "ssim": ("SSIM", ".3f"),
    "lpips": ("LPIPS", ".3f"),
    "dino": ("DINO", ".3f"),
    "clip": ("CLIP, pictures", ".3f"),
    "clip_text": ("CLIP, text", ".2f"),
    "clip_text_difference": ("CLIP, text, to own run", ".2f"),
    "distance": ("Frechet distance", ".3g"),
}
COLUMNS = 6  # prompts of the grid
LARGEST = 256  # pixels: side of a picture in the report
MEANINGS = {
    "rms": "Error: root mean square difference of the latents to the teacher's own run from the same "
    "noise and prompt, in standard deviations of its samples.",
    "diversity": "Diversity: mean distance between samples of one prompt, divided by that of the "
    "teacher's own run; 1 is equal.",
    "psnr": "PSNR and SSIM compare the pictures with those of the teacher's own run.",
    "lpips": "LPIPS: perceptual distance to the teacher's own pictures; 0 is equal.",
    "dino": "DINO: cosine similarity of features to the teacher's own pictures; 1 is equal.",
    "clip": "CLIP, pictures: the same for CLIP's features.",
    "clip_text": "CLIP, text: 100 times the cosine similarity of picture and prompt; beside it the "
    "difference to the teacher's own run.",
    "accuracy": "Accuracy: share of the pictures in which the judge finds what the prompt asks for.",
    "distance": "Frechet distance: to the reference pictures.",
}
STYLE = """
table.prompts { border-collapse: separate; border-spacing: .35rem; }
table.prompts td, table.prompts th { border: 0; padding: 0; text-align: center; font-size: .8rem; }
table.prompts th { font-weight: 400; max-width: 9rem; vertical-align: bottom; }
table.prompts td:first-child { text-align: left; white-space: nowrap; padding-right: .5rem; }
table.prompts img { width: 8.5rem; min-width: 5rem; max-width: 100%; display: block;
  border-radius: .2rem; }
td small { color: var(--soft); white-space: nowrap; display: block; }
"""


def title(row: Mapping[str, Any]) -> str:
    """Name a row of the result."""
    if row["own"]:
        return f"teacher, own run, {tables.steps_name(row['steps'])}"
    return f"{row['model']}, {tables.steps_name(row['steps'])}"


def measured(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """List the measures that a row has, in order: name -> title, format."""
    there = dict.fromkeys(
        name for row in result["rows"] for name, v in row.items() if isinstance(v, dict)
    )
    own = {name: (name.replace("_", " "), ".3f") for name in there if name.startswith("accuracy")}
    known = {name: TITLES[name] for name in TITLES if name in there}
    first = {name: known.pop(name) for name in ("rms", "distance") if name in known}
    return first | own | known


def cell(row: Mapping[str, Any], name: str, form: str) -> tuple[str, str]:
    """Write a measure of a row, and its interval."""
    found = row.get(name)
    if found is None:
        return "", ""
    value = f"{found['value']:{form}}"
    if "low" not in found:
        return value, ""
    return value, f"{found['low']:{form}} to {found['high']:{form}}"


def markdown(result: Mapping[str, Any]) -> str:
    """Write the table and the protocol in a sentence, as Markdown."""
    names, protocol = measured(result), result["protocol"]
    head = ["run", "evaluations", *(title for title, _ in names.values())]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in result["rows"]:
        cells = [title(row), str(row["evaluations"])]
        for name, (_, form) in names.items():
            value, interval = cell(row, name, form)
            cells.append(f"{value} ({interval})" if interval else value)
        lines.append(f"| {' | '.join(cells)} |")
    told = [
        f"{protocol['samples']} samples of {protocol['prompts']} held-out prompts, "
        f"{protocol['per_prompt']} of each, from the same noise in all rows; in brackets: 95% "
        "intervals, by resampling prompts.",
        *meanings(result),
    ]
    if "floor" in result:
        told.append(f"Real against real: {result['floor']['distance']:.3g}.")
    if meant := tables.meant(result.get("student", {})):
        told.append(meant)
    return "\n".join(lines) + "\n\n" + " ".join(told) + "\n"


def meanings(result: Mapping[str, Any]) -> list[str]:
    """Explain the measures of a result in sentences."""
    names = measured(result)
    return [text for name, text in MEANINGS.items() if name in names]


def finding(result: Mapping[str, Any]) -> str:
    """Write a headline: the errors of student and teacher in the student's fewest steps."""
    rows = [row for row in result["rows"] if not row["own"]]
    first = next((row for row in rows if row["model"] == "student"), rows[0])
    text = (
        f"In {tables.steps_name(first['steps'])} the {first['model']} ends "
        f"{first['rms']['value']:.2g} standard deviations from the teacher's own run"
    )
    for row in rows:
        if row["model"] == "teacher" != first["model"] and row["steps"] == first["steps"]:
            text += f", the teacher {row['rms']['value']:.2g}"
    return text


def grid(
    path: Path, pictures: Mapping[str, Tensor], titles: Mapping[str, str], prompts: Sequence[str]
) -> None:
    """Draw a row of pictures for each run and a column for each prompt, and save a PNG.

    Args:
        path: The file.
        pictures: Name of the row -> pictures [N, C, H, W] in [0, 1].
        titles: Of the rows.
        prompts: Of the columns, [N].
    """
    high, wide = next(iter(pictures.values())).shape[-2:]
    figure, axes = figures.canvas(
        1.45 * len(prompts) + 1.3,
        1.45 * high / wide * len(pictures) + 0.75,
        len(pictures),
        len(prompts),
    )
    axes = axes if hasattr(axes, "flat") else _array(axes)
    style: dict[str, Any] = {"interpolation": "nearest" if high < 128 else "antialiased"}
    for down, (name, shown) in enumerate(pictures.items()):
        for across, picture in enumerate(shown):
            panel = axes[down, across]
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            image = picture.clamp(0, 1).permute(1, 2, 0).numpy()
            grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if image.shape[2] == 1 else {}
            panel.imshow(image.squeeze(2) if grey else image, **style, **grey)
            if down == 0:
                panel.set_title(short(prompts[across], 24, 3), fontsize=8)
            if across == 0:
                colour = figures.COLOURS[name.partition("_")[0]]
                words = titles[name].replace(", ", "\n")
                look: dict[str, Any] = dict(fontsize=9, fontweight="bold", color=colour)
                panel.set_ylabel(words, rotation=0, ha="right", va="center", **look)
    figure.savefig(path, metadata={"Software": None})


def _array(axes: Any) -> Any:
    import numpy as np

    return np.array([[axes]])


def short(text: str, wide: int, lines: int) -> str:
    """Wrap a text, and cut it after so many lines."""
    wrapped = textwrap.wrap(text, wide) or [""]
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: wide - 1] + "…"]
    return "\n".join(wrapped)


def curve(result: Mapping[str, Any]) -> Any:
    """Draw the error to the teacher's own run against steps, with intervals."""
    figure, axes = figures.canvas(charts.WIDE, 3.2)
    for model, colour in figures.COLOURS.items():
        rows = [r for r in result["rows"] if r["model"] == model and not r["own"]]
        if rows:
            x, y = [r["steps"] for r in rows], [r["rms"]["value"] for r in rows]
            sides = [
                [abs(r["rms"][side] - r["rms"]["value"]) for r in rows] for side in ("low", "high")
            ]
            look: dict[str, Any] = dict(marker=figures.MARKERS[model], color=colour, linewidth=2)
            axes.errorbar(x, y, sides, capsize=3, label=model, **look)
    steps = sorted({row["steps"] for row in result["rows"] if not row["own"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("error to the teacher's own run,\nstandard deviations")
    axes.grid(which="major", color=charts.FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def page(
    name: str,
    result: Mapping[str, Any],
    pictures: Mapping[str, Tensor],
    prompts: Sequence[str],
    config: str,
    facts: Mapping[str, str],
) -> str:
    """Write the report.

    Args:
        name: Of the experiment.
        result: The content of metrics.json.
        pictures: As in `grid`; none where there are no pictures.
        prompts: Of the pictures.
        config: Of the evaluation, YAML.
        facts: More entries of the protocol.

    Returns:
        HTML.
    """
    protocol = result["protocol"]
    intro = (
        f"{name}: {protocol['samples']:,} samples of {protocol['prompts']:,} prompts that training has "
        "not seen. Each row starts from the same noise; the teacher's own run is the target."
    )
    alt = "Error to the teacher's own run against steps, for teacher and student"
    shown = charts.picture(lambda: curve(result), alt)
    columns = "Columns are prompts; the pictures of a column come from the same noise."
    parts = [
        f"<h1>{html.escape(finding(result))}</h1><p class=soft>{html.escape(intro)}</p>",
        report.section("Pictures", columns, prompt_table(result, pictures, prompts)),
        report.section("Error to the teacher's own run", "", f"<figure>{shown}</figure>"),
        report.section("Numbers", " ".join(numbers_text(result)), numbers(result)),
        report.section("Protocol", "", protocol_list(result, facts)),
        report.details("Config of the evaluation", config),
    ]
    return report.PAGE.format(
        title=html.escape(name), style=report.STYLE + STYLE, body="\n".join(parts)
    )


def numbers_text(result: Mapping[str, Any]) -> list[str]:
    """Explain the table of the report."""
    return [*meanings(result), "Below each number: its 95% interval, by resampling prompts."]


def numbers(result: Mapping[str, Any]) -> str:
    """Write the table of the report."""
    names = measured(result)
    head = ["", "evaluations", *(title for title, _ in names.values())]
    lines = ["".join(f"<th>{html.escape(text)}</th>" for text in head)]
    for row in result["rows"]:
        cells = [f'<span class="{row["model"]}">{title(row)}</span>', str(row["evaluations"])]
        for name, (_, form) in names.items():
            value, interval = cell(row, name, form)
            cells.append(f"{value}<small>{interval}</small>")
        lines.append("".join(f"<td>{text}</td>" for text in cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=wide><table>{rows}</table></div>"


def prompt_table(
    result: Mapping[str, Any], pictures: Mapping[str, Tensor], prompts: Sequence[str]
) -> str:
    """Arrange pictures: a row for each run, a column for each prompt."""
    if not pictures:
        return ""
    lines = ["<th></th>" + "".join(f"<th>{html.escape(prompt)}</th>" for prompt in prompts)]
    for row in result["rows"]:
        cells = [f'<span class="{row["model"]}">{title(row).replace(", ", "<br>")}</span>']
        for prompt, picture in zip(prompts, pictures[row["name"]], strict=True):
            alt = html.escape(f"{title(row)}: {prompt}", quote=True)
            kind = ' class="pixels"' if max(picture.shape[-2:]) < 128 else ""
            cells.append(
                f'<img{kind} src="{charts.uri("png", png(picture, LARGEST))}" alt="{alt}">'
            )
        lines.append("".join(f"<td>{text}</td>" for text in cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class=wide><table class="prompts">{rows}</table></div>'


def png(picture: Tensor, largest: int | None = None) -> bytes:
    """Encode a picture [C, H, W] in [0, 1] as a PNG, no side longer than `largest` pixels."""
    from PIL import Image

    values = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(values.squeeze(2) if values.shape[2] == 1 else values)
    if largest is not None and max(image.size) > largest:
        image.thumbnail((largest, largest))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def protocol_list(result: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """List everything that the numbers depend on, as HTML."""
    known = dict(result["protocol"])
    known["standard deviation of a latent value"] = known.pop("deviation")
    known |= {f"student, {k}": v for k, v in result.get("student", {}).items()} | dict(facts)
    if "floor" in result:
        known["Frechet distance, real against real"] = f"{result['floor']['distance']:.3g}"
    rows = []
    for key, value in known.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        text = json.dumps(value) if isinstance(value, dict | list) else text
        label = html.escape(key.replace("_", " "))
        rows.append(f"<dt>{label}</dt><dd>{html.escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def write(
    place: Path,
    result: Mapping[str, Any],
    pictures: Mapping[str, Tensor],
    prompts: Sequence[str],
    config: str,
    facts: Mapping[str, str],
) -> None:
    """Write all files of an evaluation into its run folder; the arguments are those of `page`."""
    write_atomic(place / "metrics.json", json.dumps(result, indent=1) + "\n")
    write_atomic(place / "table.md", markdown(result))
    if pictures:
        grid(place / "grid.png", pictures, {r["name"]: title(r) for r in result["rows"]}, prompts)
    name = place.absolute().parent.name
    write_atomic(place / "report.html", page(name, result, pictures, prompts, config, facts))
