"""Twenty-two classes of pipelines: pairs by one process and by two, and five updates on them."""

import json

import pytest

from flowmatch.models.watch import quiet
from flowmatch.runs import manifest
from pipelines import reflow
from tests import forked
from tests.pipelines import text_job
from tests.stages import run
from tests.tiny import TINY

NAMES = [
    *("StableDiffusion3", "Flux", "Sana", "Lumina2", "ZImage", "QwenImage", "Chroma", "AuraFlow"),
    *("Wan", "LTX", "HunyuanVideo", "Mochi", "CogView4", "HiDreamImage", "StableDiffusion"),
    *(
        "StableDiffusionXL",
        "PixArtSigma",
        "CogVideoX",
        "Lumina",
        "Krea2",
        "Flux2Klein",
        "SkyReelsV2",
    ),
]
PROMPTS = ["a cat", "a red fox in deep snow at night, seen from a hill", "two houses"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each class: the saved pipeline, and its pairs by one process and by two."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for name in NAMES:
        tiny = TINY[f"{name}Pipeline"]
        place = folder / name
        with quiet():
            tiny.build().save_pretrained(place / "pipe")
        call = {key: value for key, value in tiny.call.items() if key != "output_type"}
        (place / "call.json").write_text(json.dumps(call))
    job = ["tests.pipelines.text_job", str(folder)]
    forked.run_ranks(2, [*job, "both"], check=True)
    forked.run([*job, "one"], check=True)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_processes_write_the_same_pairs(folder, name):
    for file in ("pairs-000000.tar", "pairs-000001.tar", "manifest.json"):
        one, both = (folder / name / place / file for place in ("one", "both"))
        assert one.read_bytes() == both.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_five_updates_lower_no_number_to_nan(folder, name):
    """The student trains: five updates are logged, all finite, and its weights are sealed."""
    words = [word for word in text_job.words(folder, name) if word.startswith(("call", "prompts"))]
    place = folder / name
    fit = ["fit.steps=5", "fit.batch_size=2", "fit.log_every=1", "fit.lr=1e-4"]
    inputs = [f"start={place}/pipe", f"pairs={place}/one", f"run_dir={place}/reflow"]
    run(reflow, *words, *inputs, *fit)
    losses = [json.loads(line)["loss"] for line in (place / "reflow" / "metrics.jsonl").open()]
    assert len(losses) == 5
    facts = manifest.read(place / "reflow", "reflow")["facts"]
    noisy = TINY[f"{name}Pipeline"].build().scheduler.config.get("prediction_type")
    assert facts["form"] == ("v" if noisy in ("epsilon", "v_prediction") else "velocity")
