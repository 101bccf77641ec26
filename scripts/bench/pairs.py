"""Figures of the pairs: their making beside bare forwards, their reading beside flat arrays."""

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmatch.flow import noise
from flowmatch.flow.config import SolverConfig
from flowmatch.models import networks
from flowmatch.models.config import NetConfig
from flowmatch.pairs import shards
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from flowmatch.runs.command import execute
from pipelines import generate_pairs
from scripts.bench.yardsticks import BareSampler, Figure, Load, alternate, summary, write_set


def generation(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time whole runs of stage two, from the teacher's files to the seal, and its writing alone.

    Nothing is compiled: a run of this size would do little else.
    """
    net = networks.build(NetConfig(**load.net), load.shape, None, 0)
    networks.save(net, folder / "teacher")
    config = generate_pairs.PairsConfig(
        run_dir=str(folder / "pairs"),
        teacher=str(folder / "teacher"),
        shards=1,
        shard_size=load.shard,
        compute_batch=load.batch,
        solver=SolverConfig(name="euler", steps=load.evaluations),
        device="cpu" if device == "cpu" else "cuda",
        precision=load.precision,
    )
    bare = BareSampler(net, load, device)
    made = 0

    def ours() -> None:
        nonlocal made
        made += 1  # the set grows by a shard
        execute(generate_pairs.STAGE, config.model_copy(update={"shards": made}), dry_run=False)

    def forwards() -> None:
        bare.forwards(-(-load.shard // load.batch) * load.evaluations)

    mine, theirs = alternate((load.rounds + 1) // 2, ours, forwards)
    arrays = [noise.normal(s, range(load.shard), load.shape, 0).astype("float16") for s in (0, 1)]
    layout = Layout(load.shape, "float16", False, load.shard, min(64, load.shard))
    writes = []
    for k in range(load.rounds):
        cut = range(0, load.shard, layout.block)
        blocks = [(*(x[a : a + layout.block] for x in arrays), None) for a in cut]
        began = time.perf_counter()
        shards.write_shard(folder / "written", k, layout, blocks, "0" * 64, {}, "")
        writes.append(time.perf_counter() - began)
    middle = summary(mine)["median"]
    return {
        "pair generation": summary([b / a for a, b in zip(mine, theirs, strict=True)])
        | {"target": "at least 0.95", "what": "speed, ours / bare forwards"}
        | {"pairs_per_second": load.shard / middle},
        "writing pairs": summary([w / middle for w in writes])
        | {"target": "at most 0.02", "what": "write, hash, commit alone / generation"},
    }


def reading(folder: Path, load: Load, device: str) -> dict[str, Figure]:
    """Time random batches of pairs from tars, from a flat memory-mapped array, and by webdataset."""
    import webdataset

    quick = load.rounds < 5
    sizes = [("24 KB", (3, 64, 32), 8192, 0.4), ("500 KB", (8, 128, 128), 384, 0.7)]
    found: dict[str, Figure] = {}
    for name, shape, count, target in [(n, s, 64, t) for n, s, _, t in sizes] if quick else sizes:
        place, batch = folder / f"read{shape[-1]}", 64 if count > 1000 else 16
        write_set(place / "set", shape, count)
        for s in ("x0", "x1"):
            np.save(
                place / f"{s}.npy",
                np.random.default_rng(0).normal(size=(count, *shape)).astype("f2"),
            )
        opened = PairData(place / "set")
        opened.batch([0])  # hashes the tar, once a process: no part of reading
        orders = iter(np.random.default_rng(1).permutation(count) for _ in range(1000))

        def tars(opened: PairData = opened, orders: Any = orders, batch: int = batch) -> None:
            data, order = copy.copy(opened), next(orders)  # its mappings are made anew
            for a in range(0, len(order), batch):
                data.batch(order[a : a + batch])

        def flat(place: Path = place, orders: Any = orders, batch: int = batch) -> None:
            arrays = [np.load(place / f"{s}.npy", mmap_mode="r") for s in ("x0", "x1")]
            order = next(orders)
            for a in range(0, len(order), batch):
                for array in arrays:
                    torch.from_numpy(array[order[a : a + batch]]).float()

        mine, theirs = alternate(2 if quick else 15, tars, flat)
        found[f"reading {name} pairs"] = summary(
            [b / a for a, b in zip(mine, theirs, strict=True)]
        ) | {
            "target": f"at least {target}",
            "what": "speed, ours / flat memory-mapped array",
            "pairs_per_second": count / summary(mine)["median"],
        }
        if name != "24 KB":
            continue
        some = min(count, 1024)  # the stock pipeline is slow
        with webdataset.TarWriter(str(place / "stock.tar")) as tar:
            for i in range(some):
                x = np.zeros(shape, "float16")
                tar.write({"__key__": f"{i:06d}", "x0.npy": x, "x1.npy": x})

        def stock(place: Path = place, batch: int = batch) -> None:
            tar = webdataset.WebDataset(str(place / "stock.tar"), shardshuffle=False).shuffle(500)
            for parts in tar.decode().to_tuple("x0.npy", "x1.npy").batched(batch):
                for part in parts:
                    torch.as_tensor(np.asarray(part)).float()

        mine, theirs = alternate(2 if quick else 5, tars, stock)
        ratios = [b / some / (a / count) for a, b in zip(mine, theirs, strict=True)]
        found["reading 24 KB pairs, webdataset"] = summary(ratios) | {
            "target": "at least 20",
            "what": "speed, ours / stock per-sample pipeline",
        }
    return found
