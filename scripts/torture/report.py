"""What was tried and what came out: torture.json and torture.md."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What came out of one case. counts: column -> number. how: the command, and what it printed."""

    kind: str
    counts: dict[str, int]
    faults: list[str]
    how: str


@dataclass
class Tally:
    """The outcomes of one part, by kind."""

    title: str
    columns: tuple[str, ...]
    seed: int
    seconds: float = 0.0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def add(self, i: int, outcome: Outcome) -> None:
        """Count a case."""
        row = self.counts.setdefault(outcome.kind, Counter())
        row.update(outcome.counts)
        row.update(tried=1, faults=bool(outcome.faults))
        for fault in outcome.faults:
            told = {"kind": outcome.kind, "case": i, "fault": fault, "how": outcome.how}
            self.faults.append(told)

    def total(self, column: str) -> int:
        """Sum a column."""
        return sum(row[column] for row in self.counts.values())


def write(out: Path, name: str, tally: Tally) -> None:
    """Replace one part of torture.json, and write the table of all parts again."""
    file = out / "torture.json"
    parts = json.loads(file.read_text()) if file.is_file() else {}
    parts[name] = vars(tally)
    file.write_text(json.dumps(parts, indent=1, sort_keys=True) + "\n")
    (out / "torture.md").write_text("\n".join(table(part) for part in parts.values()))


def table(part: dict[str, Any]) -> str:
    """Write the Markdown table of a part."""
    columns = ["tried", *part["columns"], "faults"]
    lines = [
        f"### {part['title']}",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    rows = {**dict(sorted(part["counts"].items()))}
    total: Counter[str] = Counter()
    for counts in rows.values():
        total.update(counts)
    for kind, counts in {**rows, "all": total}.items():
        lines.append(f"| {kind} | {' | '.join(f'{counts.get(name, 0):,}' for name in columns)} |")
    return "\n".join([*lines, "", f"Seed {part['seed']}, {part['seconds'] / 60:.0f} minutes.", ""])
