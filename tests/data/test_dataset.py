"""Data: every source from real files, every refusal, flips, digests, the order of epochs."""

import gzip
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from flowmatch.config import UserError, content, validate
from flowmatch.data import dataset, images, sources
from flowmatch.data.config import DataConfig
from flowmatch.data.dataset import Order
from tests.images import all_of, expected, folder_of, load, parquet_of, pictures, refusal, tar_of

FASHION = Path("/usr/share/datasets/fashion-mnist")
DIGITS = ("train", "third", "two_thirds")
DEBIAN = "Debian's package dataset-fashion-mnist is not installed"


# ---- sources


def test_digits_are_sklearns_in_minus_one_to_one():
    digits = load(source="digits", labels=True)
    batch = all_of(digits)
    assert len(digits) == 1797
    assert digits.shape == (1, 8, 8)
    assert digits.classes == 10
    assert digits.images
    assert batch["x1"].min() == -1
    assert batch["x1"].max() == 1
    from sklearn.datasets import load_digits

    truth = load_digits()
    assert torch.equal(batch["x1"][:, 0], torch.from_numpy(truth.images / 8 - 1).float())
    assert batch["label"].tolist() == truth.target.tolist()


def test_a_third_of_each_class_of_the_digits_can_be_held_out():
    whole, third, rest = (load(source="digits", labels=True, split=s) for s in DIGITS)
    assert (len(whole), len(third), len(rest)) == (1797, 599, 1198)
    rows = [{x.numpy().tobytes() for x in all_of(part)["x1"]} for part in (whole, third, rest)]
    assert rows[0] == rows[1] | rows[2]
    assert not rows[1] & rows[2]
    assert np.abs(np.bincount(third.label) - np.bincount(whole.label) / 3).max() < 1
    assert len({whole.digest, third.digest, rest.digest}) == 3


def test_the_ring_has_the_moments_of_its_closed_form():
    ring = load(source="ring", labels=True, samples=20_000)
    batch = all_of(ring)
    assert ring.shape == (2,)
    assert ring.classes == 8
    assert not ring.images
    weights, means, covariances = sources.ring_mixture()
    assert np.allclose(np.linalg.norm(means, axis=1), 2.5)
    assert np.isclose(weights.sum(), 1)
    for k in range(8):
        mode = batch["x1"][batch["label"] == k].double().numpy()
        assert abs(len(mode) / 20_000 - weights[k]) < 4 * (weights[k] / 20_000) ** 0.5
        assert np.abs(mode.mean(0) - means[k]).max() < 4 * 0.3 / len(mode) ** 0.5
        assert np.abs(np.cov(mode.T) - covariances[k]).max() < 0.012


def test_classes_of_built_in_data_are_known_however_few_samples_show_them():
    assert load(source="ring", labels=True, samples=2).classes == 8


def test_a_sample_of_the_ring_depends_on_seed_and_number_alone():
    many, modes = sources.ring_samples(np.arange(100), 3)
    some, some_modes = sources.ring_samples(np.array([99, 7]), 3)
    assert np.array_equal(many[[99, 7]], some)
    assert np.array_equal(modes[[99, 7]], some_modes)
    other, _ = sources.ring_samples(np.arange(100), 4)
    assert np.abs(many - other).min(axis=1).max() > 0.1


def idx_of(file, x):
    head = bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes()
    file.write_bytes(gzip.compress(head + x.tobytes(), mtime=0))


@pytest.fixture
def idx_folder(tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    for seed, name in enumerate(("train", "t10k")):
        x = pictures(4 + seed, (5, 5), seed)
        idx_of(folder / f"{name}-images-idx3-ubyte.gz", x)
        idx_of(folder / f"{name}-labels-idx1-ubyte.gz", np.arange(4 + seed, dtype=np.uint8) % 3)
    return folder


def test_idx_files(idx_folder):
    train = load(source="idx", path=str(idx_folder), labels=True)
    assert torch.equal(all_of(train)["x1"], expected(pictures(4, (5, 5), 0)))
    assert all_of(train)["label"].tolist() == [0, 1, 2, 0]
    assert train.classes == 3
    assert len(load(source="idx", path=str(idx_folder), split="test")) == 5


@pytest.mark.skipif(not FASHION.is_dir(), reason=DEBIAN)
def test_fashion_mnist_of_debian():
    train = load(source="idx", path=str(FASHION), labels=True)
    assert len(train) == 60_000
    assert train.shape == (1, 28, 28)
    assert train.classes == 10
    assert np.bincount(train.label).tolist() == [6000] * 10
    x = train.batch(np.arange(2000))["x1"]
    assert x.min() == -1
    assert x.max() == 1
    assert abs(float(x.mean()) + 0.43) < 0.02
    assert len(load(source="idx", path=str(FASHION), split="test")) == 10_000


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels")])
@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (6, 4, 3)])
def test_npz_of_pixels(tmp_path, names, shape):
    x, y = pictures(5, shape), np.array([0, 1, 2, 1, 0], np.int32)
    np.savez(tmp_path / "a.npz", **{names[0]: x, names[1]: y})
    found = load(source="npz", path=str(tmp_path / "a.npz"), labels=True)
    assert torch.equal(all_of(found)["x1"], expected(x))
    assert all_of(found)["label"].tolist() == y.tolist()
    assert found.classes == 3
    assert "label" not in all_of(load(source="npz", path=str(tmp_path / "a.npz")))


def test_npy_of_floats_is_taken_as_it_is(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (5, 6, 6, 3))
    np.save(tmp_path / "a.npy", x)
    found = load(source="npz", path=str(tmp_path / "a.npy"))
    batch = found.batch(np.array([3, 3, 0]))
    wanted = torch.from_numpy(x.transpose(0, 3, 1, 2)[[3, 3, 0]]).float()
    assert batch["x1"].dtype == torch.float32
    assert torch.equal(batch["x1"], wanted)


def test_npy_of_points(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) * 9
    np.save(tmp_path / "a.npy", x)
    found = load(source="npz", path=str(tmp_path / "a.npy"))
    assert found.shape == (3,)
    assert not found.images
    assert torch.equal(all_of(found)["x1"], torch.from_numpy(x))


def test_image_folder(tmp_path):
    x = pictures(6)
    found = load(path=str(folder_of(tmp_path / "set", x)), labels=True)
    assert torch.equal(all_of(found)["x1"], expected(x))
    assert found.classes == 2
    assert all_of(found)["label"].tolist() == [0, 0, 0, 1, 1, 1]


def test_parquet_written_by_other_tools(tmp_path):
    import pandas

    x = pictures(3, (6, 6))
    (tmp_path / "a.png").touch()
    stored = []
    for image in x:
        Image.fromarray(image).save(tmp_path / "a.png")
        stored.append((tmp_path / "a.png").read_bytes())
    pandas.DataFrame({"png": stored}).to_parquet(tmp_path / "a.parquet")
    found = load(path=str(tmp_path / "a.parquet"))
    assert torch.equal(all_of(found)["x1"], expected(x))


def test_webdataset_tars(tmp_path):
    x = pictures(6)
    tar_of(tmp_path / "part-0.tar", x[:3], [0, 1, 1])
    tar_of(tmp_path / "part-1.tar", x[3:], [2, 0, 1])
    (tmp_path / "manifest.json").write_text("{}")
    found = load(path=str(tmp_path), labels=True)
    assert torch.equal(all_of(found)["x1"], expected(x))
    assert found.classes == 3
    assert all_of(found)["label"].tolist() == [0, 1, 1, 2, 0, 1]
    jpeg = load(path=str(tar_of(tmp_path / "jpeg.tar", x, field="jpg")))
    assert (all_of(jpeg)["x1"] - expected(x)).abs().mean() < 0.5


def test_a_name_on_the_hub(monkeypatch):
    import datasets

    asked = {}

    def stored(x):
        rows = {"image": [Image.fromarray(image) for image in x], "label": [0, 1, 1]}
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

        def load_dataset(name, subset=None, **keys):
            asked.update(keys, name=name, subset=subset)
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    x = pictures(3)
    stored(x)
    found = load(path="someone/pictures", labels=True, revision="v1", subset="small")
    assert torch.equal(all_of(found)["x1"], expected(x))
    assert found.classes == 2
    assert asked == {
        "name": "someone/pictures", "subset": "small", "split": "train", "revision": "v1"
    }  # fmt: skip
    assert load(path="someone/pictures", labels=True).digest == found.digest
    x[1, 0, 0, 0] ^= 1
    stored(x)
    assert load(path="someone/pictures", labels=True).digest != found.digest


# ---- pixels


@pytest.mark.parametrize("memory", [0, 2048])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_sets_are_decoded_batch_by_batch(tmp_path, memory, threads):
    x = pictures(6)
    path = str(folder_of(tmp_path / "set", x))
    found = load(path=path, memory=memory, threads=threads, flip=True)
    ids = np.array([5, 0, 7, 0])
    wanted = torch.cat([expected(x), expected(x).flip(-1)])[torch.from_numpy(ids)]
    assert torch.equal(found.batch(ids)["x1"], wanted)
    assert (found.read.decoded is None) == (memory == 0)


def test_size_resizes_the_short_side_and_crops_the_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # the centre third is white
    tall = wide.transpose(1, 0, 2)
    found = load(path=str(folder_of(tmp_path / "set", [wide, tall])), size=4)
    assert found.shape == (3, 4, 4)
    assert torch.all(all_of(found)["x1"][:, :, 1:3, 1:3] > 0.9)
    np.savez(tmp_path / "a.npz", x=wide[None, ..., 0])
    array = load(source="npz", path=str(tmp_path / "a.npz"), size=4)
    assert torch.equal(all_of(array)["x1"], all_of(found)["x1"][:1, :1])


def test_channels_converts(tmp_path):
    x = pictures(2)
    path = str(folder_of(tmp_path / "set", x))
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in x])
    assert torch.equal(all_of(load(path=path, channels=1))["x1"], expected(grey))
    np.savez(tmp_path / "a.npz", x=grey)
    coloured = all_of(load(source="npz", path=str(tmp_path / "a.npz"), channels=3))["x1"]
    assert torch.equal(coloured, expected(grey).expand(-1, 3, -1, -1))


def test_flip_adds_each_mirror_image_once():
    plain, both = load(source="digits"), load(source="digits", flip=True, labels=True)
    n = len(plain)
    assert len(both) == 2 * n
    assert both.digest == plain.digest
    batch = all_of(both)
    assert torch.equal(batch["x1"][:n], all_of(plain)["x1"])
    assert torch.equal(batch["x1"][n:], all_of(plain)["x1"].flip(-1))
    assert torch.equal(batch["label"][n:], batch["label"][:n])


def test_a_batch_is_a_copy():
    digits = load(source="digits", flip=True)
    digits.batch(np.array([0, 1797]))["x1"].zero_()
    assert digits.batch(np.array([0]))["x1"].abs().sum() > 0
    for wrong in (np.array([-1]), np.array([2 * 1797])):
        with pytest.raises(IndexError, match="3594 items"):
            digits.batch(wrong)


# ---- digests


def test_a_digest_changes_with_one_byte_and_not_with_the_place(tmp_path):
    x = pictures(4)
    seen = set()
    for k in range(2):
        x[0, 0, 0, 0] = k
        root = tmp_path / str(k)
        root.mkdir()
        np.savez(root / f"{k}.npz", x=x)
        found = [
            load(source="npz", path=str(root / f"{k}.npz")),
            load(path=str(folder_of(root / "set", x))),
            load(path=str(parquet_of(root / f"{k}.parquet", x))),
            load(path=str(tar_of(root / f"{k}.tar", x))),
        ]
        seen |= {one.digest for one in found}
        os.rename(root / "set", root / "moved")
        os.rename(root / f"{k}.npz", root / "other.npz")
        assert load(path=str(root / "moved")).digest == found[1].digest
        assert load(source="npz", path=str(root / "other.npz")).digest == found[0].digest
    assert len(seen) == 8
    (root / "moved" / ".directory").touch()
    assert load(path=str(root / "moved")).digest == found[1].digest
    (root / "moved" / "a" / "0.png").rename(root / "moved" / "b" / "0.png")
    assert load(path=str(root / "moved")).digest not in seen


def test_digests_of_built_in_data_and_idx(idx_folder):
    rings = [load(source="ring", samples=50, seed=seed).digest for seed in (0, 0, 1)]
    assert rings[0] == rings[1] != rings[2]
    assert load(source="digits").digest == load(source="digits", labels=True, flip=True).digest
    before = load(source="idx", path=str(idx_folder)).digest
    idx_of(idx_folder / "t10k-labels-idx1-ubyte.gz", np.zeros(5, np.uint8))
    assert load(source="idx", path=str(idx_folder)).digest != before


# ---- refusals


def test_config_faults_are_found_together_and_before_any_file():
    with pytest.raises(UserError) as caught:
        validate(DataConfig, {"source": "npz", "split": "test", "channels": 4, "size": 0})
    keys = sorted(fault.split("=")[0] for fault in caught.value.faults)
    assert keys == ["channels", "path", "size", "split"]
    for values, fault in [
        ({"source": "digits", "path": "a"}, "path='a': source digits is built in"),
        ({"source": "ring", "flip": True}, "flip=True: the ring's samples are points"),
        ({"source": "idx", "path": "a", "split": "val"}, "the splits train, test"),
        ({"source": "digits", "split": "test"}, "the splits train, two_thirds, third"),
        ({"source": "ring", "split": "test"}, "source ring has one split, train"),
        ({}, "path='': source images needs a path"),
        ({"source": "csv"}, "source='csv'"),
    ]:
        assert fault in refusal(**values)


def test_path_memory_and_threads_are_run_fields():
    names = content(DataConfig(path="a")).keys()
    assert names.isdisjoint({"path", "memory", "megapixels", "threads"})
    assert {"source", "flip"} <= names


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ([0, 2, 2], "only 2 values are used, and for example not 1"),
        ([-1, 0, 1], "labels from -1 to 1; expected 0 to K - 1; first sample 0"),
        ([1, 2, 3], "for example not 0"),
        ([0.0, 1.0, 1.0], "float64"),
        ([0, 1, 2], "3 samples have 3 different labels; these are numbers of samples"),
        ([0, 1], "expected 3 integers"),
    ],
)
def test_labels_are_zero_to_k_minus_one(tmp_path, labels, fault):
    np.savez(tmp_path / "a.npz", x=pictures(3, (6, 6)), y=np.array(labels))
    assert fault in refusal(source="npz", path=str(tmp_path / "a.npz"), labels=True)


def test_errors_name_the_key_of_their_config(tmp_path):
    folder_of(tmp_path / "data" / "set", [*pictures(1), *pictures(1, (6, 5, 3))])
    np.savez(tmp_path / "x.npz", x=np.full((2, 4, 4), 2.0), y=np.array([0, 2]))
    np.savez(tmp_path / "y.npz", x=np.zeros((2, 4)), y=np.array([0, 2]))
    folder, x, y = (str(tmp_path / name) for name in ("data/set", "x.npz", "y.npz"))
    for values in (
        {"path": folder},
        {"path": folder, "size": 8},
        {"path": folder, "split": "val"},
        {"path": folder, "image_column": "none"},
        {"path": "data: none/at/all"},
        {"path": "someone/data"},
        {"source": "idx", "path": folder},
        {"source": "npz", "path": x},
        {"source": "latents", "path": x},
        {"source": "npz", "path": y, "flip": True},
        {"source": "npz", "path": y, "labels": True},
        {"source": "npz", "path": y, "size": 4},
        {"source": "digits", "size": 4},
    ):
        with pytest.raises(UserError) as caught:
            dataset.load(validate(DataConfig, values), "held_out")
        message = str(caught.value).replace(values.get("path", ""), "")
        assert re.match(r"held_out(:|\.\w+[,=])", message), message
        assert not re.search(r"\bdata[.:]", message), message
    with pytest.raises(UserError, match=r"^held_out: image 1 .*set held_out.size"):
        dataset.load(validate(DataConfig, {"path": folder}), "held_out")


def test_images_are_never_enlarged_unasked(tmp_path):
    path = str(folder_of(tmp_path / "set", pictures(1)))
    assert "6x6, smaller than data.size=8" in refusal(path=path, size=8)
    np.savez(tmp_path / "a.npz", x=pictures(2))
    assert "set data.small to enlarge" in refusal(
        source="npz", path=str(tmp_path / "a.npz"), size=8
    )


def test_an_image_unlike_the_first_is_named_when_it_is_read(tmp_path):
    folder_of(tmp_path / "set", [pictures(1)[0], pictures(1, (6, 5, 3))[0]])
    with pytest.raises(UserError, match=r"image 1 .*1\.png\) is \[3, 6, 5\].*set data.size"):
        all_of(load(path=str(tmp_path / "set")))
    folder_of(tmp_path / "grey", [pictures(1)[0], pictures(1, (6, 6))[0]])
    with pytest.raises(UserError, match=r"image 1 .* has 1 channels, the first image 3"):
        all_of(load(path=str(tmp_path / "grey")))
    assert all_of(load(path=str(tmp_path / "grey"), channels=3))["x1"].shape == (2, 3, 6, 6)


def test_transparent_deep_and_damaged_images_are_refused(tmp_path):
    clear = np.full((6, 6, 4), 255, np.uint8)
    folder_of(tmp_path / "opaque", [clear])
    assert load(path=str(tmp_path / "opaque")).shape == (3, 6, 6)
    clear[0, 0, 3] = 0
    folder_of(tmp_path / "clear", [clear])
    assert "partly transparent" in refusal(path=str(tmp_path / "clear"))
    folder_of(tmp_path / "deep", [np.full((6, 6), 3000, np.uint16)])
    assert "has mode I;16" in refusal(path=str(tmp_path / "deep"))
    file = folder_of(tmp_path / "cut", pictures(1)) / "a" / "0.png"
    file.write_bytes(file.read_bytes()[:60])
    assert "image 0" in refusal(path=str(tmp_path / "cut"))
    assert "cannot be read" in refusal(path=str(tmp_path / "cut"))


def test_images_of_several_frames_are_counted(tmp_path, monkeypatch):
    x = pictures(5)
    frames = [Image.fromarray(image) for image in x]
    for name in ("a.gif", "b.png", "c.tif", "d.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:4], lossless=True)
    frames[0].save(tmp_path / "e.png")
    found = load(path=str(tmp_path))
    assert found.notes == (
        "4 of the 5 images hold several frames, of which the first is read; first image 0 "
        f"({tmp_path}/a.gif)",
    )
    assert torch.equal(all_of(found)["x1"][1:], expected(x[[0] * 4]))
    monkeypatch.setattr(images, "LOOKED", 2)
    monkeypatch.setattr(images, "CHUNK", 1)
    assert "1 of the 2 images looked at, of 5, hold" in load(path=str(tmp_path), memory=0).notes[0]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:2])
    assert "4 of the 6 images" in load(path=str(tmp_path)).notes[0]  # a photo with its preview


def test_an_image_that_unpacks_into_too_much_is_named_with_the_way_to_allow_it(tmp_path):
    Image.new("L", (1100, 1000)).save(tmp_path / "b.png")
    Image.new("L", (900, 1000)).save(tmp_path / "a.png")
    message = refusal(path=str(tmp_path), size=4, megapixels=1)
    assert f"data: image 1 ({tmp_path}/b.png) has more than 1 million pixels" in message
    assert "to allow it, raise data.megapixels" in message
    assert load(path=str(tmp_path), size=4, megapixels=2).count == 2
    header = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(
        ">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0
    )
    data = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(
        header + struct.pack(">I", zlib.crc32(header[12:])) + data[33:]
    )
    assert "image 1" in refusal(path=str(tmp_path), size=4)  # as Pillow guards by itself
    assert "more than 179 million pixels" in refusal(path=str(tmp_path), size=4)


def test_images_that_are_no_images_are_found_before_any_training(tmp_path):
    path = folder_of(tmp_path / "set", pictures(4))
    for damaged in (
        b"GIF89a, or so",
        b"II*\0\x08" + bytes(20),
        b"",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"BM",
    ):
        (path / "b" / "3.png").write_bytes(damaged)
        assert f"image 3 ({path}/b/3.png) cannot be read" in refusal(path=str(path))
    stored = [b"", None]
    (tmp_path / "a.png").write_bytes(b"")
    for kind in stored:
        file = parquet_of(tmp_path / "a.parquet", pictures(2))
        table = pandas.read_parquet(file)
        table.at[1, "image"] = None if kind is None else {"bytes": kind, "path": None}
        table.to_parquet(file)
        reason = "is missing: its row has no image" if kind is None else "cannot be read"
        assert f"image 1 {reason}" in refusal(path=str(file))


@pytest.mark.parametrize(
    ("x", "fault"),
    [
        (np.zeros((32, 30, 3), np.uint8), "likelier one picture than 32 grey pictures of 30x3"),
        (np.zeros((32, 30, 1)), "likelier one picture"),
        (np.full((3, 2), np.nan), "sample 0 holds NaN"),
        (np.array([[0.0, 1], [np.inf, 0]]), "sample 1 holds NaN or infinity"),
        (
            np.full((3, 4, 4), 0.5),
            "floats from 0.5 to 0.5; expected images in [-1, 1]: store 2",
        ),
        (np.linspace(-9, 9, 48).reshape(3, 4, 4), "floats from -9 to 9"),
        (np.zeros((3, 4, 4), np.int64), "the array is int64"),
        (np.zeros((3, 16), np.uint8), "points [N, D] (floats)"),
        (np.zeros((3, 4, 4, 2), np.uint8), "expected [N, H, W, C] with 1 or 3 channels"),
        (np.zeros((3, 3, 4, 4), np.uint8), "move the channels to the last axis"),
        (np.zeros((0, 4, 4), np.uint8), "[0, 4, 4]"),
        (np.array([[{}]], dtype=object), "of plain numbers: it holds Python objects"),
    ],
)
def test_arrays_that_are_no_data(tmp_path, x, fault):
    np.save(tmp_path / "a.npy", x, allow_pickle=True)
    assert fault in refusal(source="npz", path=str(tmp_path / "a.npy"))


@pytest.mark.parametrize("shape", ["(24, 2", "(10000000000000000000000, 2)", "(-1, 2)", "(2**99,)"])
def test_a_damaged_header_of_an_array_is_named(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(192)
    (tmp_path / "a.npy").write_bytes(content)
    assert "a.npy is not an .npz or .npy file" in refusal(
        source="npz", path=str(tmp_path / "a.npy")
    )


def test_floats_are_neither_resized_nor_recoloured_and_points_not_flipped(tmp_path):
    np.save(tmp_path / "a.npy", np.linspace(-1, 1, 75).reshape(3, 5, 5))
    for values in ({"size": 4}, {"channels": 3}):
        assert "store them as uint8" in refusal(
            source="npz", path=str(tmp_path / "a.npy"), **values
        )
    assert "store them as uint8" in refusal(source="digits", size=4)
    assert load(source="digits", size=8, channels=1).shape == (1, 8, 8)
    np.save(tmp_path / "b.npy", np.zeros((3, 5)))
    assert "not images" in refusal(source="npz", path=str(tmp_path / "b.npy"), flip=True)
    assert "are points" in refusal(source="npz", path=str(tmp_path / "b.npy"), size=4)


def test_latents_are_read_as_they_are(tmp_path):
    """Any number of channels, any range, half precision; but no picture's options."""
    x = (np.random.default_rng(0).normal(size=(6, 4, 5, 5)) * 3).astype(np.float16)
    path = str(tmp_path / "x.npz")
    np.savez(path, latents=x, y=np.array([0, 1, 2, 2, 1, 0]))
    found = dataset.load(DataConfig(source="latents", path=path, labels=True))
    assert (found.shape, found.count, found.classes, found.images) == ((4, 5, 5), 6, 3, False)
    batch = found.batch(np.array([5, 0]))
    assert np.array_equal(batch["x1"].numpy(), x[[5, 0]].astype(np.float32))
    assert batch["label"].tolist() == [0, 0]
    x[3, 0, 0, 0] = np.inf
    np.savez(path, x=x)
    assert "sample 3 holds NaN or infinity" in refusal(source="latents", path=path)
    np.savez(path, x=np.zeros((6, 5, 5)))
    assert "expected floats [N, C, H, W]" in refusal(source="latents", path=path)
    with pytest.raises(UserError, match="latents are encoded, not images"):
        validate(DataConfig, {"source": "latents", "path": path, "flip": True})


def test_files_that_are_not_what_they_seem(tmp_path, idx_folder):
    for stored in (b"no such thing" * 99, b"MATLAB 5.0 MAT-file", b""):
        for name in ("a.npz", "a.npy", "a.tar", "a.parquet"):
            (tmp_path / name).write_bytes(stored)
            message = refusal(
                source="npz" if ".np" in name else "images", path=str(tmp_path / name)
            )
            assert name in message
            assert "pickle" not in message
    np.save(tmp_path / "a.npy", pictures(2))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole + whole)
    assert f"holds {len(whole)} bytes more than an array [2, 6, 6, 3]" in refusal(
        source="npz", path=str(tmp_path / "a.npy")
    )
    (tmp_path / "a.npy").write_bytes(whole[:-1])
    assert "not an .npz or .npy file" in refusal(source="npz", path=str(tmp_path / "a.npy"))
    assert "is a folder; expected an .npz" in refusal(source="npz", path=str(tmp_path))
    np.savez(tmp_path / "b.npz", pictures(2))
    assert load(source="npz", path=str(tmp_path / "b.npz")).count == 2
    assert "expected one array named y or labels; the file has arr_0" in refusal(
        source="npz", path=str(tmp_path / "b.npz"), labels=True
    )
    np.savez(tmp_path / "b.npz", a=np.zeros(3))
    assert "expected one array named x or images; the file has a" in refusal(
        source="npz", path=str(tmp_path / "b.npz")
    )
    file = idx_folder / "train-images-idx3-ubyte.gz"
    for bad in (b"junk", gzip.compress(b"\0\0\x0d\x01" + b"\0" * 9), file.read_bytes()[:-20]):
        file.write_bytes(bad)
        assert "not a gzipped IDX file" in refusal(source="idx", path=str(idx_folder))
    file.unlink()
    assert "expected one file train-images*.gz" in refusal(source="idx", path=str(idx_folder))


# ---- order


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (7, 7), (5, 16), (1, 4)])
def test_every_epoch_is_a_permutation_and_any_slice_is_found(n, batch):
    whole = Order(n, 5)(np.arange(6 * n))
    assert np.array_equal(np.sort(whole.reshape(6, n)), np.tile(np.arange(n), (6, 1)))
    order = Order(n, 5)
    starts = list(range(0, 6 * n, batch))
    for start in [*starts, *reversed(starts)]:
        counters = np.arange(start, min(start + batch, 6 * n))
        assert np.array_equal(order(counters), whole[counters])
    assert len(order._epochs) <= 2


def test_epochs_and_seeds_differ_and_a_late_epoch_needs_no_earlier_one():
    order = Order(1000, 0)
    first, second = order(np.arange(1000)), order(np.arange(1000, 2000))
    assert (first == second).mean() < 0.02
    assert (Order(1000, 1)(np.arange(1000)) == first).mean() < 0.02
    late = np.int64(10**15) * 1000 + np.arange(1000)
    assert np.array_equal(np.sort(order(late)), np.arange(1000))


def test_a_reference_is_of_different_items():
    digits = load(source="digits", labels=True)
    batch = dataset.reference(digits, 1797, 0)
    assert np.bincount(batch["label"]).tolist() == np.bincount(digits.label).tolist()
    some, other = dataset.reference(digits, 100, 0), dataset.reference(digits, 100, 1)
    assert torch.equal(some["x1"], batch["x1"][:100])
    assert not torch.equal(some["label"], torch.from_numpy(digits.label[:100]))
    assert not torch.equal(some["label"], other["label"])
    with pytest.raises(UserError, match="1798 samples was asked for, but the data has 1797"):
        dataset.reference(digits, 1798, 0)


def test_torchvision_is_never_imported(tmp_path):
    """A stand-in on the path shows any import of it, also where it is not installed.

    (torchmetrics imports it by itself where it is there, and works without.)
    """
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    folder_of(tmp_path / "set", pictures(4))
    code = """
import sys, datasets, numpy as np
from flowmatch.data import dataset
from flowmatch.data.config import DataConfig
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
found = dataset.load(DataConfig(path=sys.argv[1], size=4, labels=True))
found.batch(np.arange(4))
taken = [name for name in sys.modules if name.split(".")[0] == "torchvision"]
assert not taken, taken
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set"), str(tmp_path / "cache")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
