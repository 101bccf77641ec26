"""The report of an evaluation: one HTML page that holds everything it shows, for any screen."""

import html
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch.evaluation import charts, figures

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
DOTS = {"teacher": "#7d8fa6", "student": "#d9566a", "real": "#8a929b"}  # on either ground
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

    result: what metrics.json holds. samples: model -> steps (None: converged) -> [N, ...], sample i from
    one noise everywhere. real: [N, ...] real samples. paths: model -> times, states. folders: where the
    models came from; their metrics.jsonl and config.yaml are shown if they are there. config: of the
    evaluation, YAML. facts: what else the protocol names.
    """
    parts = [
        headline(name, result),
        section("Distance to real data against network evaluations", CURVE, curve(result)),
        section("The numbers", numbers_text(result), tables(result)),
        section("The same noise at every number of steps", GRID, grid(samples, real)),
        section("Paths from noise to data", *trajectories(paths)),
        training(folders),
        section("Protocol", "", protocol(result, facts)),
        details("Config of the evaluation", config),
        *(details(f"Config of the {key}", text) for key, text in configs_of(folders)),
    ]
    return PAGE.format(title=html.escape(name), style=STYLE, body="\n".join(parts))


CURVE = (
    "Both axes are logarithmic. The dotted line is what chance makes of two sets of real data, of the "
    "size that the last row of the table below tells."
)
GRID = "All pictures start from the same noises, image by image or point by point."


def section(title: str, text: str, content: str) -> str:
    """Write a part of the page, or nothing where it has no content."""
    said = f"<p class=soft>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{title}</h2>{said}{content}</section>" if content else ""


def headline(name: str, result: Mapping[str, Any]) -> str:
    """Write the title, the finding and the four numbers that matter."""
    teacher, student = result["teacher"]["rows"], result["student"]["rows"]
    few, converged = student[0], teacher[-1]
    steps = figures.steps_name(few["steps"])
    facts = [
        (few, f"student, {steps}", "student"),
        (teacher[0], f"teacher, {steps}", "teacher"),
        (converged, f"teacher, converged ({converged['evaluations']} evaluations)", "teacher"),
        (result["floor"], "real data against real data", "soft"),
    ]
    cards = "".join(
        f'<div><b class="{kind}">{row["distance"]:.3g}</b>{html.escape(label)}</div>'
        for row, label, kind in facts
    )
    ratio = few["distance"] / converged["distance"]
    return (
        f"<h1>{html.escape(figures.finding(result))}</h1>"
        f"<p class=soft>{html.escape(name)}: {figures.NAMES[result['protocol']['distance']]}, lower is "
        f"better. At {steps} the student stands at {ratio:.2f} times what the teacher converges to.</p>"
        f"<div class=facts>{cards}</div>"
    )


def curve(result: Mapping[str, Any]) -> str:
    """Draw distance against evaluations."""
    alt = "Distance to real data against network evaluations, of teacher and student"
    shown = charts.picture(lambda: figures.curve_figure(result, charts.WIDE, 3.9, title=False), alt)
    return f"<figure>{shown}</figure>"


def numbers_text(result: Mapping[str, Any]) -> str:
    """Say how the tables are to be read."""
    text = (
        f"Read every number beside the last row, of real data, {result['floor']['samples']:,} each."
    )
    if "one_step" in result["student"]:
        text += f" {figures.ONE_STEP}"
    if "nearest" in result["floor"]:
        unseen = "reference" in result["protocol"]
        text += (
            " Precision: the share of samples that lie among real ones; recall: the share of real ones "
            "that lie among samples. Nearest training image: the median distance in features, for real "
            f"ones {'that no model has seen' if unseen else 'to the nearest other'}; samples far below "
            "that would be copies."
        )
    return text


def tables(result: Mapping[str, Any]) -> str:
    """Write the tables: the distance, then whatever else was measured."""
    teacher, student, floor = (result[key] for key in ("teacher", "student", "floor"))
    converged = teacher["rows"][-1]["distance"]
    pairs = list(zip(teacher["rows"], student["rows"], strict=True))
    body = [
        [
            figures.steps_name(a["steps"]),
            figures.evaluations(a, b),
            *(f"{row['distance']:.3g}" for row in (a, b)),
            f"{b['distance'] / converged:.2f}",
        ]
        for a, b in pairs
    ]
    head = ["steps", "evaluations", "teacher", "student", "student / teacher converged"]
    out = table(head, body, ["real", "", f"{floor['distance']:.3g}", "", ""])
    shown = [name for name in figures.QUALITIES if name in floor]
    if not shown:
        return out
    body = [
        [
            figures.steps_name(a["steps"]),
            *(versus(*(figures.quality(q, r) for r in (a, b))) for q in shown),
        ]
        for a, b in pairs
    ]
    head = ["teacher / student", *(figures.QUALITIES[name][0] for name in shown)]
    return out + "<br>" + table(head, body, ["real", *(figures.quality(q, floor) for q in shown)])


def versus(teacher: str, student: str) -> str:
    """Write two numbers beside each other, in the colours of the models."""
    return f'<span class="teacher">{teacher} /</span> <span class="student">{student}</span>'


def table(head: list[str], body: list[list[str]], last: list[str]) -> str:
    """Write a table of HTML cells whose last row stands apart."""

    def row(cells: list[str], tag: str = "td", kind: str = "") -> str:
        kind = f' class="{kind}"' if kind else ""
        inside = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
        return f"<tr{kind}>{inside}</tr>"

    rows = [row(head, "th"), *map(row, body), row(last, kind="last")]
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def grid(samples: Mapping[str, Mapping[int | None, Tensor]], real: Tensor) -> str:
    """Lay out samples: a picture for each model and number of steps, then real ones."""
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
        label = figures.steps_name(steps)
        cells.append(f"<span>{label}</span>")
        for name, found in samples.items():
            cells.append(image(found[steps].float().cpu(), DOTS[name], f"{name}, {label}"))
    shown = image(real, DOTS["real"], "real data", "real")
    return f'<div class="grid">{"".join(cells)}</div><p class=soft>Real data:</p>{shown}'


def trajectories(paths: charts.Paths) -> tuple[str, str]:
    """Draw paths: (how to read them, the picture)."""
    points = paths["teacher"][1].ndim == 3
    if points:
        text = "From noise (ring) to data (dot), by Heun; both sides start from one noise."
    else:
        text = (
            "Single pixels of different samples along t, by Heun, from the same noise on "
            "both sides. The dotted lines join the ends: a path that one Euler step follows exactly "
            "lies on its own."
        )
    make = charts.point_paths if points else charts.value_paths
    alt = "Paths from noise to data, of teacher and student"
    return text, f"<figure>{charts.picture(lambda: make(paths), alt)}</figure>"


def training(folders: Mapping[str, str | Path]) -> str:
    """Draw the loss curves of the stages that the models came from, where their logs are there."""
    curves, said = {}, []
    for name, folder in folders.items():
        log = Path(folder) / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        if len(lines) > 1:
            curves[name] = lines
            rates = sorted(line["images_per_second"] for line in lines)
            said.append(
                f"{name}: {lines[-1]['step']:,} steps, {rates[len(rates) // 2]:,.0f} images a second"
            )
    if not curves:
        return ""
    text = "Each has a loss of its own: heights do not compare. " + "; ".join(said) + "."
    alt = "Loss along the steps of training"
    shown = charts.picture(lambda: charts.losses(curves), alt)
    return section("Training", text, f"<figure>{shown}</figure>")


def protocol(result: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """List everything that the numbers depend on."""
    known: dict[str, Any] = dict(result["protocol"])
    known["samples on a side of the floor"] = result["floor"]["samples"]
    for name in ("teacher", "student"):
        straight = f"straightness {result[name]['normalised']:.3g} (0 is straight)"
        known[name] = f"reflow round {result[name]['round']}, {straight}"
    rows = []
    for key, value in (known | dict(facts)).items():
        for inner, shown in value.items() if isinstance(value, dict) else [("", value)]:
            label = html.escape(f"{key}, {inner}" if inner else key).replace("_", " ")
            rows.append(f"<dt>{label}</dt><dd>{html.escape(str(shown))}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def configs_of(folders: Mapping[str, str | Path]) -> list[tuple[str, str]]:
    """Read the configs of the stages that the models came from, where they are there."""
    files = {name: Path(folder) / "config.yaml" for name, folder in folders.items()}
    return [(name, file.read_text()) for name, file in files.items() if file.is_file()]


def details(title: str, text: str) -> str:
    """Write a text that opens on demand."""
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"


def machine(device: torch.device, processes: int) -> dict[str, str]:
    """Describe what an evaluation runs on."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return {
        "device": f"{device.type} ({name}), {processes} process(es){threads}",
        "torch": torch.__version__,
    }
