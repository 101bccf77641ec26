"""Try to break every stage: bad configs, damaged inputs, kills.

python -m scripts.torture [--seed S] [--configs N] [--inputs N] [--kills N] [--out FOLDER]

N is a number of cases (of kills), or A:B for cases A to B - 1, such as a single one that failed. Case i
is a function of (seed, i). FOLDER gets torture.json and torture.md; another call adds other parts. The
exit status is 1 where a fault was found.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.torture import configs, inputs, kills, report
from scripts.torture.world import World

PARTS = {"configs": configs.Fuzz, "inputs": inputs.Fuzz, "kills": kills.Kills}


def cases(text: str) -> range:
    """Read N or A:B."""
    first, colon, last = text.partition(":")
    return range(int(first), int(last)) if colon else range(int(text))


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for; print each fault, and write the table."""
    parser = argparse.ArgumentParser("python -m scripts.torture", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    for part in PARTS:
        parser.add_argument(f"--{part}", type=cases, default=range(0), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), metavar="FOLDER")
    call = parser.parse_args(argv)
    call.out.mkdir(parents=True, exist_ok=True)
    found = 0
    with tempfile.TemporaryDirectory(prefix="torture") as place:
        world = World(Path(place))
        world.make()
        for name, part in PARTS.items():
            if wanted := getattr(call, name):
                found += torture(part(world, call.seed), name, wanted, call)
    if (written := call.out / "torture.md").is_file():
        print(written.read_text())
    return 1 if found else 0


def torture(part: Any, name: str, wanted: range, call: argparse.Namespace) -> int:
    """Run the cases of one part; return the number of faults."""
    tally = report.Tally(part.title, part.columns, call.seed)
    began = time.monotonic()
    for i in wanted:
        outcome = part.run(i)
        tally.add(i, outcome)
        tally.seconds = time.monotonic() - began
        for fault in outcome.faults:
            again = f"python -m scripts.torture --seed {call.seed} --{name} {i}:{i + 1}"
            print(f"{outcome.kind}: {fault}\n  {again}\n  {outcome.how}\n", flush=True)
        enough = tally.total(part.goal) >= len(wanted)
        if i % 20 == 0 or i == wanted[-1] or enough:
            report.write(call.out, name, tally)
        if enough:
            break
    return len(tally.faults)


if __name__ == "__main__":
    sys.exit(main())
