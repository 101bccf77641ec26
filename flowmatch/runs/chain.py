"""The chain of an experiment: every stage planned first, then run one after the other."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowmatch.config import (
    NotReady,
    UserError,
    closest,
    expanded,
    one_line,
    together,
    validate,
)
from flowmatch.runs import children, environment, folder, ranks, stopping, storage, trusted
from flowmatch.runs.command import Stage, exit_codes, unknown_flag
from flowmatch.runs.config import PREEMPTED, StageConfig
from flowmatch.runs.experiment import EVALUATIONS, Experiment, find_config, root, stage_module
from flowmatch.runs.process import say, world_size
from flowmatch.runs.values import parse_word, read_yaml


@dataclass
class Link:
    """A section of the chain."""

    section: str
    stage: Stage
    config: StageConfig


def main(stage_of: Callable[[str], Stage], argv: list[str]) -> None:
    """Run `flowmatch run CONFIG [SECTION.key=value ...]`. stage_of: imports a stage by its name."""
    parser = argparse.ArgumentParser("flowmatch run", allow_abbrev=False)
    parser.add_argument("config", help="a YAML file, or a shipped experiment such as digits")
    parser.add_argument("words", nargs="*", metavar="SECTION.key=value")
    parser.add_argument("--rounds", type=int, help="reflow so many times")
    parser.add_argument("--only", help="sections to run, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="plan every stage, and stop")
    parser.add_argument("--accelerate", metavar="FILE", help="Accelerate's config file")
    parser.add_argument("--launcher", metavar="WORDS", help="words in place of accelerate launch")
    parser.add_argument("--processes", type=int, help="processes of that launcher, for the plan")
    parser.add_argument("--list", action="store_true", help="print the sections, and stop")
    call, unknown = parser.parse_known_intermixed_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d's stack when a process ends
    with stopping.heard("run"), exit_codes("run"):
        ranks.settle()
        if world_size() > 1:
            raise UserError(
                f"WORLD_SIZE={world_size()}: the chain starts the processes of each stage itself; start "
                "it once, with --accelerate FILE or --launcher WORDS"
            )
        if unknown:
            flags = [f"--{name.replace('_', '-')}" for name in vars(call)][
                2:
            ]  # after CONFIG, words
            raise UserError([unknown_flag(word, flags) for word in unknown])
        chain = Chain(stage_of, call)
        if call.list:
            say("\n".join(link.section for link in chain.links))
        else:
            chain.run()


class Chain:
    """The sections of an experiment that a command line asks for."""

    def __init__(self, stage_of: Callable[[str], Stage], call: argparse.Namespace):
        self.call = call
        values = read_yaml(find_config(call.config))
        if "name" not in values:
            raise UserError(
                f"{call.config}: has no `name`: the config of one stage; run it as `flowmatch STAGE "
                f"{call.config}`"
            )
        self.experiment = Experiment(values, call.config)
        pairs = together(*(partial(parse_word, word) for word in trusted.take(call.words)))
        together(*(partial(self.experiment.apply, *pair) for pair in pairs))
        rounds = self.experiment.rounds if call.rounds is None else call.rounds
        if rounds < 1:
            raise UserError(f"--rounds {rounds}: expected 1 or more")
        sections = self.experiment.chain(rounds)
        if call.only is not None:
            sections = self._only(call.only.split(","), sections)
        self.links = together(*(partial(self._link, stage_of, name) for name in sections))
        together(*(partial(self._check_reached, key, value) for key, value in pairs))

    def _only(self, asked: list[str], chain: list[str]) -> list[str]:
        for name in asked:
            if not self.experiment.has(name):
                known = list(dict.fromkeys([*chain, *self.experiment.sections]))
                near = closest(name, known)
                raise UserError(f"--only {name}: {near}sections: {', '.join(known)}")
        return [name for name in chain if name in asked] + [n for n in asked if n not in chain]

    def _link(self, stage_of: Callable[[str], Stage], section: str) -> Link:
        stage = stage_of(self.experiment.stage_of(section))
        try:
            config = validate(stage.config, self.experiment.values(section, stage.config))
        except UserError as error:
            raise UserError([f"{section}.{fault}" for fault in error.faults]) from None
        return Link(section, stage, config)

    def _check_reached(self, key: str, value: Any) -> None:
        """Refuse a shared key that no section takes over, because they have their own."""
        if key == "name" or self.experiment.has(key.partition(".")[0]):
            return
        marked, mark = deepcopy(self.experiment), "a value that no config has"
        marked.apply(key, {mark: 0} if isinstance(value, dict) else mark)
        values = [marked.values(link.section, link.stage.config) for link in self.links]
        if mark not in repr(values):
            first = re.split(r"[.\[]", key)[0]
            own = [n for n, keys in self.experiment.sections.items() if first in (keys or {})]
            way = f"{', '.join(own)}: write {own[0]}.{key}={value}" if own else "leave it out"
            raise UserError(f"{key}={value} reaches no section; those that have their own: {way}")

    def run(self) -> None:
        """Plan every stage that is not finished, then run them in order."""
        self._prepare()
        with storage.unplugged(self.call.dry_run):
            todo = [link for link in self.links if not link.stage.finished(link.config)]
            for link in self.links:
                if link not in todo:
                    say(f"{link.section}: {link.config.run_dir} is finished")
            self._plan(todo)
        if self.call.dry_run:
            return
        seconds = {}
        with children.Signals() as signals:
            for number, link in enumerate(todo, 1):
                say(f"\n{link.section} ({number} of {len(todo)}): {link.config.run_dir}")
                began = time.monotonic()
                code = signals.wait(self._launch(link))
                seconds[link.section] = time.monotonic() - began
                if code or (signals.asked and number < len(todo)):
                    sys.exit(PREEMPTED if signals.asked else code)
        self._report(seconds)

    def _prepare(self) -> None:
        """Choose the launcher, and how many processes it starts."""
        call = self.call
        self.file, self.processes, self.forks = "", call.processes or 1, False
        if call.launcher:
            return
        has_gpu = (
            shutil.which("nvidia-smi") is not None
            and not subprocess.run(
                ["nvidia-smi", "-L"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ).returncode
        )
        name = "one_gpu" if has_gpu else "cpu_2"
        self.file = expanded(call.accelerate or "") or str(
            root() / "configs" / "accelerate" / f"{name}.yaml"
        )
        self.processes = call.processes or int(read_yaml(self.file).get("num_processes", 1))
        if not has_gpu:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores
            # a fork of a process whose torch has had more threads than one waits for them for ever
            self.forks = call.accelerate is None and os.environ["OMP_NUM_THREADS"] == "1"

    def _plan(self, todo: list[Link]) -> None:
        """Plan each stage; an input that an earlier stage makes may be missing."""
        made: set[str] = set()

        def plan(link: Link, coming: set[str]) -> None:
            name = link.section
            try:
                environment.check(link.config)
                plan = link.stage.plan(link.config)
                with suppress(storage.Unread):
                    folder.compare(link.stage.name, plan)
                if self.call.dry_run:
                    with _counted_as(1):  # which start no group of processes
                        measured = plan.measure()
                    for line in [*plan.lines, *measured]:
                        say(f"{name}: {one_line(line)}")
            except NotReady as error:
                unread = set(filter(storage.is_url, error.places)) if self.call.dry_run else set()
                if not error.places or not coming.issuperset(set(error.places) - unread):
                    raise
                if self.call.dry_run:
                    for line in error.faults:
                        say(f"{name}: later: {line}")
            except UserError as error:
                raise UserError([f"{name}: {fault}" for fault in error.faults]) from None

        calls = []
        for link in todo:
            calls.append(partial(plan, link, set(made)))
            place = link.config.run_dir
            made.add(place.rstrip("/") if storage.is_url(place) else str(storage.at(place)))
        with _counted_as(self.processes):
            try:
                together(*calls)
            except UserError as error:
                raise UserError(_gathered(error.faults)) from None

    def _launch(self, link: Link) -> int:
        """Start a stage in a process group of its own; return its number."""
        words = [self.call.config, *self.call.words, f"section={link.section}", "--chain"]
        module = stage_module(link.stage.name)
        variables = dict(os.environ)
        # saving may take longer than the 30 seconds after which the launcher kills
        variables.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "100")
        paths = [
            str(root()) if module.startswith("pipelines") else "",
            os.environ.get("PYTHONPATH", ""),
        ]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if self.forks:
            return children.fork(
                partial(
                    children.ranks, link.stage, words, 1 if link.stage.alone else self.processes
                )
            )
        if self.call.launcher:
            child = [*shlex.split(self.call.launcher), "-m", module, *words]
        elif link.stage.alone:
            child = [sys.executable, "-m", module, *words]
        else:
            return children.fork(partial(children.accelerate, self.file, module, words, variables))
        return children.fork(partial(os.execvpe, child[0], child, variables))

    def _report(self, seconds: dict[str, float]) -> None:
        tables = [
            Path(link.config.run_dir) / "table.md"
            for link in self.links
            if link.stage.name in EVALUATIONS
        ]
        for table in tables[-1:]:
            if table.is_file():
                say(f"\n{table.read_text()}")
        if seconds:
            took = ", ".join(f"{section} {value:.0f}" for section, value in seconds.items())
            say(f"seconds: {took}")


def _gathered(faults: Sequence[str]) -> list[str]:
    """Write a fault that several sections have once, behind all their names."""
    sections: dict[str, list[str]] = {}
    for line in faults:
        section, _, fault = line.partition(": ")
        detail = fault.startswith(" ")  # of the line above it
        sections.setdefault(line if detail else fault, []).append("" if detail else section)
    return [
        f"{', '.join(dict.fromkeys(names))}: {fault}" if names[0] else fault
        for fault, names in sections.items()
    ]


@contextmanager
def _counted_as(processes: int) -> Iterator[None]:
    """Let a plan count the processes that are going to run."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    before = {name: os.environ.pop(name, None) for name in names}
    if processes > 1:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
