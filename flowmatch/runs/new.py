"""`flowmatch new NAME`: one commented file, an experiment of your own."""

import argparse
import re
from pathlib import Path

from flowmatch.config import UserError
from flowmatch.runs.command import exit_codes
from flowmatch.runs.experiment import find_config, shipped
from flowmatch.runs.values import read_yaml

HEADER = """\
# {name}: an experiment of your own, made from {source}. What to set:
#   data       your images, such as {{source: images, path: FOLDER, size: 64, channels: 3}}
#   reference  images that no stage trains on, for the distances; without it, data itself
#   flow       the network, its updates (fit.steps) and its batch
# Images without labels: delete `features` and `classifier`; set evaluate.features to values (up to 4,096
# values an image) or inception, and reflow.loss to {{name: normalised, power: 1.0}}.
# flowmatch run {name}.yaml --dry-run prints the plan; every key: flowmatch STAGE --help.
"""


def main(argv: list[str]) -> None:
    """Write NAME.yaml into the working directory."""
    parser = argparse.ArgumentParser("flowmatch new", allow_abbrev=False)
    parser.add_argument("name", help="name of the experiment and of its folder below runs/")
    parser.add_argument(
        "--from",
        dest="source",
        default="fashion_mnist",
        help="the shipped experiment to start from",
    )
    call = parser.parse_args(argv)
    with exit_codes("new"):
        print(write(call.name, call.source))


def write(name: str, source: str) -> str:
    """Write the file; return what to do next. Raises UserError where it is there already."""
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{name}: expected a name of letters, digits, '_' and '-'")
    if name in shipped():
        raise UserError(f"{name}: a shipped experiment has that name; choose another")
    file = find_config(source)
    values, text = read_yaml(file), Path(file).read_text()
    if "name" not in values:
        raise UserError(f"--from {source}: expected an experiment, one of {', '.join(shipped())}")
    target = Path(f"{name}.yaml")
    body = text[text.index("\nname:") + 1 :]
    body = re.sub(r"\A.*\n", f"name: {name}\n", body)
    body = re.sub(r"\n(#[^\n]*\n)*ablation:\n(.*\n)*?(?=\S|\Z)", "\n", body).rstrip() + "\n"
    old = re.escape(str(values["name"]))  # in comments alone: it may be a value, too
    body = re.sub(r"#.*", lambda found: re.sub(rf"\b{old}\b", name, found[0]), body)
    try:
        with open(target, "x") as opened:
            opened.write(HEADER.format(name=name, source=values["name"]) + body)
    except FileExistsError:
        raise UserError(f"{target}: exists already; delete it, or choose another name") from None
    return (
        f"wrote {target}: set data, reference and flow in it, then\n"
        f"  flowmatch run {target} --dry-run\n  flowmatch run {target}"
    )
