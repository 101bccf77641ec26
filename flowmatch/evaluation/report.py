"""The report of an evaluation: one self-contained HTML page, for any screen."""

import html
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch.evaluation import charts, figures, tables
from flowmatch.runs import lines
from flowmatch.runs.process import say

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --soft: #5c6570; --line: #dfe3e8; --ground: #ffffff;
  --card: #f6f7f9; --teacher: #4f5f73; --student: #c03a50; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a3acb6; --line: #343b44;
  --ground: #16191d; --card: #1f242a; --teacher: #a9bccf; --student: #ff8093; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .4rem; }
p { max-width: 44rem; margin: .4rem 0 .8rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.teacher { color: var(--teacher); } .student { color: var(--student); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; font-size: .85rem; }
.facts b { display: block; font-size: 1.5rem; line-height: 1.3; }
figure { margin: .5rem 0; } figure picture img { width: 100%; max-width: 40rem; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
tr.last td { border-top: 2px solid var(--line); color: var(--soft); }
.grid { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
  grid-template-rows: repeat(3, auto); grid-template-columns: auto; gap: .45rem; align-items: center; }
.grid span { font-size: .85rem; text-align: center; } .grid .side { text-align: left; }
.grid img { width: 100%; display: block; border-radius: .2rem; background: var(--card); }
.pixels { image-rendering: pixelated; }
.real { width: min(12rem, 45%); display: block; border-radius: .2rem; background: var(--card); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: .5rem 0;
  font-size: .92rem; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); padding: .8rem; border-radius: .5rem; overflow-x: auto;
  font-size: .8rem; }
summary { cursor: pointer; }
td span { white-space: nowrap; }
@media (max-width: 640px) {
  table { width: 100%; font-size: .76rem; } th, td { padding-right: .3rem; }
  th:last-child, td:last-child { padding-right: 0; }
  .grid { grid-auto-flow: row; grid-template-rows: none; grid-template-columns: 4.6rem 1fr 1fr; }
  .grid span { text-align: left; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
}
"""
DOTS = {"teacher": "#7d8fa6", "student": "#d9566a", "real": "#8a929b"}  # for both grounds
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style></head><body>
{body}
</body></html>
"""


def page(
    name: str,
    result: Mapping[str, Any],
    samples: Mapping[str, Mapping[int | None, Tensor]],
    *,
    real: Tensor,
    paths: charts.Paths,
    folders: Mapping[str, str | Path],
    config: str,
    facts: Mapping[str, str],
) -> str:
    """Write the page.

    Args:
        name: Of the experiment.
        result: The content of metrics.json.
        samples: Model -> steps (None: converged) -> samples [N, ...]; sample i comes from the same
            noise everywhere.
        real: Real samples [N, ...].
        paths: Model -> times [T], states [T, N, ...].
        folders: Model -> run folder; its metrics.jsonl and config.yaml are shown if they exist.
        config: Of the evaluation, YAML.
        facts: More entries of the protocol.

    Returns:
        HTML.
    """
    parts = [
        headline(name, result),
        section("Distance to real data", curve_text(result), curve(result)),
        section("Numbers", numbers_text(result), numbers(result)),
        section("Panel", *panel(result)),
        section("Samples", GRID, grid(samples, real)),
        section("Paths from noise to data", *trajectories(paths)),
        training(folders),
        section("Protocol", "", protocol(result, facts)),
        details("Config of the evaluation", config),
        *(details(f"Config of the {key}", text) for key, text in configs_of(folders)),
    ]
    return PAGE.format(title=html.escape(name), style=STYLE, body="\n".join(parts))


GRID = (
    "Samples in the same place come from the same noise, for both models and every number of steps."
)


def section(title: str, text: str, content: str) -> str:
    """Write a section of the page; nothing if it has no content."""
    intro = f"<p class=soft>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{title}</h2>{intro}{content}</section>" if content else ""


def headline(name: str, result: Mapping[str, Any]) -> str:
    """Write the finding as a title, and the four most important distances."""
    teacher, student = result["teacher"]["rows"], result["student"]["rows"]
    few, converged = student[0], teacher[-1]
    steps = tables.steps_name(few["steps"])
    facts = [
        (few, f"student, {steps}", "student"),
        (teacher[0], f"teacher, {steps}", "teacher"),
        (converged, f"teacher, converged ({converged['evaluations']} evaluations)", "teacher"),
        (result["floor"], tables.REAL, "soft"),
    ]
    cards = "".join(
        f'<div><b class="{kind}">{row["distance"]:.3g}</b>{html.escape(label)}</div>'
        for row, label, kind in facts
    )
    ratio = few["distance"] / converged["distance"]
    distance = tables.DISTANCES[result["protocol"]["distance"]]
    return (
        f"<h1>{html.escape(tables.finding(result))}</h1>"
        f"<p class=soft>{html.escape(name)}: {distance} to real data, lower is better. With {steps} the "
        f"distance of the student is {ratio:.2f} times that of the converged teacher.</p>"
        f"<div class=facts>{cards}</div>"
    )


def curve_text(result: Mapping[str, Any]) -> str:
    """Explain the curve."""
    return (
        "Both axes are logarithmic. The dashed line is the converged teacher. The dotted line is the "
        f"distance between two sets of {result['floor']['samples']:,} real samples, which differ by "
        "chance alone."
    )


def curve(result: Mapping[str, Any]) -> str:
    """Draw the distance against the evaluations."""
    alt = "Distance to real data against network evaluations, for teacher and student"
    shown = charts.picture(lambda: figures.curve_figure(result, charts.WIDE, 3.9, title=False), alt)
    return f"<figure>{shown}</figure>"


def numbers_text(result: Mapping[str, Any]) -> str:
    """Explain the tables."""
    text = (
        "The last row compares two sets of real data, of "
        f"{result['floor']['samples']:,} samples each: read every number beside it."
    )
    if told := tables.meant(result["student"]):
        text += f" {told}"
    if "nearest" in result["floor"]:
        which = (
            "to real ones that no model has seen"
            if "reference" in result["protocol"]
            else "to the other real ones"
        )
        text += (
            " Precision is the share of samples close to real ones; recall is the share of real ones "
            "close to samples. Nearest training image is the median distance in feature space from a "
            f"sample to the closest training image; the last row applies it {which}. Values far below "
            "the last row mean that samples are copies of training images."
        )
    return text


def numbers(result: Mapping[str, Any]) -> str:
    """Write the tables of `flowmatch.evaluation.tables` in HTML."""
    found = [tables.distances(result), tables.qualities(result)]
    return "<br>".join(table(each) for each in found if each is not None)


def panel(result: Mapping[str, Any]) -> tuple[str, str]:
    """Explain the tables of a panel, and write them in HTML; both are empty where there is none."""
    if "panel" not in result:
        return "", ""
    return tables.panel_text(result), "<br>".join(map(table, tables.panel(result)))


def versus(teacher: str, student: str) -> str:
    """Write two numbers side by side, in the colours of the models."""
    return f'<span class="teacher">{teacher} /</span> <span class="student">{student}</span>'


def table(content: tables.Table) -> str:
    """Write a table whose last row is set apart."""

    def row(cells: Sequence[tables.Cell], tag: str = "td", kind: str = "") -> str:
        kind = f' class="{kind}"' if kind else ""
        texts = [cell if isinstance(cell, str) else versus(*cell) for cell in cells]
        texts = [re.sub(r" (\[[^]]*\])", r" <span>\1</span>", text) for text in texts]
        return f"<tr{kind}>{''.join(f'<{tag}>{text}</{tag}>' for text in texts)}</tr>"

    rows = [row(content.head, "th"), *map(row, content.rows), row(content.floor, kind="last")]
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def grid(samples: Mapping[str, Mapping[int | None, Tensor]], real: Tensor) -> str:
    """Arrange samples: a picture per model and number of steps, then real samples."""
    limit = 1.15 * float(real.abs().max()) or 1.0

    def image(x: Tensor, colour: str, alt: str, kind: str = "") -> str:
        if x.ndim == 4:
            address = charts.uri("png", charts.mosaic(x[: figures.MOSAIC**2]))
            kind += " pixels"
        else:
            address = charts.uri("svg+xml", charts.scatter(x, limit, colour))
        return f'<img class="{kind.strip()}" src="{address}" alt="{alt}">'

    cells = ["<span></span>"]
    cells += [f'<span class="side {name}"><b>{name}</b></span>' for name in samples]
    for steps in next(iter(samples.values())):
        label = tables.steps_name(steps)
        cells.append(f"<span>{label}</span>")
        for name, found in samples.items():
            cells.append(image(found[steps].float().cpu(), DOTS[name], f"{name}, {label}"))
    shown = image(real, DOTS["real"], "real data", "real")
    return f'<div class="grid">{"".join(cells)}</div><p class=soft>Real data:</p>{shown}'


def trajectories(paths: charts.Paths) -> tuple[str, str]:
    """Draw paths. Return how to read the picture, and the picture."""
    points = paths["teacher"][1].ndim == 3
    if points:
        text = "Paths from noise (rings) to data (dots). Both models start from the same noise."
    else:
        text = (
            "Values of single pixels along t, each of another sample, from the same noise for both "
            "models. Dotted lines connect the ends of each path: one Euler step follows a path exactly "
            "if it lies on its line."
        )
    make = charts.point_paths if points else charts.value_paths
    alt = "Paths from noise to data, for teacher and student"
    return text, f"<figure>{charts.picture(lambda: make(paths), alt)}</figure>"


def training(folders: Mapping[str, str | Path]) -> str:
    """Draw the training losses of the models that have logs; nothing if none has."""
    curves, notes = {}, []
    for name, folder in folders.items():
        log = Path(folder) / "metrics.jsonl"
        sound, damaged = lines.read_metrics(log)
        logged = [values for values, _ in sound if {"loss", "images_per_second"} <= values.keys()]
        if damaged:
            say(f"evaluate: {lines.told(log, damaged)}")
        if len(logged) > 1:
            curves[name] = logged
            rates = sorted(values["images_per_second"] for values in logged)
            notes.append(
                f"{name}: {logged[-1]['step']:,} steps, {rates[len(rates) // 2]:,.0f} images per second"
            )
    if not curves:
        return ""
    text = "The two losses have different scales. " if len(curves) > 1 else ""
    text += "; ".join(notes) + "."
    alt = "Loss against training steps"
    shown = charts.picture(lambda: charts.losses(curves), alt)
    return section("Training", text, f"<figure>{shown}</figure>")


def protocol(result: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """List everything that the numbers depend on, as HTML."""
    known: dict[str, Any] = dict(result["protocol"])
    known["samples in each real set"] = result["floor"]["samples"]
    for name in ("teacher", "student"):
        straight = f"straightness {result[name]['normalised']:.3g} (0 is straight)"
        known[name] = f"reflow round {result[name]['round']}, {straight}"
    rows = []
    for key, value in (known | dict(facts)).items():
        for inner, shown in value.items() if isinstance(value, dict) else [("", value)]:
            label = html.escape(f"{key}, {inner}" if inner else key).replace("_", " ")
            text = f"{shown:.6g}" if isinstance(shown, float) else str(shown)
            rows.append(f"<dt>{label}</dt><dd>{html.escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def configs_of(folders: Mapping[str, str | Path]) -> list[tuple[str, str]]:
    """Read the configs of the training stages that have one: (model, YAML)."""
    files = {name: Path(folder) / "config.yaml" for name, folder in folders.items()}
    found = []
    for name, file in files.items():
        if file.is_file():
            text, damaged = lines.read_text(file.read_bytes())
            if damaged:
                say(f"evaluate: {lines.told(file, damaged)}")
            found.append((name, text))
    return found


def details(title: str, text: str) -> str:
    """Write a text that the reader can unfold."""
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"


def machine(device: torch.device, processes: int) -> dict[str, str]:
    """Describe the hardware and the software of an evaluation, for the protocol."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    plural = "process" if processes == 1 else "processes"
    return {
        "device": f"{device.type} ({name}), {processes} {plural}{threads}",
        "torch": torch.__version__,
    }
