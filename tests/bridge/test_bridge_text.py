"""Pairs of a pipeline that reads prompts: text embeddings, decoded pictures, and reflow on an import."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.bridge.formats import FORMATS
from flowmatch.models import latents, text
from flowmatch.models.config import CallConfig
from flowmatch.models.decoding import Decoder
from flowmatch.models.rows import Stored
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import command, manifest
from flowmatch.runs.experiment import find_config
from flowmatch.runs.values import read_yaml
from pipelines import (
    convert_pairs,
    encode_prompts,
    generate_pairs,
    import_pairs,
    reflow,
    tiny_pipeline,
)
from tests.bridge import sets
from tests.stages import MODELS, run
from tests.tiny import TINY

NAME = "StableDiffusion3Pipeline"
PROMPTS = ["a cat", "a red fox in snow", "two houses", "rain at night", "an old man"]
CALL = {key: value for key, value in TINY[NAME].call.items() if key != "output_type"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    TINY[NAME].build().save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    sizes = ["shards=2", "shard_size=6", "block=4", "compute_batch=4"]
    run(generate_pairs, *words(folder), f"teacher={folder}/pipe", f"run_dir={folder}/pairs", *sizes)
    place = [f"teacher={folder}/pipe", f"run_dir={folder}/rows", "shard_size=4"]
    run(encode_prompts, *words(folder), *place)
    return folder


def words(folder):
    listed = [f"call.{key}={json.dumps(value)}" for key, value in CALL.items()]
    return [f"prompts={folder}/prompts.txt", *listed]


def main(stage, *given):
    assert stage.main([str(word) for word in given]) == 0


def test_text_embeddings_are_those_of_encode_prompts(made, tmp_path):
    data, table = PairData(made / "pairs"), Stored(f"{made}/rows", "conditions")
    more = ["--conditions", made / "rows"]
    main(convert_pairs, made / "pairs", "--to", "fastgen", tmp_path / "fastgen", *more)
    main(convert_pairs, made / "pairs", "--to", "fastvideo", tmp_path / "cache", *more)
    labels = data.batch(range(12))["label"].tolist()
    key_map = {"real": "latent.pth", "noise": "noise.pth", "condition": "txt_emb.pth"}
    batch = sets.fastvideo(tmp_path / "cache")
    for i, row in enumerate(sets.fastgen(tmp_path / "fastgen", key_map)):
        whole, pooled = row["condition"]
        ours = table.row(labels[i])
        assert torch.equal(whole, ours["/encoder_hidden_states"][0])
        assert torch.equal(pooled, ours["/pooled_projections"][0])
        assert torch.equal(batch["text_embedding"][i], whole)
    assert batch["text_attention_mask"].shape == batch["text_embedding"].shape[:2]


def test_conditions_of_other_prompts_are_refused(made, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    listed = [word for word in words(made) if not word.startswith("prompts=")]
    place = [f"teacher={made}/pipe", f"run_dir={tmp_path}/rows"]
    run(encode_prompts, f"prompts={tmp_path}/prompts.txt", *listed, *place)
    given = [made / "pairs", "--to", "fastgen", tmp_path / "out", "--conditions", tmp_path / "rows"]
    with pytest.raises(SystemExit):
        main(convert_pairs, *given)
    assert "is of other prompts" in capsys.readouterr().err


def test_states_become_pictures_and_pictures_states_by_the_pipeline(made, tmp_path):
    more = ["--pipeline", made / "pipe", "--device", "cpu"]
    main(convert_pairs, made / "pairs", "--to", "diffsynth", tmp_path / "set", *more)
    data = PairData(made / "pairs")
    batch = data.batch(range(12))
    teacher = text.load(made / "pipe", "teacher", list_of(PROMPTS), CallConfig(**CALL))
    decode = Decoder(teacher.pipe, teacher.script, CALL)
    rows, shown = sets.diffsynth(tmp_path / "set"), decode(batch["x1"][:6], batch["prompt"][:6])
    for i, row in enumerate(rows[:6]):
        pixels = np.asarray(row["image"], dtype=np.float32).transpose(2, 0, 1) / 255
        assert np.abs(pixels - shown[i].numpy()).max() <= 0.51 / 255
        assert row["prompt"] == batch["prompt"][i]
    main(import_pairs, tmp_path / "set", "--from", "diffsynth", tmp_path / "back", *more)
    back = PairData(tmp_path / "back").batch(range(12))
    assert torch.equal(back["x0"], batch["x0"])
    assert torch.equal(back["label"], batch["label"])
    scale, shift = latents.scaling(teacher, "teacher")
    pixels = torch.from_numpy(np.asarray(rows[3]["image"], dtype=np.float32)).movedim(-1, 0)
    z = latents.encode(teacher.pipe.vae, (pixels / 127.5 - 1)[None])
    assert torch.allclose(back["x1"][3], ((z - shift) / scale)[0].half().float(), atol=2e-3)


def list_of(texts):
    from flowmatch.data.prompts import PromptList

    return PromptList(texts, [])


def test_reflow_trains_on_an_imported_set_and_says_what_is_unknown(made, tmp_path, capsys):
    """A table with seeds, as others make it; its prompts are numbered in the list that import writes."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = ["image,prompt,seed,rand_device,num_inference_steps,cfg_scale"]
    size = CALL["height"]
    for i in range(4):
        Image.fromarray(np.full((size, size, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{PROMPTS[i % 3]},{i},cpu,4,1")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    more = ["--pipeline", made / "pipe", "--device", "cpu"]
    main(import_pairs, folder, "--from", "diffsynth", tmp_path / "pairs", *more)
    assert "unknown, and so in the manifest: teacher, solver" in capsys.readouterr().out
    facts = manifest.read(tmp_path / "pairs", "pairs")["facts"]
    assert facts["unknown"] == ["teacher", "solver", "guidance", "round"]
    assert facts["prompts"]["count"] == 3
    listed = [word for word in words(made) if not word.startswith("prompts=")]
    given = [
        *(f"pairs={tmp_path}/pairs", f"prompts={tmp_path}/pairs/prompts.jsonl", *listed),
        *(f"start={made}/pipe", f"run_dir={tmp_path}/reflow", "fit.steps=2", "fit.batch_size=4"),
    ]
    run(reflow, *given)
    assert (
        "is imported from diffsynth; unknown: teacher, solver, guidance" in capsys.readouterr().out
    )
    assert (tmp_path / "reflow" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_hundred_pairs_of_digits_text_pass_through_each_format(tmp_path):
    """Its pipeline as it is made, not trained; four steps instead of twelve."""

    def stage(module, *given):
        config, _ = command.load(MODELS[module], ["digits_text", "device=cpu", *given])
        command.execute(module.STAGE, config)

    tiny, pairs, rows = (str(tmp_path / name) for name in ("tiny", "pairs", "rows"))
    few = ["call.num_inference_steps=4", f"teacher={tiny}"]
    stage(tiny_pipeline, f"run_dir={tiny}", "vae_steps=2")
    sizes = ["pipeline=null", "shards=2", "shard_size=50", "block=16", "compute_batch=25"]
    stage(generate_pairs, *few, f"run_dir={pairs}", *sizes, "states=[0.251,0.501,0.75]")
    shared = read_yaml(find_config("digits_text"))
    call = json.dumps(shared["call"] | {"num_inference_steps": 4})
    listed = [f"prompts={json.dumps(shared['prompts'])}", f"call={call}"]
    run(encode_prompts, f"run_dir={rows}", f"teacher={tiny}", *listed)
    ours = PairData(pairs, states=True)
    whole = ours.batch(range(100))
    for to in FORMATS:
        more = ["--conditions", rows] if to in ("fastgen", "fastvideo") else []
        more = ["--pipeline", tiny, "--device", "cpu"] if to == "diffsynth" else more
        main(convert_pairs, pairs, "--to", to, tmp_path / to, *more)
        more = more if to == "diffsynth" else []
        main(import_pairs, tmp_path / to, "--from", to, tmp_path / f"{to}-back", *more)
        data = PairData(tmp_path / f"{to}-back", states=to != "diffsynth")
        back = data.batch(range(100))
        assert back["prompt"] == whole["prompt"]
        for name in ("x0",) if to == "diffsynth" else ("x0", "x1", "xt"):
            assert torch.equal(back[name], whole[name])
        assert np.allclose(data.times, [] if to == "diffsynth" else ours.times)
