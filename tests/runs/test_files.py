"""Files that nobody else can lead astray, names that are of one machine, what killed processes left."""

import os
import stat

import pytest

from flowmatch.config import UserError
from flowmatch.pairs.cache import Cache
from flowmatch.pairs.layout import Layout
from flowmatch.pairs.shards import tar_name
from flowmatch.runs import files, storage
from flowmatch.runs.files import Scratch, write_atomic
from tests.store import finish, write

LAYOUT = Layout((2,), "float32", False, 8, 4)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_worker_has_the_id_of_its_machines_boot(tmp_path, monkeypatch):
    """Two machines of one host name."""
    (tmp_path / "boot").write_text("0123456789-ab\n")
    mine = files.worker()
    monkeypatch.setattr(files, "BOOT", tmp_path / "boot")
    assert "-01234567" in files.worker()
    assert files.worker() != mine
    assert files.worker().endswith(f".{os.getpid()}")
    monkeypatch.setattr(files, "BOOT", tmp_path / "none")
    assert "-01234567" not in files.worker()


def test_no_link_of_another_user_is_followed(tmp_path, monkeypatch):
    """To a victim's file, under each name that we are going to write to."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    store = storage.at("memory://links/set")
    for folder, name in (
        (tmp_path, f"a.json.tmp.{files.worker()}"),
        (store.scratch, f"{tar_name(0)}.tmp.{files.worker()}"),
    ):
        (folder / name).symlink_to(victim)
    write_atomic(tmp_path / "a.json", "{}")
    write(store, 0, LAYOUT)
    cache = Cache(store, tmp_path / "cache", 2, LAYOUT.tar_bytes, {})
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache" / f"{tar_name(0)}.part").symlink_to(victim)
    with pytest.raises(UserError, match="cannot be stored in .*cache"):
        cache.open(tar_name(0))
    assert victim.read_text() == "precious"
    assert {mode(tmp_path / "cache"), mode(store.scratch), mode(store.scratch.parent)} == {0o700}


def test_a_folder_that_another_user_has_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    finish("memory://users/set", LAYOUT, 1)
    store = storage.at("memory://users/set")
    (tmp_path / "cache").mkdir()
    cache = Cache(store, tmp_path / "cache", 2, LAYOUT.tar_bytes, {})
    ours = os.getuid()
    os.rename(tmp_path / f"flowmatch-{ours}", tmp_path / f"flowmatch-{ours + 1}")
    monkeypatch.setattr(files.os, "getuid", lambda: ours + 1)
    with pytest.raises(UserError, match=r"is another user's, or no folder; set TMPDIR to a folder"):
        _ = store.scratch
    with pytest.raises(UserError, match=r"is another user's, or no folder; set cache to a folder"):
        cache.open(tar_name(0))
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    with pytest.raises(UserError, match="or no folder; why"):
        files.own_folder(tmp_path / "link", "why")


def test_what_is_built_appears_whole_and_what_goes_leaves_no_half(tmp_path, monkeypatch):
    scratch = Scratch(tmp_path)
    before = os.umask(0o007)
    try:
        for number in range(2):
            built = scratch.build("net")
            assert not list(built.iterdir())
            (built / "inner").mkdir()
            for file in (built / "w", built / "inner" / "w"):
                file.write_text(str(number))
                file.chmod(0o600)
            scratch.place(built, tmp_path / "net")
            assert (tmp_path / "net/inner/w").read_text() == str(number)
    finally:
        os.umask(before)
    assert mode(tmp_path / "net/w") == mode(tmp_path / "net/inner/w") == 0o660

    def killed(path, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            scratch.discard(tmp_path / "net")
    assert (tmp_path / "net/w").exists()  # before the rename
    with monkeypatch.context() as patch:
        calls = []
        rmtree = files.shutil.rmtree
        patch.setattr(
            files.shutil,
            "rmtree",
            lambda path, **more: (
                calls.append(path) or (killed(path) if calls[1:] else rmtree(path))
            ),
        )
        (tmp_path / ".scratch/net.old").mkdir(parents=True, exist_ok=True)
        with pytest.raises(KeyboardInterrupt):
            scratch.discard(tmp_path / "net")
    assert not (tmp_path / "net").exists()  # after it
    scratch.sweep()
    assert not list(tmp_path.iterdir())
