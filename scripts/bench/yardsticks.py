"""What the benchmark measures us against: bare loops, and how two things are timed in turn.

The bare training loop: forward, mean squared error, backward, clip_grad_norm_, fused AdamW, EMA by one
_foreach_lerp_; same network, batch and precision, compiled where ours is. Its batches lie ready on
the device: what it costs us to read, draw and move ours counts against us. The bare sampler: as many
forwards of the same batch, and nothing between them.
"""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmatch.flow import noise
from flowmatch.models.config import Precision
from flowmatch.models.precision import arithmetic
from flowmatch.pairs import shards
from flowmatch.pairs.layout import Layout
from flowmatch.runs import manifest

Figure = dict[str, Any]  # median, low, high, rounds; target; what; other numbers of interest

UNET = {
    "name": "UNet2DModel",
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
    "add_attention": False,
}


@dataclass(frozen=True)
class Load:
    """How much is measured: the network and its batch, and how often."""

    net: dict[str, Any]
    shape: tuple[int, ...]
    batch: int
    precision: Precision  # of training and of generation
    compile: bool  # in training
    steps: int  # of training, a segment
    rounds: int  # of alternating segments
    evaluations: int  # of the teacher, a pair
    shard: int  # pairs of a segment of generation
    pairs: int  # of a set that is read


def load_for(device: str, quick: bool) -> Load:
    """Choose the load: issue-sized for a CPU or a GPU, or just enough to see that all of it works."""
    if quick:
        tiny = UNET | {"block_out_channels": [8, 8, 8]}
        return Load(tiny, (1, 8, 8), 8, "fp32", False, 2, 2, 2, 16, 64)
    if device == "cpu":
        small = UNET | {"block_out_channels": [16, 32, 64]}
        return Load(small, (1, 28, 28), 128, "fp32", False, 2, 9, 16, 256, 4096)
    large = {"name": "UNet2DModel", "block_out_channels": [128, 256, 256, 256]}  # 35M parameters
    large |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]}
    large |= {"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
    return Load(large, (3, 32, 32), 512, "bf16", True, 20, 9, 16, 8192, 16384)


def alternate(
    rounds: int, ours: Callable[[], Any], bare: Callable[[], Any]
) -> tuple[list[float], list[float]]:
    """Time two things in turn, after one round that does not count: seconds of each."""
    mine, theirs = [], []
    for _ in range(rounds + 1):
        for call, times in ((ours, mine), (bare, theirs)):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return mine[1:], theirs[1:]


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles of the rounds."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high, "rounds": len(values)}


def write_set(folder: Path, shape: tuple[int, ...], count: int, block: int = 64) -> None:
    """Write and seal one shard of `count` random pairs, in float16."""
    layout = Layout(shape, "float16", False, count, block)

    def blocks() -> Iterator[shards.Block]:
        for a in range(0, count, block):
            ids = np.arange(a, min(a + block, count))
            x0, x1 = (
                noise.normal(s, ids, shape, noise.PAIR_NOISE).astype("float16") for s in (0, 1)
            )
            yield x0, x1, None

    side = shards.write_shard(folder, 0, layout, blocks(), "0" * 64, {}, "")
    sizes = {
        "shape": shape,
        "dtype": "float16",
        "labels": False,
        "shard_size": count,
        "block": block,
    }
    facts = {"layout": sizes, "shards": 1, "count": count, "round": 0}
    rest = {"config": {}, "inputs": {}, "outputs": {shards.tar_name(0): side["sha256"]}}
    manifest.seal(folder, stage="generate_pairs", **rest, **facts)


def python(*words: str, **environment: str) -> str:
    """Run python to its end; give what it printed."""
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


def synchronise(device: str) -> None:
    """Wait for the GPU to finish what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


class BareLoop:
    """A PyTorch training loop as one writes it for one network and one afternoon."""

    def __init__(self, net: Any, load: Load, device: str):
        self.net = copy.deepcopy(net).to(device).train()
        self.model = torch.compile(self.net, dynamic=False) if load.compile else self.net
        self.parameters = list(self.net.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.device, self.bf16 = device, load.precision == "bf16"
        self.x = torch.randn(load.batch, *load.shape, device=device)
        self.target = torch.randn_like(self.x)
        self.timestep = 1000 * torch.rand(load.batch, device=device)

    def step(self) -> None:
        """Make one update."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            out = self.model(self.x, self.timestep).sample
        torch.nn.functional.mse_loss(out.float(), self.target).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1e-3)

    def steps(self, n: int) -> None:
        """Make n updates and wait for the device."""
        for _ in range(n):
            self.step()
        synchronise(self.device)


class BareSampler:
    """Forwards of a network, of one batch, in inference mode."""

    def __init__(self, net: Any, load: Load, device: str):
        self.net = copy.deepcopy(net).to(device).eval()
        self.device, self.precision = device, load.precision
        self.x = torch.randn(load.batch, *load.shape, device=device)
        self.timestep = torch.full((load.batch,), 500.0, device=device)

    @torch.inference_mode()
    def forwards(self, n: int) -> None:
        """Make n forwards and wait for the device."""
        with arithmetic(self.precision, self.device):
            for _ in range(n):
                self.net(self.x, self.timestep)
        synchronise(self.device)
