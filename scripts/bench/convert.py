"""Figures of convert: what it takes beside a plain copy of the files that it writes."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmatch.runs.files import sync
from pipelines import convert_pairs
from scripts.bench.yardsticks import Figure, Load, summary, write_set

FORMATS = ("npy", "fastgen", "self-forcing", "fastvideo")
CLOCKS = {
    "time": time.perf_counter,
    "CPU time": time.process_time,
    "CPU time of the writing thread": time.thread_time,  # the source is hashed in another
}


def converting(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time whole conversions, to the seal, and copies of their files, in turn; 0.52 MB a pair."""
    quick = load.rounds < 5
    write_set(folder / "set", (16, 64, 128), 64 if quick else 960)
    found: dict[str, Figure] = {}
    for to in FORMATS:
        out, copied = folder / to, folder / "copied"

        def ours(to: str = to, out: Path = out) -> None:
            convert_pairs.main([str(folder / "set"), str(out), "--to", to])

        def copy(out: Path = out, copied: Path = copied) -> None:
            for path in sorted(path for path in out.rglob("*") if path.is_file()):
                target = copied / path.relative_to(out)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                sync(target)

        rounds = []
        for _ in range((2 if quick else 7) + 1):  # the first does not count
            shutil.rmtree(out, ignore_errors=True)
            rounds.append((spent(ours), spent(copy)))
            shutil.rmtree(copied)
        for clock in CLOCKS:
            found[f"convert to {to}, {clock}"] = summary(
                [theirs[clock] / mine[clock] for mine, theirs in rounds[1:]]
            ) | {
                "target": "at least 0.5" if clock == "time" else "",
                "what": "speed, ours / copy of the files that ours writes",
                "seconds": summary([mine[clock] for mine, _ in rounds[1:]])["median"],
            }
        shutil.rmtree(out)
    return found


def spent(call: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds that a call takes, by each clock; no earlier write is left to do."""
    os.sync()
    began = {name: clock() for name, clock in CLOCKS.items()}
    call()
    return {name: clock() - began[name] for name, clock in CLOCKS.items()}
