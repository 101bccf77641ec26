"""`flowmatch monitor`: lines and a page, of a run that trains and of one that has ended."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from flowmatch.config import UserError
from flowmatch.runs import monitor
from tests import forked
from tests.training.test_growing import WORDS


@pytest.fixture
def flow(tmp_path):
    """What a stage leaves after 30 of 100 updates."""
    flow = tmp_path / "x/flow"
    (flow / "samples").mkdir(parents=True)
    (flow / "config.yaml").write_text("fit:\n  steps: 100\n  batch_size: 8\ninputs: {}\n")
    rows = [{"step": s, "loss": 2 - s / 50, "images_per_second": 4.0} for s in (10, 20, 30)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (flow / "metrics.jsonl").write_text(text + "\0\0\n")
    held = [{"step": s, "held_out_loss": 0.5 / s} for s in (10, 20)]
    (flow / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    for step in (10, 20):
        Image.fromarray(np.full((4, 4), step, np.uint8)).save(flow / f"samples/step_{step:08d}.png")
    return flow


def test_a_page_shows_curves_and_samples_and_needs_nothing_else(flow, capsys):
    monitor.follow(flow.parent, once=True)
    text = (flow.parent / "monitor.html").read_text()
    out = capsys.readouterr().out
    assert "flow: update 30 of 100, loss 1.4, held out 0.025, 4 images/s, 140 s left" not in out
    assert (
        "flow: update 30 of 100, loss 1.4, held out 0.025, 4 images/s, 2 min left, samples" in out
    )
    assert not re.search(r"https?://|src=\"(?!data:)|<script", text)
    assert text.count("<polyline") == 2
    assert text.count("data:image/png;base64,") == 2
    assert "After update 20. Samples in the same place" in text
    assert "<progress value=30 max=100>" in text
    assert 'http-equiv="refresh"' not in text
    stages = monitor.read(flow.parent)
    assert 'http-equiv="refresh" content="5"' in monitor.page(flow.parent, stages, 5)
    points = re.search(r'<polyline class=curve points="([^"]*)"', text)[1].split()
    xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # down the screen: the loss falls


def test_curves_of_odd_values():
    assert monitor.chart([], "loss") == ""
    assert monitor.chart([{"step": 1, "loss": 2.0}], "loss") == ""
    flat = [{"step": s, "loss": 0.0} for s in (1, 2, 3)] + [{"step": 4, "loss": float("nan")}]
    assert "nan" not in monitor.chart(flat, "loss")
    many = [{"step": s, "loss": float(s)} for s in range(1, 2002)]
    drawn = monitor.chart(many, "loss")
    assert 300 < len(re.search(r'points="([^"]*)"', drawn)[1].split()) <= 402
    assert ">2,001<" in drawn


def test_what_is_no_run_is_told(tmp_path):
    for path, what in ((tmp_path, "holds no run"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=what):
            monitor.follow(path, once=True)
    done = forked.run(["flowmatch", "monitor", str(tmp_path), "--every", "0"])
    assert done.returncode == 2
    assert "expected seconds, more than 0" in done.stderr


@pytest.mark.parametrize("text", ["fit: 3", "fit: {steps: x, batch_size: []}", "[1]", "{", "\0"])
def test_a_damaged_config_is_no_fault(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monitor.follow(tmp_path, once=True)
    assert (tmp_path / monitor.PAGE).is_file()


def test_it_follows_a_run_to_its_end(tmp_path):
    flow, words = tmp_path / "flow", ("fit.steps=40", "fit.sample_every=20")
    train = ["flowmatch", "flow", f"run_dir={flow}", *WORDS, *words]
    done = forked.run(train)
    assert done.returncode == 0, done.stderr
    (flow / "manifest.json").rename(tmp_path / "manifest.json")
    with forked.Popen(
        ["flowmatch", "monitor", str(flow), "--every", "0.1"], stdout=forked.PIPE
    ) as process:
        assert "is rewritten every 0.1 seconds" in process.stdout.readline()
        assert "update 40 of 40" in process.stdout.readline()
        (tmp_path / "manifest.json").rename(flow / "manifest.json")
        assert process.stdout.readline().rstrip().endswith("sealed")
        assert process.wait(20) == 0
    assert "sealed" in (flow / "monitor.html").read_text()
    (flow / "metrics.jsonl").write_text('{"step": 30, "loss": 2.0}\n')  # none for the last ten
    assert monitor.read_stage(flow).line.startswith("update 40 of 40, loss 2, ")
    (flow / "manifest.json").unlink()
    with forked.Popen(["flowmatch", "monitor", str(flow)], stdout=forked.PIPE) as process:
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(2)  # Ctrl-C
        assert process.wait(20) == 0
        assert "stays as it is" in process.stdout.read()
