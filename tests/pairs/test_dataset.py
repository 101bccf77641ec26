"""The pair store in training: what is read is what was written, and damage is named."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch

from flowmatch.config import NotReady, UserError
from flowmatch.flow import noise
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from flowmatch.pairs.mixture import Mixture
from flowmatch.pairs.shards import tar_name
from flowmatch.runs import manifest
from tests.store import RAGGED, finish, seal, write

torch.set_num_threads(1)


@pytest.mark.parametrize("values", RAGGED, ids=str)
def test_the_reader_gives_what_was_written(tmp_path, values):
    layout = Layout(*values)
    x0, x1, y = finish(tmp_path, layout, 3)
    data = PairData(tmp_path)
    assert len(data) == 3 * layout.shard_size
    assert data.shape == layout.shape
    assert data.has_labels == layout.labels
    order = noise.generator(0, 0, noise.ORDER).permutation(len(data))
    batch = data.batch(order)
    assert set(batch) == ({"x0", "x1", "label"} if layout.labels else {"x0", "x1"})
    assert batch["x0"].dtype == batch["x1"].dtype == torch.float32
    assert torch.equal(batch["x0"], torch.from_numpy(x0[order]).float())
    assert torch.equal(batch["x1"], torch.from_numpy(x1[order]).float())
    if layout.labels:
        assert torch.equal(batch["label"], torch.from_numpy(y[order]))
    batch["x0"].zero_()  # a batch is the caller's own
    assert torch.equal(data.batch([0])["x0"], torch.from_numpy(x0[:1]).float())
    for ids in ([-1], [len(data)], []):
        with pytest.raises(IndexError):
            data.batch(ids)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stock_loader_reads_it(tmp_path, workers):
    layout = Layout((2, 4), "float16", True, 10, 4)
    x0, _, y = finish(tmp_path, layout, 2)
    data = PairData(tmp_path)
    data.batch([3])  # mapped in the parent, and again in the children
    loader = torch.utils.data.DataLoader(data, batch_size=6, num_workers=workers)
    batches = list(loader)
    assert [len(batch["x0"]) for batch in batches] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([b["x0"] for b in batches]), torch.from_numpy(x0).float())
    assert torch.equal(torch.cat([b["label"] for b in batches]), torch.from_numpy(y))
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 2100
    assert torch.equal(copy[7]["x0"], torch.from_numpy(x0[7]).float())
    assert copy[7]["label"].shape == ()


OPEN = r"""
import re, sys
import numpy as np
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.mixture import Mixture
def peak():  # of this program: ru_maxrss counts the one that started it, too
    return re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]
own = peak()
for group in (0, 8):
    data = PairData(sys.argv[1], group=group)
    mixture = Mixture([(data, 1.0)], 256, 0)
    ids = mixture.orders[0](np.arange(256))
    print(len(data), len(np.unique(ids)), peak(), own)
"""


def test_ten_million_pairs_are_opened_in_little_memory(tmp_path):
    """Sizes of 4,883 tars, which are holes, the seal, and the order of the first batch; in kilobytes."""
    layout = Layout((3, 32, 32), "float16", False, 2048, 64)
    names = [tar_name(k) for k in range(4883)]
    for name in names:
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, layout.tar_bytes)
    facts = {"layout": asdict(layout), "shards": len(names), "count": 2048 * len(names)}
    rest = {"stage": "generate_pairs", "config": {}, "inputs": {}, "round": 0}
    manifest.seal(tmp_path, outputs={name: "0" * 64 for name in names}, **rest, **facts)
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        count, different, most, own = map(int, line.split())
        print(f"{count:,} pairs: {most / 1e3:.0f} MB, imports {own / 1e3:.0f}")
        assert count > 10**7
        assert different == 256
        assert most < 500e3


def test_mappings_hold_no_file_descriptors(tmp_path):
    layout = Layout((2,), "float32", False, 1, 1)
    finish(tmp_path, layout, 40)
    data = PairData(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    data.batch(np.arange(40))
    assert len(data._maps) == 40
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_does_not_change_the_files(tmp_path):
    layout = Layout((2,), "float32", False, 8, 4)
    finish(tmp_path, layout, 1)
    tar = tmp_path / "pairs-000000.tar"
    before = tar.read_bytes()
    data = PairData(tmp_path)
    data._map(0)[:] = 0  # the mapping is private
    assert tar.read_bytes() == before


def test_the_reader_refuses_what_is_not_a_set_of_pairs(tmp_path):
    layout = Layout((2,), "float32", False, 8, 4)
    with pytest.raises(NotReady, match="pairs="):
        PairData(tmp_path / "nowhere")
    write(tmp_path, 0, layout)
    with pytest.raises(NotReady, match="reflow_pairs="):
        PairData(tmp_path, "reflow_pairs")
    seal_as = partial(manifest.seal, tmp_path, config={}, inputs={}, outputs={}, round=0)
    seal_as(stage="train_flow")
    with pytest.raises(UserError, match="the result of train_flow; expected one of gen"):
        PairData(tmp_path)
    seal_as(stage="generate_pairs")
    with pytest.raises(UserError, match="not a folder of pairs"):
        PairData(tmp_path)
    seal(tmp_path, layout, 0)
    with pytest.raises(UserError, match="count=0"):
        PairData(tmp_path)
    seal(tmp_path, layout, 20)
    with pytest.raises(UserError) as error:
        PairData(tmp_path)
    assert len(error.value.faults) == 9
    assert "11 more shards" in error.value.faults[-1]


def test_of_one_set_a_batch_is_what_was_gathered(tmp_path, monkeypatch):
    """Nothing is copied to put it in order."""
    layout = Layout((2,), "float32", False, 8, 4)
    x0, _, _ = finish(tmp_path, layout, 1)
    mixture = Mixture([(PairData(tmp_path), 1.0)], 4, 0)
    counters = np.array([9, 2, 2, 7])
    assert np.array_equal(mixture(counters)["x0"], x0[mixture.orders[0](counters)])
    monkeypatch.setattr(mixture.sets[0], "batch", lambda ids: ids)
    assert isinstance(mixture(counters), np.ndarray)


def test_a_tar_that_is_not_the_sealed_one_is_found_at_its_first_touch(tmp_path):
    """Same sizes, other bytes: shards swapped, a hole of zeros, two bits of a value, a wrong layout."""
    layout = Layout((2,), "float32", False, 8, 4)
    finish(tmp_path, layout, 2)
    a, b = tmp_path / "pairs-000000.tar", tmp_path / "pairs-000001.tar"
    raw = a.read_bytes(), b.read_bytes()
    a.write_bytes(raw[1])
    said = (
        r"\.tar is damaged: its bytes are not those that were sealed \(sha256 differs\); flowmatch"
    )
    with pytest.raises(UserError, match=f"000000{said}"):
        PairData(tmp_path).batch([5])
    a.write_bytes(raw[0])
    start, value = layout.block_bytes + layout.member_bytes("x0", 4), int(layout.offsets(6)["x1"])
    hole = raw[1][:start] + bytes(1024) + raw[1][start + 1024 :]
    flipped = raw[1][:value] + bytes([raw[1][value] ^ 96]) + raw[1][value + 1 :]
    for bad in (hole, flipped):
        b.write_bytes(bad)
        data = PairData(tmp_path)
        data.batch([0, 4])
        for _ in range(2):  # a failed check does not count as done
            with pytest.raises(UserError, match=f"000001{said}"):
                data.batch([0, 13])
    b.write_bytes(raw[1])
    data.batch([0, 13])
    other = Layout((2,), "float32", False, 8, 8)
    assert other.tar_bytes == layout.tar_bytes
    seal(tmp_path, other, 2)
    with pytest.raises(
        UserError, match=r"pairs-000000\.tar is damaged: at byte 0 expected the head"
    ):
        PairData(tmp_path).batch([0])


def test_each_tar_is_hashed_once_a_process(tmp_path, monkeypatch):
    finish(tmp_path, layout := Layout((2,), "float32", False, 8, 4), 3)
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(len(data)) or sha256(data))
    data = PairData(tmp_path)
    hashed.clear()
    for _ in range(2):
        data.batch([3, 17, 2])
    copy = pickle.loads(pickle.dumps(data))
    copy.batch([3, 17])
    assert hashed == [layout.tar_bytes] * 2
    copy.batch([8])
    assert len(hashed) == 3


def test_a_seal_without_a_hash_is_refused(tmp_path):
    finish(tmp_path, Layout((2,), "float32", False, 8, 4), 2)
    sealed = json.loads((tmp_path / "manifest.json").read_text())
    del sealed["outputs"]["pairs-000001.tar"]
    (tmp_path / "manifest.json").write_text(json.dumps(sealed))
    with pytest.raises(
        UserError, match="manifest.json has no sha256 of some tars; flowmatch verify"
    ):
        PairData(tmp_path)
