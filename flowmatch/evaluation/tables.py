"""The tables of an evaluation: rows of formatted numbers for Markdown and HTML, and their words."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from flowmatch.config import UserError, step_words

DISTANCES = {"frechet": "Frechet distance", "sliced_wasserstein": "sliced Wasserstein-2 distance"}
QUALITIES = {  # what images are scored on beside the distance: name, format
    "kernel": ("kernel distance", ".3g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "nearest": ("nearest training image", ".3g"),
}
PANEL = {  # what a panel shows of each feature space: name, format
    "frechet": ("Frechet distance", ".3g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "density": ("density", ".3f"),
    "coverage": ("coverage", ".3f"),
    "nearest": ("nearest training image", ".3g"),
    "diversity_ratio": ("diversity / teacher's", ".3f"),
}
CHEAP = {"table.md", "curve.png"}  # files that follow from metrics.json
UNHASHED = ("table.md", "curve.png", "grid.png", "report.html")
ONE_STEP = "The student was trained for one step only; its rows with more steps are not meaningful."
FOR_STEPS = "The student was trained for {} only; its other rows are not meaningful."
WINDOWS = (
    "The student was trained for {} equal steps; rows with no multiple of them are not meaningful."
)
REAL = "real against real"

Cell = str | tuple[str, str]  # tuple: the value of the teacher, that of the student


@dataclass(frozen=True)
class Table:
    """A table of formatted numbers."""

    head: list[str]
    rows: list[list[Cell]]
    floor: list[Cell]  # last row: real data against real data


def distances(result: Mapping[str, Any]) -> Table:
    """Tabulate the distances: a row for each number of steps.

    Args:
        result: The content of metrics.json.
    """
    converged = result["teacher"]["rows"][-1]["distance"]
    reference = result["protocol"]["solver"].split("; converged: ")[1]
    rows: list[list[Cell]] = [
        [
            f"{a['steps'] or f'converged ({reference})'}",
            evaluations(a, b),
            f"{a['distance']:.3g}",
            f"{b['distance']:.3g}",
            f"{b['distance'] / converged:.2f}",
        ]
        for a, b in _pairs(result)
    ]
    head = ["steps", "evaluations", "teacher", "student", "student / teacher converged"]
    return Table(head, rows, [REAL, "", f"{result['floor']['distance']:.3g}", "", ""])


def qualities(result: Mapping[str, Any]) -> Table | None:
    """Tabulate the other measures, a row for each number of steps; None if there are none.

    Args:
        result: The content of metrics.json.
    """
    shown = [name for name in QUALITIES if name in result["floor"]]
    if not shown:
        return None
    rows: list[list[Cell]] = [
        [steps_name(a["steps"]), *((_quality(name, a), _quality(name, b)) for name in shown)]
        for a, b in _pairs(result)
    ]
    head = ["teacher / student", *(QUALITIES[name][0] for name in shown)]
    return Table(head, rows, [REAL, *(_quality(name, result["floor"]) for name in shown)])


def panel(result: Mapping[str, Any]) -> list[Table]:
    """Tabulate a panel: a table for each feature space, without any where there is no panel.

    Args:
        result: The content of metrics.json.
    """
    found = []
    for name, space in result.get("panel", {"spaces": {}})["spaces"].items():
        rows: list[list[Cell]] = [
            [f"{model}, {steps_name(row['steps'])}", *_measured(row)]
            for model in ("teacher", "student")
            for row in space[model]
        ]
        head = [name, *(title for title, _ in PANEL.values())]
        found.append(Table(head, rows, [REAL, *_measured(space["floor"])]))
    return found


def panel_text(result: Mapping[str, Any]) -> str:
    """Explain the tables of a panel.

    Args:
        result: The content of metrics.json.
    """
    protocol, found = result["protocol"], result["panel"]
    unseen = "reference" in protocol
    spaces = ", ".join(
        f"{name} ({space['network']}, {_learnt(space)})" for name, space in found["spaces"].items()
    )
    return (
        f"Panel of feature spaces that no loss has used: {spaces}. {protocol['samples']} samples "
        f"against {protocol['real_samples']} images that "
        f"{'no model has seen' if unseen else 'the models were trained on'}; in brackets 95% intervals "
        f"of {found['resamples']} resamples, which leave the neighbourhoods of precision, recall, "
        f"density and coverage (k = {found['neighbours']}) as they are. Diversity is the mean distance "
        f"of two samples {_within(found)}, over that of the converged teacher."
    )


def _learnt(space: Mapping[str, Any]) -> str:
    if "accuracy" in space:
        return f"held-out accuracy {space['accuracy']:.3f}"
    return f"held-out variance explained {space['explained']:.3f}"


def _within(found: Mapping[str, Any]) -> str:
    labelled = any("accuracy" in space for space in found["spaces"].values())
    return "of one class, as the classifier sees it" if labelled else "of any class"


def _measured(row: Mapping[str, Any]) -> list[Cell]:
    cells: list[Cell] = []
    for name, (_, form) in PANEL.items():
        value, low, high = (f"{row[name][key]:{form}}" for key in ("value", "low", "high"))
        cells.append(f"{value} [{low}, {high}]")
    return cells


def read(
    folder: Path, key: str, write: Callable[[Mapping[str, Any]], str] | None = None
) -> tuple[dict[str, Any], str]:
    """Read metrics.json of a sealed evaluation, and write its table anew.

    Args:
        folder: The run folder.
        key: Name of the config key, for errors.
        write: Writes the table; default: `markdown`.

    Raises:
        UserError: metrics.json is not one of this stage.
    """
    try:
        result: dict[str, Any] = json.loads((folder / "metrics.json").read_bytes())
        return result, (write or markdown)(result)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(
            f"{key}={folder}: metrics.json is not one of this stage ({error!r}); delete manifest.json "
            "there and repeat its stage"
        ) from None


def lost(folder: Path) -> list[str]:
    """List the files of a sealed evaluation that are missing, and a table that was changed."""
    names = [name for name in UNHASHED if not (folder / name).is_file()]
    table = folder / "table.md"
    if table.is_file() and table.read_bytes() != read(folder, "run_dir")[1].encode():
        names.insert(0, table.name)
    return names


def markdown(result: Mapping[str, Any]) -> str:
    """Write the tables and the protocol in a sentence, as Markdown.

    Args:
        result: The content of metrics.json.
    """
    teacher, student = result["teacher"], result["student"]
    protocol, floor = result["protocol"], result["floor"]
    solver = protocol["solver"].split("; converged: ")[0]
    rounded = protocol.get("arithmetic", "fp32")
    weights = "EMA weights" + ("" if rounded == "fp32" else f" in {rounded}")
    if "student_solver" in protocol:
        solver = f"teacher {solver}, student {protocol['student_solver']}"
    table, more = distances(result), qualities(result)
    parts = [
        _lines(table.head, table.rows),
        f"{protocol['distance']} distance, {protocol['samples']} samples against "
        f"{protocol['real_samples']} real ones, {weights}, {solver}; real against real, "
        f"{floor['samples']} each: {floor['distance']:.3g}. Straightness, normalised (0 is straight): "
        f"teacher {teacher['normalised']:.3g}, student {student['normalised']:.3g}.",
    ]
    if told := meant(student):
        parts.append(told)
    if more is not None:
        parts.append(_lines(more.head, [*more.rows, more.floor]))
    if "panel" in result:
        parts.append(panel_text(result))
    parts += [_lines(each.head, [*each.rows, each.floor]) for each in panel(result)]
    return "\n\n".join(parts) + "\n"


def meant(student: Mapping[str, Any]) -> str:
    """Say which rows of a student mean something; "" where all do.

    Args:
        student: The part of metrics.json on the student, whose `for_steps` was once `one_step`.
    """
    if steps := student.get("for_steps", [1] * student.get("one_step", 0)):
        return ONE_STEP if steps == [1] else FOR_STEPS.format(step_words(steps))
    return WINDOWS.format(student["windows"]) if "windows" in student else ""


def _lines(head: list[str], rows: list[list[Cell]]) -> str:
    texts = [[cell if isinstance(cell, str) else " / ".join(cell) for cell in row] for row in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in chain([head], texts)]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def evaluations(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Write the evaluations of a row; of both models if they differ."""
    a, b = teacher["evaluations"], student["evaluations"]
    return f"{a}" if a == b else f"{a} / {b}"


def steps_name(steps: int | None) -> str:
    """Write a number of steps; None is converged."""
    if steps is None:
        return "converged"
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def finding(result: Mapping[str, Any]) -> str:
    """Write a headline: how many evaluations of the teacher the student beats with its fewest.

    Distances that are equal as the table prints them are not beaten.

    Args:
        result: The content of metrics.json.
    """
    first, beaten = result["student"]["rows"][0], 0
    least = float(f"{first['distance']:.3g}")
    for row in result["teacher"]["rows"]:
        if row["steps"] is None or float(f"{row['distance']:.3g}") <= least:
            break
        beaten = row["evaluations"]
    few, plural = first["evaluations"], "s" if first["evaluations"] > 1 else ""
    if beaten <= few:
        return "Distance to real data against network evaluations"
    return f"{few} evaluation{plural} of the student beat{'' if plural else 's'} {beaten} of the teacher"


def _pairs(result: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list(zip(result["teacher"]["rows"], result["student"]["rows"], strict=True))


def _quality(name: str, measured: Mapping[str, float]) -> str:
    return f"{measured[name]:{QUALITIES[name][1]}}"
