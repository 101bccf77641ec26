"""Prompts: every source, every refusal with its line, templates, sides, digests and numbers."""

import csv
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from flowmatch.config import Config, NotReady, UserError, content, option, validate
from flowmatch.data import prompts
from flowmatch.data.config import PromptsConfig
from flowmatch.flow import noise

TEXTS = ["a red fox, in snow", 'the "old" town', "ein Käfer", "狐", "no. 7  "]


class Stage(Config):
    prompts: PromptsConfig | None = option(None, "prompts")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Write lists into a temporary folder; keep datasets' cache there, and the hub out of reach."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path


def load(given=None, **values):
    return prompts.load(validate(Stage, {"prompts": given or values}).prompts)


def refusal(given=None, **values):
    with pytest.raises(UserError) as caught:
        load(given, **values)
    return str(caught.value)


def lines(name, *texts, end="\n", head=b""):
    with open(name, "wb") as file:
        file.write(head)
        for text in texts:
            file.write((text if isinstance(text, bytes) else text.encode()) + end.encode())


def tar_of(name, rows):
    with webdataset.TarWriter(str(name), mtime=0) as tar:
        for i, row in enumerate(rows):
            tar.write({"__key__": f"{i:04d}", "jpg": b"no picture"} | row)


# ---- sources


def test_every_kind_of_list_gives_the_same_prompts(inside):
    """BOM, CRLF and a missing last newline belong to the file, spaces to the text."""
    import datasets

    lines("a.txt", *TEXTS)
    lines("crlf.txt", *TEXTS, end="\r\n", head=b"\xef\xbb\xbf")
    (inside / "open.txt").write_text("\n".join(TEXTS))
    lines("a.jsonl", *(json.dumps({"id": 3, "caption": text}) for text in TEXTS))
    lines("a.json", *(json.dumps(text, ensure_ascii=False) for text in TEXTS))
    with open("a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["n", "text"], *([i, text] for i, text in enumerate(TEXTS))])
    table = datasets.Dataset.from_dict({"n": range(5), "prompt": TEXTS})
    table.to_parquet("a.parquet")
    table.save_to_disk("saved")
    datasets.DatasetDict({"test": table}).save_to_disk("splits")
    tar_of("a.tar", [{"txt": text + "\n"} for text in TEXTS])
    (inside / "two").mkdir()
    lines("two/1.txt", *TEXTS[:2])
    tar_of("two/1.tar", [{"json": {"caption": text, "n": 1}} for text in TEXTS[:2]])
    tar_of("two/2.tar", [{"json": {"caption": text, "n": 1}} for text in TEXTS[2:]])
    lines("two/2.txt", *TEXTS[2:])
    for name in ("a.txt", "crlf.txt", "open.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert load(name).texts == TEXTS, name
    for name in ("saved", "a.tar", "two/*.txt", "two/*.tar"):
        assert load(name).texts == TEXTS, name
    assert load(path="splits", split="test").texts == TEXTS
    assert load("a.csv").digest == load("a.tar").digest
    assert load("a.txt").weights is None


def test_a_tar_is_read_whole_on_every_rank(monkeypatch):
    tar_of("a.tar", [{"txt": text, "json": {"caption": "another"}} for text in TEXTS])
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "WORKER": "0", "NUM_WORKERS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert load(path="a.tar", column="txt").texts == TEXTS


def test_columns_and_weights_are_chosen_by_name():
    rows = [{"text": "x", "say": text, "w": i + 0.5} for i, text in enumerate(TEXTS)]
    lines("a.jsonl", *map(json.dumps, rows))
    found = load(path="a.jsonl", column="say", weight_column="w")
    assert found.texts == TEXTS
    assert found.weights.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


# ---- refusals


def test_faults_are_told_by_line_all_at_once():
    lines("a.txt", "fox", "", "owl", b"caf\xe9", "a\0b", "fox", "  ", "a\x1b[0m", "tab\tis text")
    assert refusal("a.txt").splitlines() == [
        "prompts.path=a.txt: line 2 is empty; remove it",
        "prompts.path=a.txt: line 4 is not UTF-8; save the list as UTF-8",
        "prompts.path=a.txt: line 5 holds the character U+0000; remove it",
        "prompts.path=a.txt: line 7 is empty; remove it",
        "prompts.path=a.txt: line 8 holds the character U+001B; remove it",
        "prompts.path=a.txt: line 6 repeats line 1",
    ]
    lines("a.txt", *[""] * 5000, *TEXTS)
    told = refusal("a.txt").splitlines()
    assert len(told) == 9
    assert told[8] == "prompts.path=a.txt: 4,992 more faults like these"


def test_faults_of_rows(inside):
    rows = ['{"prompt": "a"}', '{"prompt": 3}', "{", '{"p": "b"}', '{"prompt": "\\ud800"}', "", "7"]
    lines("a.jsonl", *rows)
    told = refusal("a.jsonl").splitlines()
    assert told[0] == "prompts.path=a.jsonl: line 2 holds 3; expected a string"
    assert told[1].startswith("prompts.path=a.jsonl: line 3 is not JSON, an object or a string")
    assert told[2] == "prompts.path=a.jsonl: line 4 holds None; expected a string"
    assert "line 5 is not UTF-8" in told[3]
    assert "line 6 is empty" in told[4]
    assert "line 7 holds 7; expected a string" in told[5]
    given = [1, 0, -1, True, "x", "2.5", None, "nan", 10**400]
    lines("w.jsonl", *(json.dumps({"prompt": f"p{i}", "w": w}) for i, w in enumerate(given)))
    told = refusal(path="w.jsonl", weight_column="w")
    assert [int(line.split("line ")[1][0]) for line in told.splitlines()] == [2, 3, 4, 5, 7, 8, 9]
    assert "line 3 has the weight -1; expected a positive number" in told
    lines("a.csv", "prompt,n", "a fox, in snow,1", "an owl,2")
    assert "row 1 has 3 fields, but the header 2; quote prompts" in refusal("a.csv")
    tar_of("a.tar", [{"txt": b"fox"}, {"txt": b"caf\xe9"}, {"json": b"{"}])
    told = refusal("a.tar")
    assert "row 2 is not UTF-8" in told
    assert "row 3 is not JSON" in told
    (inside / "two").mkdir()
    lines("two/1.txt", "fox", "owl")
    lines("two/2.txt", "bee", "owl")
    assert refusal("two") == (
        "prompts.path=two: 2.txt: line 2 repeats prompts.path=two: 1.txt: line 2"
    )


def test_lists_that_cannot_be_read(inside):
    with pytest.raises(NotReady, match="prompts.path=none.txt does not exist"):
        load("none.txt")
    (inside / "mixed").mkdir()
    lines("mixed/a.txt", "fox")
    lines("mixed/a.csv", "prompt", "fox")
    lines("empty.txt")
    lines("a.txt", *TEXTS)
    lines("c.jsonl", json.dumps({"caption": "fox", "text": "owl", "n": 1}))
    lines("d.jsonl", json.dumps({"n": 1}))
    tar_of("cut.tar", [{"txt": text} for text in TEXTS])
    (inside / "cut.tar").write_bytes((inside / "cut.tar").read_bytes()[:2048])
    lines("broken.csv", "prompt", '"fox')
    (inside / "broken.tar").write_bytes(b"no tar" * 200)
    (inside / "broken.parquet").write_bytes(b"no parquet")
    (inside / "saved").mkdir()
    lines("saved/dataset_info.json", "{}")
    (inside / "pictures").mkdir()
    lines("pictures/a.png", "fox")
    table = {
        "empty.txt": "empty.txt has no prompts",
        "mixed": "has .csv and .txt; expected files of one kind",
        "pictures": "has no lists of prompts; expected",
        "c.jsonl": "several columns can be the prompts; set column; the columns are caption, text, n",
        "d.jsonl": "no column can be the prompts; set column; the columns are n",
        "broken.csv": "broken.csv cannot be read: unexpected end of data",
        "broken.tar": "broken.tar is not a whole tar: it begins like no tar",
        "cut.tar": "cut.tar is not a whole tar: it is cut off",
        "broken.parquet": "broken.parquet is not a whole parquet file: ",
        "saved": "saved cannot be read: ",
        "a/b/c": "does not exist; expected a folder, a file, a glob, or a name on the hub",
        "an-owner/a-set": "the hub cannot be reached",
    }
    for name, what in table.items():
        assert what in refusal(name), name
        assert "\n" not in refusal(name), name
    assert "has one prompt a line; remove" in refusal(path="a.txt", column="prompt")
    assert "is no dataset; remove prompts.split" in refusal(path="a.txt", split="test")
    assert "has no column x; the columns are n" in refusal(path="d.jsonl", column="x")
    assert "no weight_column w" in refusal(path="c.jsonl", column="text", weight_column="w")


def test_configs_that_contradict_themselves():
    words = {"animal": ["fox"], "place": ["snow"], "time": []}
    assert refusal(templates=["a {animal} at {time} in {colour}"], words=words) == (
        f"prompts.words={words}: no words for {{time}}, which a template has; no words for {{colour}}, "
        "which a template has; no template has the place {place}"
    )
    for bad in ("a {", "a {0}", "a {animal!r}", "a {animal:3}", "a {animal.name}", "a {}"):
        assert "write a place as {word}" in refusal(templates=[bad], words={"animal": ["fox"]}), bad
    many = {name: ["x"] * 100 for name in "abcd"}
    assert "100,000,000 prompts; expected at most" in refusal(templates="{a}{b}{c}{d}", words=many)
    assert "there are no prompts; set path" in refusal(negative="blurry")
    assert "set path, or remove this key" in refusal(templates="fox", column="text")
    for bad in (1, -0.1, True, "", [0.1]):
        assert "expected a share in [0, 1), or the path" in refusal(templates="fox", held_out=bad)


# ---- templates, sides, digests, numbers


def test_templates_are_filled_in_a_fixed_order_before_the_list():
    lines("a.txt", "fox", "owl")
    words = {"n": ["one", "two"], "what": ["fox", "owl", "bee"]}
    found = load(
        path="a.txt", templates=["{n} {what}, {n}", "a {{brace}}"], words=words, negative="dark"
    )
    assert found.texts == [
        *("one fox, one", "one owl, one", "one bee, one", "two fox, two", "two owl, two"),
        *("two bee, two", "a {brace}", "fox", "owl"),
    ]
    assert found.negative == "dark"
    assert found.longest == "one fox, one"
    assert load(templates="fox").texts == ["fox"]
    told = refusal(path="a.txt", templates=["bee", "owl"])
    assert told == "prompts.path=a.txt: line 2 repeats prompts.templates: prompt 2"


def test_a_prompts_side_depends_on_its_text_and_the_share_alone():
    texts = [f"prompt {i}" for i in range(2000)]
    lines("a.txt", *texts)
    lines("b.txt", *texts[::-1], *(f"more {i}" for i in range(500)))
    small, large = load(path="a.txt", held_out=0.1), load(path="a.txt", held_out=0.2)
    longer = load(path="b.txt", held_out=0.1)
    assert abs(len(small.held_out) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert sorted(small.texts + small.held_out) == sorted(texts)
    assert small.texts == [text for text in texts if text not in set(small.held_out)]
    assert set(small.held_out) < set(large.held_out)
    assert [text for text in longer.held_out if text in set(texts)] == small.held_out[::-1]
    value = int.from_bytes(hashlib.sha256(small.held_out[0].encode()).digest()[:6]) / 2**48
    assert value < 0.1
    assert load("a.txt").held_out == []
    lines("few.txt", *TEXTS)
    assert "0 of the 5 prompts fall in this share" in refusal(path="few.txt", held_out=0.001)
    assert "5 of the 5 prompts fall in this share" in refusal(path="few.txt", held_out=0.999)


def test_held_out_prompts_of_another_list():
    lines("a.jsonl", *(json.dumps({"say": text, "text": "", "w": 1}) for text in TEXTS))
    lines("held.txt", "bee", "ant")
    found = load(path="a.jsonl", column="say", weight_column="w", held_out="held.txt")
    assert (found.texts, found.held_out) == (TEXTS, ["bee", "ant"])
    lines("held.txt", "bee", "狐", "bee")
    assert refusal(path="a.jsonl", column="say", held_out="held.txt").splitlines() == [
        "prompts.held_out=held.txt: line 2 is a training prompt; remove it",
        "prompts.held_out=held.txt: line 3 repeats line 1",
    ]
    with pytest.raises(NotReady, match="prompts.held_out=none.txt does not exist"):
        load(templates="fox", held_out="none.txt")


def weighted(count=200, side=0.0):
    rows = [{"prompt": f"prompt {i}", "w": 1 + i % 3} for i in range(count)]
    lines("w.jsonl", *map(json.dumps, rows))
    return load(path="w.jsonl", weight_column="w", held_out=side)


def test_weights_stay_with_their_prompts():
    found = weighted(side=0.3)
    assert [1 + int(text.split()[1]) % 3 for text in found.texts] == found.weights.tolist()


def test_the_digest_is_of_all_that_decides_a_pair_and_of_prefixes():
    lines("a.txt", *TEXTS)
    lines("more.txt", *TEXTS, "one more, and longer than all the others")
    lines("other.txt", *TEXTS[::-1])
    found, more = load("a.txt"), load("more.txt")
    assert more.digest_of(5) == found.digest == found.digest_of(5)
    assert more.first(5).longest == found.longest != more.longest
    different = [found, more, load("other.txt"), load(path="a.txt", negative="dark"), weighted(5)]
    heavier = replace(different[-1], weights=different[-1].weights + 1)
    assert len({it.digest for it in [*different, heavier]}) == 6
    assert load(path="a.txt", negative="").digest != found.digest
    assert load(templates=TEXTS).digest == found.digest
    assert weighted(5).digest == weighted(200).digest_of(5)
    for count in (0, 6):
        with pytest.raises(ValueError, match="expected 1 to 5"):
            found.digest_of(count)


def test_numbers_are_functions_of_seed_id_and_list():
    lines("a.txt", *TEXTS)
    lines("more.txt", *TEXTS, "one more")
    ids = np.arange(3000)
    found = load("a.txt")
    assert np.array_equal(found.number(3, ids), noise.labels(3, ids, 5))
    assert np.array_equal(load("more.txt").first(5).number(3, ids), found.number(3, ids))
    for count in (3, 200):
        drawn = weighted(200).first(count)
        numbers = drawn.number(3, ids)
        assert numbers.dtype == np.int64
        assert np.array_equal(drawn.number(3, ids[[7, 2]]), numbers[[7, 2]])
        share = np.bincount(numbers % 3, minlength=3) / len(ids)
        wanted = [drawn.weights[k::3].sum() / drawn.weights.sum() for k in range(3)]
        assert np.abs(share - wanted).max() < 0.04
        assert numbers.max() < count
        assert not np.array_equal(drawn.number(4, ids), numbers)


def test_only_the_negative_prompt_is_content_beside_the_digest():
    """Another place of the same prompts resumes; another list is told by its digest."""
    config = validate(Stage, {"prompts": {"path": "a.txt", "held_out": 0.1, "negative": "dark"}})
    assert content(config) == {"prompts": {"negative": "dark"}}
