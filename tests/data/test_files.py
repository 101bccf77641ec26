"""Which files a path names: splits, labels, what is left out, names that mean something elsewhere."""

import json
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.data import files
from tests.images import all_of, expected, folder_of, load, parquet_of, pictures, refusal, tar_of


def make(root, *names):
    """Write files: pictures for names that end as such, some text for others."""
    for k, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".png":
            Image.fromarray(pictures(1, seed=k)[0]).save(file)
        else:
            file.write_text("no picture")
    return root


@contextmanager
def as_another_user():
    """Let the permissions of files count, also where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("names", "split", "count", "notes"),
    [
        (["1.png", "2.png", "3.png", "4.avif"], "train", 3, ["1 file left out: .avif"]),
        (["1.png", "1.txt", "2.txt", "a.zip"], "train", 1, ["3 files left out: 2 .txt, 1 .zip"]),
        (["1.png", "2.jfif", "3.pgm", "README"], "train", 1,
         ["3 files left out: 1 .jfif, 1 .pgm, 1 without a suffix"]),
        (["a/1.png", ".DS_Store", ".git/x"], "train", 1, ["2 files left out: 2 hidden"]),
        (["__a/1.png", "__2.png"], "train", 2, []),
        (["train/1.png", "test/2.png", "test/x.txt", "3.png"], "train", 1,
         ["1 file left out: .png"]),
        (["train/1.png", "train/1.txt", "extra/2.csv"], "train", 1,
         ["2 files left out: 1 .csv, 1 .txt"]),
        (["train-0.png", "test-0.png", "LICENSE"], "test", 1,
         ["1 file left out: without a suffix"]),
        (["metadata.json", "1.png"], "train", 1, ["1 file left out: .json"]),
    ],
)  # fmt: skip
def test_what_is_left_out_is_counted(tmp_path, names, split, count, notes):
    found = load(path=str(make(tmp_path, *names)), split=split)
    assert (found.count, list(found.notes)) == (count, notes)


def test_beside_parquet_and_tars_too(tmp_path):
    parquet_of(make(tmp_path / "p", "README.md") / "a.parquet", pictures(2))
    assert load(path=str(tmp_path / "p")).notes == ("1 file left out: .md",)
    tar_of(make(tmp_path / "t", "a.json", "b.json") / "a.tar", pictures(2))
    assert load(path=str(tmp_path / "t")).notes == ("2 files left out: .json",)
    assert load(path=str(tmp_path / "t" / "*.tar")).notes == ()


def metadata(root, *rows, name="metadata.jsonl"):
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root)


def test_metadata_say_which_pictures_and_their_labels(tmp_path):
    make(tmp_path, "0.png", "1.png", "2.png", "b/3.png", "b/4.png", "a/5.png")
    rows = [{"file_name": f"{k}.png", "label": k % 2, "image": "x"} for k in (2, 0, 1)]
    path = metadata(tmp_path, *rows)
    found = load(path=path, labels=True)
    assert all_of(found)["label"].tolist() == [0, 0, 1]
    x = np.concatenate([pictures(1, seed=k) for k in (2, 0, 1)])
    assert torch.equal(all_of(found)["x1"], expected(x))
    assert found.notes == ("3 of 6 pictures left out: metadata.jsonl does not name them",)
    (tmp_path / "metadata.jsonl").unlink()
    for place, number in (("b", 4), ("a", 5)):  # several tables: in the order of their names
        table = f"file_name,label\n{number}.png,{number - 4}\n{number}.png,{number - 4}\n"
        (tmp_path / place / "metadata.csv").write_text(table)
    found = load(path=path, labels=True)
    assert all_of(found)["label"].tolist() == [1, 1, 0, 0]
    assert found.notes[1] == "2 rows of the metadata name a picture that another row names"


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"file_name": "0.png"}, {"file_name": "9.png"}], "row 1 of .* names '9.png'"),
        ([{"file_name": "../0.png"}], "names '../0.png'; expected a picture in that folder"),
        ([{"file_name": "/etc/passwd"}], "names '/etc/passwd'"),
        ([{"file_name": "0.png"}, {"file_name": None}], "row 1 of .* names None"),
        ([], "cannot be read: Empty JSON"),
        ([{"name": "0.png"}], "has the columns name; expected one called file_name"),
        ([{"file_name": "0.png", "label": "cat"}, {"file_name": "a/1.png", "label": "dog"}],
         "2 rows have 2 different words"),
        ([{"file_name": "0.png", "label": 0}, {"file_name": "0.png"}],
         "1 of 2 rows have no label, first row 1"),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_are_refused(tmp_path, rows, fault):
    path = metadata(make(tmp_path, "0.png", "a/1.png"), *rows)
    with pytest.raises(ValueError, match=fault):
        load(path=path, labels=True)


@pytest.mark.parametrize(
    ("names", "labels", "fault"),
    [
        (["cat/1.png", "cat/2.png", "dog/3.png"], [0, 0, 1], None),
        (["cat/20/1.png", "cat/20/2.png", "dog/21/3.png"], [0, 0, 1], None),  # they agree
        (["x/cat/1.png", "x/cat/2.png", "x/dog/3.png"], [0, 0, 1], None),
        (["cat/20/1.png", "cat/21/2.png", "dog/20/3.png"], None,
         "first folders (cat, dog) or the last ones (20, 21)"),
        (["cat/1.png", "dog/2.png", "3.png", "4.png"], None, "2 pictures lie beside the folders"),
        (["cat/1.png", "cat/2.png"], None, "all pictures lie in one folder"),
        (["a/1.png", "b/2.png", "c/3.png"], None, "each of 3 pictures lies in a folder of its own"),
    ],
)  # fmt: skip
def test_folders_are_classes_where_that_has_one_meaning(tmp_path, names, labels, fault):
    path = str(make(tmp_path, *names))
    if fault:
        assert fault in refusal(path=path, labels=True)
    else:
        assert load(path=path, labels=True).label.tolist() == labels


ODD = ["x[1]", "a?b", "a*b", "a b", "a%20b", "[!x]", "~x", "a:b", "a{1,2}", "é", "a\nb", "a\\b"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_means_nothing_but_itself(tmp_path, name):
    """Each kind of file, in a folder of that name; beside it one that it could stand for."""
    for folder in (name, "axb", "x1"):
        make(tmp_path / "pictures" / folder, "1.png", "2[1].png", "2.png")
        (tmp_path / "tars" / folder).mkdir(parents=True)
        tar_of(tmp_path / "tars" / folder / "a[1].tar", pictures(2))
    for kind, count in (("pictures", 3), ("tars", 2)):
        assert load(path=str(tmp_path / kind / name)).count == count
    (file,) = (tmp_path / "tars" / name).iterdir()
    assert load(path=str(file)).count == 2


@pytest.mark.parametrize("name", ["a::b", "$HOME", "${HOME}x"])
def test_names_that_datasets_replaces_are_refused_by_name(tmp_path, name):
    make(tmp_path / "pictures" / name, "1.png")
    assert load(path=str(tmp_path / "pictures")).count == 1
    (tmp_path / name).mkdir()
    tar_of(tmp_path / name / "a.tar", pictures(2))
    assert f"{name}/a.tar': datasets takes" in refusal(path=str(tmp_path / name))


def test_names_and_files_that_cannot_be_read_are_named(tmp_path):
    make(tmp_path / "set", "a/1.png", "b/2.png", "3.png")
    path = str(tmp_path / "set")
    odd = os.fsdecode(os.fsencode(path) + b"/\xff.png")
    os.rename(f"{path}/3.png", odd)
    assert "\\udcff.png' is not UTF-8; rename the file" in refusal(path=path)
    os.remove(odd)
    os.mkfifo(f"{path}/pipe")  # reading it would wait for ever
    assert "pipe is neither a file nor a folder" in refusal(path=path)
    os.remove(f"{path}/pipe")
    for place in (tmp_path, *tmp_path.parents[:3]):
        os.chmod(place, 0o755)
    for blocked, fault in (("b", "b: Permission denied"), ("a/1.png", "a/1.png'")):
        mode = os.stat(f"{path}/{blocked}").st_mode
        os.chmod(f"{path}/{blocked}", 0)
        with as_another_user():
            message = refusal(path=path)
        os.chmod(f"{path}/{blocked}", mode)
        assert "Permission denied" in message
        assert fault in message


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("s3://bucket/x", "only pairs go by URL; copy the data into a local folder"),
        ("hf://datasets/org/name/a.parquet", "use the name on the hub, org/name"),
        ("file:///a/b", "use the path /a/b"),
        ("https://host/x.tar", "only pairs go by URL"),
    ],
)
@pytest.mark.parametrize("source", ["images", "npz", "idx"])
def test_data_do_not_go_by_url(source, path, fault):
    assert fault in refusal(source=source, path=path)


def test_braces_stand_for_several_files(tmp_path):
    for k in range(3):
        tar_of(tmp_path / f"a-{k:02d}.tar", pictures(2, seed=k))
    found = load(path=f"{tmp_path}/a-{{00..02}}.tar")
    assert found.count == 6
    assert found.digest == load(path=f"{tmp_path}/*.tar").digest
    assert "a-03.tar matches no file" in refusal(path=f"{tmp_path}/a-{{02..03}}.tar")
    assert "does not exist" in refusal(path=f"{tmp_path}/a-{{00.tar")


def test_the_cache_of_datasets_is_named_where_it_is_the_fault(tmp_path, monkeypatch):
    import datasets

    file = tar_of(tmp_path / "a.tar", pictures(2))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(file / "cache"))
    message = refusal(path=str(file))
    assert message.startswith(f"{file}/cache")
    assert "Not a directory: datasets keeps tables there; set the variable HF_DATASETS" in message
    assert load(path=str(folder_of(tmp_path / "set", pictures(2)))).count == 2  # needs no cache


def test_local_files_are_copied_once_and_without_the_bars_of_a_download(tmp_path, capfd):
    import datasets

    path = str(tar_of(tmp_path / "a.tar", pictures(2)))
    datasets.enable_progress_bars()
    load(path=path)
    told = capfd.readouterr()
    assert told.out.startswith("data: datasets copies 1 file into its cache, /")
    assert told.err == ""
    assert not datasets.utils.are_progress_bars_disabled()
    load(path=path)
    assert capfd.readouterr() == ("", "")


def test_image_folder_with_splits_whatever_classes_are_called(tmp_path):
    x = pictures(8)
    folder_of(tmp_path / "train", x[:4])
    (tmp_path / "train" / "b").rename(tmp_path / "train" / "test")  # a class, not a split
    folder_of(tmp_path / "val", x[4:])
    assert torch.equal(all_of(load(path=str(tmp_path)))["x1"], expected(x[:4]))
    assert torch.equal(all_of(load(path=str(tmp_path), split="val"))["x1"], expected(x[4:]))


def test_a_class_or_a_picture_of_trains_is_no_split(tmp_path):
    x = pictures(8)
    folder_of(tmp_path / "set", x[:4])
    (tmp_path / "set" / "b").rename(tmp_path / "set" / "train")
    for k, file in enumerate(sorted((tmp_path / "set" / "train").iterdir())):
        file.rename(file.with_name(f"train_{k}.png"))
    found = load(path=str(tmp_path / "set"), labels=True)
    assert torch.equal(all_of(found)["x1"], expected(x[:4]))
    assert found.classes == 2
    (tmp_path / "flat").mkdir()
    for name, image in zip(("beach", "train-1", "train-station", "wood"), x[4:], strict=True):
        Image.fromarray(image).save(tmp_path / "flat" / f"{name}.png")
    assert torch.equal(all_of(load(path=str(tmp_path / "flat")))["x1"], expected(x[4:]))


def test_images_named_after_their_split(tmp_path):
    x = pictures(4)
    for name, image in zip(("test-0", "train-0", "train-1", "val-0"), x, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    assert torch.equal(all_of(load(path=str(tmp_path)))["x1"], expected(x[1:3]))
    assert torch.equal(all_of(load(path=str(tmp_path), split="val"))["x1"], expected(x[3:]))


def test_parquet_file_folder_and_glob(tmp_path):
    x, labels = pictures(9, (6, 6)), [0, 1, 2] * 3
    for k, name in enumerate(("train-00000", "train-00001", "test-00000")):
        part = slice(3 * k, 3 * k + 3)
        parquet_of(tmp_path / f"{name}.parquet", x[part], label=labels[part])
    (tmp_path / "README.md").write_text("not data")
    whole = load(path=str(tmp_path), labels=True)
    assert torch.equal(all_of(whole)["x1"], expected(x[:6]))
    assert whole.classes == 3
    assert all_of(whole)["label"].tolist() == labels[:6]
    test = load(path=str(tmp_path), split="test")
    assert torch.equal(all_of(test)["x1"], expected(x[6:]))
    one = load(path=str(tmp_path / "test-00000.parquet"))
    assert torch.equal(all_of(one)["x1"], expected(x[6:]))
    some = load(path=str(tmp_path / "train-*1.parquet"))
    assert torch.equal(all_of(some)["x1"], expected(x[3:6]))


def test_above_a_gibibyte_names_and_sizes_are_hashed(tmp_path, monkeypatch):
    x = pictures(2)
    path = folder_of(tmp_path / "set", x)
    monkeypatch.setattr(files, "HASHED", 10)
    before = load(path=str(path)).digest
    stored = bytearray((path / "a" / "0.png").read_bytes())
    stored[-1] ^= 1
    (path / "a" / "0.png").write_bytes(stored)
    assert load(path=str(path)).digest == before
    (path / "a" / "0.png").write_bytes(bytes(stored) + b"\0")
    assert load(path=str(path)).digest != before


def test_above_a_gibibyte_pieces_of_large_files_are_hashed(tmp_path, monkeypatch):
    """Another array of the same name and size is other data."""
    monkeypatch.setattr(files, "HASHED", 64)
    monkeypatch.setattr(files, "PIECE", 8)
    file, small = tmp_path / "x.npy", tmp_path / "y.npy"
    small.write_bytes(bytes(10))
    content = bytearray(1000)
    file.write_bytes(content)
    before = files.digest_files(tmp_path, [file, small])
    for place in (0, 7, 330, 332, 992, 999):  # the first, second and last of four pieces
        changed = content.copy()
        changed[place] = 1
        file.write_bytes(changed)
        assert files.digest_files(tmp_path, [file, small]) != before
    file.write_bytes(content)
    assert files.digest_files(tmp_path, [file, small]) == before
    small.write_bytes(bytes(9) + b"1")  # short of its four pieces: hashed whole
    assert files.digest_files(tmp_path, [file, small]) != before


def test_missing_splits_are_named(tmp_path):
    folder_of(tmp_path / "train", pictures(4))
    assert "data.split=val: " in refusal(path=str(tmp_path), split="val")
    parquet_of(tmp_path / "a.parquet", pictures(2))
    assert "no such split" in refusal(path=str(tmp_path / "a.parquet"), split="test")


def test_folders_that_are_no_data(tmp_path):
    folder_of(tmp_path / "set", pictures(4))
    (tmp_path / "set" / "b").rename(tmp_path / "b")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "b")
    assert "b is a link to a folder" in refusal(path=str(tmp_path / "set"))
    tar_of(tmp_path / "b" / "a.tar", pictures(2))
    assert "has 2 image files and 1 .tar file; " in refusal(path=str(tmp_path / "b"))
    (tmp_path / "empty").mkdir()
    assert "empty folder" in refusal(path=str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.jfif").touch()
    assert "has 1 file: .jfif; expected image" in refusal(path=str(tmp_path / "empty"))
    for name in ("b.jfif", "c.pgm"):
        (tmp_path / "empty" / name).touch()
    message = refusal(path=str(tmp_path / "empty"))
    assert "has 3 files: 2 .jfif, 1 .pgm; expected image, .parquet or .tar files" in message
    assert "images are .png .jpg" in message


@pytest.mark.parametrize("source", ["idx", "npz", "images"])
@pytest.mark.parametrize("path", ["nothing/at/all", "./nothing", "missing.npz", "none*.png"])
def test_a_missing_path_is_named(source, path):
    assert path in refusal(source=source, path=path)


def test_a_name_that_is_neither_here_nor_on_the_hub():
    assert "there is no such folder, file or glob" in refusal(path="someone/nothing")


def test_a_replaced_file_is_read_anew_though_its_time_is_kept(tmp_path):
    file = tmp_path / "a.parquet"
    for seed in range(2):
        parquet_of(file, pictures(3, seed=seed))
        os.utime(file, (1, 1))
        assert torch.equal(all_of(load(path=str(file)))["x1"], expected(pictures(3, seed=seed)))


def test_labels_that_are_not_there(tmp_path):
    x = pictures(2, (6, 6))
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", x=x)
    tar_of(tmp_path / "a.tar", x)
    folder_of(tmp_path / "set", x, classes=1)
    for path in ("a.npy", "a.npz", "a.tar", "set"):
        source = "npz" if path.startswith("a.np") else "images"
        message = refusal(source=source, path=str(tmp_path / path), labels=True)
        assert "data.labels=true: " in message, message


def test_columns_that_are_absent_or_ambiguous_are_listed(tmp_path):
    x, words = pictures(4, (6, 6)), ["cat", "dog", "cat", "cat"]
    numbers = {"id": [0, 1, 2, 3], "digit": [0, 1, 1, 0]}
    named = parquet_of(tmp_path / "a.parquet", x, label=words, **numbers)
    plain = parquet_of(tmp_path / "b.parquet", x, **numbers)
    for file, values, faults in [
        (named, {"image_column": "no"}, ["data.image_column=no does not exist", "id (int64)"]),
        (named, {"image_column": "id"}, ["data.image_column=id is not a column of images"]),
        (named, {"label_column": "image"}, ["image is not a column of labels"]),
        (named, {"label_column": "id"}, ["4 samples have 4 different labels", "not classes"]),
        (plain, {}, ["no column is called as the labels (label, ", "id (int64), digit (int64)"]),
        (plain, {"label_column": "no"}, ["data.label_column=no does not exist"]),
    ]:
        message = refusal(path=str(file), labels=True, **values)
        assert all(fault in message for fault in faults), message
    found = load(path=str(named), labels=True)
    assert (found.names, all_of(found)["label"].tolist()) == (("cat", "dog"), [0, 1, 0, 0])
    found = load(path=str(plain), labels=True, label_column="digit", image_column="image")
    assert all_of(found)["label"].tolist() == [0, 1, 1, 0]
    both = parquet_of(tmp_path / "c.parquet", x, label=[0] * 4, target=[0] * 4)
    assert "label and target can both be the labels" in refusal(path=str(both), labels=True)
    import pandas

    pandas.DataFrame({"a": [1], "b": ["x"]}).to_parquet(tmp_path / "d.parquet")
    assert "no column can be the images" in refusal(path=str(tmp_path / "d.parquet"))


def test_named_classes_may_be_absent_but_not_unlabelled(tmp_path):
    import datasets

    for labels in ([0, 2, 2], [0, -1, 1]):
        rows = {"image": [Image.fromarray(image) for image in pictures(3)], "label": labels}
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
        rows = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        rows.to_parquet(tmp_path / f"{labels[1]}.parquet")
    assert load(path=str(tmp_path / "2.parquet"), labels=True).classes == 3
    assert "from -1 to 1; expected 0 to 2" in refusal(
        path=str(tmp_path / "-1.parquet"), labels=True
    )
