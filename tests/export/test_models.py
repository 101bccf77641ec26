"""The students in docs/models: sampled as a user does, and compared with what is recorded of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowmatch.export.sample import sample
from flowmatch.runs import manifest

MODELS = Path(__file__).parents[2] / "docs/models"
STUDENTS = sorted(path.parent.name for path in MODELS.glob("*/manifest.json"))


def pictures(folder):
    files = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(file), np.float64) for file in files])


def moments(x):
    """Mean and standard deviation of all pixels, and their mean gradient along a row."""
    return [x.mean(), x.std(), np.abs(np.diff(x, axis=-1)).mean()]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_samples_the_pictures_that_are_recorded(name, tmp_path):
    folder = MODELS / name
    sealed = manifest.read(str(folder), "export")
    manifest.verify(str(folder), "export", sealed)
    recorded = json.loads((folder / "figures.json").read_text())
    for steps, expected in recorded["steps"].items():
        out = tmp_path / steps
        sample(str(folder), int(steps), out, recorded["count"], 0)
        assert moments(pictures(out)) == pytest.approx(expected, rel=2e-3)


def test_a_student_is_there():
    assert STUDENTS
