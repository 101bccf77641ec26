"""Figures of start-up: fresh processes, beside torch's own import."""

import time
from pathlib import Path

from scripts.bench.yardsticks import Figure, Load, python, summary

STAGES = ("train_flow", "generate_pairs", "reflow", "evaluate", "export")


def start_up(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time imports and --help of every stage in fresh processes, beside torch's own import."""
    commands = {
        "torch": ["-c", "import torch"],
        "flowmatch": ["-c", "import torch, flowmatch.training.loop"],
    }
    commands |= {name: ["-m", f"pipelines.{name}", "--help"] for name in STAGES}
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 if load.rounds < 5 else 7):
        for name, words in commands.items():
            began = time.perf_counter()
            python(*words)
            took[name].append(time.perf_counter() - began)
    beyond = [a - b for a, b in zip(took["flowmatch"], took["torch"], strict=True)]
    slowest = max(STAGES, key=lambda name: summary(took[name])["median"])
    bare = summary(took["torch"])["median"]
    return {
        "import flowmatch.training.loop": summary(beyond)
        | {"target": "at most 0.3", "what": "seconds beyond import torch", "torch_seconds": bare},
        "--help": summary(took[slowest])
        | {"target": "at most 3", "what": f"seconds, the slowest stage ({slowest})"},
    }
