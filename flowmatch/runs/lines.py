"""Files of a run folder as lines, of which some may be damaged: metrics.jsonl and config.yaml."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> tuple[list[tuple[dict[str, Any], bytes]], int]:
    """Read metrics.jsonl, one JSON object a line.

    Returns:
        (values, line) for each sound line, which holds a step and numbers; and the number of damaged
        lines. Nothing where there is no file.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    sound = [(values, line + b"\n") for line in lines if (values := _values(line)) is not None]
    return sound, len(lines) - len(sound)


def read_text(content: bytes) -> tuple[str, int]:
    """Return the lines that are text, and the number of the others, such as lines of NULs."""
    lines = content.splitlines()
    sound = [text for line in lines if (text := _text(line)) is not None]
    return "".join(f"{line}\n" for line in sound), len(lines) - len(sound)


def told(path: object, damaged: int) -> str:
    """Write that lines of a file are left out."""
    return f"{path}: {damaged} damaged line{'s' * (damaged > 1)} left out"


def _values(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return values if all(type(value) in (int, float) for value in values.values()) else None


def _text(line: bytes) -> str | None:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    return None if any(ord(c) < 32 and c != "\t" for c in text) else text
