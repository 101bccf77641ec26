"""The command line of a stage: its config, its plan, its work, and their errors as exit codes.

Resume means: repeat the command. The same content resumes, a finished folder says so and is left alone,
other content is an error that lists the keys.
"""

import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import flowmatch
from flowmatch.config import (
    Config,
    NotReady,
    UserError,
    closest,
    dump,
    together,
    usage,
    validate,
)
from flowmatch.runs import (
    agreement,
    environment,
    folder,
    group,
    memory,
    ranks,
    stopping,
    storage,
    trusted,
)
from flowmatch.runs.config import PREEMPTED, USER_ERROR, StageConfig
from flowmatch.runs.experiment import Experiment, find_config
from flowmatch.runs.process import leads, rank, say
from flowmatch.runs.values import assign, leave_derived, merge, parse_word, read_yaml

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Args:
        name: its name, which its manifests carry.
        config: the class of its config.
        plan: checks a config and opens its inputs; raises every refusal before any work.
        run: does the work of a plan.
        summary: what it does, for --help.
        intact: checks without torch that the files of a finished folder are there; default: hash them.
        alone: whether one process does all of the work.
        grouped: whether its processes work together, in a process group.
    """

    name: str
    config: type[StageConfig]
    plan: Callable[[Any], folder.Plan]
    run: Callable[[Any], None]
    summary: str
    intact: Callable[[Any, dict[str, Any]], bool] | None = field(default=None)
    alone: bool = False
    grouped: bool = False

    def finished(self, config: StageConfig) -> bool:
        """Check without torch whether the folder holds the finished work of this config."""
        return folder.finished(self.name, config, self.intact)


@dataclass(frozen=True)
class Call:
    """What a command line asks for beside the config."""

    dry_run: bool = False
    help: bool = False
    version: bool = False
    chain: bool = False  # words are those of a chain, SECTION.key=value


FLAGS = {"--dry-run": "dry_run", "--help": "help", "-h": "help", "--version": "version"}
FLAGS |= {"--chain": "chain"}


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """Explain what is wrong with a word that begins with a dash."""
    flag, given, _ = word.partition("=")
    if flag in known:
        return f"{word}: {flag} takes no value"
    if given or "." in word:
        key = word.lstrip("-") + ("" if given else "=value")
        return f"{word}: unknown flag; keys have no dashes: {key}"
    return f"{word}: unknown flag; {closest(flag, known)}known: {', '.join(known)}"


def read_flags(argv: list[str]) -> tuple[Call, list[str]]:
    """Split a command line into flags and words. Raises UserError for an unknown flag."""
    flags = [word for word in argv if word.startswith("-")]
    known = ("--dry-run", "--help", "--version")
    faults = [unknown_flag(word, known) for word in flags if word not in FLAGS]
    if faults:
        raise UserError(faults)
    return Call(**{FLAGS[word]: True for word in flags}), [w for w in argv if w not in flags]


def load(model: type[C], argv: list[str]) -> tuple[C | None, Call]:
    """Read `CONFIG [key=value ...] [--dry-run] [--help] [--version]` into the config of a stage.

    Later values win. Raises UserError with every fault at once. With --help, with --version and
    without any word the config is None.
    """
    call, words = read_flags(argv)
    words = trusted.take(words)
    if call.help or call.version or not words:
        return None, call
    files = [word for word in words if "=" not in word]
    keys = [word for word in words if "=" in word]
    read = together(
        *(partial(lambda file: read_yaml(find_config(file)), file) for file in files),
        *(partial(parse_word, word) for word in keys),
    )
    values: dict[str, Any] = {}
    experiment: Experiment | None = None
    for file, found in zip(files, read, strict=False):
        if "name" in found and hasattr(model, "stage"):
            if experiment is not None:
                raise UserError(f"{experiment.file} and {file} are two experiments; name one")
            experiment = Experiment(found, file)
        else:
            values = merge(values, found)
    given: list[tuple[str, Any]] = read[len(files) :]
    if experiment is None:
        together(*(partial(assign, values, key, value) for key, value in given))
        leave_derived(values, model, [key for key, _ in given])
        return validate(model, values), call
    asked = [value for key, value in given if key == "section"]
    if None in asked:
        raise UserError(f"section=: expected one of {', '.join(experiment.sections)}")
    section = experiment.section_for(str(model.stage), *asked[-1:])  # type: ignore[attr-defined]
    if call.chain:
        together(*(partial(experiment.apply, *pair) for pair in given if pair[0] != "section"))
    else:
        _check_bare(given, section, model)
        own = experiment.sections.setdefault(section, {})
        experiment.sections[section] = own = merge(own, values)
        together(*(partial(assign, own, *pair) for pair in given if pair[0] != "section"))
        experiment.typed[section] = [key for key, _ in given]
    return validate(model, experiment.values(section, model)), call


def _check_bare(given: Sequence[tuple[str, Any]], section: str, model: type[Config]) -> None:
    """Refuse SECTION.key=value for a stage's own command, which takes key=value."""
    faults = [
        f"{key}={value}: keys of one stage have no section here: write {key.partition('.')[2]}={value}"
        for key, value in given
        if key.startswith(f"{section}.") and section not in model.model_fields
    ]
    if faults:
        raise UserError(faults)


@contextmanager
def exit_codes(name: str, dry_run: bool = False) -> Iterator[None]:
    """Print the faults of a body and exit with 2; in a dry run an input not made yet is a remark."""
    environment.hush()
    try:
        yield
    except NotReady as error:
        if not dry_run:
            _fail(name, error)
        for line in error.faults:
            say(f"{name}: later: {line}")
    except stopping.Stopped:  # this one alone: those that stop together have left the group
        if (code := group.ended()) is not None:  # its launcher ends it for another's fault
            sys.exit(code)
        where = "" if leads() else f"rank {rank()} was stopped; repeat the command to go on"
        group.end(PREEMPTED, where)
        raise
    except Exception as error:
        refused = refusal(error)
        broken = refused is None or isinstance(error, ConnectionError | TimeoutError)
        if broken and (code := group.ended(patient=True)) is not None:  # which broke a connection
            sys.exit(code)
        if refused is None and (cause := group.lost(error)):
            told = f"{cause}; repeat the command to go on from the newest checkpoint"
            print(f"{name}: {group.speaks()}{told}", file=sys.stderr, flush=True)
            group.end(1, told)
            sys.exit(1)
        if refused is None:
            group.end(1, f"rank {rank()} has failed: {type(error).__name__}: {error}")
            raise
        _fail(name, refused)


FREE = "free space there or make it writable, and repeat the command: finished parts are kept"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
WAYS = dict.fromkeys(NO_SPACE, FREE)  # number of an error -> how to go on
KIND = "a file is expected where there is a folder, or the other way round; check the path"
WAYS |= {errno.EISDIR: KIND, errno.ENOTDIR: KIND, errno.ENAMETOOLONG: "use a shorter path"}


def refusal(error: Exception) -> UserError | None:
    """Return a user's mistake, and turn what the system refuses into one; None for any other error.

    Every OSError is about a file that the user named, or one beside it. safetensors' own error, which
    is no OSError, has the number in its words.
    """
    if isinstance(error, UserError):
        return error
    if memory.runs_out(error):
        return memory.refusal(error)
    told = re.search(r"\(os error (\d+)\)", str(error))
    if not (isinstance(error, OSError) or told):
        return None
    number = int(told[1]) if told else getattr(error, "errno", None)
    if number is None or isinstance(error, ConnectionError | TimeoutError):
        way = "check that the host can be reached, and repeat the command"
        return UserError(f"the network refuses ({type(error).__name__}: {error}); {way}")
    way = WAYS.get(number, "check the path and its disk, and repeat the command")
    return UserError(f"the disk refuses: {error}; {way}")


def _fail(name: str, error: UserError) -> None:
    with stopping.heard(name, defer=True):  # its launcher may end it while it tells the others
        if group.tells(name, error.faults):
            for line in error.faults:
                print(f"{name}: {group.speaks()}{line}", file=sys.stderr, flush=True)
        group.end(USER_ERROR)
    sys.exit(USER_ERROR)


def execute(stage: Stage, config: StageConfig, dry_run: bool = False) -> None:
    """Plan a stage, and run it unless its folder is finished or the plan is all that is asked for."""
    try:
        _execute(stage, config, dry_run)
    except Exception as error:
        if isinstance(error, UserError) or not memory.runs_out(error):
            raise
        raise memory.refusal(error, config) from error


def _execute(stage: Stage, config: StageConfig, dry_run: bool) -> None:

    def meet() -> group.Job | None:
        if dry_run or not stage.grouped:
            return None
        ranks.check_group()
        return group.join(stage.name, agreement.stall_seconds(config))

    with storage.unplugged(dry_run):
        ignored, job, plan = together(
            lambda: environment.settle(config), meet, lambda: stage.plan(config)
        )
        if ignored:
            say(f"{stage.name}: {ignored}")
        if dry_run:
            say(dump(config))
            plan.lines.extend(plan.measure())
        work = folder.begin(stage.name, plan, dry_run)
    if job is not None:
        job.agree(agreement.facts(plan, work))
    if work:
        stage.run(plan)
    group.leave()


def main(stage: Stage, argv: Sequence[str] | None = None) -> None:
    """Run a stage from the command line: plan, then work unless the folder is finished."""
    words = list(sys.argv[1:] if argv is None else argv)
    with stopping.heard(stage.name), exit_codes(stage.name, "--dry-run" in words):
        if ranks.launched():
            stopping.watch_launcher(stage.name)
        ranks.settle()
        config, call = load(stage.config, words)
        if call.version:
            say(f"flowmatch {flowmatch.__version__}")
        elif call.help:
            say(usage(stage.config, stage.name, stage.summary))
        elif config is None:
            line = f"usage: flowmatch {stage.name} CONFIG [key=value ...] [--dry-run] [--help]"
            raise UserError(f"expected a config; {line}")
        elif not call.dry_run and stage.finished(config):
            say(f"{stage.name}: {config.run_dir} is sealed: nothing to do")
        else:
            execute(stage, config, call.dry_run)
