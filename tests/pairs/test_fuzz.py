"""Damage at random: whatever stands in the files, readers answer with our error, and execute nothing."""

import json
import os
import pickle
from contextlib import suppress

import numpy as np
import pytest

from flowmatch.config import UserError
from flowmatch.evaluation import figures
from flowmatch.pairs import shards
from flowmatch.pairs.dataset import PairData
from pipelines import inspect_pairs, verify_pairs
from scripts.torture import damage
from scripts.torture.damage import bytes_at_random
from tests import pairset
from tests.pairset import LAYOUT, contents, copy, generate

ROUNDS = 30
FILES = {
    "tar": "pairs-000001.tar",
    "sidecar": ".meta/pairs-000001.json",
    "manifest": "manifest.json",
    "config": "config.yaml",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    pairset.make_teacher(root / "flow")
    generate(*pairset.words(root))
    return root


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(figures, "pairs", lambda *_: None)
    monkeypatch.setattr(figures, "costs", lambda *_: None)


def read_all(folder):
    data = PairData(folder)
    data.batch(range(len(data)))


def look(folder, root, capsys):
    """Let everyone who reads the folder read it; return how many found no fault."""
    sound = 0
    with suppress(UserError):
        read_all(folder)
    with suppress(UserError):
        shards.missing(folder, range(3), "a" * 64)
    with suppress(UserError):
        generate(*pairset.words(root), "--dry-run")
    with suppress(UserError):
        generate(str(folder / "config.yaml"), "--dry-run")
    for main, flags in [
        (verify_pairs.main, []),
        (verify_pairs.main, ["--full"]),
        (inspect_pairs.main, ["--out", str(root / "look")]),
    ]:
        status = main([str(folder), *flags])
        assert status in (0, 2)
        sound += status == 0
        assert "Traceback" not in "".join(capsys.readouterr())
    return sound


@pytest.mark.parametrize("how", [bytes_at_random, damage.value], ids=["bytes", "values"])
@pytest.mark.parametrize("kind", FILES)
def test_damage_at_random_is_never_more_than_our_error(whole, tmp_path, capsys, kind, how):
    if how is damage.value and kind in ("tar", "config"):
        pytest.skip("no JSON")
    folder = copy(whole, tmp_path)
    path, rng = folder / FILES[kind], np.random.default_rng(list(FILES).index(kind))
    raw, found = path.read_bytes(), 0
    for _ in range(ROUNDS):
        path.write_bytes(damaged := how(raw, rng))
        found += look(folder, tmp_path, capsys) < 3
        if kind == "tar" and damaged != raw:
            assert verify_pairs.main([str(folder), "--full"]) == 2
    assert found > ROUNDS / 4
    path.write_bytes(raw)
    assert look(folder, tmp_path, capsys) == 3
    assert contents(folder) == contents(whole / "pairs")  # nobody changed anything


@pytest.mark.parametrize("seed", range(4))
def test_damage_at_random_is_mended(whole, tmp_path, capsys, seed):
    """Several files at once; two rounds at most of what verify_pairs says, and the set is whole."""
    from tests.pairs.test_faults import mend

    folder, rng = copy(whole, tmp_path), np.random.default_rng(seed)
    for _ in range(4):
        kind = list(FILES)[int(rng.integers(3))]
        name = FILES[kind].replace("000001", f"{int(rng.integers(3)):06d}")
        (folder / name).write_bytes(bytes_at_random((folder / name).read_bytes(), rng))
    for _ in range(3):
        capsys.readouterr()
        if verify_pairs.main([str(folder), "--full"]) == 0:
            break
        mend(capsys.readouterr().err, tmp_path)
    else:
        pytest.fail("not mended")
    assert contents(folder) == contents(whole / "pairs")
    read_all(folder)


def trap(sentinel):
    """What would make a file, were it unpickled."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(sentinel),)

    return pickle.dumps(Trap())


def test_nothing_in_a_file_is_executed(whole, tmp_path, capsys):
    """A pickle where a member's values are, an object in its .npy header, a call in the YAML."""
    sentinel, folder = tmp_path / "executed", copy(whole, tmp_path)
    tar, side = folder / FILES["tar"], folder / FILES["sidecar"]
    config = folder / FILES["config"]
    raw, text = tar.read_bytes(), config.read_text()
    place = int(LAYOUT.offsets(0)["x1"])
    payload = trap(sentinel)
    pickle.loads(trap(tmp_path / "it_works"))
    assert (tmp_path / "it_works").is_dir()
    header = raw[place - 128 : place].replace(b"'<f2'", b"'|O' ")
    assert header != raw[place - 128 : place]
    for content in (
        raw[:place] + payload + raw[place + len(payload) :],
        raw[: place - 128] + header + payload + raw[place + len(payload) :],
        raw[: place - 128] + payload + raw[place - 128 + len(payload) :],
    ):
        tar.write_bytes(content)
        look(folder, tmp_path, capsys)
        sums = json.loads(side.read_text()) | {"sha256": shards.hashlib.sha256(content).hexdigest()}
        side.write_text(json.dumps(sums))
        look(folder, tmp_path, capsys)
    tar.write_bytes(raw)
    calls = [
        f"!!python/object/apply:os.mkdir ['{sentinel}']",
        f"seed: !!python/object/apply:os.mkdir ['{sentinel}']",
        f"{text}\nseed: !!python/object/new:os.mkdir ['{sentinel}']",
        "!!python/name:os.system",
        "{" * 5000,
        "&a [*a]",
        f"{text}\nseed: ${{oc.create:{{}}}}",
        f"{text}\nteacher: ${{oc.env:HOME}}",
    ]
    for call in calls:
        config.write_text(call)
        look(folder, tmp_path, capsys)
    for name in ("manifest", "sidecar"):
        for content in (payload, b"[" * 10**5, b"\x80\x04", b'{"format": ' + b"9" * 5000 + b"}"):
            (folder / FILES[name]).write_bytes(content)
            look(folder, tmp_path, capsys)
    assert not sentinel.exists()
