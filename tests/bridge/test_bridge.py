"""Pairs in the formats of other trainers: what their loaders read, and what comes back."""

import contextlib
import json
import shutil
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch import cli
from flowmatch.bridge import importing, parts
from flowmatch.bridge.conversion import Conversion
from flowmatch.bridge.formats import FORMATS
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest
from flowmatch.runs.files import Folder
from pipelines import convert_pairs, import_pairs, inspect_pairs, verify_pairs
from tests import forked
from tests.bridge import sets

LATENT, VIDEO, PICTURE = (4, 3, 2), (2, 3, 4, 4), (3, 8, 6)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Prompts, and paths of four points, as FastGen wants them."""
    folder = tmp_path_factory.mktemp("latents") / "pairs"
    return sets.make(folder, LATENT, times=sets.TIMES, prompts=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "pairs"
    return sets.make(folder, PICTURE, kind="float32", classes=3)


def convert(made, to, out, *more):
    assert convert_pairs.main([str(made.folder), "--to", to, str(out), *map(str, more)]) == 0


def bring(folder, kind, out, *more):
    assert import_pairs.main([str(folder), "--from", kind, str(out), *map(str, more)]) == 0
    assert verify_pairs.main([str(out), "--full"]) == 0
    return PairData(out)


def refused(capsys, command, *words):
    """Run a command that must refuse; return what it says."""
    with pytest.raises(SystemExit) as left:
        command([str(word) for word in words])
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert "Traceback" not in said
    return said


def tree(folder):
    """All files of a set but its commits, as bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".meta" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(data, made, half=False):
    """Compare a set with what it was made from, value by value."""
    data.reads_states = bool(data.times)
    batch = data.batch(np.arange(len(data)))
    cast = np.float16 if half else made.x0.dtype
    assert np.array_equal(batch["x0"].numpy(), made.x0.astype(cast).astype(np.float32))
    assert np.array_equal(batch["x1"].numpy(), made.x1.astype(cast).astype(np.float32))
    if made.xt is not None:
        assert np.allclose(data.times, sets.TIMES, atol=1e-6)
        assert np.array_equal(batch["xt"].numpy(), made.xt.astype(cast).astype(np.float32))
    return batch


# ---- what the loaders of other trainers read


def test_fastgen_reads_pairs_and_paths(latents, tmp_path, capsys):
    convert(latents, "fastgen", tmp_path)
    said = capsys.readouterr().out
    assert "txt_emb.pth is left out; for prompts give --conditions" in said
    pairs = sets.fastgen(tmp_path, {"real": "latent.pth", "noise": "noise.pth", "condition": "txt"})
    paths = sets.fastgen(tmp_path, {"real": "latent.pth", "path": "path.pth"})
    assert [row["fname"] for row in pairs] == [f"{i:08d}" for i in range(18)]
    for i, (pair, path) in enumerate(zip(pairs, paths, strict=True)):
        assert np.array_equal(pair["real"].numpy(), latents.x1[i])
        assert np.array_equal(pair["noise"].numpy(), latents.x0[i])
        assert path["path"].shape == (4, *LATENT)
        assert np.array_equal(path["path"][0].numpy(), latents.x0[i])
        assert np.array_equal(path["path"][1:].numpy(), latents.xt[i])
        text = pair["condition"]
        assert (text if isinstance(text, str) else text.decode()) == latents.texts[i]
    assert json.loads((tmp_path / "shard_count.json").read_text()) == {
        f"{k:06d}.tar": 6 for k in range(3)
    }
    sigmas = json.loads((tmp_path / "index.json").read_text())["path_timesteps"]
    assert np.allclose(sigmas, [1.0, 0.937, 0.833, 0.624])


def test_self_forcing_reads_paths_as_frames(latents, tmp_path):
    convert(latents, "self-forcing", tmp_path / "set")
    rows = sets.self_forcing(tmp_path / "set")
    assert len(rows) == 18
    for i, (row, text) in enumerate(rows):
        assert text == latents.texts[i]
        points = np.concatenate([latents.x0[i][None], latents.xt[i], latents.x1[i][None]])
        assert row.shape == (5, 1, *LATENT)
        assert np.array_equal(row[:, 0], points)
    assert not list((tmp_path / "set").glob(".part*"))


def test_a_video_has_its_frames_first_where_its_trainer_wants_them(tmp_path):
    made = sets.make(tmp_path / "pairs", VIDEO, number=2, size=3)
    convert(made, "self-forcing", tmp_path / "lmdb")
    convert(made, "fastvideo", tmp_path / "cache")
    row, text = sets.self_forcing(tmp_path / "lmdb")[4]
    assert text == ""
    assert np.array_equal(row, np.stack([made.x0[4], made.x1[4]]).swapaxes(1, 2))
    batch = sets.fastvideo(tmp_path / "cache")
    assert np.array_equal(batch["real"][4].numpy(), made.x1[4].swapaxes(0, 1))
    for kind, out in (("self-forcing", "lmdb"), ("fastvideo", "cache")):
        same(bring(tmp_path / out, kind, tmp_path / f"back-{out}"), made)


def test_fastvideo_reads_its_cache(latents, tmp_path):
    convert(latents, "fastvideo", tmp_path)
    batch = sets.fastvideo(tmp_path)
    assert batch["trajectory_latents"].shape == (18, 4, 1, *LATENT)
    assert batch["trajectory_timesteps"][0].tolist() == [1000, 937, 833, 624]
    assert np.array_equal(batch["real"][:, 0].numpy(), latents.x1)
    assert np.array_equal(batch["trajectory_latents"][:, 1:, 0].numpy(), latents.xt)


def test_diffsynth_reads_pictures_and_finds_no_seed_to_draw_other_noise_from(pictures, tmp_path):
    convert(pictures, "diffsynth", tmp_path)
    rows = sets.diffsynth(tmp_path)
    assert set(rows[0]) == {"image", "prompt", "noise", "label"}
    for i, row in enumerate(rows):
        pixels = np.asarray(row["image"], dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(pixels - pictures.x1[i]).max() <= 0.5 / 127.5 + 1e-6
        assert np.array_equal(np.load(tmp_path / row["noise"]), pictures.x0[i])
        assert row["prompt"] == str(pictures.y[i])


def test_any_webdataset_pipeline_reads_npy_members(latents, tmp_path):
    convert(latents, "npy", tmp_path)
    for i, row in enumerate(sets.npy(tmp_path)):
        assert np.array_equal(row["x0.npy"], latents.x0[i])
        assert np.array_equal(row["x1.npy"], latents.x1[i])
        assert np.array_equal(row["xt.npy"], latents.xt[i])
        assert row["txt"] == latents.texts[i]
        assert row["cls"] == latents.y[i]


def test_a_class_is_its_name_where_there_are_no_prompts(pictures, tmp_path, capsys):
    (tmp_path / "names").write_text("cat\ndog\nfox\n")
    convert(pictures, "npy", tmp_path / "named", "--names", tmp_path / "names")
    rows = sets.npy(tmp_path / "named")
    assert [row["txt"] for row in rows] == [("cat", "dog", "fox")[k] for k in pictures.y]
    convert(pictures, "fastgen", tmp_path / "numbers")
    assert "the text of each pair is the number of its class" in capsys.readouterr().out


# ---- there and back


@pytest.mark.parametrize("to", ["fastgen", "fastvideo", "npy", "self-forcing"])
def test_every_value_comes_back(latents, tmp_path, to):
    convert(latents, to, tmp_path / "set")
    data = bring(tmp_path / "set", to, tmp_path / "back")
    batch = same(data, latents)
    assert batch["prompt"] == latents.texts
    facts, ours = data.sealed["facts"], manifest.read(latents.folder, "pairs")["facts"]
    assert facts["kind"] == "imported"
    assert facts["round"] == 1
    assert facts["unknown"] == []
    assert facts["origin"]["teacher"] == "b" * 64
    if to != "self-forcing":  # which has no place for numbers of prompts
        assert batch["label"].tolist() == latents.y.tolist()
        assert facts["prompts"] == ours["prompts"]


def test_pictures_come_back_to_half_a_step_of_eight_bits(pictures, tmp_path):
    convert(pictures, "diffsynth", tmp_path / "set")
    data = bring(tmp_path / "set", "diffsynth", tmp_path / "back")
    batch = data.batch(range(18))
    assert np.array_equal(batch["x0"].numpy(), pictures.x0)
    assert np.abs(batch["x1"].numpy() - pictures.x1).max() <= 0.5 / 127.5 + 1e-6
    assert batch["label"].tolist() == pictures.y.tolist()
    assert data.sealed["facts"]["classes"] == 3
    assert not data.has_prompts


def test_float32_is_kept_where_it_can_be_and_halved_where_it_cannot(pictures, tmp_path, capsys):
    for to in ("fastgen", "fastvideo", "npy"):
        convert(pictures, to, tmp_path / to)
        assert same(bring(tmp_path / to, to, tmp_path / f"{to}-back"), pictures)
    capsys.readouterr()
    convert(pictures, "self-forcing", tmp_path / "half")
    assert "latents become float16" in capsys.readouterr().out
    same(bring(tmp_path / "half", "self-forcing", tmp_path / "half-back"), pictures, half=True)


def test_noise_that_is_drawn_is_written(tmp_path):
    """`x0: drawn` leaves it out of the tars; other trainers cannot draw it."""
    made = sets.make(tmp_path / "stored", LATENT, number=1)
    drawn = tmp_path / "pairs"
    layout = made.layout.__class__(**made.layout.entries() | {"noise": False})
    from flowmatch.pairs import shards

    sealed = manifest.read(made.folder, "pairs")
    blocks = [(None, made.x1[a : a + 4], None) for a in (0, 4)]
    side = shards.write_shard(drawn, 0, layout, blocks, "a" * 64, {}, "# Pairs\n")
    facts = sealed["facts"] | {"layout": layout.entries(), "fingerprint": "a" * 64}
    sums = {"pairs-000000.tar": side["sha256"]}
    rest = {"config": sealed["config"], "inputs": sealed["inputs"], "outputs": sums}
    manifest.seal(drawn, stage="generate_pairs", **rest, **facts)
    made.folder = drawn
    convert(made, "npy", tmp_path / "out")
    assert np.array_equal(np.stack([row["x0.npy"] for row in sets.npy(tmp_path / "out")]), made.x0)


# ---- workers that are killed, and repeated


@pytest.mark.parametrize("to", list(FORMATS))
def test_killed_and_repeated_workers_write_the_same(latents, pictures, tmp_path, monkeypatch, to):
    made = pictures if to == "diffsynth" else latents
    convert(made, to, tmp_path / "whole")
    out, real, built = tmp_path / "out", FORMATS[to], []

    class Dying:
        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, folder, k, *rest):
            real.write(folder, k, *rest)
            built.append(k)
            if len(built) == 2:
                raise RuntimeError("killed")

    monkeypatch.setitem(FORMATS, to, Dying())
    rmtree = shutil.rmtree
    monkeypatch.setattr(parts.shutil, "rmtree", lambda *a, **k: None)  # a kill cleans nothing up
    with pytest.raises(RuntimeError):
        convert_pairs.main([str(made.folder), "--to", to, str(out)])
    monkeypatch.undo()
    left = list((out / ".meta").glob("build-*"))
    for path in left:  # as of a process that is no more
        path.rename(path.with_name(f"{path.name.rpartition('.')[0]}.4194304"))
    assert left
    assert not (out / "manifest.json").exists()
    words = ["pipelines.convert_pairs", made.folder, "--to", to, out, "--lease-seconds", "5"]
    workers = [forked.Popen(words, stdout=forked.PIPE, stderr=forked.STDOUT) for _ in range(2)]
    for one in workers:
        text, _ = one.communicate(60)
        assert one.returncode == 0, text
    assert tree(out) == tree(tmp_path / "whole")
    assert not list((out / ".meta").glob("build-*"))
    rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["fastvideo", "self-forcing"])
def test_workers_that_are_killed_at_any_moment_lose_their_part_alone(tmp_path, to):
    made = sets.make(tmp_path / "pairs", LATENT, times=sets.TIMES, prompts=True, number=20)
    convert(made, to, tmp_path / "whole")
    words = ["pipelines.convert_pairs", made.folder, "--to", to, tmp_path / "out"]
    words += ["--lease-seconds", "5"]  # where the number of a dead worker is another's by now
    rng, kills = np.random.default_rng(0), 0
    for _ in range(6):
        worker = forked.Popen(words, stdout=forked.PIPE, stderr=forked.STDOUT)
        assert worker.stdout.readline()  # the plan: work begins
        time.sleep(rng.uniform(0, 0.15))
        kills += worker.poll() is None
        worker.kill()
        worker.wait()
    assert kills > 1
    forked.run(words, timeout=60, check=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_file_that_is_lost_is_made_again_and_no_other(latents, tmp_path, capsys):
    for to in ("fastvideo", "self-forcing"):
        out = tmp_path / to
        convert(latents, to, out)
        before = tree(out)
        lost = out / ("samples/00000007.pt" if to == "fastvideo" else "data.mdb")
        lost.unlink()
        convert(latents, to, out)
        assert tree(out) == before
        capsys.readouterr()
        convert(latents, to, out)
        assert "is sealed: nothing to do" in capsys.readouterr().out


def test_a_part_that_was_not_committed_is_made_again(latents, tmp_path, monkeypatch):
    """Killed, or out of space, between the last rename and the sidecar of the first part."""

    write = Folder.write

    def killed(self, name, *more, **options):
        if "/part-" in name:
            raise KeyboardInterrupt
        return write(self, name, *more, **options)

    convert(latents, "fastvideo", tmp_path / "whole")
    for gone in (None, "shutil.rmtree"):  # nothing removes anything of a process that is killed
        out = tmp_path / f"out-{gone}"
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "write", killed)
            if gone:
                patch.setattr(gone, lambda *words, **options: None)
            with contextlib.suppress(KeyboardInterrupt):
                convert_pairs.main([str(latents.folder), "--to", "fastvideo", str(out)])
        convert(latents, "fastvideo", out)
        assert tree(out) == tree(tmp_path / "whole")


def test_a_worker_that_comes_when_others_have_joined_makes_no_part_again(latents, tmp_path):
    """Files of parts are gone then; who waited for the last of them must not make them again."""
    convert(latents, "self-forcing", tmp_path / "out")
    data = PairData(latents.folder)
    work = Conversion(data, FORMATS["self-forcing"], tmp_path / "out")
    assert parts.missing(work.store, range(3), work.fingerprint) == [0, 1, 2]
    assert work._left(work.store, range(3), work.fingerprint) == []


def test_other_hidden_files_stay(latents, tmp_path):
    convert(latents, "self-forcing", tmp_path / "out")
    (tmp_path / "out" / ".keep").touch()
    (tmp_path / "out" / "manifest.json").unlink()
    convert(latents, "self-forcing", tmp_path / "out")
    assert (tmp_path / "out" / ".keep").exists()


def test_the_command_finds_them_and_a_damaged_import_is_made_again(latents, tmp_path, capsys):
    words = ["convert", latents.folder, "--to", "npy", tmp_path / "set"]
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    assert left.value.code == 0
    bring(tmp_path / "set", "npy", tmp_path / "look")
    capsys.readouterr()
    assert inspect_pairs.main([str(tmp_path / "look"), "--out", str(tmp_path / "drawn")]) == 0
    said = capsys.readouterr().out
    assert "is imported from npy; unknown: nothing" in said
    assert "by None" not in said
    again = ["import", tmp_path / "set", "--from", "npy", tmp_path / "back", "--shard-size", 6]
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in again])
    assert left.value.code == 0
    whole = tree(tmp_path / "back")
    with open(tmp_path / "back/pairs-000002.tar", "r+b") as file:
        file.seek(2000)
        file.write(b"xx")
    capsys.readouterr()
    assert verify_pairs.main([str(tmp_path / "back"), "--full", "--repair"]) == 2
    assert f"flowmatch import SOURCE --from npy {tmp_path}/back" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([str(word) for word in again])
    (tmp_path / "back/pairs-000002.tar.bad").unlink()
    assert tree(tmp_path / "back") == whole


def test_an_import_is_killed_and_repeated(latents, tmp_path, monkeypatch):
    convert(latents, "npy", tmp_path / "set")
    bring(tmp_path / "set", "npy", tmp_path / "whole", "--shard-size", 3)
    out, real = tmp_path / "out", importing.Import._blocks

    def dying(self, k):
        if k == 2:
            raise RuntimeError("killed")
        return real(self, k)

    monkeypatch.setattr(importing.Import, "_blocks", dying)
    words = [str(tmp_path / "set"), "--from", "npy", str(out), "--shard-size", "3"]
    with pytest.raises(RuntimeError):
        import_pairs.main(words)
    monkeypatch.undo()
    command = ["pipelines.import_pairs", *words]
    workers = [forked.Popen(command, stdout=forked.PIPE, stderr=forked.STDOUT) for _ in range(2)]
    for one in workers:
        text, _ = one.communicate(60)
        assert one.returncode == 0, text
    assert tree(out) == tree(tmp_path / "whole")


# ---- sets of others


def test_fastgens_own_paths_keep_states_whose_times_are_given(tmp_path, capsys):
    import webdataset

    folder = tmp_path / "set"
    folder.mkdir()
    path = torch.randn(6, 4, *LATENT, dtype=torch.bfloat16)
    real = torch.randn(6, *LATENT, dtype=torch.bfloat16)
    with webdataset.TarWriter(str(folder / "00000.tar")) as tar:
        for i in range(6):
            row = {"latent.pth": real[i].clone(), "path.pth": path[i].clone()}
            tar.write({"__key__": f"sample_{i}"} | row)
    data = bring(folder, "fastgen", tmp_path / "plain")
    assert "the times of 3 states of each path are unknown" in capsys.readouterr().out
    assert data.times == []
    assert data.sealed["facts"]["unknown"] == ["teacher", "solver", "guidance", "round"]
    data = bring(folder, "fastgen", tmp_path / "timed", "--times", "0.063,0.167,0.376")
    data.reads_states = True
    batch = data.batch(range(6))
    assert torch.equal(batch["x0"], path[:, 0].float())
    assert torch.equal(batch["xt"], path[:, 1:].float())
    assert torch.equal(batch["x1"], real.float())


def test_rfpp_is_its_pictures_and_the_noise_of_its_states(tmp_path):
    rng = np.random.default_rng(0)
    folder, pixels, noise = tmp_path / "set", [], []
    folder.mkdir()
    with (
        zipfile.ZipFile(folder / "samples.zip", "w") as images,
        zipfile.ZipFile(folder / "z.zip", "w") as states,
        open(folder / "images_labels.csv", "w") as labels,
    ):
        for i in range(5):
            state = rng.bit_generator.state["state"]
            noise.append(rng.standard_normal((3, 4, 4)).astype(np.float32))
            rng.bit_generator.state = rng.bit_generator.state | {"has_uint32": 0, "uinteger": 0}
            pixels.append(np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8))
            with images.open(f"{i:05d}.png", "w") as file:
                Image.fromarray(pixels[-1]).save(file, format="PNG")
            words = [state[name].to_bytes(16, "big") for name in ("state", "inc")]
            states.writestr(f"{i:05d}.bin", b"".join(words))
            labels.write(f"{i:05d}.png,{i % 2}\n")
    data = bring(folder, "rfpp", tmp_path / "pairs")
    batch = data.batch(range(5))
    assert np.array_equal(batch["x0"].numpy(), np.stack(noise))
    x1 = (np.stack(pixels).astype(np.float32) / 255 - 0.5) / 0.5
    assert np.allclose(batch["x1"].numpy(), x1.transpose(0, 3, 1, 2), atol=1e-6)
    assert batch["label"].tolist() == [0, 1, 0, 1, 0]


def test_rectifiedflow_is_its_arrays_in_folders_of_seeds(tmp_path):
    parts_of = {}
    for seed in ("0", "1"):
        (tmp_path / "set" / seed).mkdir(parents=True)
        parts_of[seed] = np.random.default_rng(int(seed)).normal(size=(2, 5, 3, 4, 4))
        for k in (0, 1):
            np.save(tmp_path / "set" / seed / f"z{k}.npy", parts_of[seed][k].astype(np.float32))
    data = bring(tmp_path / "set", "rectifiedflow", tmp_path / "pairs", "--count", 8)
    whole = np.concatenate([parts_of["0"], parts_of["1"]], 1).astype(np.float32)
    batch = data.batch(range(8))
    assert np.array_equal(batch["x0"].numpy(), whole[0, :8])
    assert np.array_equal(batch["x1"].numpy(), whole[1, :8])


def test_what_convert_tells_of_a_set_is_an_input_of_its_import(pictures, tmp_path, capsys):
    """Else a changed value gives another manifest of the same inputs, and a damaged one is no one's."""
    convert(pictures, "npy", tmp_path / "npy")
    file, inputs = tmp_path / "npy" / "manifest.json", []
    whole = file.read_text()
    for name, text in (("a", whole), ("b", whole.replace('"guidance": 2.0', '"guidance": 3.0'))):
        file.write_text(text)
        bring(tmp_path / "npy", "npy", tmp_path / name)
        sealed = json.loads((tmp_path / name / "manifest.json").read_text())
        inputs.append((sealed["facts"]["origin"]["guidance"], sealed["inputs"]))
    assert [fact for fact, _ in inputs] == [2.0, 3.0]
    assert inputs[0][1]["source"] == inputs[1][1]["source"]
    assert inputs[0][1]["facts"] != inputs[1][1]["facts"]
    file.write_text(whole[:-9])
    words = [str(tmp_path / "npy"), "--from", "npy", str(tmp_path / "c")]
    with pytest.raises(SystemExit) as left:
        import_pairs.main(words)
    assert left.value.code == 2
    assert f"{file} is damaged, and tells no more what the set is" in capsys.readouterr().err
    file.write_text('{"tool": "another"}')
    bring(tmp_path / "npy", "npy", tmp_path / "c")


def test_a_seed_of_diffsynth_is_drawn_as_its_pipelines_draw_it(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = ["image,prompt,seed,rand_device,num_inference_steps,cfg_scale"]
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 60 * i, dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f'{i}.png,"a cat, {i}",{i + 7},cpu,4,1')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    batch = bring(folder, "diffsynth", tmp_path / "pairs").batch(range(2))
    drawn = torch.randn(
        (1, 3, 8, 8), generator=torch.Generator("cpu").manual_seed(8), dtype=torch.bfloat16
    )
    assert torch.equal(batch["x0"][1], drawn[0].float())
    assert batch["prompt"] == ["a cat, 0", "a cat, 1"]


def test_a_pickle_is_read_as_tensors_only(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for name in ("latent", "noise"):
            content = tmp_path / name
            content.write_bytes(sets.trap(tmp_path / "sprung"))
            tar.add(content, f"0.{name}.pth")
    said = refused(capsys, import_pairs.main, folder, "--from", "fastgen", tmp_path / "pairs")
    assert "cannot be read as tensors" in said
    assert not (tmp_path / "sprung").exists()


# ---- refusals


def test_what_cannot_be_converted_is_refused_in_a_line(
    latents, pictures, tmp_path, capsys, monkeypatch
):
    points = sets.make(tmp_path / "points", (2,), number=1)
    out = tmp_path / "out"

    def said(made, to, *more, place=out):
        return refused(capsys, convert_pairs.main, made.folder, "--to", to, place, *more)

    assert "these pairs are [2]; use --to npy or fastgen" in said(points, "self-forcing")
    assert "give --pipeline, the pipeline that decodes them" in said(latents, "diffsynth")
    assert "--names has 2 lines; the pairs have no classes" in said(
        latents, "npy", "--names", write(tmp_path / "names", "a\nb\n")
    )
    assert "holds prompts as text" in said(latents, "npy", "--conditions", tmp_path)
    assert "does not exist" in said(points, "fastgen", "--conditions", tmp_path / "none")
    assert "local folder" in said(points, "npy", place="s3://bucket/set")
    (tmp_path / "full").mkdir()
    write(tmp_path / "full" / "mine.txt", "")
    assert "holds other files, such as mine.txt" in said(points, "npy", place=tmp_path / "full")
    shutil.copytree(points.folder, tmp_path / "unsealed")
    (tmp_path / "unsealed" / "manifest.json").unlink()
    assert "holds other files" in said(points, "npy", place=tmp_path / "unsealed")
    assert "holds the result of generate_pairs" in said(points, "npy", place=points.folder)
    convert(points, "npy", tmp_path / "other")
    assert "another set, or with other options" in said(pictures, "npy", place=tmp_path / "other")
    import importlib.util

    found = importlib.util.find_spec
    gone = lambda name, *rest: None if name == "lmdb" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    assert "pip install 'flowmatch[bridge]'" in said(latents, "self-forcing")
    assert not out.exists()


def write(path, text):
    path.write_text(text)
    return path


def test_what_cannot_be_imported_is_refused_in_a_line(latents, tmp_path, capsys):
    convert(latents, "npy", tmp_path / "set")

    def said(kind, *more, folder=tmp_path / "set"):
        return refused(capsys, import_pairs.main, folder, "--from", kind, tmp_path / "out", *more)

    assert "was written as npy; use --from that" in said("fastgen")
    assert "expected rising numbers" in said("npy", "--times", "0.5,0.2")
    assert "--times gives 1 times; the paths have 3 states" in said("npy", "--times", "0.5")
    assert "does not divide 18 pairs; divisors: 1, 2, 3, 6, 9, 18" in said("npy", "--shard-size", 4)
    assert "--count=19: expected 1 to 18" in said("npy", "--count", 19)
    (tmp_path / "empty").mkdir()
    for kind, told in {
        "npy": "holds no *.tar",
        "self-forcing": "has no data.mdb",
        "fastvideo": "expected FastVideo's cache",
        "diffsynth": "cannot be read",
        "rfpp": "0 pictures in samples",
        "rectifiedflow": "has no z0.npy",
    }.items():
        assert told in said(kind, folder=tmp_path / "empty")


def test_a_conversion_whose_samples_are_not_its_pairs_is_not_sealed(latents, tmp_path, capsys):
    out = tmp_path / "out"
    convert(latents, "fastvideo", out)
    (out / "manifest.json").unlink()
    sample = out / "samples/00000005.pt"
    row = torch.load(sample, weights_only=True)
    row["real"][0, 0, 0, 0] += 1
    size = sample.stat().st_size
    torch.save(row, sample)
    assert sample.stat().st_size == size
    said = refused(capsys, convert_pairs.main, latents.folder, "--to", "fastvideo", out)
    assert "x1 of sample 5 is not that of its pair" in said
    assert not (out / "manifest.json").exists()


def test_damaged_pairs_are_not_converted(latents, tmp_path, capsys):
    folder = tmp_path / "pairs"
    shutil.copytree(latents.folder, folder)
    place = int(latents.layout.offsets(3)["x1"])
    with open(folder / "pairs-000001.tar", "r+b") as file:
        file.seek(place)
        file.write(b"\x00\x3c")
    said = refused(capsys, convert_pairs.main, folder, "--to", "npy", tmp_path / "out")
    assert "pairs-000001.tar is damaged: its bytes are not those that were sealed" in said
    assert not (tmp_path / "out" / "000001.tar").exists()


def test_latents_of_a_vae_become_pictures_and_latents_again(tmp_path):
    from diffusers import AutoencoderKL

    from flowmatch.models import autoencoder

    torch.manual_seed(0)
    levels = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    down, up = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    net = AutoencoderKL(3, 3, down, up, latent_channels=4, scaling_factor=0.5, **levels).eval()
    net.save_pretrained(tmp_path / "vae")
    vae = autoencoder.load(tmp_path / "vae", "vae", (3, 8, 8))
    made = sets.make(tmp_path / "pairs", (4, 4, 4), kind="float32", classes=2, number=1)
    sealed = json.loads((made.folder / "manifest.json").read_text())
    sealed["facts"] |= {"latents": vae.facts, "id2label": {"0": "cat", "1": "dog"}}
    (made.folder / "manifest.json").write_text(json.dumps(sealed))
    more = ["--pipeline", tmp_path / "vae", "--device", "cpu"]
    convert(made, "diffsynth", tmp_path / "set", *more)
    rows, shown = sets.diffsynth(tmp_path / "set"), vae.decode(torch.from_numpy(made.x1))
    pixels = np.stack([np.asarray(row["image"], dtype=np.float32) for row in rows])
    x = torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1
    assert (x - shown).abs().max() <= 0.51 / 127.5
    assert [row["prompt"] for row in rows] == [("cat", "dog")[k] for k in made.y]
    batch = bring(tmp_path / "set", "diffsynth", tmp_path / "back", *more).batch(range(6))
    assert torch.allclose(batch["x1"], vae.encode(x), atol=1e-5)
    assert np.array_equal(batch["x0"].numpy(), made.x0)


@pytest.mark.slow
def test_a_signal_ends_a_worker_between_two_samples(tmp_path):
    made = sets.make(tmp_path / "pairs", (16, 64, 64), number=2, size=400)
    words = ["pipelines.convert_pairs", made.folder, "--to", "fastvideo", tmp_path / "out"]
    worker = forked.Popen(words, stdout=forked.PIPE, stderr=forked.STDOUT)
    meta = tmp_path / "out" / ".meta"
    while not list(meta.glob("build-*/samples/*.pt")):
        time.sleep(0.01)
        assert worker.poll() is None
    worker.terminate()
    text, _ = worker.communicate(60)
    assert worker.returncode == 75, text
    assert "stopped by SIGTERM; repeat the command to go on" in text
    assert not list(meta.iterdir())
