"""Prompts beside pairs: read as written, by us and by stock readers; what does not fit is named."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch

from flowmatch.config import UserError
from flowmatch.pairs import dataset as reading
from flowmatch.pairs import matching, shards
from flowmatch.pairs.dataset import PairData
from flowmatch.pairs.layout import PROMPT, Layout, bytes_per_pair, write_prompts
from flowmatch.pairs.mixture import Mixture
from flowmatch.runs import manifest
from pipelines import inspect_pairs, verify_pairs
from tests import stock, store

LAYOUT = Layout((2, 3), "float16", True, 10, 4, prompt_bytes=48)
SOME = [
    "a cat",
    "",
    'said "so"\n\t\\',
    "Ümläute",
    "猫と犬",
    "🐒 up a tree",
    "null",
    "  ends in spaces  ",
]
GIVEN = ({"seed": 0}, {"teacher": "b" * 64}, 1)


def prompts_of(k, layout=LAYOUT):
    numbers = k * layout.shard_size + np.arange(layout.shard_size)
    return [f"{n} {SOME[n % len(SOME)]}" if n % 5 else SOME[n % len(SOME)] for n in numbers]


def blocks_of(k, layout=LAYOUT):
    texts = prompts_of(k, layout)
    for number, block in enumerate(store.blocks_of(k, layout)):
        yield *block, texts[number * layout.block :][: layout.block]


def finish(folder, number=3, layout=LAYOUT, blocks=blocks_of):
    """Write and seal a set that verify_pairs finds sound; return its prompts."""
    told = manifest.pair_fingerprint(*GIVEN, manifest.PAIR_FORMAT)
    sides = [
        shards.write_shard(folder, k, layout, blocks(k, layout), told, {}, store.CARD)
        for k in range(number)
    ]
    reseal(folder, [side["sha256"] for side in sides], layout)
    return [text for k in range(number) for text in prompts_of(k, layout)]


def reseal(folder, sums, layout=LAYOUT):
    (config, inputs, level), number = GIVEN, len(sums)
    facts = {"layout": layout.entries(), "shards": number, "count": number * layout.shard_size}
    facts |= {"classes": 10, "round": level}
    facts["fingerprint"] = manifest.pair_fingerprint(*GIVEN, manifest.PAIR_FORMAT)
    outputs = {shards.tar_name(k): total for k, total in enumerate(sums)}
    rest = {"config": config, "inputs": inputs, "outputs": outputs}
    manifest.seal(folder, stage="generate_pairs", **rest, **facts)


def test_the_layout_is_what_tarfile_finds(tmp_path):
    """The prompts come last in their block; each member has its fixed size, spaces fill it up."""
    finish(tmp_path)
    raw = (tmp_path / "pairs-000002.tar").read_bytes()
    assert len(raw) == LAYOUT.tar_bytes
    texts = []
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        members = tar.getmembers()
        assert [info.name.partition(".")[2] for info in members] == [
            *("x0.npy", "x1.npy", "y.npy", "prompt.json")
        ] * LAYOUT.blocks
        for block, info in enumerate(members[3::4]):
            pairs = int(LAYOUT.pairs(block))
            assert info.name == LAYOUT.member(2, block, PROMPT)
            assert info.size == pairs * LAYOUT.prompt_bytes
            assert info.offset_data == LAYOUT.offsets(block * LAYOUT.block)[PROMPT]
            content = tar.extractfile(info).read()
            assert content.rstrip(b" ").endswith(b"]")
            texts += json.loads(content)
    assert texts == prompts_of(2)


def test_the_reader_gives_what_was_written(tmp_path, monkeypatch):
    """In any order, through a stock loader, with few blocks kept; the rest as it is without prompts."""
    texts = finish(tmp_path / "set")
    store.finish(tmp_path / "bare", Layout((2, 3), "float16", True, 10, 4), 3)
    monkeypatch.setattr(reading, "TEXTS", 2)
    data, bare = PairData(tmp_path / "set"), PairData(tmp_path / "bare")
    order = np.random.default_rng(0).permutation(30)
    for _ in range(2):
        batch = data.batch(order)
        assert batch.pop("prompt") == [texts[i] for i in order]
        assert len(data._texts) == 2
    other = bare.batch(order)
    assert batch.keys() == other.keys()
    assert all(torch.equal(batch[name], other[name]) for name in other)
    assert data[7]["prompt"] == texts[7]
    assert pickle.loads(pickle.dumps(data))._texts == {}
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    assert [text for batch in loader for text in batch["prompt"]] == texts


def test_the_room_of_a_list_of_prompts_is_the_least_that_holds_any_block():
    room = bytes_per_pair(SOME)
    longest = max(SOME, key=lambda text: len(json.dumps(text, ensure_ascii=False).encode()))
    for pairs in (1, 3, 50):
        assert len(write_prompts([longest] * pairs, pairs * room, "here")) == pairs * room
        write_prompts((SOME * 50)[:pairs], pairs * room, "here")
        with pytest.raises(UserError, match=f"use prompt_bytes={room} or more"):
            write_prompts([longest] * pairs, pairs * (room - 1), "here")


def test_a_mixture_keeps_prompts_with_their_pairs_and_drops_nothing(tmp_path):
    texts = finish(tmp_path / "a")
    finish(tmp_path / "b", 1)
    data = PairData(tmp_path / "a")
    batch = Mixture([(data, 2.0), (PairData(tmp_path / "b"), 1.0)], 12, 0)(np.arange(12)[::-1])
    numbers = {x0.numpy().tobytes(): i for i, x0 in enumerate(data.batch(range(30))["x0"])}
    assert batch["prompt"] == [texts[numbers[x0.numpy().tobytes()]] for x0 in batch["x0"]]
    store.finish(tmp_path / "bare", Layout((2, 3), "float16", True, 10, 4), 1)
    store.finish(tmp_path / "plain", Layout((2, 3), "float16", False, 10, 4), 1)
    bare, plain = PairData(tmp_path / "bare", "pairs.1.path"), PairData(tmp_path / "plain")
    for sets in ([data, bare], [bare, data]):
        with pytest.raises(UserError, match=r"a has prompts, pairs\.1\.path=.*bare has none"):
            Mixture([(one, 1.0) for one in sets], 4, 0)
    with pytest.raises(UserError, match=r"bare has labels"):
        Mixture([(plain, 1.0), (bare, 1.0)], 4, 0)


def test_reflow_refuses_prompts(tmp_path):
    class Start:
        diffusion, shape, classes, facts = None, (2, 3), 10, {}

    finish(tmp_path, 1)
    with pytest.raises(UserError, match="has prompts; set prompts= to their list") as error:
        matching.check_match(Start, [PairData(tmp_path)])
    assert len(error.value.faults) == 1


def test_inspection_shows_some(tmp_path, capsys):
    texts = finish(tmp_path / "set")
    assert inspect_pairs.main([str(tmp_path / "set")]) == 0
    found = json.loads((tmp_path / "set_inspect" / "summary.json").read_text())
    assert found["prompts"] == texts[:4]
    assert f"prompts: {', '.join(map(repr, texts[:4]))}\n" in capsys.readouterr().out


def test_prompts_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    blocks = list(blocks_of(0))

    def changed(prompts, number=2):
        given = [*blocks]
        given[number] = (*blocks[number][:3], *prompts)
        return given

    long = json.dumps(["ß" * 60, ""], ensure_ascii=False).encode()
    assert 2 * LAYOUT.prompt_bytes < len(long) <= 2 * 64
    for prompts, message in [
        (["ß" * 60, ""], rf"shard 0 block 2: its 2 .* need {len(long)} bytes.*prompt_bytes=64 or"),
        (["\ud800", ""], "shard 0 block 2: a prompt is not Unicode"),
        (["one"], "1 prompts; expected 2 strings"),
        ([b"one", "two"], "expected 2 strings"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.write(tmp_path, 0, LAYOUT, changed([prompts]))
    with pytest.raises(ValueError, match="0 prompts; expected 2 strings"):
        store.write(tmp_path, 0, LAYOUT, changed([]))
    bare = Layout((2, 3), "float16", True, 10, 4)
    with pytest.raises(ValueError, match="the layout has no prompts"):
        store.write(tmp_path, 0, bare, blocks)
    assert not list(tmp_path.glob("*.tar*"))
    roomier = Layout((2, 3), "float16", True, 10, 4, prompt_bytes=64)
    store.write(tmp_path, 0, roomier, changed([["ß" * 60, ""]]))
    sizes = [(-1, "0 or more"), (2**32, "8 GiB"), (True, "expected integers for the sizes")]
    for size, message in sizes:
        with pytest.raises(UserError, match=message):
            Layout((2,), "float16", False, 4, 4, prompt_bytes=size)


def test_a_set_without_prompts_says_nothing_of_them(tmp_path):
    """What was made before reads as before, and what is made now is the same."""
    bare = Layout((2, 3), "float16", True, 10, 4)
    assert "prompt_bytes" not in bare.entries()
    assert "prompt_bytes" not in store.write(tmp_path, 0, bare)["layout"]
    for layout in (bare, LAYOUT):
        assert Layout(**json.loads(json.dumps(layout.entries()))) == layout


def test_stock_readers_read_it(tmp_path):
    texts = finish(tmp_path / "pairs", 2)
    batch = PairData(tmp_path / "pairs").batch(range(20))
    read = stock.read(tmp_path / "pairs", tmp_path)
    assert len(read) == 5
    for who, found in read.items():
        assert set(found) == {"x0.npy", "x1.npy", "y.npy", "prompt.json"}, who
        assert found["prompt.json"].tolist() == texts, who
        assert np.array_equal(found["x1.npy"], batch["x1"].numpy()), who


DAMAGE = {
    "no JSON": b'["a", "b" "c", "d"]',
    "no UTF-8": b'["\xff", "b", "c", "d"]',
    "too few": b'["a", "b", "c"]',
    "no strings": b'["a", "b", "c", 4]',
    "no list": b'{"a": 1, "b": 2, "c": 3, "d": 4}',
    "deep": b"[" * 192,
    "zeros": bytes(192),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_in_full_and_by_the_reader(tmp_path, capsys, damage):
    """Even where sidecar and seal agree with the tar: whoever wrote the one wrote the others."""
    texts = finish(tmp_path, 2)
    assert verify_pairs.main([str(tmp_path), "--full"]) == 0
    tar, side = tmp_path / "pairs-000001.tar", tmp_path / ".meta/pairs-000001.json"
    raw, place = bytearray(tar.read_bytes()), int(LAYOUT.offsets(4)[PROMPT])
    raw[place : place + 192] = DAMAGE[damage].ljust(192)
    tar.write_bytes(raw)
    assert verify_pairs.main([str(tmp_path)]) == 0  # headers alone
    total = hashlib.sha256(raw).hexdigest()
    side.write_text(json.dumps(json.loads(side.read_text()) | {"sha256": total}))
    reseal(tmp_path, [manifest.sha256_file(tmp_path / "pairs-000000.tar"), total])
    capsys.readouterr()
    assert verify_pairs.main([str(tmp_path), "--full"]) == 2
    said = "000001-000004.prompt.json is not a JSON list of 4 strings"
    assert f"pairs-000001.tar is damaged: {said}" in capsys.readouterr().err
    data = PairData(tmp_path)
    assert data.batch([10, 13, 18])["prompt"] == [texts[10], texts[13], texts[18]]
    for _ in range(2):
        with pytest.raises(UserError, match=rf"000001\.tar is damaged: {said}.*flowmatch verify"):
            data.batch([0, 15])


def test_a_damaged_header_is_found_by_all(tmp_path, capsys):
    finish(tmp_path, 2)
    tar = tmp_path / "pairs-000001.tar"
    raw, place = bytearray(tar.read_bytes()), int(LAYOUT.offsets(4)[PROMPT]) - 512
    raw[place : place + 4] = b"zero"
    tar.write_bytes(raw)
    for flags in ([], ["--full"]):
        assert verify_pairs.main([str(tmp_path), *flags]) == 2
        assert f"at byte {place} expected the header of 000001-000004" in capsys.readouterr().err
    with pytest.raises(UserError, match="its bytes are not those that were sealed"):
        PairData(tmp_path).batch([15])
