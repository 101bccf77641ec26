"""The command `flowmatch`: the chain of an experiment, its stages one by one, and their helpers."""

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import flowmatch
from flowmatch.config import UserError, closest, describe
from flowmatch.runs import command, stopping
from flowmatch.runs.experiment import (
    CHAIN,
    STAGES,
    Experiment,
    find_config,
    root,
    shipped,
    stage_module,
)
from flowmatch.runs.values import read_yaml

USAGE = """flowmatch turns a flow or diffusion model of many steps into one that needs one to four.

usage:
  flowmatch run CONFIG [SECTION.key=value ...]    run the chain of an experiment, without finished stages
      --rounds N         reflow N times (default: the rounds that CONFIG has)
      --only A,B         run these sections alone
      --dry-run          plan every stage, and stop
      trust=MODULE       run the code of a module that net.name or a teacher names
      --accelerate FILE  Accelerate's config file (default: one GPU, or two CPU processes)
      --launcher WORDS   start each stage with these words instead of `accelerate launch`
  flowmatch new NAME --data DATA --size N         write NAME.yaml, an experiment of your own pictures
      --labels           with classes: folders, words or numbers
      --vae VAE          train on the latents of a VAE
  flowmatch new NAME [--from EXPERIMENT]          the same from a shipped experiment
  flowmatch new NAME --teacher PIPELINE --prompts LIST
                                                  the same for a pipeline that reads text
  flowmatch STAGE CONFIG [key=value ...]          run one stage or section of an experiment
      --dry-run          print the config and the plan, and stop
      --help             print every key of the stage
  flowmatch export CONFIG --push-to-hub ORG/NAME  write the diffusers folder, and upload it
  flowmatch verify FOLDER [--full] [--repair]     check a set of pairs
  flowmatch inspect FOLDER                        describe and draw a set of pairs
  flowmatch monitor RUN [--every SECONDS] [--once]
                                                  follow a run: lines here, curves and samples in a page
  flowmatch seal RUN                              end a training run at its newest checkpoint
  flowmatch convert FOLDER --to FORMAT OUT        write a set of pairs in the format of another trainer
  flowmatch import FOLDER --from FORMAT OUT       make a set of pairs from one in such a format
  flowmatch sample EXPORT [--steps N] [--out FOLDER] [--count N] [--seed N]
                                                  sample an export into PNG files
  flowmatch completion bash|zsh|fish              print a script for completion
  flowmatch --version

CONFIG is a YAML file, a run folder, or a shipped experiment:
"""
OTHER = (
    "run",
    "new",
    "verify",
    "inspect",
    "convert",
    "import",
    "monitor",
    "seal",
    "sample",
    "completion",
)
FOLDERS = {  # commands on a folder -> their modules
    "verify": "verify_pairs",
    "inspect": "inspect_pairs",
    "convert": "convert_pairs",
    "import": "import_pairs",
}
ALIASES = {"flow": "train_flow", "pairs": "generate_pairs"}


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exit with 2 for a user's mistake, 75 after a signal that asks to stop."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "COMP_LINE" in os.environ and words[:1] == ["--complete"]:
        print("\n".join(complete(os.environ["COMP_LINE"])))
        return
    if words[:1] == ["--version"]:
        print(f"flowmatch {flowmatch.__version__}")
        return
    text = f"{USAGE}  {', '.join(shipped())}\n\nSTAGE is one of {', '.join(STAGES)}."
    if not words:
        print(text, file=sys.stderr)
        sys.exit(2)
    if words[0] in ("--help", "-h", "help"):
        print(text)
        return
    name, rest = words[0], words[1:]
    if name in STAGES or name not in OTHER:
        rest = as_keys(rest)
    with stopping.heard(name):
        with command.exit_codes("flowmatch"):
            body = find_command(name, rest)
        body(rest)


def as_keys(words: list[str]) -> list[str]:
    """Write `--push-to-hub NAME` as the key of the export."""
    found, left = [], iter(words)
    for word in left:
        flag, given, name = word.partition("=")
        if flag == "--push-to-hub":
            word = f"push_to_hub={name if given else next(left, '')}"
        found.append(word)
    return found


def find_command(name: str, words: list[str]) -> Callable[[list[str]], object]:
    """Find what the first word names. Raises UserError for an unknown one."""
    if name == "run":
        from flowmatch.runs import chain

        return lambda rest: chain.main(stage_of, rest)
    if name == "new":
        from flowmatch.runs import new

        return new.main
    if name in FOLDERS:
        module = import_stage(FOLDERS[name])
        return lambda rest: sys.exit(module.main(rest))
    if name == "monitor":
        from flowmatch.runs import monitor

        return monitor.main
    if name == "seal":
        from flowmatch.training import sealing

        return sealing.main
    if name == "sample":
        from flowmatch.export import sample

        return sample.main
    if name == "completion":
        return completion
    section = None
    with suppress(UserError):  # of a config, which the stage reports
        section = section_stage(name, words)  # `evaluate` may be a section of another stage
    if name in STAGES and section in (None, name):
        return lambda rest: command.main(stage_of(name), rest)
    section = section_stage(name, words)
    if section is None:
        near = closest(name, [*OTHER, *STAGES, *CHAIN])
        if name in shipped() or name.endswith((".yaml", ".yml")):
            near = f"did you mean flowmatch run {name}? "
        raise UserError(f"{name}: unknown command; {near}try flowmatch --help")
    flags = [] if any(word.startswith("section=") for word in words) else [f"section={name}"]
    config = next((word for word in words if "=" not in word and word[0] != "-"), None)
    if name in ALIASES and (config is None or "name" not in read_yaml(find_config(config))):
        flags = []  # help, or the config of the stage alone
    return lambda rest: command.main(stage_of(section), [*rest, *flags])


def section_stage(name: str, words: list[str]) -> str | None:
    """Return the stage of a section of the experiment that the words name; None for no section."""
    for word in words:
        if "=" not in word and not word.startswith("-"):
            values = read_yaml(find_config(word))
            if "name" in values:
                experiment = Experiment(values, word)
                if not experiment.has(name):
                    return None
                return experiment.stage_of(name)
            break
    return CHAIN.get(name)


def stage_of(name: str) -> command.Stage:
    """Import a stage by its name."""
    stage = import_stage(name).STAGE
    assert isinstance(stage, command.Stage)
    return stage


def import_stage(name: str) -> Any:
    """Import the module of a stage: from the checkout around an editable install, or the package."""
    module = stage_module(name)
    if module.startswith("pipelines.") and str(root()) not in sys.path:
        sys.path.append(str(root()))
    return importlib.import_module(module)


SCRIPTS = {
    "bash": "complete -o default -C 'flowmatch --complete' flowmatch",
    "zsh": "autoload -U +X bashcompinit && bashcompinit\n"
    "complete -o default -C 'flowmatch --complete' flowmatch",
    "fish": "complete -c flowmatch -a '(env COMP_LINE=(commandline -cp) flowmatch --complete)'",
}


def completion(words: list[str]) -> None:
    """Print the script that completes the command in a shell."""
    with command.exit_codes("flowmatch"):
        if len(words) != 1 or words[0] not in SCRIPTS:
            raise UserError(
                f"completion {' '.join(words)}: expected one of {', '.join(SCRIPTS)}; for bash: "
                'eval "$(flowmatch completion bash)"'
            )
    print(SCRIPTS[words[0]])


def complete(line: str) -> Iterable[str]:
    """List the words that may stand at the end of a command line."""
    words = line.split()[1:]
    prefix = "" if line.endswith(" ") or not words else words.pop()
    if not words:
        found = [*OTHER, *STAGES, *CHAIN]
    elif words[0] == "completion":
        found = list(SCRIPTS)
    elif words[0] in (*FOLDERS, "monitor", "seal", "sample"):
        found = []
    elif len(words) == 1:
        found = [*shipped(), *sorted(str(path) for path in Path().glob("*.yaml"))]
    elif words[0] == "run":
        flags = ["--rounds", "--only", "--dry-run", "--accelerate", "--launcher"]
        keys = [f"{s}.{key}=" for s, name in CHAIN.items() for key in keys_of(name)]
        found = flags + keys
    else:
        stage = section_stage(words[0], words[1:]) or ALIASES.get(words[0], words[0])
        found = ["--dry-run", "--help", *(f"{key}=" for key in keys_of(stage))]
    return [word for word in dict.fromkeys(found) if word.startswith(prefix)]


def keys_of(stage: str) -> list[str]:
    """List the keys of a stage."""
    return [key for key, _, _ in describe(stage_of(stage).config)] if stage in STAGES else []
