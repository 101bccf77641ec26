"""A small set of pairs made by stage two from a small teacher, for the tests that damage it."""

import os
import shutil
import subprocess

import torch

from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.models.digest import network_digest
from flowmatch.pairs.layout import Layout
from flowmatch.runs import manifest
from flowmatch.runs.command import execute, load
from pipelines import generate_pairs

SHARDS = 3
LAYOUT = Layout((2,), "float16", True, 10, 4)  # the last of its blocks is ragged
CLASSES = 3
WORDS = [
    *("shard_size=10", "block=4", "compute_batch=5", "solver.name=euler", "solver.steps=2"),
    *("device=cpu", "lease_seconds=5"),
]


def make_teacher(folder, classes=CLASSES, shape=(2,), **net):
    """Write a sealed training folder with an untrained network whose weights are not near zero."""
    config = NetConfig(**(net or {"name": "VelocityMLP", "hidden": 8}))
    net = networks.build(config, shape, classes, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    files = [f"net/{name}" for name in networks.save(net, folder / "net")]
    inputs, facts = {"data": "d" * 64}, {"round": 0, "net": network_digest(net)}
    manifest.seal(folder, stage="train_flow", config={}, inputs=inputs, outputs=files, **facts)


def words(root, *more, folder="pairs"):
    """The command line of stage two below a folder."""
    place = [f"run_dir={root / folder}", f"teacher={root / 'flow'}", f"shards={SHARDS}"]
    return [*WORDS, *place, *more]


def generate(*argv):
    """Run stage two in this process."""
    config, call = load(generate_pairs.PairsConfig, list(argv))
    execute(generate_pairs.STAGE, config, call.dry_run)


def copy(source, target):
    """Copy what is below a root to another one; return the folder of its pairs."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = target / "pairs" / "config.yaml"
    config.write_text(config.read_text().replace(str(source), str(target)))
    return target / "pairs"


def words_in_shell(script, folder, **environment):
    """Run a script with sh, whose commands only record their words; return [[program, *words]].

    RANK=... and WORLD_SIZE=... come first where the script sets them.
    """
    record = (
        'printf "%s\\0" ${RANK+RANK=$RANK} ${WORLD_SIZE+WORLD_SIZE=$WORLD_SIZE} "${0##*/}" "$@"'
    )
    programs, log = folder / "programs", folder / "words"
    programs.mkdir(exist_ok=True)
    log.write_bytes(b"")
    for name in ("python", "flowmatch"):
        (programs / name).write_text(f"#!/bin/sh\n{{ {record}; echo; }} >> '{log}'\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    subprocess.run(["sh", "-ec", script], env=os.environ | {"PATH": path} | environment, check=True)
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


def contents(folder):
    """What readers see: tars and seal, as bytes."""
    return {
        path.name: path.read_bytes() for path in [*folder.glob("*.tar"), folder / "manifest.json"]
    }
