"""A few pictures, points and latents in every kind of file that is read, and a foreign teacher."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

COUNT = 24
DATA: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # name -> its files, its config
    "npz": (("pictures.npz",), {"source": "npz", "path": "pictures.npz", "labels": True}),
    "npy": (("points.npy",), {"source": "npz", "path": "points.npy"}),
    "latents": (("latents.npz",), {"source": "latents", "path": "latents.npz"}),
    "idx": (("idx/*",), {"source": "idx", "path": "idx", "labels": True}),
    "png": (("png/*/*",), {"source": "images", "path": "png", "labels": True}),
    "jpg": (("jpg/*",), {"source": "images", "path": "jpg"}),
    "tars": (("tars/*",), {"source": "images", "path": "tars", "labels": True}),
    "parquet": (("parquet/*",), {"source": "images", "path": "parquet", "labels": True}),
}


def pictures(seed: int, count: int = COUNT) -> tuple[np.ndarray, np.ndarray]:
    """Draw grey pictures of bars, uint8 [N, 8, 8], and their classes."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 3
    x = rng.integers(0, 60, (count, 8, 8))
    for i, k in enumerate(label):
        x[i, :, 2 * k + 1] += 150
    return x.astype(np.uint8), label.astype(np.int64)


def write(folder: Path) -> None:
    """Write all files of DATA."""
    from PIL import Image

    x, y = pictures(0)
    rng = np.random.default_rng(1)
    np.savez(folder / "pictures.npz", x=x, y=y)
    np.save(folder / "points.npy", rng.standard_normal((COUNT, 2)).astype(np.float32))
    latents = rng.standard_normal((COUNT, 4, 4, 4)).astype(np.float32)
    np.savez(folder / "latents.npz", x=latents)
    for name in ("idx", "jpg", "tars", "parquet", *(f"png/{k}" for k in "abc")):
        (folder / name).mkdir(parents=True)
    for name, array in (("images", x), ("labels", y.astype(np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        with gzip.GzipFile(folder / "idx" / f"train-{name}.gz", "wb", mtime=0) as file:
            file.write(head + array.tobytes())
    encoded = []
    for i, picture in enumerate(x):
        image, held = Image.fromarray(picture), io.BytesIO()
        image.save(folder / "png" / "abc"[y[i]] / f"{i:03d}.png")
        image.save(folder / "jpg" / f"{i:03d}.jpg")
        image.save(held, "png")
        encoded.append(held.getvalue())
    for shard in range(2):
        with tarfile.open(folder / "tars" / f"shard-{shard:06d}.tar", "w") as tar:
            for i in range(shard, COUNT, 2):
                for suffix, content in (("png", encoded[i]), ("cls", str(y[i]).encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    parquet(folder / "parquet" / "table.parquet", encoded, y)
    captions(folder, x, y)


def captions(folder: Path, x: np.ndarray, label: np.ndarray) -> None:
    """Write pictures in colour with captions, and a list of prompts."""
    from PIL import Image

    (folder / "captions").mkdir()
    colours = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "white": [1, 1, 1]}
    places = ("at the left", "in the middle", "at the right")
    rows = []
    for i, picture in enumerate(x):
        colour, place = list(colours)[i % 4], places[label[i]]
        coloured = picture[..., None] * np.array(colours[colour], np.uint8)
        Image.fromarray(coloured).save(folder / "captions" / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": f"a {colour} bar {place}"})
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "captions" / "metadata.jsonl").write_text(lines)
    texts = [f"a {colour} bar {place}" for colour in colours for place in places]
    (folder / "prompts.txt").write_text("\n".join(texts) + "\n")


def parquet(file: Path, encoded: list[bytes], label: np.ndarray) -> None:
    """Write a table of pictures and labels."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    column = [{"bytes": content, "path": None} for content in encoded]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    write_table(pa.table({"image": pa.array(column, kind), "label": label}), file)


def foreign(folder: Path) -> None:
    """Write a small untrained DDPM as a diffusers pipeline."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet2DModel(
            **{"sample_size": 8, "in_channels": 1, "out_channels": 1, "add_attention": False},
            **{"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4},
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
    DDPMPipeline(unet=net, scheduler=DDPMScheduler()).save_pretrained(folder)
