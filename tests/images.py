"""Small sets of pictures for tests: folders, parquet files and tars, and what is read from them."""

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from flowmatch.config import UserError, validate
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig


def load(**values):
    return dataset.load(validate(DataConfig, values))


def refusal(**values):
    with pytest.raises(UserError) as caught:
        load(**values)
    return str(caught.value)


def pictures(n=6, shape=(6, 6, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def expected(x):
    """float32 [N, C, H, W] of uint8 [N, H, W] or [N, H, W, C]."""
    x = x[..., None] if x.ndim == 3 else x
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1)


def all_of(found):
    return found.batch(np.arange(len(found)))


def folder_of(root, x, classes=2):
    """Write PNGs as CLASS/NUMBER.png, in an order that a listing keeps."""
    for i, image in enumerate(x):
        place = root / "ab"[i * classes // len(x)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    return root


def parquet_of(file, x, **columns):
    import datasets

    images = {"image": [Image.fromarray(image) for image in x]}
    datasets.Dataset.from_dict(images | columns).cast_column("image", datasets.Image()).to_parquet(
        file
    )
    return file


def tar_of(file, x, labels=None, field="png"):
    with webdataset.TarWriter(str(file), mtime=0) as tar:
        for i, image in enumerate(x):
            row = {"__key__": f"{i:04d}", field: Image.fromarray(image)}
            tar.write(row if labels is None else row | {"cls": int(labels[i])})
    return file
