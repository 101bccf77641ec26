"""What a card says of a model's training: data, updates, hours, hardware, licence.

Read from the run folders from which a student comes, as far as they are there: what was moved or made
elsewhere is left out of the card.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowmatch.config import UserError
from flowmatch.models.diffusion import HUB_NAME
from flowmatch.runs import lines, manifest
from flowmatch.runs.monitor import duration
from flowmatch.runs.storage import is_url

HARDWARE = "hardware.json"  # written by each training run: device, processes
CHOOSE = (
    "**Licence: choose one.** As long as this card names none, nobody may use the weights. "
    "`flowmatch export ... license=apache-2.0` writes it here."
)
READ = """
**How to read the distance.** It compares samples with real data: lower is better. Compare it with *real
against real*, which two sets of real samples have by chance: no model can be better than that by more
than chance. Its scale depends on the features and the number of samples, so numbers of this card and of
others do not compare.
"""


@dataclass
class Origin:
    """Where a student comes from.

    Attributes:
        lines: Its training, stage by stage, from the first.
        datasets: Names on the hub of the data.
        base: Name on the hub of the model whose weights it began with, or "".
    """

    lines: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    base: str = ""


def trace(student: str) -> Origin:
    """Follow a student back to its data.

    Args:
        student: A run folder of a training stage, its `net_2`, or a checkpoint.

    Returns:
        What its run folders say.
    """
    origin, seen = Origin(), set()
    place = student
    while place and place not in seen:
        seen.add(place)
        run = run_folder(place)
        if run is None:
            origin.base = origin.base or hub_name(place)
            break
        config = read_yaml(run / "config.yaml")
        sealed = sealed_at(run)
        before = str(config.get("start") or "")
        if config.get("pairs"):
            pairs = [pair_line(entry) for entry in config["pairs"] if isinstance(entry, dict)]
            told, name = "; ".join(filter(None, pairs)), sealed.get("stage", "reflow")
        else:
            told, name = data_words(config.get("data") or {}, sealed, origin), "flow"
        origin.lines.insert(0, f"- {name}: {training(run, config, told)}")
        place = before
    return origin


def run_folder(place: str) -> Path | None:
    """Return the run folder that holds a network, or None."""
    path = Path(place)
    for folder in (path, path.parent, path.parent.parent, path.parent.parent.parent):
        inside = path == folder or path.relative_to(folder).parts[0] in (
            "net",
            "net_2",
            "checkpoints",
        )
        if inside and (folder / "config.yaml").is_file():
            return folder
    return None


def training(run: Path, config: dict[str, Any], data: str) -> str:
    """Write the updates, data, hours and hardware of a training run."""
    fit = config.get("fit") or {}
    logged = [m for m, _ in lines.read_metrics(run / "metrics.jsonl")[0]]
    steps = max((m["step"] for m in logged), default=fit.get("steps") or 0)
    words = f"{steps:,} updates of {fit.get('batch_size', 0):,}"
    words += f" on {data}" if data else ""
    if took := seconds(logged, fit.get("batch_size") or 0):
        words += f"; {duration(took)} on {hardware(run)}"
    return words


def seconds(logged: list[dict[str, Any]], batch: int) -> float:
    """Add up the seconds of a run from the rates that it has logged."""
    total, before = 0.0, 0
    for line in logged:
        if rate := line.get("images_per_second"):
            total += (line["step"] - before) * batch / rate
        before = line["step"]
    return total


def hardware(run: Path) -> str:
    """Name the device of a run."""
    try:
        found = json.loads((run / HARDWARE).read_text())
        device, count = str(found["device"]), int(found["processes"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown hardware"
    return f"{device}, {count} process{'es' * (count > 1)}"


def pair_line(entry: dict[str, Any]) -> str:
    """Write the number of the pairs of a set."""
    path = str(entry.get("path", ""))
    count = {} if is_url(path) else sealed_at(Path(path)).get("facts", {})
    return f"{count['count']:,} pairs" if "count" in count else "pairs"


def data_words(data: dict[str, Any], sealed: dict[str, Any], origin: Origin) -> str:
    """Write what the data of stage one are, without local paths; note their name on the hub."""
    source, path = str(data.get("source", "")), str(data.get("path") or "")
    name = hub_name(path) if source == "images" else ""
    if name:
        origin.datasets.append(name)
    where = f"`{name}`" if name else source if source in ("digits", "ring") else f"own {source}"
    samples = sealed.get("facts", {}).get("samples")
    return f"{samples:,} samples of {where}" if samples else where


def sealed_at(folder: Path) -> dict[str, Any]:
    """Read a manifest; empty where there is none, or a damaged one."""
    try:
        return manifest.find(folder, "student") or {}
    except UserError:
        return {}


def hub_name(place: str) -> str:
    """Return a name on the hub, or "" for what lies on this machine."""
    return place if HUB_NAME.fullmatch(place) and not Path(place).exists() else ""


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a mapping; what is damaged is empty."""
    try:
        found = yaml.safe_load(lines.read_text(file.read_bytes())[0])
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def front(license: str | None, tag: str, origin: Origin) -> dict[str, Any]:
    """Return the entries of a card that the hub reads.

    Args:
        license: Identifier of the licence; None where there is none yet.
        tag: The pipeline tag, or "".
        origin: Of the student.
    """
    entries: dict[str, Any] = {"license": license, "pipeline_tag": tag or None}
    entries |= {"base_model": origin.base or None, "datasets": origin.datasets or None}
    return {name: value for name, value in entries.items() if value is not None}


def written(entries: dict[str, Any]) -> str:
    """Write entries of a card as YAML lines."""
    return yaml.safe_dump(entries, sort_keys=False, width=1000) if entries else ""


def sections(origin: Origin, license: str | None, picture: str) -> tuple[str, str]:
    """Write the picture of a card, and its section on training and licence.

    Args:
        origin: Of the student.
        license: As for `front`.
        picture: File of the samples beside the card, or "".
    """
    shown = f"\n![samples]({picture})\n" if picture else ""
    told = "\n".join(origin.lines) or "Its run folders were not found."
    terms = f"Licence: {license}." if license else CHOOSE
    return shown, f"\n## Training\n\n{told}\n\n{terms}\n"
