"""The pair store on disk: layout, bytes, commits, damage, stock readers."""

import hashlib
import io
import json
import os
import tarfile
import time

import numpy as np
import pytest

from flowmatch.config import UserError
from flowmatch.pairs import shards
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import Layout
from tests import forked, stock
from tests.store import CARD, PRINT, RAGGED, blocks_of, finish, pairs_of, write

GOLDEN = "57c527feaa978c030154451328662dc422000a540ab5c19786a2178f781349d2"


@pytest.mark.parametrize("values", RAGGED, ids=str)
def test_the_layout_is_what_tarfile_finds(tmp_path, values):
    """Every pair lies where the arithmetic says; tarfile would have written the same bytes."""
    layout = Layout(*values)
    write(tmp_path, 3, layout)
    raw = (tmp_path / "pairs-000003.tar").read_bytes()
    x0, x1, y = pairs_of(3, layout)
    again, members = io.BytesIO(), {}
    with (
        tarfile.open(fileobj=io.BytesIO(raw)) as tar,
        tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy,
    ):
        for info in tar:
            members[info.name] = info
            array = np.load(io.BytesIO(tar.extractfile(info).read()), allow_pickle=False)
            stock = io.BytesIO()
            np.save(stock, array)
            fresh = tarfile.TarInfo(info.name)
            fresh.size = len(stock.getvalue())
            copy.addfile(fresh, io.BytesIO(stock.getvalue()))
            assert (info.mtime, info.uid, info.gid, info.mode) == (0, 0, 0, 0o644)
            assert (info.uname, info.gname) == ("", "")
    assert again.getvalue() == raw
    assert len(raw) == layout.tar_bytes
    assert len(members) == layout.blocks * len(layout.members)
    places = layout.offsets(np.arange(layout.shard_size))
    for index in range(layout.shard_size):
        block, row = divmod(index, layout.block)
        for name, source in {"x0": x0, "x1": x1, "y": y}.items():
            if source is None:
                continue
            info = members[f"000003-{block * layout.block:06d}.{name}.npy"]
            place = info.offset_data + 128 + row * source[index].nbytes
            assert places[name][index] == layout.offsets(index)[name] == place
            assert raw[place : place + source[index].nbytes] == source[index].tobytes()


def test_a_layout_that_cannot_be_stored_lists_every_fault():
    with pytest.raises(UserError) as error:
        Layout((0,), "bfloat16", False, 0, 5)
    assert len(error.value.faults) == 4
    with pytest.raises(UserError, match="8 GiB"):
        Layout((3, 1024, 1024), "float32", False, 1000, 1000)
    with pytest.raises(UserError, match="too many dimensions"):
        Layout((1,) * 40, "float32", False, 4, 4)


def test_bytes_depend_on_content_alone(tmp_path, monkeypatch):
    """Same sha256 twice, another day, under another umask, from another working directory."""
    layout = Layout((3, 8, 8), "float16", True, 10, 4)
    first = write(tmp_path / "a", 2, layout)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o077)
    try:
        second = write("b", 2, layout)
    finally:
        os.umask(before)
    tars = [(tmp_path / name / "pairs-000002.tar").read_bytes() for name in "ab"]
    assert tars[0] == tars[1]
    assert first["sha256"] == second["sha256"] == hashlib.sha256(tars[0]).hexdigest()
    assert first["sha256"] == GOLDEN
    assert write(tmp_path / "c", 3, layout)["sha256"] != first["sha256"]


def test_the_sidecar_tells_all(tmp_path):
    layout = Layout((2,), "float32", False, 10, 4)
    returned = write(tmp_path, 0, layout, environment={"torch": "2"})
    facts = json.loads((tmp_path / ".meta/pairs-000000.json").read_text())
    assert facts == returned == shards.sidecar(tmp_path, 0)
    assert facts["count"] == 10
    assert facts["bytes"] == (tmp_path / "pairs-000000.tar").stat().st_size
    assert facts["fingerprint"] == PRINT
    assert facts["environment"] == {"torch": "2"}
    assert Layout(**facts["layout"]) == layout
    assert facts["seconds"] > 0
    assert sorted(os.listdir(tmp_path)) == [".meta", "README.md", "pairs-000000.tar"]
    assert (tmp_path / "README.md").read_text().endswith(CARD)


def test_what_is_committed_stays(tmp_path):
    """A worker that comes too late throws its work away, other last digits included."""
    layout = Layout((2,), "float32", False, 8, 4)
    first = write(tmp_path, 0, layout)
    raw = (tmp_path / "pairs-000000.tar").read_bytes()
    late = ((x0, x1 + np.float32(1e-6), y) for x0, x1, y in blocks_of(0, layout))
    assert write(tmp_path, 0, layout, late) == first
    assert (tmp_path / "pairs-000000.tar").read_bytes() == raw


def test_memory_does_not_grow_with_the_shard(tmp_path):
    """Blocks are written as they arrive: the next is asked for after the last is on its way."""
    layout = Layout((3, 64, 64), "float32", False, 256, 8)
    sizes = []

    def blocks():
        for block in blocks_of(0, layout):
            sizes.append(sum(path.stat().st_size for path in tmp_path.glob("*.tmp.*")))
            yield block

    write(tmp_path, 0, layout, blocks())
    assert all(size >= b * layout.block_bytes - 3 * shards.CHUNK for b, size in enumerate(sizes))
    assert sizes[-1] > 0.7 * layout.tar_bytes


def test_blocks_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    layout = Layout((2,), "float16", False, 8, 4)
    good = list(blocks_of(0, layout))
    x0, x1, _ = good[0]
    hole = x1.copy()
    hole[1, 1] = np.inf
    for blocks, message in [
        (good[:1], "1 blocks; expected the 2 of its layout"),
        (good * 2, "more than the 2 blocks"),
        ([(x0, x1.astype(np.float32), None), good[1]], "x1: float32"),
        ([(x0[:3], x1, None), good[1]], r"\(3, 2\); expected float16 \(4, 2\)"),
        ([(x0, x1, np.zeros(4, np.int64)), good[1]], "the layout has none of y"),
        ([(x0, hole, None), good[1]], "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(tmp_path, 0, layout, blocks)
        assert os.listdir(tmp_path) == [".meta"]
        assert os.listdir(tmp_path / ".meta") == []
    labelled = Layout((2,), "float16", True, 8, 4)
    with pytest.raises(ValueError, match="y: nothing; expected int64"):
        write(tmp_path, 0, labelled, good)


def test_a_full_disk_leaves_no_tar_and_no_sidecar(tmp_path):
    """A limit on the size of files stands in for it: the same write raises the same OSError."""
    result = forked.run(["tests.limited", 8192, "tests.store", tmp_path, 0, 1, 1, 60, 0, "race"])
    assert result.returncode == 1
    assert "OSError: [Errno 27]" in result.stderr
    assert os.listdir(tmp_path) == [".meta"]
    assert os.listdir(tmp_path / ".meta") == []


DAMAGE = {
    "tar cut": lambda folder: os.truncate(folder / "pairs-000001.tar", 1000),
    "tar gone": lambda folder: (folder / "pairs-000001.tar").unlink(),
    "sidecar gone": lambda folder: (folder / ".meta/pairs-000001.json").unlink(),
    "sidecar empty": lambda folder: (folder / ".meta/pairs-000001.json").write_text(""),
    "sidecar cut": lambda folder: os.truncate(folder / ".meta/pairs-000001.json", 30),
    "sidecar of another shard": lambda folder: (folder / ".meta/pairs-000001.json").write_bytes(
        (folder / ".meta/pairs-000002.json").read_bytes()
    ),
    "sidecar of another kind": lambda folder: (folder / ".meta/pairs-000001.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_and_made_again(tmp_path, damage):
    layout = Layout((2, 3), "float16", True, 10, 4)
    finish(tmp_path, layout, 3)
    before = [(tmp_path / shards.tar_name(k)).read_bytes() for k in range(3)]
    assert shards.missing(tmp_path, range(4), PRINT) == [3]
    DAMAGE[damage](tmp_path)
    assert shards.missing(tmp_path, range(3), PRINT) == [1]
    if damage.startswith("tar"):
        with pytest.raises(UserError, match=r"000001\.tar.*flowmatch verify .* --full") as error:
            PairData(tmp_path)
        assert len(error.value.faults) == 1
    write(tmp_path, 1, layout)
    assert shards.missing(tmp_path, range(3), PRINT) == []
    assert [(tmp_path / shards.tar_name(k)).read_bytes() for k in range(3)] == before
    PairData(tmp_path).batch(np.arange(30))


def test_shards_of_another_fingerprint_are_refused(tmp_path):
    layout = Layout((2,), "float32", False, 4, 4)
    write(tmp_path, 0, layout)
    for ask in (shards.done, lambda *a: shards.missing(a[0], [a[1]], a[2])):
        with pytest.raises(UserError, match=r"pairs-000000\.tar was made with another config"):
            ask(tmp_path, 0, "b" * 64)


@pytest.mark.parametrize(("dtype", "number"), [("float16", 1), ("float32", 2)])
def test_stock_readers_read_it(tmp_path, dtype, number):
    """webdataset and datasets, by files and by folder, beside manifest and sidecars."""
    layout = Layout((3, 4, 4), dtype, True, 10, 4)
    folder = tmp_path / "pairs"
    x0, x1, y = finish(folder, layout, number)
    read = stock.read(folder, tmp_path)
    assert len(read) == 5
    for who, found in read.items():
        assert set(found) == {"x0.npy", "x1.npy", "y.npy"}, who
        assert np.array_equal(found["x0.npy"], x0), who
        assert np.array_equal(found["x1.npy"], x1), who
        assert np.array_equal(found["y.npy"], y), who
    assert read["webdataset"]["x0.npy"].dtype == dtype
