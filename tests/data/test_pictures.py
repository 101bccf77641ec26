"""Pictures as people have them: what is wrong is counted, and keys say what is done with it."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.config import UserError, validate
from flowmatch.data import dataset, images
from flowmatch.data.config import DataConfig
from flowmatch.flow import noise
from tests.images import all_of, expected, folder_of, load, parquet_of, pictures, refusal, tar_of

WAYS = {"background": "white", "small": "enlarge", "bad": "skip"}


def mixed(folder, n=12, side=16):
    """Write pictures of mixed sizes; of each four the last three are clear, small and cut off."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        kind = i % 4
        high, wide = (side // 2,) * 2 if kind == 2 else side + rng.integers(0, 9, 2)
        array = rng.integers(0, 256, (high, wide, 4 if kind == 1 else 3), dtype=np.uint8)
        file = folder / f"{i:03d}.png"
        Image.fromarray(array).save(file)
        if kind == 3:
            file.write_bytes(file.read_bytes()[:-60])
    return folder


def test_every_kind_of_fault_is_listed_with_its_count_and_its_first_file(tmp_path):
    path = mixed(tmp_path / "set")
    with pytest.raises(UserError) as caught:
        load(path=str(path), size=16)
    lines = caught.value.faults
    assert len(lines) == 3
    assert f"3 of 12 images cannot be read; first: image 3 ({path}/003.png) " in lines[0]
    assert "set data.bad=skip" in lines[0]
    assert f"3 of 12 images are partly transparent; first: image 1 ({path}/001.png)" in lines[1]
    assert "set data.background to white, grey or black" in lines[1]
    assert "3 of 12 images are smaller than data.size=16; first: image 2 " in lines[2]
    assert "is 8x8; set data.small to enlarge or skip" in lines[2]


def test_keys_take_them_or_leave_them_out_and_say_so(tmp_path):
    path = mixed(tmp_path / "set")
    found = load(path=str(path), size=16, **WAYS)
    assert (found.count, found.shape) == (9, (3, 16, 16))
    assert found.notes == (
        f"3 of the 12 images have transparent pixels, laid on white; first image 1 ({path}/001.png)",
        f"3 of the 12 images are enlarged to size=16; first image 2 ({path}/002.png)",
        "3 of 12 images left out (data.bad=skip): they cannot be read; first image 3 "
        f"({path}/003.png)",
    )
    assert [re.search(r"\d\d\d.png", line)[0] for line in found.skipped] == [
        "003.png", "007.png", "011.png"
    ]  # fmt: skip
    fewer = load(path=str(path), size=16, **WAYS | {"small": "skip"})
    kept = [i for i in range(9) if i % 3 != 2]
    assert torch.equal(all_of(fewer)["x1"], all_of(found)["x1"][kept])
    dataset.write_skipped(fewer, tmp_path)
    assert (tmp_path / "skipped.txt").read_text().count("\n") == 6
    few = load(path=str(path), size=16, memory=0, **WAYS)  # all are seen, none is kept
    assert few.read.decoded is None
    assert torch.equal(all_of(few)["x1"], all_of(found)["x1"])


@pytest.mark.parametrize(("ground", "level"), [("white", 255), ("grey", 128), ("black", 0)])
def test_transparent_pixels_show_the_background(tmp_path, ground, level):
    clear = np.full((4, 4, 4), 200, np.uint8)
    clear[:2, :, 3] = 0
    clear[2, :, 3] = 255
    folder_of(tmp_path / "set", [clear])
    shown = all_of(load(path=str(tmp_path / "set"), background=ground))["x1"][0]
    pixels = (shown + 1) * 127.5
    assert torch.allclose(pixels[:, :2], torch.tensor(float(level)), atol=1e-3)
    assert torch.allclose(pixels[:, 2], torch.tensor(200.0), atol=1e-3)
    mix = 200 * 200 / 255 + level * 55 / 255
    assert (pixels[:, 3] - mix).abs().max() <= 1


def test_size_may_be_a_rectangle_and_pad_shows_the_whole_picture(tmp_path):
    white = np.full((8, 24, 3), 255, np.uint8)
    path = str(folder_of(tmp_path / "set", [white]))
    padded = load(path=path, size=[12, 12], fit="pad", background="black")
    assert padded.shape == (3, 12, 12)
    rows = all_of(padded)["x1"][0, 0].mean(1)
    assert rows.tolist() == [-1] * 4 + [1] * 4 + [-1] * 4
    wide = load(path=path, size=[4, 12])
    assert (wide.shape, float(all_of(wide)["x1"].min())) == ((3, 4, 12), 1)
    assert "smaller than data.size=[4, 30]" in refusal(path=path, size=[4, 30])
    both = {"fit": "pad", "small": "enlarge", "background": "white"}
    assert load(path=path, size=[9, 48], **both).shape == (3, 9, 48)
    np.savez(tmp_path / "a.npz", x=white[None])
    assert load(source="npz", path=str(tmp_path / "a.npz"), size=[16, 48], small="enlarge").count
    assert validate(DataConfig, {"path": "a", "size": [8, 8]}).size == 8
    for wrong in (0, [8], [8, 0], "8", True, [8, 8, 8]):
        with pytest.raises(UserError, match=r"size=.*: expected a number of pixels, or \[height"):
            validate(DataConfig, {"path": "a", "size": wrong})


@pytest.mark.parametrize("memory", [0, 2048])
def test_random_crops_are_drawn_by_the_place_in_the_training_alone(tmp_path, memory):
    ramp = np.arange(40, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2)
    path = str(folder_of(tmp_path / "set", [ramp, ramp + 100]))
    found = load(path=path, size=8, crop="random", memory=memory)

    def lefts(batch):
        return ((batch["x1"][:, 0, 0, 0] + 1) * 127.5).round().int()

    counters = np.arange(600)
    ids = counters % 2
    whole = found.batch(ids, counters, seed=3)
    left = lefts(whole) - torch.from_numpy(100 * ids).int()
    drawn = [noise.generator(3, i, noise.CROP).random(2)[1] for i in range(600)]
    assert left.tolist() == [int(u * 33) for u in drawn]
    assert (left.min(), left.max()) == (0, 32)
    some = np.array([9, 512, 77])
    again = found.batch(ids[some], some, seed=3)["x1"]  # a resumed run
    assert torch.equal(again, whole["x1"][some])
    once = found.batch(np.array([0, 1, 0]))["x1"]  # as an evaluation reads it
    assert torch.equal(once[0], once[2])


def test_what_does_not_fit_into_memory_is_checked_in_part_and_the_plan_says_so(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(images, "LOOKED", 4)
    monkeypatch.setattr(images, "CHUNK", 2)
    path = folder_of(tmp_path / "set", pictures(9), classes=1)
    (path / "a" / "1.png").write_bytes(b"")
    assert "1 of" not in refusal(path=str(path), memory=0)
    (path / "a" / "1.png").write_bytes((path / "a" / "0.png").read_bytes())
    (path / "a" / "7.png").write_bytes(b"")
    found = load(path=str(path), memory=0)
    assert found.notes == (
        "5 of 9 images are checked, as many as fit data.memory=0; the other 4 are checked when they "
        "are read",
    )
    with pytest.raises(UserError, match=r"image 7 .* cannot be read"):
        all_of(found)
    assert load(path=str(path), memory=0, bad="skip").count == 8  # all of them are seen


def test_stages_of_one_process_decode_once(tmp_path, monkeypatch):
    x = pictures(6)
    path = str(folder_of(tmp_path / "set", x))
    first = load(path=path)
    monkeypatch.setattr(images, "pixels", None)
    assert torch.equal(all_of(load(path=path))["x1"], expected(x))
    assert load(path=path).read is first.read


def test_words_and_folders_become_classes_by_sorted_name(tmp_path):
    x, words = pictures(6), ["dog", "ant", "cat", "dog", "ant", "cat"]
    found = load(path=str(parquet_of(tmp_path / "a.parquet", x, label=words)), labels=True)
    assert found.names == ("ant", "cat", "dog")
    assert all_of(found)["label"].tolist() == [2, 0, 1, 2, 0, 1]
    assert found.classes == 3
    assert load(path=str(folder_of(tmp_path / "set", x)), labels=True).names == ("a", "b")
    assert (
        load(path=str(tar_of(tmp_path / "a.tar", x, [0, 1, 0, 1, 0, 1])), labels=True).names is None
    )
    empty = parquet_of(tmp_path / "b.parquet", x, label=["", *words[1:]])
    assert "row 0 is empty" in refusal(path=str(empty), labels=True)
    own = parquet_of(tmp_path / "c.parquet", x, label=[f"w{i}" for i in range(6)])
    assert "6 rows have 6 different words; these are no classes" in refusal(
        path=str(own), labels=True
    )


def test_labels_follow_the_pictures_that_are_left(tmp_path):
    path = folder_of(tmp_path / "set", pictures(6))
    (path / "a" / "0.png").write_bytes(b"")
    found = load(path=str(path), labels=True, bad="skip")
    assert all_of(found)["label"].tolist() == [0, 0, 1, 1, 1]
    assert found.names == ("a", "b")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"fit": "pad", "size": 8}, "fit=pad needs a colour"),
        ({"fit": "pad", "background": "white"}, "set that, too"),
        ({"crop": "random"}, "set that, too"),
        ({"source": "digits", "bad": "skip"}, "bad belongs to source=images"),
        ({"source": "npz", "crop": "random", "size": 8}, "crop belongs to source=images"),
    ],
)
def test_keys_without_effect_are_refused(values, fault):
    with pytest.raises(UserError, match=fault):
        validate(DataConfig, {"path": "" if values.get("source") == "digits" else "a"} | values)
