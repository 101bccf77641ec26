"""Every fault of a set of pairs is found, named, and mended by the commands that are printed.

Each is done to a sealed set and to one that is not finished; what is mended equals what was there
before, and no shard but the bad one is made again.
"""

import io
import json
import os
import re
import shlex
import tarfile

import numpy as np
import pytest

from flowmatch.config import NotReady
from flowmatch.pairs import shards
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from pipelines import verify_pairs
from tests import pairset
from tests.pairset import LAYOUT, contents, copy, generate

TAR, SIDE = "pairs-000001.tar", ".meta/pairs-000001.json"
MEMBER = int(LAYOUT.member_bytes("x0", 4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound set; nobody changes it."""
    root = tmp_path_factory.mktemp("whole")
    pairset.make_teacher(root / "flow")
    generate(*pairset.words(root))
    generate(*pairset.words(root, "seed=1", folder="other"))
    return root


def verify(capsys, folder, *flags):
    """Run verify_pairs in this process: exit status, standard output, standard error."""
    capsys.readouterr()
    status = verify_pairs.main([str(folder), *flags])
    return status, *capsys.readouterr()


def commands(err):
    """The commands that verify_pairs printed."""
    return re.findall(r"^\w+: +(flowmatch .*)$", err, re.MULTILINE)


def mend(err, root=None):
    """Run the commands that verify_pairs printed."""
    for line in commands(err):
        _, program, *argv = shlex.split(line)
        if program == "verify":
            assert verify_pairs.main(argv) == 2
            continue
        assert program == "pairs"
        if argv[0].startswith("THE_CONFIG"):
            argv = pairset.words(root)
        generate(*argv)


def flip(path, place, bit=1):
    raw = bytearray(path.read_bytes())
    raw[place] ^= bit
    path.write_bytes(raw)


def overwrite(path, place, content):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rehash(folder):
    """Let the sidecar agree with the tar: whoever wrote the one wrote the other."""
    edit(folder / SIDE, sha256=manifest.sha256_file(folder / TAR))


def without_a_member(folder):
    """Write the tar again without the second block's x1."""
    tar, out = folder / TAR, io.BytesIO()
    with (
        tarfile.open(tar) as old,
        tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for info in old:
            if info.name != "000001-000004.x1.npy":
                new.addfile(info, old.extractfile(info))
    tar.write_bytes(out.getvalue())  # whole records: as long as before


def values(folder, name, content):
    """Overwrite the first values of a member, and let the sidecar agree."""
    overwrite(folder / TAR, LAYOUT.offsets(5)[name], content)
    rehash(folder)


def foreign(folder, k=1):
    """Put a shard of another seed in the place of shard k."""
    for path in (TAR, SIDE):
        content = (folder.parent / "other" / path).read_bytes()
        (folder / path.replace("000001", f"{k:06d}")).write_bytes(content)


NAN, FAR = np.float16([np.nan]).tobytes(), np.int64([9]).tobytes()
SHARD = {  # what is done to shard 1 -> what is said
    "cut at a member": (lambda f: os.truncate(f / TAR, MEMBER), "has 1024 bytes, its sidecar says"),
    "cut in a header": (lambda f: os.truncate(f / TAR, MEMBER + 200), "has 1224 bytes"),
    "cut in the values": (lambda f: os.truncate(f / TAR, 3 * MEMBER - 380), "has 2692 bytes"),
    "made longer": (lambda f: os.truncate(f / TAR, 20480), "has 20480 bytes"),
    "empty": (lambda f: os.truncate(f / TAR, 0), "has 0 bytes"),
    "a hole of zeros": (
        lambda f: overwrite(f / TAR, MEMBER, bytes(1024)),
        "at byte 1024 expected the header of 000001-000000.x1.npy",
    ),
    "a bit of a size": (
        lambda f: flip(f / TAR, MEMBER + 124 + 9),
        "at byte 1024 expected the header",
    ),
    "a bit of a name": (lambda f: flip(f / TAR, MEMBER + 3), "at byte 1024 expected the header"),
    "a bit of a .npy header": (lambda f: flip(f / TAR, MEMBER + 530), "at byte 1024 expected"),
    "a member missing": (without_a_member, "expected the header of 000001-000004.x1.npy"),
    "another shard's tar": (
        lambda f: (f / TAR).write_bytes((f / "pairs-000002.tar").read_bytes()),
        "at byte 0 expected the header of 000001-000000.x0.npy",
    ),
    "dirt at the end": (lambda f: flip(f / TAR, LAYOUT.tar_bytes - 1), "the end of the archive"),
    "tar missing": (lambda f: (f / TAR).unlink(), "is missing"),
    "sidecar missing": (lambda f: (f / SIDE).unlink(), f"its sidecar {SIDE} is missing"),
    "sidecar empty": (lambda f: os.truncate(f / SIDE, 0), f"its sidecar {SIDE} is damaged"),
    "sidecar cut": (lambda f: os.truncate(f / SIDE, 70), f"its sidecar {SIDE} is damaged"),
    "sidecar of a list": (lambda f: (f / SIDE).write_text("[]"), f"its sidecar {SIDE} is damaged"),
    "sidecar nested without end": (lambda f: (f / SIDE).write_text("[" * 10**5), "is damaged"),
    "sidecar of a wrong count": (lambda f: edit(f / SIDE, count=9), "has count=9"),
    "sidecar of a wrong size": (lambda f: edit(f / SIDE, bytes=9), "its sidecar says 9"),
    "sidecar of another layout": (lambda f: edit(f / SIDE, layout={}), "has layout={}"),
    "sidecar without a hash": (lambda f: edit(f / SIDE, sha256=5), "has sha256=5"),
    "a shard of another seed": (foreign, "was made with another config or teacher"),
    "a sidecar of another seed, alone": (
        lambda f: [foreign(f), (f / TAR).unlink()],
        "was made with another config or teacher",
    ),
}
FULL = {
    "a bit of a value": (lambda f: flip(f / TAR, MEMBER + 642), "not those that were committed"),
    "a bit of the padding": (lambda f: flip(f / TAR, MEMBER - 1), "not those that were committed"),
    "a hole in the values": (
        lambda f: overwrite(f / TAR, MEMBER + 640, bytes(16)),
        "not those that were committed",
    ),
    "not finite": (
        lambda f: values(f, "x1", NAN),
        "000001-000004.x1.npy holds values that are not fin",
    ),
    "no class": (
        lambda f: values(f, "y", FAR),
        "000001-000004.y.npy holds labels outside 0 to 2",
    ),
    "sidecar of another hash": (lambda f: edit(f / SIDE, sha256="0" * 64), TAR),
}
UNSEALED_BLIND = {"no class"}  # only the seal says how many classes there are
SET = {
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 100), "manifest.json is damaged"),
    "manifest empty": (lambda f: os.truncate(f / "manifest.json", 0), "manifest.json is damaged"),
    "manifest of fewer shards": (
        lambda f: facts(f, shards=2),
        "manifest.json is damaged: shards=2, but it lists 3 tars",
    ),
    "manifest of another count": (lambda f: facts(f, count=29), "count=29, expected 30"),
    "manifest without layout": (lambda f: facts(f, layout={}), "manifest.json is damaged"),
    "manifest of an odd layout": (lambda f: facts(f, layout=[1]), "manifest.json is damaged"),
    "manifest of another hash": (
        lambda f: edit(f / "manifest.json", outputs=outputs(f) | {TAR: "0" * 64}),
        f"manifest.json has another sha256 for {TAR}",
    ),
    "manifest of another config": (lambda f: reseed(f), "manifest.json is damaged: fingerprint="),
    "manifest of another config, alone": (
        lambda f: [reseed(f), (f / "config.yaml").unlink()],
        "manifest.json is damaged: fingerprint=",
    ),
    "manifest of another round": (lambda f: facts(f, round=5), "is damaged: fingerprint="),
    "manifest of no number": (lambda f: reseed(f, float("nan")), "manifest.json is damaged"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "is not sealed"),
    "config of another seed": (
        lambda f: (f / "config.yaml").write_text(
            (f / "config.yaml").read_text().replace("seed: 0", "seed: 9")
        ),
        "differs from what was sealed: seed: 0 -> 9",
    ),
    "config that is none": (
        lambda f: (f / "config.yaml").write_text("- x\n"),
        "config.yaml is damaged",
    ),
    "a tar too many": (lambda f: (f / "pairs-000003.tar").write_bytes(b"x"), "beyond the 3 shards"),
    "a shard too many": (lambda f: foreign(f, 4), "beyond the 3 shards"),
    "a stranger's tar": (lambda f: (f / "more.tar").write_bytes(b"x"), "more.tar is not a shard"),
    "card gone": (
        lambda f: (f / "README.md").unlink(),
        "README.md is missing: load_dataset may read manifest.json as the pairs",
    ),
    "both gone": (
        lambda f: [(f / TAR).unlink(), (f / SIDE).unlink()],
        f"its sidecar {SIDE} is missing",
    ),
}


def facts(folder, **values):
    path = folder / "manifest.json"
    edit(path, facts=json.loads(path.read_text())["facts"] | values)


def reseed(folder, seed=9):
    path = folder / "manifest.json"
    edit(path, config=json.loads(path.read_text())["config"] | {"seed": seed})


def outputs(folder):
    return json.loads((folder / "manifest.json").read_text())["outputs"]


def stamps(folder):
    """Which file is where, and since when."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("pairs-*.tar")}


def mended(whole, tmp_path, capsys, damage, said, sealed, full):
    """Damage a copy; find it, mend it, and compare it with what it was."""
    folder = copy(whole, tmp_path)
    if not sealed:
        (folder / "manifest.json").unlink()
    damage(folder)
    before = stamps(folder)
    flags = ["--full"] if full else []
    status, _, err = verify(capsys, folder, *flags)
    assert status == 2
    named = [line for line in err.splitlines() if said in line]
    assert len(named) == 1, err
    assert stamps(folder) == before  # a look changes nothing
    mend(err, tmp_path)
    status, out, err = verify(capsys, folder, "--full")
    assert (status, err) == (0, "")
    assert contents(folder) == contents(whole / "pairs")
    after = stamps(folder)
    healthy = {"pairs-000000.tar", "pairs-000002.tar"}
    assert {name: after[name] for name in healthy} == {name: before[name] for name in healthy}
    return out


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unfinished"])
@pytest.mark.parametrize("fault", SHARD)
def test_a_bad_shard_is_found_by_a_quick_look(whole, tmp_path, capsys, fault, sealed):
    mended(whole, tmp_path, capsys, *SHARD[fault], sealed, full=False)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unfinished"])
@pytest.mark.parametrize("fault", FULL)
def test_bad_values_are_found_by_a_full_look(whole, tmp_path, capsys, fault, sealed):
    if fault in UNSEALED_BLIND and not sealed:
        sealed = True
    mended(whole, tmp_path, capsys, *FULL[fault], sealed, full=True)


@pytest.mark.parametrize("fault", SET)
def test_a_damaged_seal_and_strangers_are_found(whole, tmp_path, capsys, fault):
    mended(whole, tmp_path, capsys, *SET[fault], True, full="another hash" in fault)


def test_what_is_left_over_is_remarked_and_swept(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path)
    dead = f"{TAR}.tmp.{shards.worker().rpartition('.')[0]}.{2**22 + 1}"
    left = [dead, f"{TAR}.tmp.elsewhere.7", f"{SIDE}.tmp.elsewhere.7", ".meta/000001.lease"]
    for name in left:
        (folder / name).write_text("half")
    status, out, err = verify(capsys, folder)
    assert (status, err) == (0, "")
    for name in left:
        assert out.count(f"left over, never read: {folder / name}\n") == 1
    verify(capsys, folder, "--repair")
    assert [name for name in left if not (folder / name).exists()] == [dead]  # others' may be alive


def test_a_lost_workers_shards_are_named(whole, tmp_path, capsys):
    """One of two workers never came, and nobody took over: 0 and 2 are there, 1 is not."""
    folder = copy(whole, tmp_path)
    for name in ("manifest.json", TAR, SIDE):
        (folder / name).unlink()
    with pytest.raises(NotReady, match="has not finished"):
        PairData(folder)
    status, _, err = verify(capsys, folder)
    assert status == 2
    assert "is not finished: shards 1 are not made yet" in err
    assert "2 of 3 shards are sound" in err
    mend(err)
    assert contents(folder) == contents(whole / "pairs")


def test_what_is_set_aside_is_kept(whole, tmp_path, capsys):
    folder = copy(whole, tmp_path)
    raw, side = (folder / TAR).read_bytes(), (folder / SIDE).read_bytes()
    for number in range(2):
        flip(folder / TAR, 700 + number)
        bad = (folder / TAR).read_bytes()
        status, out, _ = verify(capsys, folder, "--full", "--repair")
        ending = ".bad.1" if number else ".bad"
        assert status == 2
        assert f"verify_pairs: {TAR} is set aside as {TAR}{ending}\n" in out
        assert (folder / (TAR + ending)).read_bytes() == bad
        assert (folder / (SIDE + ending)).read_bytes().splitlines()[:4] == side.splitlines()[:4]
        assert shards.missing(folder, range(3), manifest_facts(folder)["fingerprint"]) == [1]
        generate(*pairset.words(tmp_path))
        assert (folder / TAR).read_bytes() == raw


def manifest_facts(folder):
    return json.loads((folder / "manifest.json").read_text())["facts"]


def test_folders_that_are_no_pairs_are_refused(whole, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, said in [
        (tmp_path / "nowhere", "does not exist or is not a folder"),
        (tmp_path / "empty", "is not a folder of pairs"),
        (whole / "flow", "holds the result of train_flow; expected that of generate_pairs"),
    ]:
        status, _, err = verify(capsys, folder)
        assert status == 2
        assert said in err
        assert err.count("\n") == 1


def test_the_printed_commands_are_for_a_shell(whole, tmp_path, capsys):
    """In a folder with a space, and with a config from another folder, sh sees the same words."""
    root = tmp_path / "my pairs"
    folder = copy(whole, root)
    flip(folder / TAR, MEMBER + 642)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(f"run_dir: {folder}", "run_dir: moved"))
    status, _, err = verify(capsys, folder, "--full")
    assert status == 2
    assert "2 of 3 shards are sound" in err
    lines = commands(err)
    assert len(lines) == 2
    assert pairset.words_in_shell("\n".join(lines), tmp_path) == [shlex.split(x) for x in lines]
    mend(err)
    assert contents(folder) == contents(whole / "pairs")
    assert verify(capsys, folder, "--full")[0] == 0
