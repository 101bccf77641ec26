"""SIGKILLs at random moments: repeated to its end, a stage has the bytes of an undisturbed run.

Case i is a function of (seed, i): a stage, and up to five kills, each at a random time or just before a
random touch of a file (which a second run repeats exactly). Then the command is repeated until it ends.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.torture.damage import pick
from scripts.torture.inputs import differences
from scripts.torture.report import Outcome
from scripts.torture.world import EXPERIMENTS, SECTIONS, World, leftovers
from tests import forked

STREAM = 3
OFTEN = {
    "tiny": 2,
    "flow": 6,
    "pairs": 6,
    "conditions": 4,
    "encode": 4,
    "reflow": 6,
    "features": 3,
    "classifier": 3,
    "evaluate": 3,
    "export": 1,
}
KILLS = 5  # of a case


class Kills:
    """The cases, each in a copy of the experiments without the stage that is killed."""

    title = "Kills"
    columns = ("kills", "equal")
    goal = "kills"

    def __init__(self, world: World, seed: int):
        self.world, self.seed = world, seed
        self.stages = [
            (name, section)
            for name in EXPERIMENTS
            for section in SECTIONS[name]
            if f"runs/{name}/{section}" in world.costs
            for _ in range(OFTEN[section])
        ]

    def run(self, i: int) -> Outcome:
        """Run case i."""
        rng = np.random.default_rng([self.seed, STREAM, i])
        name, section = pick(rng, self.stages)
        moments = [(rng.random() < 0.5, rng.random()) for _ in range(KILLS)]
        folder, made = self.world.copy("kills", name), f"runs/{name}/{section}"
        shutil.rmtree(folder / made)
        seconds, touches = self.world.costs[made]
        told, kills, words = [], 0, (section, f"{name}.yaml")
        for by_touch, share in moments:
            at = 1 + int(share * touches) if by_touch else 0
            code = self.kill(folder, words, at, share * seconds)
            kills += code == -9
            told.append(f"touch {at}" if by_touch else f"{share * seconds:.3f} s")
            if code != -9:
                break
        ended = self.world.call(folder, *words)
        told = [f"killed at {', '.join(told)}; flowmatch {' '.join(words)}: {ended.code}"]
        how = "\n".join([*told, ended.err[-1500:]])
        faults = [] if ended.code == 0 else [f"the repeated command ends with {ended.code}"]
        if not faults and (
            other := differences(self.world.root / "whole" / made, folder / made, True)
        ):
            faults = [f"other bytes than undisturbed: {', '.join(other[:5])}"]
        if left := leftovers(folder / made):
            faults.append(f"left: {', '.join(left[:5])}")
        return Outcome(
            made.removeprefix("runs/"), {"kills": kills, "equal": not faults}, faults, how
        )

    def kill(self, folder: Path, words: Sequence[str], touch: int, seconds: float) -> int:
        """Run a command until its Nth touch of a file, or for some seconds; return its exit status."""
        world = self.world
        child = forked.Popen(
            world.words(*words, kill=touch),
            cwd=folder,
            env=world.env,
            stdout=forked.DEVNULL,
            stderr=forked.DEVNULL,
        )
        if not touch:
            time.sleep(seconds)
            child.kill()
        return child.wait()
