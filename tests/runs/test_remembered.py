"""Digests of large files: computed once, and again when a file has changed."""

import os
import time

import pytest

from flowmatch.models import networks
from flowmatch.models.digest import files_digest, loaded_digest, module_digest
from flowmatch.runs import remembered


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "LARGE", 4)
    monkeypatch.setattr(remembered, "SETTLED", 0.0)
    (tmp_path / "a").write_bytes(b"large")
    return tmp_path / "a"


def digest(files, calls, what="bytes"):
    def compute():
        calls.append(1)
        return files[0].read_bytes().hex()

    return remembered.digest(files, what, compute)


def test_a_large_file_is_hashed_once_until_it_changes(file):
    calls = []
    assert digest([file], calls) == digest([file], calls) == b"large".hex()
    assert len(calls) == 1
    digest([file], calls, "another way")
    assert len(calls) == 2
    time.sleep(0.01)
    was = file.stat()
    file.write_bytes(b"LARGE")  # of the same size, and with the time of before
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert digest([file], calls) == b"LARGE".hex()
    assert len(calls) == 3
    saved = list((file.parent / "cache/flowmatch/digests").iterdir())
    assert len(saved) == 2
    for path in saved:
        path.write_text("{")  # damaged
    assert digest([file], calls) == b"LARGE".hex()
    assert len(calls) == 4


def test_small_files_and_those_just_written_are_hashed_each_time(file, monkeypatch):
    calls = []
    monkeypatch.setattr(remembered, "SETTLED", 60.0)
    digest([file], calls), digest([file], calls)
    monkeypatch.setattr(remembered, "SETTLED", 0.0)
    monkeypatch.setattr(remembered, "LARGE", 6)
    digest([file], calls), digest([file], calls)
    assert len(calls) == 4
    assert not (file.parent / "cache").exists()


def test_a_network_is_known_by_its_files(file):
    from diffusers import UNet2DModel

    from tests.stages import UNET

    for seed, name in ((0, "one"), (1, "two")):
        import torch

        torch.manual_seed(seed)
        UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **UNET).save_pretrained(
            file.parent / name
        )
    one, two = (networks.load(file.parent / name, "net") for name in ("one", "two"))
    assert files_digest(one) != files_digest(two)
    assert loaded_digest(one, module_digest) == module_digest(one)
    assert loaded_digest(one, module_digest) == module_digest(one)
    assert files_digest(one.half()) == files_digest(networks.load(file.parent / "one", "net"))
