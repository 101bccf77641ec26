"""Pairs of many tiny pipelines by one process or two: a program for test_text_classes.py.

usage: python -m tests.pipelines.text_job FOLDER OUT; FOLDER holds a folder `pipe` for each class. With
RANK and WORLD_SIZE set, this process is one worker of several.
"""

import json
import sys
from pathlib import Path

from flowmatch.runs.command import execute, load
from pipelines import generate_pairs


def words(folder: Path, name: str) -> list[str]:
    """Words of stage two for a class."""
    call = json.loads((folder / name / "call.json").read_text())
    listed = [f"call.{key}={json.dumps(value)}" for key, value in call.items()]
    sizes = [
        "shards=2",
        "shard_size=3",
        "block=2",
        "compute_batch=2",
        "dtype=float32",
        "device=cpu",
    ]
    return [
        f"teacher={folder}/{name}/pipe",
        f"prompts.path={folder}/prompts.txt",
        "prompts.truncate=true",
        *listed,
        *sizes,
    ]


def main(folder: Path, out: str) -> None:
    """Make the pairs of every class."""
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        config, _ = load(
            generate_pairs.PairsConfig, [*words(folder, name), f"run_dir={folder}/{name}/{out}"]
        )
        execute(generate_pairs.STAGE, config)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
