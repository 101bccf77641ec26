"""Bad configs and command lines over all commands: planned only, and refused in words.

Case i is a function of (seed, i): a valid config of one of the commands, some of its values, words or
bytes changed. It passes if the command ends with 0, 2 or 75, prints no traceback, explains a 2 in lines
of its own, and changes no file.
"""

import copy
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from flowmatch.runs.experiment import CHAIN, STAGES, Experiment
from scripts.torture import damage
from scripts.torture.damage import Random, pick
from scripts.torture.report import Outcome
from scripts.torture.world import EXPERIMENTS, FORMATS, SECTIONS, Ended, World

STREAM = 1
FINE = {0, 2, 75}
BAR = re.compile(r"\d+%\||examples/s\]")  # of tqdm
OTHERS = {
    "new": [["x"], ["x", "--from", "ring"], ["x", "--from", "points.yaml"], ["x", "y"], []],
    "verify": [["runs/points/pairs"], ["runs/pictures/pairs", "--full"], ["runs/points"], []],
    "inspect": [["runs/points/pairs", "--out", "look"], ["runs/pictures/flow"], []],
    "sample": [
        ["runs/points/export", "--count", "2"],
        ["runs/pictures/export", "--labels", "0,9"],
        ["runs/prompts/export", "--prompt", "a red bar", "--count", "2"],
    ],
    "seal": [["runs/points/flow"], ["runs/points/pairs"], ["runs/points"], []],
    "monitor": [["runs/points/flow", "--once"], ["runs/points/flow", "--every", "1"]],
    "convert": [
        ["runs/pictures/pairs", "converted", "--to", kind, "--dry-run"]
        for kind in (*FORMATS, "npy", "x")
    ],
    "import": [
        [f"runs/pictures/to_{kind}", "imported", "--from", kind, "--dry-run"]
        for kind in (*FORMATS, "rfpp", "rectifiedflow")
    ],
    "completion": [["bash"], [], ["x"], ["bash", "zsh"]],
}
ODD_WORDS = [
    *(str(value) for value in damage.ODD if not isinstance(value, dict | list)),
    *(
        "--help",
        "-h",
        "--seed",
        "--steps",
        "--steps=0",
        "--steps=x",
        "--count",
        "--count=-1",
        "--full",
    ),
    *("--labels=", "--labels=x", "--labels=1,,2", "--samples=0", "--pairs=x", "--seed=-1", "--x=1"),
    *("--out", "--out=/dev/null", "--out=home/file", "--from", "--from=x", "--teacher=x", "\udcff"),
]


@dataclass
class Case:
    """A config and a command line."""

    kind: str
    words: list[str]
    text: bytes


def case(seed: int, i: int) -> Case:
    """Make case i."""
    rng = np.random.default_rng([seed, STREAM, i])
    chain = [section for section in CHAIN if any(section in found for found in SECTIONS.values())]
    kind = pick(rng, [*chain, *chain, "run", "run", "run", *OTHERS, "sample"])
    if kind in OTHERS:
        words = list(pick(rng, OTHERS[kind]))
        for _ in range(int(rng.integers(1, 3))):
            at = int(rng.integers(len(words) + 1))
            words[at : at + int(rng.integers(2))] = [pick(rng, ODD_WORDS)]
        return Case(kind, [word for word in words if "\0" not in word], b"")
    fitting = [name for name, found in SECTIONS.items() if kind in (*found, "run")]
    name = pick(rng, fitting if rng.random() < 0.95 else list(EXPERIMENTS))
    values: Any = copy.deepcopy(EXPERIMENTS[name])
    words = [kind, "bad.yaml", "--dry-run"]
    if kind in values:
        if rng.random() < 0.5:
            values[kind]["run_dir"] = "new"
        if rng.random() < 0.4:  # the config of one stage alone
            words[0] = values[kind].get("stage", CHAIN[kind])
            values = flat(values, kind)
    for _ in range(pick(rng, [1, 1, 1, 2, 3])):
        if rng.random() < 0.7 and isinstance(values, dict | list):
            values = damage.change_value(values, rng)
        else:
            words.insert(int(rng.integers(1, len(words) + 1)), word(values, rng))
    text = damage.dump_yaml(values)
    if rng.random() < 0.1:
        text = damage.bytes_at_random(text, rng)
    return Case(kind, [word for word in words if "\0" not in word], text)


def flat(values: dict[str, Any], section: str) -> dict[str, Any]:
    """The config of one stage, as its run folder holds it."""
    from flowmatch import cli

    experiment = Experiment(values, "bad.yaml")
    return experiment.values(section, cli.stage_of(experiment.stage_of(section)).config)


def word(values: Any, rng: Random) -> str:
    """Draw an odd word, or an odd value for a key that the config has."""
    if rng.random() < 0.4 or not isinstance(values, dict) or not values:
        return pick(rng, damage.WORDS)
    key = ".".join(str(part) for part in pick(rng, list(damage.places(values))))
    odd = pick(rng, [*damage.ODD, *damage.CHOICES])
    if isinstance(odd, str):
        return f"{key}={odd}"
    text = yaml.safe_dump(odd, default_flow_style=True, width=10**6).removesuffix("...\n")
    return f"{key}={text.strip()}"


class Fuzz:
    """The cases, run in one copy of the experiments, which no command may change."""

    title = "Bad configs"
    columns = ("planned", "refused")
    goal = "tried"

    def __init__(self, world: World, seed: int):
        self.world, self.seed = world, seed
        self.folder = world.copy("configs")
        (world.root / "home" / "file").write_text("")
        (self.folder / "home").symlink_to(world.root / "home")
        self.before = listing(world.root)

    def run(self, i: int) -> Outcome:
        """Run case i."""
        made = case(self.seed, i)
        (self.folder / "bad.yaml").write_bytes(made.text)
        words = made.words if made.kind not in OTHERS else [made.kind, *made.words]
        ended = self.world.call(self.folder, *words)
        faults = judge(ended)
        after = listing(self.world.root)
        names = after.keys() | self.before
        changed = [name for name in names if after.get(name) != self.before.get(name)]
        wrong = [n for n in changed if not allowed(n, "" if n in self.before else made.kind)]
        if wrong:
            faults.append(f"changes {', '.join(sorted(wrong)[:5])}")
        if changed:
            self.clean(changed)
        how = f"flowmatch {' '.join(map(repr, words))}\n{made.text[:2000]!r}\n{ended.err[-1500:]}"
        return Outcome(made.kind, {"refused" if ended.code == 2 else "planned": 1}, faults, how)

    def clean(self, changed: list[str]) -> None:
        """Remove what a command has written, and restore what it has changed."""
        for name in sorted(changed):
            path = self.world.root / name
            if name not in self.before and path.is_dir():
                shutil.rmtree(path)
            elif name not in self.before:
                path.unlink(missing_ok=True)
        if any(name in self.before for name in changed):
            self.folder = self.world.copy("configs")
            (self.folder / "home").symlink_to(self.world.root / "home")
        self.before = listing(self.world.root)


def allowed(name: str, kind: str) -> bool:
    """Whether a command may write a new file: `new` its config, two others into a folder."""
    rest = name.removeprefix("configs/")
    if name.startswith("home/.") or rest == "bad.yaml":  # caches of libraries
        return True
    own = {
        "monitor": r"(.*/)?monitor\.html",
        "new": r"[^/]*\.yaml",
        "sample": r"[^/]+(/.*)?",
        "inspect": r"(.*_inspect|[^/]+)(/.*)?",
        "convert": r"[^/]+(/.*)?",
        "import": r"[^/]+(/.*)?",
    }
    return kind in own and re.fullmatch(own[kind], rest) is not None


def listing(root: Path) -> dict[str, tuple[int, int]]:
    """The size and the time of every file below a folder."""
    found = {}
    for path in root.rglob("*"):
        stat = path.lstat()
        found[str(path.relative_to(root))] = (
            stat.st_size,
            0 if path.is_dir() else stat.st_mtime_ns,
        )
    return found


def judge(ended: Ended) -> list[str]:
    """List what is wrong with the end of a command."""
    faults = []
    if ended.code is None:
        return ["hangs"]
    if ended.code not in FINE:
        faults.append(f"exit status {ended.code}")
    if "Traceback" in ended.err + ended.out:
        faults.append(f"traceback: {ended.err.strip().splitlines()[-1]}")
    lines = [line for line in ended.err.splitlines() if line.strip() and not BAR.search(line)]
    if ended.code == 2 and not lines:
        faults.append("refused without a word")
    if ended.code == 2 and not faults and not ours(lines):
        faults.append(f"refused in strange lines: {lines[-1][:200]}")
    return faults


def ours(lines: list[str]) -> bool:
    """Whether lines end with `NAME: fault`, after those of libraries, or are argparse's usage."""
    if lines[0].startswith("usage:"):
        return True
    names = "|".join([*STAGES, *CHAIN, *OTHERS, "run", "flowmatch", r"\w+_pairs"])
    return re.match(rf"({names})(_\d+)?: ", lines[-1]) is not None
