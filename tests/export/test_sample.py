"""`flowmatch sample`: whole exports, numbers in their ranges."""

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from flowmatch.config import UserError
from flowmatch.export.sample import main, sample
from flowmatch.runs import manifest
from tests.stages import UNET


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline with three classes and the null class, sealed as an export."""
    folder = tmp_path_factory.mktemp("export")
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=4, **UNET)
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(folder)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    manifest.seal(folder, stage="export", config={}, inputs={}, outputs=files, round=1)
    return folder


@pytest.mark.parametrize(
    "name", ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
)
def test_a_damaged_export_is_named_and_not_sampled(made, tmp_path, name):
    raw = (made / name).read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", raw.replace(b"1", b"2")):
        (made / name).write_bytes(damaged)
        try:
            with pytest.raises(UserError, match=f"{name} is not the file that was sealed"):
                sample(str(made), 1, tmp_path / "out", 1, 0)
        finally:
            (made / name).write_bytes(raw)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: expected a number from 1 to 1000"),
        (["--steps", str(10**20)], "expected a number from 1 to 1000"),
        (["--count", str(10**11)], "expected a number from 1 to 100000"),
        (["--seed", "-1"], "--seed -1: expected a number from 0"),
        (["--seed", str(2**64)], "expected a number from 0"),
        (["--labels", "x"], "--labels x: expected 0 to 2"),
        (["--labels", "0,-1"], "--labels 0,-1: expected 0 to 2"),
        (["--labels", "3"], "--labels 3: expected 0 to 2"),
    ],
)
def test_a_number_out_of_its_range_is_refused(made, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(made), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_where_the_folder_should_be_is_refused_before_sampling(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--out={tmp_path}/file/x lies below the file"):
        sample(str(made), 1, tmp_path / "file" / "x", 1, 0)


def test_samples_are_not_put_into_a_sealed_folder(made, tmp_path):
    manifest.seal(tmp_path, stage="reflow", config={}, inputs={}, outputs=[], round=1)
    before = sorted(made.rglob("*"))
    for out in (made, made / "unet" / "new", tmp_path):
        with pytest.raises(UserError, match=f"--out={out} lies in a sealed folder"):
            sample(str(made), 1, out, 1, 0)
    assert sorted(made.rglob("*")) == before


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"_class_name": []}', '{"_class_name": "X"}'])
def test_what_is_no_pipeline_is_refused(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(UserError, match="no pipeline could be read there"):
        sample(str(tmp_path), 1, tmp_path / "out", 1, 0)
