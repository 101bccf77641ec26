"""Measure flowmatch against bare yardsticks, in turn, in the same run, on the hardware at hand.

Figures are medians of alternating rounds, with their quartiles: a busy machine widens the spread and
hardly moves a ratio. FOLDER gets bench.json and bench.md. Threads are those of OMP_NUM_THREADS.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from scripts.bench.convert import converting
from scripts.bench.large import large
from scripts.bench.own_run import own_run
from scripts.bench.pairs import generation, reading
from scripts.bench.start import start_up
from scripts.bench.training import memory, processes, training
from scripts.bench.yardsticks import load_for

FIGURES = {
    "train": training,
    "pairs": generation,
    "read": reading,
    "convert": converting,
    "processes": processes,
    "start": start_up,
    "memory": memory,
    "large": large,
    "own_run": own_run,
}


def hardware(device: str) -> dict[str, Any]:
    """Say what was measured on."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0].split(":")[1].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }


def table(result: dict[str, Any]) -> str:
    """Write the figures as a Markdown table, the hardware below."""
    lines = ["| | what | median | quartiles | target |", "|---|---|---|---|---|"]
    for name, row in result["figures"].items():
        numbers = [f"{row[key]:.3g}" for key in ("median", "low", "high")]
        lines.append(
            f"| {name} | {row['what']} | {numbers[0]} | {numbers[1]} to {numbers[2]} | {row['target']} |"
        )
    on = result["hardware"]
    where = (
        f"{on['gpu'] or on['processor']}, {on['cores']} cores, {on['threads']} thread(s) a process"
    )
    quick = " Loads of --quick: these figures mean nothing." if result["quick"] else ""
    lines += ["", f"{on['date']}: {where}, torch {on['torch']}, load {on['load_average']}.{quick}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is asked for; print and write the table."""
    parser = argparse.ArgumentParser("python -m scripts.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FIGURES, help="measure these alone")
    parser.add_argument(
        "--quick", action="store_true", help="tiny loads: show that all of it works"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    call = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {}
    for name in call.only or FIGURES:
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            print(f"bench: {name}", flush=True)
            with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
                with contextlib.redirect_stderr(sink):  # the stages' own bars and plans
                    found = FIGURES[name](Path(folder), load_for(device, call.quick), device)
            figures |= found
    result = {"hardware": hardware(device), "quick": call.quick, "figures": figures}
    call.out.mkdir(parents=True, exist_ok=True)
    (call.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    (call.out / "bench.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
