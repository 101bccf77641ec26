"""Damaged files: whatever reads them refuses in words, or ends with the bytes of an undisturbed run.

Case i is a function of (seed, i): a scenario, one of its files, and what is done to it. A file that no
seal covers (data, a foreign model) may also be read as another one, of as many samples, if the manifest
of what is made from it says so.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scripts.torture import damage
from scripts.torture.configs import judge
from scripts.torture.damage import Random, pick
from scripts.torture.data import DATA
from scripts.torture.report import Outcome
from scripts.torture.world import (
    EXPERIMENTS,
    FORMATS,
    SAMPLE,
    SECTIONS,
    SHARDED,
    World,
    bridge,
    result,
)

STREAM = 2
WEIGHTS = {
    "checkpoints": 4,
    "pairs": 3,
    "unfinished pairs": 2,
    "evaluation": 1,
    "sampled export": 1,
}


@dataclass(frozen=True)
class Scenario:
    """Some files of which one is damaged, and who reads them.

    Args:
        kind: its row of the table.
        files: globs of the files.
        removed: globs of what is removed first.
        commands: run one after the other, to the first refusal.
        made: folders that must hold what they hold undisturbed.
        open: whether the files are not sealed.
        beside: whether tables and cards, which are not hashed, are compared too.
    """

    kind: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    made: tuple[str, ...]
    open: bool = False
    beside: bool = False


def of(
    name: str, kind: str, files: str, removed: str, stages: str, beside: bool = False
) -> Scenario:
    """Make a scenario of the stages of one experiment; files are below its runs."""
    return Scenario(
        kind,
        tuple(f"runs/{name}/{word}" for word in files.split()),
        tuple(f"runs/{name}/{word}" for word in removed.split()),
        tuple((stage, f"{name}.yaml") for stage in stages.split()),
        tuple(f"runs/{name}/{stage}" for stage in stages.split()),
        beside=beside,
    )


def experiment(name: str) -> Iterator[Scenario]:
    """Yield the scenarios of an experiment."""
    last = EXPERIMENTS[name]["flow"]["fit"]["steps"]
    for stage in ("flow", "reflow"):
        cut = f"{stage}/manifest.json {stage}/net {stage}/checkpoints/step_{last:08d}"
        yield of(name, "checkpoints", f"{stage}/checkpoints/*/*", cut, stage)
        logs = f"{stage}/metrics.jsonl {stage}/config.yaml"
        yield of(name, "unfinished run", logs, cut, stage)
    tars = "pairs/*.tar pairs/.meta/*.json pairs/config.yaml pairs/README.md"
    shard = "pairs/manifest.json pairs/pairs-000001.tar pairs/.meta/pairs-000001.json"
    yield of(name, "unfinished pairs", tars, f"{shard} reflow", "pairs reflow")
    yield of(name, "pairs", f"{tars} pairs/manifest.json", "reflow", "reflow")
    yield of(name, "teacher", "flow/net/* flow/manifest.json flow/config.yaml", "pairs", "pairs")
    student = "reflow/net/* reflow/manifest.json reflow/metrics.jsonl"
    yield of(name, "student", student, "evaluate", "evaluate")
    if "classifier" in SECTIONS[name]:
        yield of(name, "classifier", "classifier/*", "evaluate", "evaluate")
        yield of(name, "classifier", "features/*", "reflow", "reflow")
    if "conditions" in SECTIONS[name]:
        yield of(name, "conditions", "conditions/*", "reflow", "reflow")
        cut = "conditions/manifest.json conditions/rows-000001.safetensors"
        yield of(name, "unfinished conditions", "conditions/*", cut, "conditions")
        yield of(name, "tiny pipeline", "tiny/* tiny/*/*", "flow", "flow")
        yield of(name, "tiny pipeline", "tiny/* tiny/*/*", "export", "export")
    if "encode" in SECTIONS[name]:
        yield of(name, "encoded latents", "encode/* encode/vae/*", "flow", "flow")
        cut = "encode/manifest.json encode/latents-000001.npy"
        yield of(name, "unfinished latents", "encode/*.npy", cut, "encode")
    yield of(name, "evaluation", f"evaluate/* {student}", "export", "export")
    for stage in SECTIONS[name]:
        every = " ".join(f"{stage}/{stars}" for stars in ("*", "*/*", "*/*/*"))
        scenario = of(name, "finished stage", every, "", stage, beside=True)
        if stage == "pairs":  # looks at sizes alone; what trains on the set hashes it, as does
            again = (("verify", f"runs/{name}/pairs", "--full"),)
            scenario = replace(scenario, commands=(*scenario.commands, *again))
        yield scenario
    run = f"runs/{name}/flow"
    files = tuple(f"{run}/{file}" for file in ("metrics.jsonl", "config.yaml"))
    yield Scenario("monitor", files, (), (("monitor", run, "--once"),), (run,))
    pairs, export, samples = (f"runs/{name}/pairs", f"runs/{name}/export", f"samples/{name}")
    files = (f"{pairs}/*.tar", f"{pairs}/.meta/*", f"{pairs}/manifest.json")
    yield Scenario("verify", files, (), (("verify", pairs, "--full"),), (pairs,))
    files = (f"{export}/*", f"{export}/*/*")
    sample = (*SAMPLE, export, "--out", samples)
    yield Scenario("sampled export", files, (samples,), (sample,), (samples,))


def scenarios() -> Iterator[Scenario]:
    """Yield all scenarios."""
    for name in EXPERIMENTS:
        yield from experiment(name)
    for name, (files, _) in DATA.items():
        run, commands = f"runs/{name}/flow", (("flow", f"{name}.yaml"),)
        yield Scenario(f"data: {name}", files, (run,), commands, (run,), open=True)
        unsealed = (f"{run}/manifest.json", f"{run}/net")
        yield Scenario(f"data: {name}", files, unsealed, commands, (run,))
    yield from prompts()
    yield from bridges()
    made, last = "runs/sharded/flow", EXPERIMENTS["pictures"]["flow"]["fit"]["steps"]
    cut = tuple(
        f"{made}/{name}" for name in ("manifest.json", "net", f"checkpoints/step_{last:08d}")
    )
    run = ((SHARDED, "sharded.yaml"),)
    yield Scenario("sharded checkpoints", (f"{made}/checkpoints/*/*",), cut, run, (made,))
    files, made = ("ddpm/*.json", "ddpm/*/*.json", "ddpm/*/*.safetensors"), "runs/foreign/pairs"
    commands = (("pairs", "foreign.yaml"),)
    yield Scenario("foreign teacher", files, (made,), commands, (made,), open=True)


def bridges() -> Iterator[Scenario]:
    """Yield those of pairs in the formats of other trainers."""
    for kind in FORMATS:
        to, back = bridge(kind)
        there, here = to[2], back[2]
        every = tuple(f"{there}/{stars}" for stars in ("*", ".meta/*", "*/*", "*/*/*"))
        pairs = ("runs/pictures/pairs/*.tar", "runs/pictures/pairs/manifest.json")
        yield Scenario("convert", pairs, (there,), (to,), (there,))
        cut = (f"{there}/manifest.json", f"{there}/.meta/part-000001.json")
        yield Scenario("unfinished convert", every, cut, (to,), (there,))
        yield Scenario("import", every, (here,), (back,), (here,), open=True)
        tars = (f"{here}/*.tar", f"{here}/.meta/*")
        again = (back, ("verify", here, "--full"))  # as with pairs: what reads the set hashes it
        yield Scenario("unfinished import", tars, (f"{here}/manifest.json",), again, (here,))


def prompts() -> Iterator[Scenario]:
    """Yield those of captions, a VAE, lists of prompts, and a foreign pipeline that reads them."""
    for stage in ("tiny", "flow"):
        made = f"runs/prompts/{stage}"
        files, commands = ("captions/*.png", "captions/*.jsonl"), ((stage, "prompts.yaml"),)
        yield Scenario("data: captions", files, (made,), commands, (made,), open=True)
    made, commands = "runs/encoded/encode", (("encode", "encoded.yaml"),)
    files = ("captions/*.png", "vae/*")
    yield Scenario("pictures and VAE", files, (made,), commands, (made,), open=True)
    for stage in ("pairs", "conditions", "evaluate"):
        made, commands = f"runs/prompts/{stage}", ((stage, "prompts.yaml"),)
        yield Scenario("prompts", ("prompts.txt",), (made,), commands, (made,), open=True)
    files, made = ("sd/*.json", "sd/*/*.json", "sd/*/*.safetensors"), "runs/words/pairs"
    commands = (("pairs", "words.yaml"),)
    yield Scenario("foreign pipeline", files, (made,), commands, (made,), open=True)


class Fuzz:
    """The cases, each in a copy of the experiments."""

    title = "Damaged inputs"
    columns = ("refused", "equal", "another input")
    goal = "tried"

    def __init__(self, world: World, seed: int):
        self.world, self.seed = world, seed
        whole = world.root / "whole"
        self.scenarios = [
            scenario
            for scenario in scenarios()
            if all((whole / made).is_dir() for made in scenario.made)
            and any(list(whole.glob(pattern)) for pattern in scenario.files)
            for _ in range(WEIGHTS.get(scenario.kind, 2))
        ]

    def run(self, i: int) -> Outcome:
        """Run case i."""
        rng = np.random.default_rng([self.seed, STREAM, i])
        scenario = pick(rng, self.scenarios)
        folder = self.world.copy("inputs", scenario.made[-1].split("/")[1])
        for pattern in scenario.removed:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        file, how = self.harm(folder, scenario, rng)
        told = [f"{file.relative_to(folder)} {how}"]
        for words in scenario.commands:
            ended = self.world.call(folder, *words)
            told.append(f"flowmatch {' '.join(words)}: {ended.code}\n{ended.err[-1500:]}")
            faults = judge(ended)
            if not faults and ended.code == 75:
                faults = ["exit status 75"]
            if faults:
                return Outcome(scenario.kind, {}, faults, "\n".join(told))
            if ended.code == 2:
                if not names(ended.err, file.relative_to(folder)):
                    faults = [f"the refusal does not name {file.relative_to(folder)}"]
                return Outcome(scenario.kind, {"refused": 1}, faults, "\n".join(told))
        whole = self.world.root / "whole"
        different = [
            f"{made}/{name}"
            for made in scenario.made
            for name in differences(whole / made, folder / made, scenario.beside)
            if not name == file.name == "README.md"  # a card may be edited
        ]
        if not different:
            return Outcome(scenario.kind, {"equal": 1}, [], "")
        fault = f"a silent difference: {', '.join(different[:4])}"
        if self.says_so(scenario, file, whole, folder):
            counts = [samples(self.world.outs.get(scenario.made[-1], "")), samples(ended.out)]
            if not scenario.open or counts[0] == counts[1] or not counts[0]:
                return Outcome(scenario.kind, {"another input": 1}, [], "")
            fault = f"reads {counts[1]} instead of {counts[0]}"
        return Outcome(scenario.kind, {}, [fault], "\n".join(told))

    def harm(self, folder: Path, scenario: Scenario, rng: Random) -> tuple[Path, str]:
        """Damage one of the files; return it, and what was done."""
        groups = [sorted(p for p in folder.glob(g) if p.is_file()) for g in scenario.files]
        files = pick(rng, [group for group in groups if group])
        file = pick(rng, files)
        raw, twins = file.read_bytes(), [p for p in files if p.suffix == file.suffix and p != file]
        ways = [*damage.BYTES, *damage.BYTES, "flipped", "cut"]
        ways += ["value"] * 8 if file.suffix in (".json", ".jsonl", ".yaml") else []
        ways += ["exchanged"] * (2 * bool(twins))
        ways += [] if scenario.open or scenario.kind.startswith("data") else ["removed"]
        match how := pick(rng, ways):
            case "removed":
                file.unlink()
            case "exchanged":
                other = pick(rng, twins)
                file.write_bytes(other.read_bytes())
                other.write_bytes(raw)
                how = f"exchanged with {other.relative_to(folder)}"
            case "value":
                file.write_bytes(damage.value(raw, rng))
                how = f"with a changed value: {file.read_bytes()[:3000]!r}"
            case _ if raw:
                file.write_bytes(damage.BYTES[how](raw, rng))
        return file, how

    def says_so(self, scenario: Scenario, file: Path, whole: Path, folder: Path) -> bool:
        """Whether the manifest of what was made names another input than the undisturbed one."""
        if file.parent == folder / scenario.made[-1] and file.name == "manifest.json":
            return True  # the only name that its folder has
        if not scenario.open and file.name != "manifest.json":
            return False
        texts = [(place / scenario.made[-1] / "manifest.json") for place in (whole, folder)]
        before, after = (json.loads(text.read_text()) for text in texts)
        return bool(before["inputs"] != after["inputs"])


def differences(whole: Path, made: Path, beside: bool) -> list[str]:
    """List the results in a folder that differ from those of an undisturbed one."""
    before, after = result(whole, beside), result(made, beside)
    return sorted(name for name in before.keys() | after if before.get(name) != after.get(name))


def samples(out: str) -> str:
    """What a plan says about its data."""
    found = re.search(r"[\d,]+ (samples|pairs) of \[[^]]*\]", out)
    return found[0] if found else ""


def names(text: str, file: Path) -> bool:
    """Whether a message names a file, a folder that it is in, or the key of the data."""
    places = [
        file.name,
        *map(str, list(file.parents)[:-1]),
        ": data:",
        ": prompts",
        "(input) data",
        "the teacher",
    ]
    return any(place in text for place in places)
