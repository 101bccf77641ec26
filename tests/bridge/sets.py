"""Sets of pairs without a teacher, and the loaders of other trainers, written from their sources."""

import csv
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flowmatch.data.prompts import PromptList
from flowmatch.flow import noise
from flowmatch.pairs import shards
from flowmatch.pairs.layout import Layout, bytes_per_pair
from flowmatch.runs import manifest

TEXTS = ["a cat", 'said "so", and\nmore', "Ümläute 猫", "two houses", "a red fox"]
TIMES = [0.063, 0.167, 0.376]


@dataclass
class Made:
    folder: Path
    layout: Layout
    x0: np.ndarray
    x1: np.ndarray
    xt: np.ndarray | None
    y: np.ndarray | None
    texts: list[str] | None


def make(folder, shape, *, kind="float16", times=(), prompts=False, classes=None, number=3, size=6):
    """Write and seal a set; block of 4, so that the last one of a shard is ragged."""
    room = bytes_per_pair(TEXTS) if prompts else 0
    labels = prompts or classes is not None
    layout = Layout(shape, kind, labels, size, min(4, size), prompt_bytes=room, states=len(times))
    ids = np.arange(number * size)
    x0 = noise.normal(0, ids, shape, noise.PAIR_NOISE).astype(kind)
    x1 = np.tanh(x0.astype(np.float32) + 0.5).astype(kind)
    ends = [x.astype(np.float32) for x in (x0, x1)]
    lines = [((1 - t) * ends[0] + t * ends[1]).astype(kind) for t in times]
    xt = np.stack(lines, 1) if times else None
    count = len(TEXTS) if prompts else classes
    y = noise.labels(0, ids, count) if labels else None
    texts = [TEXTS[i] for i in y] if prompts else None
    facts = {"round": 1, "classes": count, "layout": layout.entries(), "shards": number}
    facts |= {"count": number * size, "kind": "generated", "evaluations": 8}
    if times:
        facts["times"] = list(times)
    if prompts:
        facts["prompts"] = {"count": len(TEXTS), "digest": PromptList(TEXTS, []).digest}
    config, inputs = {"seed": 0, "solver": {"name": "heun"}, "guidance": 2.0}, {"teacher": "b" * 64}
    facts["fingerprint"] = manifest.pair_fingerprint(config, inputs, 1)
    sums = {}
    for k in range(number):
        blocks = []
        for a in range(k * size, (k + 1) * size, layout.block):
            b = min(a + layout.block, (k + 1) * size)
            more = [xt[a:b]] if times else []
            more += [texts[a:b]] if prompts else []
            blocks.append((x0[a:b], x1[a:b], None if y is None else y[a:b], *more))
        side = shards.write_shard(folder, k, layout, blocks, facts["fingerprint"], {}, "# Pairs\n")
        sums[shards.tar_name(k)] = side["sha256"]
    manifest.seal(
        folder, stage="generate_pairs", config=config, inputs=inputs, outputs=sums, **facts
    )
    return Made(folder, layout, x0, x1, xt, y, texts)


# ---- loaders of other trainers


def fastgen(folder, key_map):
    """WDSLoader of NVlabs/FastGen: samples with all keys of its map; .pth by webdataset's decoder."""
    import webdataset

    urls = [str(path) for path in Path(folder).iterdir() if path.suffix.lower() == ".tar"]
    urls.sort(key=lambda url: int(Path(url).name.split(".")[0]))  # shard_to_idx
    rows = webdataset.WebDataset(urls, shardshuffle=False)
    rows = rows.select(lambda row: all(isinstance(row.get(key), bytes) for key in key_map.values()))
    decoder = webdataset.autodecode.Decoder([], only=list(key_map.values()))
    return [
        {name: row[key] for name, key in key_map.items()} | {"fname": row["__key__"]}
        for row in rows.map(decoder)
    ]


def self_forcing(folder):
    """ODERegressionLMDBDataset of guandeh17/Self-Forcing."""
    import lmdb

    env = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
    with env.begin() as rows:
        shape = tuple(map(int, rows.get(b"latents_shape").decode().split()))
        found = []
        for i in range(shape[0]):
            row = np.frombuffer(rows.get(f"latents_{i}_data".encode()), np.float16)
            text = rows.get(f"prompts_{i}_data".encode()).decode()
            found.append((row.reshape(shape[1:]), text))
    env.close()
    return found


def fastvideo(folder):
    """_KDPathDataset and _kd_collate of hao-ai-lab/FastVideo: all samples of a cache as one batch."""
    assert (Path(folder) / "COMPLETE").exists()
    total = int(json.loads((Path(folder) / "metadata.json").read_text())["total_samples"])
    assert {int(f.stem) for f in (Path(folder) / "samples").glob("*.pt")} == set(range(total))
    rows = [
        torch.load(f"{folder}/samples/{i:08d}.pt", weights_only=True, map_location="cpu")
        for i in range(total)
    ]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def diffsynth(folder):
    """UnifiedDataset of modelscope/DiffSynth-Studio: rows, their image opened as RGB."""
    from PIL import Image

    with open(f"{folder}/metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["image"] = Image.open(Path(folder) / row["image"]).convert("RGB")
    return rows


def npy(folder):
    """Any webdataset pipeline."""
    import webdataset

    tars = sorted(map(str, Path(folder).glob("*.tar")))
    return list(webdataset.WebDataset(tars, shardshuffle=False).decode())


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def trap(path):
    return pickle.dumps(Trap(path))
