"""The ablation table of an experiment: each recipe of its `ablation` section, trained and scored.

python -m scripts.ablation NAME [--seeds 3] [--jobs 2] [--only A,B] [--table] [STAGE.key=value ...]

Teacher, pairs and classifiers are made once. A recipe is one or more parts, one after the other: reflow
stages, which share the updates of the experiment's `reflow`; finishes; and pairs of the student so far,
on which the later parts train. The seed is that of the parts: which pairs and times an update sees.
Every seed is scored on the same noise by the same classifier. Each run is a stage's folder below
runs/NAME/ablation: repeat the command, and finished runs are skipped. STAGE is one of flow pairs reflow
finish classifier evaluate; reflow's keys hold for all recipes, except for what a recipe sets itself.
run_dir, teacher, start, pairs, student and the seeds of recipes and of the classifiers are set by the
ablation and refused here; a recipe may name its own pairs. evaluate.panel=full adds a table for each of
its feature spaces. --table writes the tables of the finished runs, and runs nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from flowmatch.config import Config, UserError, option, required, together, validate
from flowmatch.runs import manifest
from flowmatch.runs.command import load
from flowmatch.runs.experiment import find_config
from flowmatch.runs.files import write_atomic
from flowmatch.runs.values import read_yaml
from pipelines.finish import FinishConfig
from pipelines.generate_pairs import PairsConfig
from pipelines.reflow import ReflowConfig

MODULES = {"flow": "train_flow", "pairs": "generate_pairs", "reflow": "reflow", "finish": "finish"}
MODULES |= {"classifier": "train_classifier", "evaluate": "evaluate"}
OWN = {stage: ["run_dir"] for stage in MODULES}  # the keys that each run gets here
OWN["pairs"] += ["teacher"]
OWN["reflow"] += ["start", "pairs", "seed"]
OWN["finish"] += ["start", "teacher", "pairs", "seed"]
OWN["classifier"] += ["seed"]
OWN["evaluate"] += ["teacher", "student"]
CONFIGS = {"reflow": ReflowConfig, "finish": FinishConfig, "pairs": PairsConfig}
SHOWN = (1, 2, 4, 8, None)  # numbers of steps; None is converged
SHARES = ("precision", "recall")
JUDGES = ("panel_classifier", "panel_encoder")  # sections of the networks that judge a panel


class Part(Config):
    """A stage of a recipe. Later parts start from the student so far."""

    stage: Literal["reflow", "finish", "pairs"] = option("reflow", "the stage")
    share: float = option(1.0, "of reflow: share of its updates", gt=0, le=1)
    words: list[str] = option([], "key=value of the stage; {root} is the ablation's folder")


class Recipe(Config):
    """A row of the table."""

    name: str = required("name of its folder")
    says: str = required("its description in the table")
    parts: list[Part] = required("its stages, in order")


class AblationConfig(Config):
    """The `ablation` section of an experiment."""

    classifier: list[str] | None = option(
        None,
        "key=value of two classifiers: one that scores ({root}/judge, seed 0), one for feature losses "
        "({root}/eyes, seed 1); none where no classifier scores",
    )
    pairs: list[str] | None = option(
        None, "key=value of the pairs of all recipes ({root}/pairs); default: the experiment's own"
    )
    inverted: list[str] | None = option(
        None, "key=value of pairs: data integrated back to noise ({root}/inverted)"
    )
    words: list[str] = option([], "key=value of reflow for every recipe, before its own")
    recipes: list[Recipe] = required("the rows")


class Ablation:
    """The runs of one experiment."""

    def __init__(self, name: str, runs: Path, seeds: int, given: list[str]):
        """given: STAGE.key=value. Raises UserError for another stage, and a key that is set here."""
        self.writing = threading.Lock()
        self.file, self.seeds = find_config(name), seeds
        values = read_yaml(self.file)
        if "ablation" not in values:
            raise UserError(f"{name}: expected an experiment with an `ablation` section")
        self.runs = runs / str(values["name"])
        self.root = self.runs / "ablation"
        config = validate(AblationConfig, values["ablation"])
        self.config = config
        self.words: dict[str, list[str]] = {stage: [] for stage in MODULES}
        for word in given:
            stage, _, rest = word.partition(".")
            if stage not in MODULES or "=" not in rest:
                raise UserError(
                    f"{word} is not STAGE.key=value; STAGE is one of {', '.join(MODULES)}"
                )
            own = [*OWN[stage], *["classifier"] * (stage == "evaluate" and bool(config.classifier))]
            if (key := rest.partition("=")[0].split(".")[0]) in own:
                raise UserError(
                    f"{word} would be lost: {key} of {stage} is set for each run of the table (--seeds "
                    "and --runs say how many and where); leave it out"
                )
            self.words[stage].append(rest)
        self.pairs = self.runs / "pairs" if config.pairs is None else self.root / "pairs"
        judged = "panel=full" in self.words["evaluate"]
        self.judges = [name for name in JUDGES if judged and name in values]
        self.base = [self.file, *config.words, *self.words["reflow"]]
        reflow, _ = load(ReflowConfig, self.base)
        assert reflow is not None
        self.steps = reflow.fit.steps
        for recipe in config.recipes:
            total = sum(part.share for part in recipe.parts if part.stage == "reflow")
            if abs(total - 1) > 1e-6:
                raise UserError(
                    f"{recipe.name}: its parts share {total:g} of the updates; expected 1"
                )
            for part in recipe.parts:
                load(CONFIGS[part.stage], self.words_of(part))

    def launch(self, stage: str, folder: Path, words: list[str]) -> None:
        """Run a stage in a process of its own; its output goes to a log beside its folder."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", f"pipelines.{MODULES[stage]}", *words, f"run_dir={folder}"]
        with open(f"{folder}.log", "a") as log:  # what a repeated command says follows the failure
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise UserError(f"{folder}: {MODULES[stage]} exits {done.returncode}; see {folder}.log")
        print(f"ablation: {folder}", flush=True)

    def prepare(self) -> None:
        """Make what all recipes share: teacher, pairs, classifiers."""
        flow = self.runs / "flow"
        self.launch("flow", flow, [self.file, *self.words["flow"]])
        words = [self.file, *(self.config.pairs or []), *self.words["pairs"], f"teacher={flow}"]
        self.launch("pairs", self.pairs, words)
        if self.config.inverted is not None:
            own = [*words, *self.config.inverted]
            self.launch("pairs", self.root / "inverted", own)
        if self.config.classifier is not None:
            for seed, name in enumerate(("judge", "eyes")):
                own = [*self.config.classifier, *self.words["classifier"], f"seed={seed}"]
                words = [self.file, *own]
                self.launch("classifier", self.root / name, words)

        for name in self.judges:
            words = [self.file, f"section={name}", *self.words["classifier"]]
            self.launch("classifier", self.runs / name, words)

    def words_of(self, part: Part, *inputs: str) -> list[str]:
        """Give the words of a part, its paths filled in. inputs: what its own words may replace."""
        base = self.base if part.stage == "reflow" else [self.file, *self.words[part.stage]]
        steps = [f"fit.steps={round(part.share * self.steps)}"] * (part.stage == "reflow")
        own = [word.replace("{root}", str(self.root)) for word in part.words]
        return [*base, *inputs, *steps, *own]

    def folder(self, recipe: Recipe, seed: int, stage: str) -> Path:
        """Name the folder of a run."""
        return self.root / recipe.name / f"seed_{seed}" / stage

    def parts(self, recipe: Recipe, seed: int) -> list[Path]:
        """Name the folders of a recipe's stages, in order."""
        stages = [f"{part.stage}_{i + 1}" for i, part in enumerate(recipe.parts)]
        return [self.folder(recipe, seed, stage) for stage in stages]

    def run(self, recipe: Recipe, seed: int) -> None:
        """Train and score a recipe with a seed."""
        flow = self.runs / "flow"
        start, pairs = flow, self.pairs
        for part, place in zip(recipe.parts, self.parts(recipe, seed), strict=True):
            if part.stage == "pairs":
                self.launch("pairs", place, self.words_of(part, f"teacher={start}"))
                pairs = place
                continue
            inputs = [f"start={start}", f"pairs=[{{path: {pairs}}}]", f"seed={seed}"]
            inputs += [f"teacher={flow}"] * (part.stage == "finish")
            self.launch(part.stage, place, self.words_of(part, *inputs))
            start = place
        words = [self.file, *self.words["evaluate"]]
        words += [f"teacher={self.runs / 'flow'}", f"student={start}"]
        if self.config.classifier is not None:
            words.append(f"classifier={self.root / 'judge'}")
        if self.judges:
            words.append(f"judges=[{', '.join(str(self.runs / name) for name in self.judges)}]")
        self.launch("evaluate", self.folder(recipe, seed, "evaluate"), words)
        with self.writing:  # recipes end at the same time: whoever writes last has read all
            self.table()

    def table(self) -> str:
        """Write table.md of the runs that are sealed; return it. Raises UserError where none is."""
        rows: list[tuple[str, list[dict[str, Any]]]] = []
        lines, updates = [], set()
        for recipe in self.config.recipes:
            found, seconds = [], []
            for seed in range(self.seeds):
                place = self.folder(recipe, seed, "evaluate")
                if manifest.sealed(place):
                    found.append(json.loads((place / "metrics.json").read_text()))
                    parts = [p for p in self.parts(recipe, seed) if "pairs" not in p.name]
                    seconds.append(sum(map(seconds_of, parts)))
                    updates.add(sum(fit_of(part)["steps"] for part in parts))
            if found:
                rows.append((recipe.says, found))
                students = [each["student"]["rows"] for each in found]
                lines.append(line(recipe.says, students, f"{statistics.median(seconds):.0f}"))
        if not rows:
            raise UserError(f"{self.root} holds no evaluation yet; run without --table")
        last = rows[-1][1][-1]
        floor, protocol = last["floor"], last["protocol"]
        names = [f"@{steps}" if steps else "converged" for steps in SHOWN]
        head = ["recipe", "seeds", *names, "RMSE @1", "recall @1", "training, s"]
        lines = [*header(head), line("teacher", [last["teacher"]["rows"]]), *lines]
        steps = " or ".join(map(str, sorted(updates)))
        text = "\n".join(lines) + (
            f"\n\n{protocol['distance']} distance, {protocol['samples']} samples, mean and standard "
            f"deviation over the seeds of reflow; real against real, {floor['samples']} each: "
            f"{floor['distance']:.3g}. RMSE: to the converged teacher on the same noise. {steps} "
            "updates a recipe, on the same pairs; the seconds are those of training alone, as logged.\n"
        )
        text += "".join(
            panel_table(space, rows) for space in last.get("panel", {"spaces": ()})["spaces"]
        )
        write_atomic(self.root / "table.md", text)
        return text


def panel_table(space: str, rows: list[tuple[str, list[dict[str, Any]]]]) -> str:
    """Write the table of one feature space of a panel. rows: a recipe, and metrics.json of each seed."""

    def of(found: list[dict[str, Any]], model: str) -> list[list[dict[str, Any]]]:
        spaces = [each["panel"]["spaces"] for each in found if "panel" in each]
        return [each[space][model] for each in spaces if space in each]

    last = rows[-1][1][-1]["panel"]["spaces"][space]
    names = [f"@{steps}" if steps else "converged" for steps in SHOWN]
    lines = header(["recipe", "seeds", *names])
    for says, models in [("teacher", [last["teacher"]])] + [(r, of(f, "student")) for r, f in rows]:
        cells = [says, str(len(models))]
        for steps in SHOWN:
            at = [row for model in models for row in model if row["steps"] == steps]
            value = {key: [row[key]["value"] for row in at] for key in ("frechet", *SHARES)}
            shares = ", ".join(f"{statistics.mean(value[key]):.3f}" for key in SHARES if at)
            cells.append(f"{spread(value['frechet'])} ({shares})" if at else "")
        lines.append(f"| {' | '.join(cells)} |")
    real = last["floor"]
    shares = ", ".join(f"{real[key]['value']:.3f}" for key in SHARES)
    return (
        f"\n## {space}, which no loss has used\n\n"
        + "\n".join(lines)
        + f"\n\nFrechet distance (precision, recall); real against real, {real['samples']} each: "
        f"{real['frechet']['value']:.3g} ({shares}).\n"
    )


def header(names: list[str]) -> list[str]:
    """Write the first lines of a table."""
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def line(says: str, found: list[list[dict[str, Any]]], seconds: str = "") -> str:
    """Write a row of the table. found: the rows of a model in metrics.json, a seed each."""
    by_steps = [{row["steps"]: row for row in model} for model in found]
    cells = [says, str(len(found))]
    for steps in SHOWN:
        measured = [rows[steps]["distance"] for rows in by_steps if steps in rows]
        cells.append(spread(measured) if measured else "")
    for key in ("rmse", "recall"):
        cells.append(spread([rows[1][key] for rows in by_steps if key in rows.get(1, {})]))
    cells.append(seconds)
    return f"| {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    """Write mean and standard deviation of some values, or the only one."""
    mean = f"{statistics.mean(values):.3g}" if values else ""
    return f"{mean} +- {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def fit_of(folder: Path) -> dict[str, Any]:
    """Read what a sealed training stage says of its loop."""
    return manifest.read(folder, "run_dir")["config"]["fit"]


def seconds_of(folder: Path) -> float:
    """Estimate the seconds that a training stage took, from the images a second that it logged."""
    log, fit = folder / "metrics.jsonl", fit_of(folder)
    lines = log.read_text().splitlines() if log.is_file() else []
    if not lines:  # of fewer updates than fit.log_every
        return 0.0
    rate = statistics.median(json.loads(text)["images_per_second"] for text in lines)
    return fit["steps"] * fit["batch_size"] / rate


def positive(text: str) -> int:
    """Read a number of 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def main() -> int:
    """Run what is missing, whatever fails; print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="an experiment with an `ablation` section")
    parser.add_argument("words", nargs="*", metavar="STAGE.key=value")
    parser.add_argument(
        "--seeds", type=positive, default=3, help="seeds of each recipe (default 3)"
    )
    parser.add_argument("--jobs", type=positive, default=1, help="recipes at a time (default 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs/NAME lies")
    parser.add_argument("--only", metavar="A,B", help="these recipes alone")
    parser.add_argument("--table", action="store_true", help="write the table, run nothing")
    given = parser.parse_intermixed_args()
    try:
        ablation = Ablation(given.name, given.runs, given.seeds, given.words)
        names = [recipe.name for recipe in ablation.config.recipes]
        only = given.only.split(",") if given.only else names
        if unknown := set(only) - set(names):
            raise UserError(
                f"--only {','.join(sorted(unknown))}: expected some of {', '.join(names)}"
            )
        if not given.table:
            ablation.prepare()
            chosen = [recipe for recipe in ablation.config.recipes if recipe.name in only]
            with ThreadPoolExecutor(given.jobs) as pool:
                every = [(recipe, seed) for seed in range(given.seeds) for recipe in chosen]
                runs = [pool.submit(ablation.run, *each).result for each in every]
                together(*runs, lambda: print(ablation.table()))
        else:
            print(ablation.table())
    except UserError as error:
        for fault in error.faults:
            print(f"ablation: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
