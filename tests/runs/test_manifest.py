"""Seals: pure functions of content; damage is named."""

import json

import pytest

from flowmatch.config import NotReady, UserError
from flowmatch.runs import files, manifest
from flowmatch.runs.files import Folder, write_atomic


def make(folder, **facts):
    folder.mkdir(exist_ok=True)
    (folder / "w.bin").write_bytes(b"weights")
    return manifest.seal(
        folder,
        stage="train_flow",
        config={"lr": 0.1},
        inputs={"data": "abc"},
        outputs=["w.bin"],
        **facts,
    )


def test_two_folders_of_the_same_content_have_the_same_seal(tmp_path):
    make(tmp_path / "a", round=0)
    make(tmp_path / "b", round=0)
    assert manifest.digest(tmp_path / "a") == manifest.digest(tmp_path / "b")
    text = (tmp_path / "a" / "manifest.json").read_text()
    assert str(tmp_path) not in text


def test_a_seal_is_read_back_and_verified(tmp_path):
    written = make(tmp_path / "a", round=0)
    assert manifest.read(tmp_path / "a", "teacher", ["train_flow"]) == written
    manifest.verify(tmp_path / "a", "teacher", written)
    (tmp_path / "a" / "w.bin").write_bytes(b"Weights")
    with pytest.raises(UserError, match=r"teacher=.*w.bin is not the file that was sealed"):
        manifest.verify(tmp_path / "a", "teacher", written)
    (tmp_path / "a" / "w.bin").unlink()
    with pytest.raises(UserError, match="w.bin is missing"):
        manifest.verify(tmp_path / "a", "teacher", written)


def test_inputs_that_are_not_ready_or_not_right_are_refused(tmp_path):
    with pytest.raises(NotReady, match="teacher=.* does not exist"):
        manifest.read(tmp_path / "none", "teacher")
    (tmp_path / "early").mkdir()
    with pytest.raises(NotReady, match="has not finished"):
        manifest.read(tmp_path / "early", "teacher")
    make(tmp_path / "a")
    with pytest.raises(UserError, match="result of train_flow; expected one of generate_pairs"):
        manifest.read(tmp_path / "a", "pairs", ["generate_pairs"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', "null", "\x00\xff"])
def test_a_damaged_manifest_is_our_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        manifest.read(tmp_path, "teacher")


def test_another_format_is_refused(tmp_path):
    make(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        manifest.read(tmp_path / "a", "teacher")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert path.read_text() == "old"


def test_what_is_read_is_hashed_and_nothing_else_is_asked(tmp_path, monkeypatch):
    written = make(tmp_path / "a", round=0)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "exists", lambda folder: pytest.fail("asked"))
        found = manifest.read_hashed(tmp_path / "a", "teacher")
    assert found == (written, manifest.digest(tmp_path / "a"))
    with pytest.raises(UserError, match=r"w\.bin is a file; expected the folder of a finished"):
        manifest.read(tmp_path / "a" / "w.bin", "teacher")
