"""Students that read prompts, exported into their teacher's own class."""

import json
import re
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.config import UserError
from flowmatch.data.config import PromptsConfig
from flowmatch.data.prompts import PromptList
from flowmatch.export import push, text_card, text_export, text_folder
from flowmatch.export.sample import sample
from flowmatch.export.scheduler import RectifiedFlowScheduler
from flowmatch.models import learn, networks, text
from flowmatch.models.config import CallConfig
from flowmatch.models.digest import network_digest
from flowmatch.models.schedule import ZeroTerminal, betas_of
from flowmatch.runs import manifest
from pipelines import export
from tests.stages import run
from tests.tiny import TINY

PROMPTS = ["a cat", "a red fox in snow", "two houses"]
SD3, SD = "StableDiffusion3Pipeline", "StableDiffusionPipeline"
EULER = "FlowMatchEulerDiscreteScheduler"


def call_of(name):
    return {key: value for key, value in TINY[name].call.items() if key != "output_type"}


def student_of(name):
    """A student of a tiny pipeline, as a reflow would make it, with the teacher's random weights."""
    pipe, call = TINY[name].build(), call_of(name)
    script = learn.learn(pipe, call, "teacher=x")
    flow = script.kind == "flow"
    return text.TextTeacher(
        getattr(pipe, script.network).eval(),
        "d" * 64,
        1,
        pipe=pipe,
        script=script,
        call=call,
        prompts=PromptList(PROMPTS, []),
        schedule=None if flow else ZeroTerminal(betas_of(pipe.scheduler)),
    )


@pytest.fixture(scope="module", params=[SD3, SD])
def made(request, tmp_path_factory):
    """A teacher's folder, a sealed reflow of it with other weights, and the words of the export."""
    folder, name = tmp_path_factory.mktemp("text"), request.param
    student = student_of(name)
    student.pipe.save_pretrained(folder / "pipe")
    (folder / "pipe" / "README.md").write_text("---\nlicense: openrail++\n---\n# Teacher\n")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    files = networks.save(student.net, folder / "reflow" / "net")
    facts = student.student_facts | {"round": 1, "net": network_digest(student.net)}
    outputs = [f"net/{file}" for file in files]
    manifest.seal(folder / "reflow", stage="reflow", config={}, inputs={}, outputs=outputs, **facts)
    listed = [f"call.{key}={json.dumps(value)}" for key, value in call_of(name).items()]
    words = [f"student={folder}/reflow", f"pipeline={folder}/pipe", f"prompts={folder}/prompts.txt"]
    return name, folder, [*words, *listed]


def ways_of(folder):
    return manifest.read(folder, "export")["facts"]["ways"]


def trained(folder, name):
    prompts, call = PromptsConfig(path=f"{folder}/prompts.txt"), CallConfig(**call_of(name))
    return text_folder.open_student(
        f"{folder}/reflow", prompts, call, f"{folder}/pipe", device="cpu"
    )


def test_the_export_is_the_teachers_pipeline_with_the_students_network(made, tmp_path, request):
    name, folder, words = made
    if name == SD3:
        request.getfixturevalue("fresh_process")
    run(export, *words, f"run_dir={tmp_path}/export", "steps=[1,2]")
    out = tmp_path / "export"
    indices = [json.loads((p / "model_index.json").read_text()) for p in (folder / "pipe", out)]
    for index in indices:
        assert index.pop("scheduler")[0] == "diffusers"
        index.pop("_name_or_path", None)
    assert indices[0] == indices[1]
    for file in out.rglob("*.json"):
        assert str(folder) not in file.read_text()
    student = trained(folder, name)
    net = student.script.network
    for part in ("text_encoder", "vae", net):
        one, other = (next((p / part).glob("*.safetensors")) for p in (folder / "pipe", out))
        assert (one.read_bytes() == other.read_bytes()) == (part != net)
    card = (out / "README.md").read_text()
    front, code = re.search(r"^---\n(.*?)---.*?```python\n(.*?)```", card, re.S).groups()
    assert "license: openrail++" in front
    space = {}
    exec(code.replace("path/to/this/folder", str(out)), space)
    assert space["sample"].size == (16, 16)
    assert "{" not in card
    # two steps, by hand
    noise = torch.randn(2, *student.shape, generator=torch.Generator().manual_seed(3))
    pipe, cond = space["pipe"], {"label": torch.tensor([0, 2])}
    x = noise
    if name == SD3:
        assert "`scheduler_2/`" in card
        stock = type(pipe.scheduler).from_pretrained(out, subfolder="scheduler_2")
        pipe.scheduler, times = stock, [0.0, 0.5, 1.0]
        assert type(stock).__name__ == EULER
    else:
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        middle = pipe.scheduler.alphas_cumprod[499].double() ** 0.5
        times = [0.0, float(middle / (middle + (1 - middle**2) ** 0.5)), 1.0]
    field = student.field(student.net)(student.net)
    with torch.no_grad():
        for t, s in pairwise(times):
            x = x + (s - t) * field(x, t, cond)
    arguments = call_of(name) | {"num_inference_steps": 2, "guidance_scale": 1.0}
    given = [PROMPTS[0], PROMPTS[2]]
    theirs = pipe(given, latents=noise, output_type="latent", **arguments).images
    assert (theirs - x).abs().max() <= 1e-5 * x.abs().max()
    # the command, one step
    told = sample(str(out), 1, tmp_path / "samples", 2, 5, None, "a dog")
    assert told == f"wrote 2 images into {tmp_path}/samples"
    if name == SD:  # whose scheduler is the folder's own
        stock = pipe(
            "a dog", generator=torch.Generator().manual_seed(5), **ways_of(out)["1"]["call"]
        )
        picture = np.asarray(Image.open(tmp_path / "samples" / "00.png"))
        assert np.array_equal(picture, np.asarray(stock.images[0]))
    for more, message in [
        ((3,), "--steps 3: this export takes 1, 2 steps"),
        ((1, [1]), "--labels"),
    ]:
        with pytest.raises(UserError, match=message):
            sample(str(out), more[0], tmp_path, 1, 0, *more[1:])


@pytest.mark.parametrize("made", [SD], indirect=True)
def test_what_does_not_fit_is_refused(made, tmp_path, monkeypatch):
    name, _, words = made
    student, pipe, prompts, *call = words
    other = tmp_path / "prompts.txt"
    other.write_text("a dog\n" + "\n".join(PROMPTS) + "\n")
    wrong = "StableDiffusionXLPipeline"
    TINY[wrong].build().save_pretrained(tmp_path / "other")
    for given, message in [
        ([student, pipe, *call], "pipeline: for a student that reads prompts; set prompts, too"),
        ([student], f"student=.*reflow reads prompts: set prompts= .* the teacher's {name}"),
        (
            [student, prompts, *call],
            f"reflow is one network; set pipeline= to its teacher's {name}",
        ),
        ([*words, "call.height=32"], "call=.*'height': 32.* was trained with call=.*'height': 16"),
        ([student, pipe, f"prompts={other}"], "trained with 3 prompts, which are not the first"),
        (
            [student, f"pipeline={tmp_path}/other", prompts],
            f"is not that of student=.*, a {name}",
        ),
        ([*words, "push_to_hub=x"], "push_to_hub=x: expected ORG/NAME"),
        ([*words, "push_to_hub=a/b c"], "push_to_hub=a/b c: Repo id must"),
        ([*words, "steps=[0]"], "expected one or more numbers, from 1"),
    ]:
        with pytest.raises(UserError, match=message):
            run(export, *given, f"run_dir={tmp_path}/export")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="push_to_hub=a/b: HF_HUB_OFFLINE is set"):
        run(export, *words, f"run_dir={tmp_path}/export", "push_to_hub=a/b")
    assert not (tmp_path / "export").exists()


class Wrong:
    """A fresh process whose samples are zeros."""

    def __init__(self, cpu):
        self.scratch = tempfile.TemporaryDirectory()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.scratch.cleanup()

    def sample(self, task):
        assert task["ways"][0]["call"]["guidance_scale"] == 1
        noise = torch.load(Path(self.scratch.name) / "noise.pt")
        return {"0": torch.zeros_like(noise), "output": "images"}


@pytest.mark.parametrize("made", [SD], indirect=True)
def test_an_export_that_differs_is_not_sealed(made, tmp_path, monkeypatch):
    _, _, words = made
    monkeypatch.setattr(export, "Fresh", Wrong)
    with pytest.raises(
        UserError, match="loaded again, the export differs by 1 at 1 steps with sched"
    ):
        run(export, *words, f"run_dir={tmp_path}/export", "steps=[1]")
    monkeypatch.setattr(text_export, "EXACT", -1.0)
    monkeypatch.setattr(text_export, "NEAR", 1e-12)
    with pytest.raises(
        UserError, match="cannot take our 1 steps with any scheduler that was tried"
    ):
        run(export, *words, f"run_dir={tmp_path}/export", "steps=[1]")
    assert not manifest.sealed(tmp_path / "export")


class Hub:
    """What `push` uses of HfApi, and a record of it."""

    calls: ClassVar[list] = []
    fails = False

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, name, exist_ok):
        self.calls.append(name)
        return f"https://huggingface.co/{name}"

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        if self.fails:
            raise OSError("no way")
        self.calls.append((repo_id, folder_path, ignore_patterns))


def test_a_sealed_folder_is_uploaded_on_request(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "calls", [])
    manifest.seal(tmp_path, stage="export", config={}, inputs={}, outputs=[])
    push.check_push("a/b")
    export.upload(tmp_path, "a/b")
    assert Hub.calls == ["whoami", "a/b", ("a/b", tmp_path, push.KEPT_BACK)]
    assert "uploaded to https://huggingface.co/a/b" in capsys.readouterr().out
    config = export.ExportConfig(run_dir=str(tmp_path), student="x", push_to_hub="a/b")
    plan = export.Plan(config, {}, [], None, None, "")
    for written, again in (("null", True), ("a/c", True), ("a/b", None)):
        (tmp_path / "config.yaml").write_text(f"push_to_hub: {written}\n")
        assert plan.reopen() is again
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(UserError, match="push_to_hub=a/b: the upload failed: no way; repeat"):
        export.upload(tmp_path, "a/b")
    assert not manifest.sealed(tmp_path)


def test_parts_that_are_none_are_named_where_diffusers_wants_it(tmp_path):
    pipe = TINY["StableDiffusion3Pipeline, no T5"].build()
    code = text_card.load_code(pipe)
    assert code.endswith('("FOLDER", text_encoder_3=None, tokenizer_3=None)')
    pipe.save_pretrained(tmp_path)
    space = {"DiffusionPipeline": __import__("diffusers").DiffusionPipeline}
    exec(code.replace("FOLDER", str(tmp_path)), space)
    assert space["pipe"].text_encoder_3 is None
    assert text_card.load_code(TINY[SD].build()).endswith('from_pretrained("FOLDER")')


def test_the_times_that_the_network_sees_count(monkeypatch):
    """CogView4 gives its network times of its own, whatever the sigmas of the scheduler are."""
    trial = text_export.Trial(student_of("CogView4Pipeline"), 0)
    way = text_export.Way(text_export.euler(trial.pipe.scheduler, shift_terminal=0.5))
    state = trial.seen(2, way).steps[-1].after
    monkeypatch.setattr(trial, "own", lambda grid: state)
    assert trial.difference(2, way) == pytest.approx(0.499)  # 1 instead of 500
    given = text_export.Way(
        text_export.euler(trial.pipe.scheduler), call={"timesteps": [1000, 500]}
    )
    state = trial.seen(2, given).steps[-1].after
    assert trial.difference(2, given) == 0


# What takes 1, 2 and 4 steps exactly, as on the page: one stock scheduler for any number, or one for
# each number, or arguments of the call, or the pipeline's own noise levels.
ANY, ONE, ZERO = "Euler", "Euler of N", "DDIM"
PAGE = {
    ANY: "Flux Lumina2 ZImage QwenImage Chroma LTX HunyuanVideo OvisImage Krea2 NucleusMoEImage "
    "BriaFibo Flux2Klein HunyuanImage HunyuanVideo15",
    ONE: "StableDiffusion3 Sana Lumina AuraFlow Wan HiDreamImage Bria PRX SanaVideo SkyReelsV2 "
    "Kandinsky5T2V",
    ZERO: "StableDiffusion StableDiffusionXL PixArtAlpha PixArtSigma CogVideoX HunyuanDiT CogView3Plus "
    "Latte Allegro AnimateDiff LDMTextToImage",
    "Euler, with `timesteps`": "CogView4",
    "Euler of N at 2, own levels at 4, none at 1": "Mochi",
}
# Classes in which our scheduler cannot be used: sigmas are inverted; the stock class's config is read.
NOT_OURS = ("MochiPipeline", "BriaFiboPipeline")
KINDS = {f"{name}Pipeline": kind for kind, names in PAGE.items() for name in names.split()}


def test_the_page_names_the_scheduler_of_each_class():
    page = Path(__file__).parents[2] / "docs" / "reference" / "pipelines.md"
    found = {}
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7:
            found |= {f"{name}Pipeline": cells[-1] for name in cells[0].split(", ")}
    assert {name: found.get(name) for name in KINDS} == KINDS


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_stock_samples_equal_our_own_steps(name):
    student, kind = student_of(name), KINDS[name]
    trial = text_export.Trial(student, 0)
    choice = text_export.choose(trial, [1, 2, 4])
    for n, found in choice.steps.items():
        if name == "MochiPipeline" and n == 1:
            assert found.way is None
            assert "ZeroDivisionError" in found.failure
            continue
        assert found.difference <= 1e-5
        assert found.way.name == ("DDIMScheduler" if kind == ZERO else EULER)
        plain = name == "MochiPipeline" and n == 4
        single = choice.folder.name == EULER and n == 1  # without 1/N, which is no grid of one step
        alone = kind.startswith(ONE) and not plain and not single
        assert found.way.place == (f"scheduler_{n}" if alone else "scheduler")
        assert bool(found.way.call) == (name == "CogView4Pipeline" and n > 1)
        assert (found.way.own_grid is not None) == plain
        if student.schedule is None and name not in NOT_OURS:
            ours = text_export.Way(RectifiedFlowScheduler())
            assert trial.difference(n, ours) <= 1e-5
