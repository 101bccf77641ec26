"""`flowmatch new NAME`: one commented file, an experiment of your own data or of your own pipeline."""

import argparse
import re
from pathlib import Path

from flowmatch.config import UserError
from flowmatch.runs import own_data
from flowmatch.runs.command import exit_codes
from flowmatch.runs.experiment import find_config, shipped
from flowmatch.runs.own_data import quoted
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

TEXT = """\
# {name}: few-step sampling for a pipeline that reads text. What to set:
#   prompts    your prompts: a file, a dataset, or templates (docs/guides/prompts.md)
#   call       what you pass to the pipeline beside the prompt; all of it decides the result
#   pairs      shards x shard_size pairs; more shards extend a finished set
#   reflow     updates (fit.steps) and their batch
# flowmatch run {name}.yaml --dry-run shows what was learnt of it, the evaluations and the bytes;
# every key: flowmatch STAGE --help. The guide: docs/guides/text-to-image.md.
name: {name}

teacher: {teacher}
prompts:
  path: {prompts}
  held_out: 0.05  # share of the prompts that is kept for the evaluation
call: {{}}  # such as {{height: 1024, width: 1024, num_inference_steps: 28, guidance_scale: 4.5}}

pairs:  # stage two: the pipeline's own run, with its scheduler and guidance
  shards: 8
  shard_size: 512
  block: 1  # pairs in a tar member of 0.25 to 4 MB
  compute_batch: 4  # prompts in a call
  precision: fp32  # bf16 on a GPU, as you sample the pipeline yourself

conditions: {{}}  # the prompts, encoded once; without this section they are encoded in each update

reflow:  # stage three: the student, from the teacher's weights
  fit:
    steps: 4000
    batch_size: 16
    micro_batch: 4  # samples in one forward pass of a process
    lr: 1.0e-5
    warmup: 100
    ema_decay: 0.999
    precision: fp32  # bf16 on a GPU
    checkpointing: true

evaluate:  # the student against its teacher's own run, on held-out prompts
  stage: evaluate_prompts
  samples: 64
  per_prompt: 2
  steps: [1, 2, 4]
  compute_batch: 4
  precision: fp32  # that of the pairs

export: {{}}  # the pipeline's own class, with the student in the place of its network
"""


def main(argv: list[str]) -> None:
    """Write NAME.yaml into the working directory."""
    parser = argparse.ArgumentParser("flowmatch new", allow_abbrev=False)
    parser.add_argument("name", help="name of the experiment and of its folder below runs/")
    parser.add_argument(
        "--from",
        dest="source",
        help="the shipped experiment to start from (default: fashion_mnist)",
    )
    parser.add_argument(
        "--teacher", help="a diffusers pipeline that reads text: folder or hub name"
    )
    parser.add_argument(
        "--prompts", help="with --teacher: the list of prompts, such as prompts.txt"
    )
    parser.add_argument(
        "--data",
        help="your pictures: a folder, parquet files, tars, an .npz, or a dataset on the hub",
    )
    parser.add_argument("--size", help="with --data: pixels of a side, or HEIGHTxWIDTH")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="with --data: 3 (RGB) or 1")
    parser.add_argument("--labels", action="store_true", help="with --data: they have classes")
    parser.add_argument("--reference", help="with --data: pictures that no stage trains on")
    parser.add_argument("--vae", help="with --data: a VAE, whose latents are trained on")
    call = parser.parse_args(argv)
    with exit_codes("new"):
        check_name(call.name)
        own = ("size", "channels", "labels", "reference", "vae")
        if call.data is not None:
            if call.source or call.teacher or call.prompts:
                raise UserError("--data stands alone; leave --from, --teacher and --prompts out")
            given = {name: getattr(call, name) for name in own} | {"channels": call.channels or 3}
            create(Path(f"{call.name}.yaml"), own_data.body(call.name, call.data, **given))
            print(
                f"wrote {call.name}.yaml; now\n"
                f"  flowmatch run {call.name}.yaml --dry-run\n  flowmatch run {call.name}.yaml"
            )
        elif alone := [name for name in own if getattr(call, name)]:
            raise UserError(f"--{alone[0]} says how --data is read; set that, too")
        elif call.teacher is None and call.prompts is None:
            print(write(call.name, call.source or "fashion_mnist"))
        else:
            print(write_text(call.name, call.source, call.teacher, call.prompts))


def check_name(name: str) -> None:
    """Raise UserError for a name that no experiment of one's own may have."""
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"{name}: expected a name of letters, digits, '_' and '-'")
    if name in shipped():
        raise UserError(f"{name}: a shipped experiment has that name; choose another")


def write_text(name: str, source: str | None, teacher: str | None, prompts: str | None) -> str:
    """Write the file of a pipeline that reads text. Raises UserError as `write`."""
    if source is not None or teacher is None or prompts is None:
        raise UserError(
            "--teacher PIPELINE and --prompts LIST belong together, and replace --from EXPERIMENT"
        )
    if Path(teacher).is_dir() and not (Path(teacher) / "model_index.json").is_file():
        raise UserError(f"--teacher {teacher}: a folder without model_index.json is no pipeline")
    body = TEXT.format(name=name, teacher=quoted(teacher), prompts=quoted(prompts))
    create(Path(f"{name}.yaml"), body)
    return (
        f"wrote {name}.yaml: set call in it, then\n"
        f"  flowmatch run {name}.yaml --dry-run\n  flowmatch run {name}.yaml"
    )


def create(target: Path, body: str) -> None:
    """Write a new file. Raises UserError where it is there already."""
    try:
        with open(target, "x") as opened:
            opened.write(body)
    except FileExistsError:
        raise UserError(f"{target}: exists already; delete it, or choose another name") from None


def write(name: str, source: str) -> str:
    """Write the file; return what to do next. Raises UserError where it is there already."""
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
    create(target, HEADER.format(name=name, source=values["name"]) + body)
    return (
        f"wrote {target}: set data, reference and flow in it, then\n"
        f"  flowmatch run {target} --dry-run\n  flowmatch run {target}"
    )
