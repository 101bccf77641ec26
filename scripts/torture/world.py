"""Tiny experiments, made once: points on a ring, pictures of 8x8 pixels in classes, latents, prompts.

Beside them is a training run on each kind of data, and pairs of foreign teachers.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowmatch.runs.experiment import CHAIN
from scripts.torture import data
from tests import forked

FIT = {"steps": 40, "batch_size": 16, "lr": 1e-3, "warmup": 5, "save_every": 8, "log_every": 4}
FIT |= {"keep": 3}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "points": {
        "name": "points",
        "device": "cpu",
        "data": {"source": "ring", "samples": 256},
        "flow": {"net": {"name": "VelocityMLP", "hidden": 8, "layers": 2}, "fit": FIT},
        "pairs": {
            **{"shards": 3, "shard_size": 32, "block": 8, "compute_batch": 16, "dtype": "float32"},
            "solver": {"name": "euler", "steps": 4},
        },
        "reflow": {"fit": FIT, "loss": {"name": "pseudo_huber", "c": 0.1}},
        "evaluate": {
            **{"samples": 64, "compute_batch": 32, "steps": [1, 2], "converged_steps": 4},
            "data": {"seed": 1},
        },
        "export": {"steps": [1, 2]},
    },
    "pictures": {
        "name": "pictures",
        "device": "cpu",
        "data": {"source": "npz", "path": "pictures.npz", "labels": True},
        "flow": {
            "net": {
                **{"name": "UNet2DModel", "block_out_channels": [8, 8], "layers_per_block": 1},
                **{"norm_num_groups": 4, "down_block_types": ["DownBlock2D", "DownBlock2D"]},
                **{"up_block_types": ["UpBlock2D", "UpBlock2D"], "add_attention": False},
            },
            "fit": FIT | {"steps": 12, "batch_size": 8, "save_every": 3},
        },
        "pairs": {
            **{"shards": 3, "shard_size": 8, "block": 4, "compute_batch": 8},
            "solver": {"name": "heun", "steps": 2},
        },
        "features": {"seed": 1, "steps": 10, "batch_size": 8},
        "reflow": {
            "fit": FIT | {"steps": 12, "batch_size": 8, "save_every": 3},
            "loss": {"name": "feature", "power": 1.0},
        },
        "classifier": {"steps": 10, "batch_size": 8},
        "evaluate": {"samples": 16, "compute_batch": 16, "steps": [1, 2], "converged_steps": 2},
        "export": {"steps": [1, 2]},
    },
    "prompts": {
        "name": "prompts",
        "device": "cpu",
        "data": {"source": "images", "path": "captions"},
        "prompts": {"path": "prompts.txt", "held_out": 0.25},
        "call": {"height": 8, "width": 8, "num_inference_steps": 2, "guidance_scale": 2.0},
        "tiny": {
            "net": {
                **{"name": "UNet2DConditionModel", "block_out_channels": [8, 8]},
                **{"layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 4},
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            },
            **{"width": 16, "vae_channels": [8, 8], "vae_steps": 4, "vae_batch": 8},
        },
        "flow": {"fit": FIT | {"steps": 12, "batch_size": 8, "save_every": 3}},
        "pairs": {"shards": 2, "shard_size": 8, "block": 4, "compute_batch": 4},
        "conditions": {"shard_size": 4, "batch_size": 4},
        "reflow": {
            "fit": FIT | {"steps": 12, "batch_size": 8, "save_every": 3},
            "loss": {"name": "mse"},
        },
        "evaluate": {
            **{"stage": "evaluate_prompts", "samples": 8, "per_prompt": 2, "compute_batch": 4},
            "steps": [1],
        },
        "export": {"steps": [1]},
    },
    "encoded": {
        "name": "encoded",
        "device": "cpu",
        "data": {"source": "images", "path": "captions"},
        "encode": {"vae": "vae", "shard_size": 8, "batch_size": 4},
        "flow": {"fit": FIT | {"steps": 6, "batch_size": 8, "save_every": 3}},
    },
}
EXPERIMENTS["encoded"]["flow"]["net"] = EXPERIMENTS["pictures"]["flow"]["net"]
SECTIONS = {  # in the order of the chain
    name: [section for section in CHAIN if section in values]
    for name, values in EXPERIMENTS.items()
}
BESIDE = ("table.md", "README.md")  # not hashed, but made from what is
SAMPLE = ("sample", "--count", "4")
FORMATS = ("diffsynth", "fastgen", "fastvideo", "npy", "self-forcing")
SHARDED = "run"  # the command that starts two processes
SECONDS = 300  # after which a command hangs


@dataclass
class Ended:
    """How a command ended. code: None where it did not, within SECONDS."""

    code: int | None
    out: str
    err: str


@dataclass
class World:
    """A folder that holds both experiments, their runs, and a home."""

    root: Path
    env: dict[str, str] = field(init=False)
    costs: dict[str, tuple[float, int]] = field(default_factory=dict)  # folder -> seconds, touches
    outs: dict[str, str] = field(default_factory=dict)  # folder -> what its stage has printed

    def __post_init__(self) -> None:
        self.env = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
        }
        self.env |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.env |= {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HOME": str(self.root / "home"),
        }
        self.env |= {"TMPDIR": str(self.root / "tmp"), "TERM": "dumb"}

    def words(self, *words: str, kill: int = 0, counted: str = "-") -> list[str]:
        """The command line of `flowmatch WORDS` for tests.forked, with a limit of its memory."""
        return ["scripts.torture.child", str(kill), counted, "flowmatch.__main__", *words]

    def call(
        self, folder: Path, *words: str, counted: str = "-", seconds: float = SECONDS
    ) -> Ended:
        """Run `flowmatch WORDS` in a folder to its end."""
        try:
            done = forked.run(
                self.words(*words, counted=counted), cwd=folder, env=self.env, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return Ended(None, "", f"no end within {seconds:.0f} seconds")
        return Ended(done.returncode, done.stdout, done.stderr)

    def make(self, only: Collection[str] = ()) -> None:
        """Write the experiments, and run every stage, or `only` some, such as points/flow."""
        for name in ("home", "tmp", "whole"):
            (self.root / name).mkdir(parents=True)
        whole = self.root / "whole"
        data.write(whole)
        self.must(whole, "--version")  # starts the helper that forks, which is not a stage's cost
        runs = {name: (values, SECTIONS[name]) for name, values in EXPERIMENTS.items()}
        for name, (_, config) in data.DATA.items():
            flow = EXPERIMENTS["points" if name == "npy" else "pictures"]["flow"]
            fit = flow["fit"] | {"steps": 6, "batch_size": 8}
            runs[name] = {"name": name, "data": config, "flow": flow | {"fit": fit}}, ["flow"]
        pairs = EXPERIMENTS["pictures"]["pairs"]
        runs["foreign"] = {"name": "foreign", "teacher": "ddpm", "pairs": pairs}, ["pairs"]
        text = {key: EXPERIMENTS["prompts"][key] for key in ("prompts", "call", "pairs")}
        flow = EXPERIMENTS["pictures"]["flow"]
        sharded = {**flow, "fit": flow["fit"] | {"shard": True}}
        data_of = EXPERIMENTS["pictures"]["data"]
        runs["sharded"] = {"name": "sharded", "data": data_of, "flow": sharded}, ["flow"]
        runs["words"] = {"name": "words", "teacher": "sd", **text}, ["pairs"]
        for name, (values, sections) in runs.items():
            text = yaml.safe_dump({"device": "cpu", **values}, sort_keys=False)
            (whole / f"{name}.yaml").write_text(text)
            for section in sections:
                if not only or f"{name}/{section}" in only:
                    if name == "foreign":
                        data.foreign(whole / "ddpm")
                    if (name, section) == ("encoded", "encode"):
                        shutil.copytree(whole / "runs/prompts/tiny/vae", whole / "vae")
                    if name == "words":
                        made = shutil.ignore_patterns("manifest.json", "config.yaml")
                        shutil.copytree(whole / "runs/prompts/tiny", whole / "sd", ignore=made)
                    self.stage(name, section)
        for kind in FORMATS:
            if (whole / "runs/pictures/pairs").is_dir() and (not only or f"bridge/{kind}" in only):
                for words in bridge(kind):
                    self.outs[words[2]] = self.must(whole, *words)

    def stage(self, name: str, section: str) -> None:
        """Run a stage, and keep what it costs and prints."""
        made, count, whole = f"runs/{name}/{section}", self.root / "count", self.root / "whole"
        began = time.monotonic()
        command = SHARDED if name == "sharded" else section
        self.outs[made] = self.must(whole, command, f"{name}.yaml", counted=str(count))
        self.costs[made] = time.monotonic() - began, int(count.read_text())
        count.unlink()
        if section == "export":
            self.must(whole, *SAMPLE, made, "--out", f"samples/{name}")

    def must(self, folder: Path, *words: str, counted: str = "-") -> str:
        """Run a command that has to end with 0; return what it prints."""
        ended = self.call(folder, *words, counted=counted)
        assert ended.code == 0, f"flowmatch {' '.join(words)}: {ended.code}\n{ended.out}{ended.err}"
        return ended.out

    def copy(self, name: str, experiment: str = "") -> Path:
        """Copy the experiments and their runs to a new folder, or one of them and what it reads."""
        target, whole = self.root / name, self.root / "whole"
        shutil.rmtree(target, ignore_errors=True)
        if not experiment:
            shutil.copytree(whole, target)
            return target
        target.mkdir()
        config = f"{experiment}.yaml"
        named = [config, *(whole / config).read_text().split()]
        for word in (f"runs/{experiment}", f"samples/{experiment}", *dict.fromkeys(named)):
            if (whole / word).is_dir():
                shutil.copytree(whole / word, target / word)
            elif (whole / word).is_file():
                shutil.copy2(whole / word, target / word)
        return target


def bridge(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The commands that convert the pairs of the pictures to a format, and import them again."""
    there, back = f"runs/pictures/to_{kind}", f"runs/pictures/from_{kind}"
    to = ("convert", "runs/pictures/pairs", there, "--to", kind)
    return to, ("import", there, back, "--from", kind)


def result(folder: Path, beside: bool = True) -> dict[str, str]:
    """Hash the manifest of a sealed folder and the files that it lists; all files of another folder.

    beside: also the files that are made from them.
    """
    if (folder / "manifest.json").is_file():
        text = (folder / "manifest.json").read_bytes()
        names = ["manifest.json", *json.loads(text)["outputs"]]
        names += [name for name in BESIDE if beside and (folder / name).exists()]
    elif (folder / "config.yaml").is_file():
        names = []  # unfinished
    else:
        names = [path.name for path in folder.glob("*")]
    return {name: sha256(folder / name) for name in names}


def sha256(path: Path) -> str:
    """The sha256 of a file; a word where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return type(error).__name__


def leftovers(run: Path) -> list[str]:
    """List what a dead process has left: temporary files and folders, and locks of shards."""
    return sorted(
        str(path.relative_to(run))
        for path in run.rglob("*")
        if ".tmp" in path.name or path.name.startswith("tmp")
    )
