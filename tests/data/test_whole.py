"""Tars and parquet files that are not whole are refused by name, whatever readers make of them."""

import gzip
import io
import tarfile

import pandas
import pytest
from PIL import Image

from tests.images import load, parquet_of, pictures, refusal

BLOCK = 512


def stored(x, format_name="PNG"):
    file = io.BytesIO()
    Image.fromarray(x).save(file, format_name)
    return file.getvalue()


def tar_with(file, *names):
    """Write a tar with a file of each name: a picture, or a class."""
    with tarfile.open(file, "w") as tar:
        for k, name in enumerate(names):
            content = b"1" if name.endswith("cls") else stored(pictures(1, seed=k)[0])
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def offsets(file):
    with tarfile.open(file) as tar:
        return [member.offset for member in tar]


NAMES = [f"{k:03d}.png" for k in range(40)]


def cut(content, starts):
    return content[: starts[20]]


def cut_inside(content, starts):
    return content[: starts[20] + BLOCK + 10]


def without_end(content, starts):
    return content.rstrip(b"\0")


def one_block_of_zeros(content, starts):
    body = content.rstrip(b"\0")
    return body + bytes(-len(body) % BLOCK) + bytes(BLOCK)


def damaged(content, starts):
    return content[: starts[7]] + b"?" + content[starts[7] + 1 :]


def appended(content, starts):
    return content + content


FAULTS = {
    cut: "a.tar is not a whole tar: it is cut off: its end, two blocks of zeros, is missing",
    cut_inside: "a.tar is not a whole tar",
    without_end: "a.tar is not a whole tar",
    one_block_of_zeros: "its end, two blocks of zeros, is missing",
    damaged: "from byte [0-9,]+ on it is damaged",
    appended: "or a second tar was appended",
    lambda content, starts: b"": "a.tar is not a whole tar: it begins like no tar",
    lambda content, starts: gzip.compress(content)[:-20]: "a.tar is not a whole tar",
}


@pytest.mark.parametrize("harm", FAULTS)
def test_a_tar_that_is_not_whole_is_refused_by_name(tmp_path, harm):
    file = tar_with(tmp_path / "a.tar", *NAMES)
    content, starts = file.read_bytes(), offsets(file)
    tar_with(tmp_path / "b.tar", "x.png")
    file.write_bytes(harm(content, starts))
    with pytest.raises(ValueError, match=FAULTS[harm]):
        load(path=str(tmp_path))


def test_whole_tars_of_other_writers_are_read(tmp_path):
    file = tar_with(tmp_path / "a.tar", *NAMES)
    content = file.read_bytes()
    file.write_bytes(content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % BLOCK + 2 * BLOCK))
    assert load(path=str(file)).count == 40
    file.write_bytes(gzip.compress(content))
    assert load(path=str(file)).count == 40


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["0.png", "1.jpg", "2.png"], "2 with png \\(first: 0 of a.tar\\); 1 with jpg"),
        ([*NAMES[:9], "x.jpg"], "9 with png .*; 1 with jpg"),
        (["0.png", "1.png", "1.cls", "2.cls"], "1 with no picture \\(first: 2 of"),
        (["0.png", "1.png", "0.cls", "1.cls"], "2 with no picture"),  # not side by side
        (["LICENSE", "._0.png"], "the tars hold no files with a suffix"),
    ],
)
def test_samples_that_differ_are_refused(tmp_path, names, fault):
    with pytest.raises(ValueError, match=fault):
        load(path=str(tar_with(tmp_path / "a.tar", *names)))


def test_members_that_readers_leave_out_are_counted_each_time(tmp_path):
    path = str(tar_with(tmp_path / "a.tar", "0.png", "._0.png", "__1.png", "LICENSE", "2.png"))
    for _ in range(2):  # the second time from the cache
        found = load(path=path)
        assert found.count == 2
        why = "hidden, without a suffix, or links"
        assert found.notes == (f"3 members of the tars left out: {why}; first '._0.png'",)


def test_a_missing_label_is_named_by_its_row(tmp_path):
    both = [name for k in range(6) for name in (f"{k}.png", f"{k}.cls")]
    path = str(tar_with(tmp_path / "a.tar", *both, "6.png", "7.png"))
    assert "cls: 2 of 8 rows have no label, first row 6" in refusal(path=path, labels=True)
    path = str(tar_with(tmp_path / "b.tar", *both[:4], "6.png"))
    assert "the first samples of a tar differ in their suffixes" in refusal(path=path)
    file = parquet_of(tmp_path / "a.parquet", pictures(4), label=[0, 1, None, 0])
    message = refusal(path=str(file), labels=True)
    assert "data.label_column=label: 1 of 4 rows have no label, first row 2" in message


def test_parquet_that_is_not_whole_is_refused_by_name(tmp_path):
    for name in "ab":
        parquet_of(tmp_path / f"{name}.parquet", pictures(3))
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-50])
    assert "b.parquet is not a whole parquet file" in refusal(path=str(tmp_path))
    pandas.DataFrame({"image": [b""]}).iloc[:0].to_parquet(tmp_path / "b.parquet")
    assert "holds no rows" in refusal(path=str(tmp_path / "b.parquet"))
    parquet_of(tmp_path / "a.parquet", pictures(3)).rename(tmp_path / "train-0.parquet")
    pandas.read_parquet(tmp_path / "train-0.parquet").iloc[:0].to_parquet(tmp_path / "b.parquet")
    (tmp_path / "b.parquet").rename(tmp_path / "train-1.parquet")
    assert load(path=str(tmp_path)).count == 3
