"""Stage one on pictures with captions, in the latents of a pipeline's VAE; the tiny pipeline."""

import io
import json
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from flowmatch.config import UserError
from flowmatch.data import captions, dataset, digits_text
from flowmatch.data.config import DataConfig, PromptsConfig
from flowmatch.data.prompts import PromptList
from flowmatch.flow import coupling
from flowmatch.flow.config import TimesConfig
from flowmatch.flow.noise import Order
from flowmatch.models import latents, students, text
from flowmatch.models.config import CallConfig
from flowmatch.runs import manifest
from flowmatch.runs.command import execute, load
from flowmatch.runs.experiment import Experiment, find_config
from flowmatch.runs.values import read_yaml
from flowmatch.training import pictures
from flowmatch.training.draw import draw
from pipelines import generate_pairs, reflow, tiny_pipeline, train_flow
from tests.stages import MODELS, run
from tests.tiny import TINY

NET = {
    "name": "UNet2DConditionModel",
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SD3 = {"name": "SD3Transformer2DModel", "num_layers": 1, "num_attention_heads": 2}
SD3 |= {"patch_size": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
CALL = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 2.0}
WORDS = [f"call.{key}={value}" for key, value in CALL.items()]
FIT = ["fit.batch_size=8", "fit.log_every=1"]


def build(folder, name, *more, net=NET):
    sizes = ["width=16", "vae_channels=[8,8]", "vae_steps=4", "vae_batch=8"]
    net = [f"net={json.dumps(net)}", "data.source=digits_text", f"run_dir={folder}/{name}"]
    run(tiny_pipeline, *net, *sizes, *more)
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    build(folder, "tiny")
    start = [f"start={folder}/tiny", "data.source=digits_text", "data.memory=0", *WORDS, *FIT]
    run(train_flow, *start, f"run_dir={folder}/flow", "fit.steps=2", "fit.label_drop=0.5")
    return folder


def test_the_tiny_pipeline_is_a_stock_one_and_made_again_the_same(made):
    again = build(made, "again")
    assert manifest.digest(again) == manifest.digest(made / "tiny")
    pipe = DiffusionPipeline.from_pretrained(made / "tiny")
    assert pipe.tokenizer("a red seven at the left").input_ids[1:-1] != []
    assert len(pipe.tokenizer("a red seven at the left").input_ids) == 8  # a word is a token
    picture = pipe("a blue one at the top", height=16, width=16, num_inference_steps=1).images[0]
    assert picture.size == (16, 16)
    other = build(made, "other", "seed=1")
    assert manifest.digest(other) != manifest.digest(again)


def test_samples_while_it_trains_are_pictures_of_the_pipeline(made, tmp_path):
    start = [f"start={made}/tiny", "data.source=digits_text", "data.memory=0", *WORDS, *FIT]
    more = ["fit.steps=2", "fit.label_drop=0.5", "fit.sample_every=1"]
    run(train_flow, *start, f"run_dir={tmp_path}/flow", *more)
    assert manifest.digest(tmp_path / "flow") == manifest.digest(made / "flow")
    sheet = Image.open(tmp_path / "flow/samples/step_00000002.png")
    assert sheet.size[1] == 2 * (4 * 16 + pictures.GAP)  # pictures of 16 x 16, four times as large


def test_a_pipeline_of_sd3s_class_is_made_too(made):
    build(made, "sd3", net=SD3)
    call = CallConfig(**CALL | {"max_sequence_length": 12})
    listed = PromptsConfig(templates=["a red seven at the left", "a blue one"])
    teacher = text.load(made / "sd3", "start", listed, call)  # learnt, and replayed
    assert teacher.script.pipeline == "StableDiffusion3Pipeline"
    assert teacher.shape == (4, 8, 8)
    one, other = (teacher.conditions().rows(torch.tensor([i])) for i in (0, 1))
    assert not torch.equal(one["encoder_hidden_states"], other["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["net.name=UNet2DModel"], "expected UNet2DConditionModel or SD3Transformer2DModel"),
        (["net.block_out_channels=[5]"], "net: UNet2DConditionModel refuses these arguments"),
        (["net.up_block_types=[1,2]"], "net: UNet2DConditionModel refuses these arguments"),
        (["net.sample_size=8"], "net.sample_size: follows from data and width"),
        (["predicts=noise", f"net={json.dumps(SD3)}"], "SD3Transformer2DModel predicts a flow"),
        (["vae_channels=[8]"], "vae_channels: AutoencoderKL refuses these arguments"),
        (["data.source=digits"], r"samples are \[1, 8, 8\]|has no captions"),
        (["device=cuda"], "device=cuda: the VAE is trained on the CPU"),
        (["data={source: npz, path: odd.npz}"], r"samples are \[1, 7, 7\]; expected .* even sides"),
    ],
)
def test_a_tiny_pipeline_that_cannot_be_made_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("odd.npz", x=np.zeros((4, 7, 7), np.uint8))
    with pytest.raises(UserError, match=message):
        build(tmp_path, "tiny", *words)
    assert not (tmp_path / "tiny").exists()


def test_latents_are_standardised_and_pictures_stay_as_they_are(made):
    data = dataset.load(DataConfig(source="digits_text"))
    vae = DiffusionPipeline.from_pretrained(made / "tiny").vae.requires_grad_(False)
    vae.quant_conv.bias[:4] += torch.arange(4.0)
    vae.quant_conv.weight[:4] *= 3
    x = data.batch(np.arange(0, 21570, 37))["x1"]
    before = vae.encode(x).latent_dist
    pictures = vae.decode(before.mode()).sample
    tiny_pipeline.standardise(vae, data)
    after = vae.encode(x).latent_dist
    assert after.mode().mean((0, 2, 3)).abs().max() < 0.1
    assert (after.mode().std((0, 2, 3)) - 1).abs().max() < 0.1
    scale = before.mode().std((0, 2, 3), keepdim=True) / after.mode().std((0, 2, 3), keepdim=True)
    assert torch.allclose(after.std * scale, before.std, rtol=1e-3)
    assert torch.allclose(vae.decode(after.mode()).sample, pictures, atol=1e-4)


def test_the_pictures_show_what_their_captions_say():
    for split, count in (("train", 21570), ("test", 5385)):
        config = DataConfig(source="digits_text", split=split, labels=True)
        data = dataset.load(config)
        captioned, texts, _ = captions.read(data, config)
        assert len(data) == count
        assert len(texts) == 150
        ids = np.arange(0, count, 7)
        words = [texts[i] for i in captioned.label[ids]]
        classes = torch.nn.functional.one_hot(torch.from_numpy(data.label[ids]))
        classifier = SimpleNamespace(logits=lambda x, classes=classes: classes)
        verdicts = digits_text.judge(data.batch(ids)["x1"], words, classifier)
        assert all(verdict.eq(1).all() for verdict in verdicts.values())
        changed = ["a blue two in the middle", "a picture", *words[2:]]
        verdicts = digits_text.judge(data.batch(ids)["x1"], changed, classifier)
        assert [float(v[0]) for v in verdicts.values()] == [0.0, 0.0, 1.0]
        assert all(v[1].isnan() for v in verdicts.values())


def test_the_network_is_trained_on_the_captions(made):
    """Its first call and loss, by the pipeline's own parts: VAE, tokenizer, encoder, and the path."""
    words = [f"start={made}/tiny", "data.source=digits_text", "data.memory=0", *WORDS, *FIT]
    words += [f"run_dir={made}/seen", "fit.steps=1", "fit.label_drop=0.5", "device=cpu"]
    plan = train_flow.plan(load(train_flow.FlowConfig, words)[0])
    calls = []

    def keep(net, args, given):
        calls.append({name: value for name, value in given.items() if torch.is_tensor(value)})

    plan.net.register_forward_pre_hook(keep, with_kwargs=True)
    train_flow.run(plan)
    seen = next(call for call in calls if len(call.get("sample", ())) == 8)
    config = DataConfig(source="digits_text")
    pipe = DiffusionPipeline.from_pretrained(made / "tiny")
    data, texts, _ = captions.read(dataset.load(config), config)
    order = Order(len(data), 0)

    def stream(counters):
        batch = data.batch(order(counters))
        z = pipe.vae.encode(batch["x1"]).latent_dist.mode()
        return batch | {"x1": z * pipe.vae.config.scaling_factor}

    with torch.no_grad():
        drawn = draw(
            *(
                stream,
                coupling.build(train_flow.CouplingConfig()),
                TimesConfig(),
                0.5,
                len(texts),
                0,
            ),
            np.arange(8),
        )
        words = [[*texts, ""][i] for i in drawn.label]
        assert "" in words
        tokens = pipe.tokenizer(
            words, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
        )
        hidden = pipe.text_encoder(tokens.input_ids)[0]
        t = drawn.t[:, None, None, None]
        x = (1 - t) * drawn.x0 + t * drawn.x1
        out = pipe.unet(x, 1000 * (1 - drawn.t), encoder_hidden_states=hidden).sample
        loss = float((out - (drawn.x0 - drawn.x1)).square().mean())
    assert torch.allclose(seen["sample"], x, atol=1e-5)
    assert torch.allclose(seen["encoder_hidden_states"], hidden, atol=1e-5)
    assert torch.allclose(seen["timestep"], 1000 * (1 - drawn.t), atol=1e-3)
    first = json.loads((made / "seen/metrics.jsonl").read_text())
    assert first["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_flow_is_a_teacher_of_prompts(made):
    """Pairs by its own run, of other prompts than the captions; reflow from it."""
    sealed = manifest.read(made / "flow", "flow")
    assert sealed["facts"]["round"] == 0
    assert sealed["facts"]["prompts"]["count"] == 150
    assert sealed["facts"]["script"]["pipeline"] == "StableDiffusionPipeline"
    assert sealed["inputs"].keys() == {"data", "captions", "start", "vae"}
    prompts = ["a red seven at the left", "a blue one in the middle"]
    listed, call = PromptsConfig(templates=prompts), CallConfig(**CALL)
    teacher = text.load(made / "flow", "teacher", listed, call, pipeline=str(made / "tiny"))
    start = text.load(made / "tiny", "start", listed, call)
    assert teacher.digest != start.digest
    words = [f"prompts.templates={json.dumps(prompts)}", *WORDS, f"pipeline={made}/tiny"]
    sizes = ["shards=1", "shard_size=4", "compute_batch=4", "block=4"]
    run(generate_pairs, *words, f"teacher={made}/flow", f"run_dir={made}/pairs", *sizes)
    more = [f"start={made}/flow", f"pairs={made}/pairs", f"run_dir={made}/reflow", *FIT]
    run(reflow, *words, *more, "fit.steps=2")
    assert manifest.read(made / "reflow", "reflow")["facts"]["round"] == 1


def test_a_network_of_noise_is_trained_as_ddpm_trains_it(made):
    """Its first loss is that of diffusers' own add_noise; then it is a teacher, and no student."""
    build(made, "noise", "predicts=noise")
    words = [f"start={made}/noise", "data.source=digits_text", "data.memory=0", *WORDS, *FIT]
    run(train_flow, *words, f"run_dir={made}/ddpm", "fit.steps=1", "fit.label_drop=0")
    pipe = DiffusionPipeline.from_pretrained(made / "noise")
    config = DataConfig(source="digits_text")
    data, texts, _ = captions.read(dataset.load(config), config)
    order = Order(len(data), 0)

    def stream(counters):
        batch = data.batch(order(counters))
        return batch | {"x1": pipe.vae.encode(batch["x1"]).latent_dist.mode()}

    with torch.no_grad():
        random = coupling.build(train_flow.CouplingConfig())
        drawn = draw(stream, random, TimesConfig(), 0.0, len(texts), 0, np.arange(8))
        steps = 999 - (1000 * drawn.t).long()
        tokens = pipe.tokenizer(
            [texts[i] for i in drawn.label],
            padding="max_length",
            max_length=12,
            return_tensors="pt",
        )
        hidden = pipe.text_encoder(tokens.input_ids)[0]
        y = pipe.scheduler.add_noise(drawn.x1, drawn.x0, steps)
        out = pipe.unet(y, steps, encoder_hidden_states=hidden).sample
        loss = float((out - drawn.x0).square().mean())
    (line,) = (made / "ddpm/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(loss, rel=1e-4)
    listed, call = PromptsConfig(templates=["a blue one"]), CallConfig(**CALL)
    teacher = text.load(made / "ddpm", "teacher", listed, call, pipeline=str(made / "noise"))
    assert (teacher.schedule, teacher.student_facts["form"]) == (None, "v")
    with pytest.raises(UserError, match="predicts epsilon, as its pipeline's own network does"):
        students.load(teacher, made / "ddpm", "student")


def test_fresh_weights_replace_those_of_the_pipeline(made):
    words = [f"start={made}/tiny", "data.source=digits_text", "data.memory=0", *WORDS, *FIT]
    words.append("fit.steps=1")
    run(train_flow, *words, f"run_dir={made}/fresh", "fresh=true", "fit.label_drop=0.5")
    first, other = (
        json.loads((made / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("flow", "fresh")
    )
    assert first != other


def teacher_of(name, tmp_path, **more):
    TINY[name].build().save_pretrained(tmp_path / "pipe")
    call = {key: value for key, value in TINY[name].call.items() if key != "output_type"}
    listed = PromptList(["a cat", "a dog"], [])
    return text.load(tmp_path / "pipe", "start", listed, CallConfig(**call | more))


def test_states_are_scaled_as_the_pipeline_scales_them(tmp_path):
    """SD3's VAE has a scale and a shift, which its pipeline undoes before it decodes."""
    teacher = teacher_of("StableDiffusion3Pipeline", tmp_path)
    vae, data = teacher.pipe.vae, dataset.load(DataConfig(source="digits_text"))
    data = replace(data, count=70)  # two chunks
    with torch.no_grad():
        z = vae.encode(data.batch(np.arange(5))["x1"]).latent_dist.mode()
    expected = (z - vae.config.shift_factor) * vae.config.scaling_factor
    assert vae.config.shift_factor
    for memory in (0, 2048):  # read anew, and kept
        found = latents.encoded(teacher, data, memory, "start=pipe")
        assert found.shape == (4, 8, 8)
        got = found.batch(np.arange(5))["x1"]
        assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FluxPipeline", "states of FluxPipeline are not laid out like the latents of its VAE"),
        (
            "StableDiffusion3Pipeline",
            r"become latents of \[4, 8, 8\]; the state of .* is \[4, 16, 16",
        ),
    ],
)
def test_states_that_are_no_latents_are_refused(name, message, tmp_path):
    teacher = teacher_of(name, tmp_path, height=32, width=32)
    data = dataset.load(DataConfig(source="digits_text"))
    with pytest.raises(UserError, match=message):
        latents.encoded(teacher, data, 0, "start=pipe")


def test_pictures_that_no_vae_encodes_are_refused(tmp_path):
    teacher = teacher_of("StableDiffusionPipeline", tmp_path)
    grey = dataset.load(DataConfig(source="digits"))
    with pytest.raises(UserError, match=r"pictures of \[1, 8, 8\] cannot be encoded by the VAE of"):
        latents.encoded(teacher, grey, 0, "start=pipe")
    bare = replace(teacher, pipe=SimpleNamespace(vae=None))
    with pytest.raises(
        UserError, match="has no VAE that encodes pictures; it cannot train on them"
    ):
        latents.encoded(bare, grey, 0, "start=pipe")


def test_captions_are_read_from_tables_and_tars(tmp_path):
    words = ["a cat", "a dog", "a cat"]
    pictures = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(3)]
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = []
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": words[i], "source": "x"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for i, picture in enumerate(pictures):
            content = io.BytesIO()
            picture.save(content, "PNG")
            for suffix, part in (("png", content.getvalue()), ("txt", words[i].encode())):
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    for path in (folder, tmp_path / "set.tar"):
        config = DataConfig(path=str(path))
        data, texts, _ = captions.read(dataset.load(config), config)
        assert texts == ["a cat", "a dog"]
        assert data.batch(np.arange(3))["label"].tolist() == [0, 1, 0]
    config = DataConfig(path=str(folder), caption_column="txt")
    with pytest.raises(UserError, match=r"caption_column=txt does not exist; the columns are text"):
        captions.read(dataset.load(config), config)
    (folder / "metadata.jsonl").write_text("\n".join(rows).replace("a dog", " "))
    config = DataConfig(path=str(folder))
    with pytest.raises(UserError, match="the caption of row 1 is empty"):
        captions.read(dataset.load(config), config)


def test_what_does_not_fit_is_refused(made, tmp_path):
    base = ["fit.steps=1", *FIT, f"run_dir={tmp_path}/flow"]
    start, data = f"start={made}/tiny", "data.source=digits_text"
    TINY["StableDiffusionPipeline"].build().save_pretrained(tmp_path / "noise")
    for more, message in [
        ([data], "net=None: missing; set net.name, a class of diffusers, or start"),
        ([data, start, "net=UNet2DModel"], "start has a network; remove net"),
        ([data, "net=UNet2DModel", "fresh=true"], "fresh=True: for a pipeline that reads text"),
        ([data, "net=UNet2DModel", "call.height=8"], "call=.*for a pipeline that reads text"),
        ([start, "data.source=digits"], "data.source=digits has no captions"),
        ([data, f"start={made}/flow"], "start=.*is a run folder; expected a pipeline"),
        (
            [data, f"start={tmp_path}/noise", *WORDS, "loss.name=pseudo_huber"],
            "predicts epsilon, and is trained with its own squared error; leave loss out",
        ),
        ([data, start, "call.height=32", "call.width=32"], r"the state of .* is \[4, 16, 16\]"),
        ([data, start, "data.flip=true"], "captions of digits_text say left and right"),
    ]:
        with pytest.raises(UserError, match=message):
            run(train_flow, *base, *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_text", "digits_text_noise", "digits_text_sd3"])
def test_a_shipped_experiment_runs_to_its_export(name, tmp_path, monkeypatch):
    """With a few updates; then a stock pipeline of the class of its own."""
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(read_yaml(find_config(name)), name)
    words = ["tiny.vae_steps=2", "classifier.steps=2", "evaluate.samples=8", "evaluate.steps=[1]"]
    words += ["evaluate.compute_batch=8", "pairs.shard_size=8", "pairs.shards=1", "data.memory=0"]
    words += [
        f"{stage}.fit.{key}" for stage in ("flow", "reflow") for key in ("steps=2", "batch_size=8")
    ]
    words += ["call.num_inference_steps=2", "export.steps=[1]", "device=cpu"]
    for section in experiment.chain(1):
        (stage,) = [s for s in MODELS if s.STAGE.name == experiment.stage_of(section)]
        config, _ = load(stage.STAGE.config, [name, f"section={section}", "--chain", *words])
        execute(stage.STAGE, config)
    result = json.loads((tmp_path / f"runs/{name}/evaluate/metrics.json").read_text())
    assert {"accuracy: digit", "accuracy: colour", "accuracy: place"} <= set(result["rows"][0])
    pipe = DiffusionPipeline.from_pretrained(f"runs/{name}/export")
    start = DiffusionPipeline.from_pretrained(f"runs/{name}/tiny")
    assert type(pipe) is type(start)
    call = {
        key: value for key, value in experiment.shared["call"].items() if key != "guidance_scale"
    }
    call |= {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert pipe("a red seven at the left", **call).images[0].size == (16, 16)
