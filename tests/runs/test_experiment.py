"""Experiments: one file, shared keys, sections that know their folders and each other's."""

from pathlib import Path

import pytest

from flowmatch.config import UserError, validate
from flowmatch.evaluation.config import EvaluateConfig
from flowmatch.pairs.config import PairsConfig
from flowmatch.runs import new
from flowmatch.runs.command import load
from flowmatch.runs.experiment import (
    CHAIN,
    SHARED,
    STAGES,
    Experiment,
    find_config,
    shipped,
)
from flowmatch.runs.values import parse_word, read_yaml
from pipelines import reflow, train_classifier, train_flow
from tests.stages import MODELS as CONFIGS

MODELS = {module.STAGE.name: module.STAGE.config for module in CONFIGS}
FIT = {"steps": 2, "batch_size": 4}
VALUES = {
    "name": "mine",
    "data": {"source": "images", "path": "a", "size": 8},
    "reference": {"source": "images", "path": "b", "size": 8},
    "net": {"name": "UNet2DModel"},
    "flow": {"fit": FIT, "data": {"flip": True}},
    "pairs": {"shards": 2, "solver": {"name": "heun", "steps": 16}, "seed": 5},
    "features": {"seed": 1},
    "reflow": {"fit": FIT, "loss": {"name": "feature", "power": 1.0}},
    "classifier": None,
    "evaluate": {"steps": 1},
    "export": {},
    "distil": {"stage": "reflow", "start": "reflow", "fit": FIT, "times": {"zero": 1.0}},
    "inverted": {
        **{"stage": "generate_pairs", "shards": 1, "dtype": "float32"},
        "data": {"source": "images", "path": "a"},
    },
}


def make(*words, without=(), **more):
    values = {key: value for key, value in (VALUES | more).items() if key not in without}
    experiment = Experiment(values, "mine.yaml")
    for word in words:
        experiment.apply(*parse_word(word))
    return experiment


def config(experiment, section):
    model = MODELS[experiment.stage_of(section)]
    return validate(model, experiment.values(section, model))


def test_the_table_of_shared_fields_is_that_of_the_stages():
    fields = {name for model in MODELS.values() for name in model.model_fields}
    assert fields - set(CHAIN) - {"run_dir"} == SHARED
    assert set(STAGES) == set(MODELS)


def test_the_section_of_evaluation_may_be_on_prompts():
    texts = {"path": "p.txt", "held_out": 0.1}
    evaluation = {"stage": "evaluate_prompts", "classes": ["zero", "one"], "samples": 8}
    mine = make(evaluate=evaluation, teacher="a/pipeline", prompts=texts, without=("flow",))
    assert mine.section_for("evaluate_prompts") == "evaluate"
    assert "evaluate" in mine.chain(1)
    with pytest.raises(UserError, match="no section for evaluate;"):
        mine.section_for("evaluate")
    found = config(mine, "evaluate")
    assert (found.teacher, found.student) == ("a/pipeline", "runs/mine/reflow")
    assert (found.prompts.held_out, found.reference.path) == (0.1, "b")
    assert found.run_dir == "runs/mine/evaluate"


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_experiment_is_sound_and_works_in_its_own_folder(name):
    experiment = Experiment(read_yaml(find_config(name)), name)
    assert experiment.name == name
    for section in experiment.sections:
        assert config(experiment, section).run_dir == f"runs/{name}/{section}"


def test_sections_share_keys_and_read_the_folders_beside_them():
    mine = make()
    assert mine.chain(1) == [name for name in CHAIN if name in VALUES]
    flow, pairs, reflowed = (config(mine, name) for name in ("flow", "pairs", "reflow"))
    assert (flow.data.path, flow.data.size, flow.data.flip) == ("a", 8, True)
    assert flow.run_dir == "runs/mine/flow"
    assert (pairs.teacher, pairs.data) == ("runs/mine/flow", None)  # shared data invert nothing
    assert reflowed.start == "runs/mine/flow"
    assert [entry.path for entry in reflowed.pairs] == ["runs/mine/pairs"]
    assert reflowed.loss.features == "runs/mine/features"
    scored, exported = config(mine, "evaluate"), config(mine, "export")
    assert (scored.teacher, scored.student) == ("runs/mine/flow", "runs/mine/reflow")
    assert (scored.classifier, scored.reference.path) == ("runs/mine/classifier", "b")
    assert (exported.student, exported.evaluation) == ("runs/mine/reflow", "runs/mine/evaluate")
    for name in ("features", "classifier"):  # labels of both sets, without a word
        learnt = config(mine, name)
        assert (learnt.data.path, learnt.held_out.path) == ("a", "b")
        assert learnt.data.labels
        assert learnt.held_out.labels
    distil, inverted = config(mine, "distil"), config(mine, "inverted")
    assert (distil.start, distil.run_dir) == ("runs/mine/reflow", "runs/mine/distil")
    assert inverted.data.path == "a"
    assert inverted.teacher == "runs/mine/flow"


def test_the_judges_of_a_panel_are_trained_where_it_is_asked_for():
    judges = {"panel_classifier": {"seed": 2}, "panel_encoder": {"task": "denoising", "seed": 3}}
    assert not {*judges} & {*make(**judges).chain(1)}
    assert config(make(**judges), "evaluate").judges == []
    for word in ("evaluate.panel=full", "panel=full"):
        mine = make(word, **judges)
        assert mine.chain(1)[-4:] == [*judges, "evaluate", "export"]
        folders = ["runs/mine/panel_classifier", "runs/mine/panel_encoder"]
        assert config(mine, "evaluate").judges == folders
    assert config(mine, "panel_classifier").data.labels
    assert not config(mine, "panel_encoder").data.labels
    assert config(make("panel=full"), "evaluate").judges == []  # which trains them itself
    named = make("evaluate.panel=full", "evaluate.judges=[panel_encoder, /x/y]", **judges)
    assert config(named, "evaluate").judges == [folders[1], "/x/y"]


def test_inputs_name_sections_and_folders_and_follow_them():
    words = ["reflow.run_dir=/x/r", "reflow.pairs=[pairs, {path: inverted, weight: 0.1}, s3://b/c]"]
    mine = make(*words, "evaluate.features=values", "name=other", "data.path=z")
    reflowed = config(mine, "reflow")
    paths = [entry.path for entry in reflowed.pairs]
    assert paths == ["runs/other/pairs", "runs/other/inverted", "s3://b/c"]
    assert config(mine, "evaluate").student == config(mine, "distil").start == "/x/r"
    assert config(mine, "evaluate").classifier is None
    assert config(mine, "flow").data.path == "z"
    plain = make("reflow.loss.name=normalised", without=["features", "classifier"])
    with pytest.raises(UserError, match="loss.features"):
        config(make(without=["features"]), "reflow")
    assert plain.chain(1) == ["flow", "pairs", "reflow", "evaluate", "export"]
    assert config(make(without=["classifier"]), "evaluate").classifier is None


def test_a_finish_reads_the_student_its_pairs_and_what_its_method_compares():
    mine = make(finish={"fit": FIT})
    found = config(mine, "finish")
    assert (found.start, found.pairs[0].path) == ("runs/mine/reflow", "runs/mine/pairs")
    assert (found.features, found.teacher, found.data) == (["random"], "runs/mine/flow", None)
    assert found.method.name == "dmd"
    mine.apply("finish.method", "kernel")
    found = config(mine, "finish")
    assert (found.features, found.teacher) == (["runs/mine/features"], None)
    mine.apply("evaluate.student", "finish")
    assert config(mine, "evaluate").student == "runs/mine/finish"
    assert "finish" not in mine.chain(1)
    assert config(make(finish={"fit": FIT}), "finish_2").start == "runs/mine/reflow_2"


def test_a_teacher_from_elsewhere_takes_the_place_of_stage_one():
    mine = make(teacher="google/ddpm-cifar10-32", without=["flow", "net"])
    assert config(mine, "pairs").teacher == "google/ddpm-cifar10-32"
    assert config(mine, "reflow").start == "google/ddpm-cifar10-32"
    assert config(mine, "evaluate").teacher == "google/ddpm-cifar10-32"
    mine.sections["reflow_2"] = {}
    assert config(mine, "pairs_2").teacher == "runs/mine/reflow"
    assert config(mine, "evaluate_2").teacher == "google/ddpm-cifar10-32"


def test_stages_of_a_pipeline_that_reads_prompts_know_it():
    values = {"name": "mine", "prompts": "p.txt", "call": {"height": 8}, "pairs": {"shards": 1}}
    values |= {"data": {"source": "digits_text"}, "reflow": {"fit": FIT}, "flow": {"fit": FIT}}
    mine = Experiment(values | {"tiny": {"net": {"name": "UNet2DConditionModel"}}}, "mine.yaml")
    assert mine.chain(1) == ["tiny", "flow", "pairs", "reflow"]
    flow, pairs, reflowed = (config(mine, name) for name in ("flow", "pairs", "reflow"))
    assert flow.start == pairs.pipeline == reflowed.pipeline == "runs/mine/tiny"
    assert flow.call == pairs.call == reflowed.call
    assert pairs.teacher == reflowed.start == "runs/mine/flow"
    assert config(mine, "pairs_2").teacher == config(mine, "reflow_2").start == "runs/mine/reflow"
    assert config(mine, "reflow_2").pipeline == "runs/mine/tiny"
    scored = {"finish": {"fit": FIT, "method": "dmd"}, "conditions": {}}
    mine.sections |= scored
    ended = config(mine, "finish")
    assert (ended.start, ended.pipeline) == ("runs/mine/reflow", "runs/mine/tiny")
    assert (ended.teacher, ended.conditions) == ("runs/mine/flow", "runs/mine/conditions")
    assert (ended.prompts, ended.fit.label_drop) == (reflowed.prompts, 0)
    own = Experiment(values | {"flow": {"fit": FIT, "start": "my/pipe"}}, "mine.yaml")
    assert config(own, "flow").start == config(own, "pairs").pipeline == "my/pipe"
    elsewhere = {key: value for key, value in values.items() if key != "flow"}
    own = Experiment(elsewhere | {"teacher": "my/pipe"}, "mine.yaml")
    assert config(own, "pairs").pipeline is None
    own.sections |= scored
    ended = config(own, "finish")
    assert (ended.start, ended.teacher, ended.pipeline) == (
        "runs/mine/reflow",
        "my/pipe",
        "my/pipe",
    )


def test_rounds_inherit_from_the_first_and_follow_the_one_before():
    mine = make("pairs_2.solver={name: ab2, steps: 2}", "reflow_3.fit.steps=7", "pairs.run_dir=/p")
    assert mine.rounds == 3
    order = ["flow", "pairs", "features", "reflow", "pairs_2", "reflow_2", "pairs_3", "reflow_3"]
    assert mine.chain(3) == [*order, "classifier", "evaluate_3", "export_3"]
    second, third = config(mine, "pairs_2"), config(mine, "pairs_3")
    assert (second.run_dir, second.teacher) == ("runs/mine/pairs_2", "runs/mine/reflow")
    assert (second.seed, third.seed) == (6, 7)
    assert (second.solver.name, second.solver.steps) == ("ab2", 2)
    assert (third.solver.name, third.teacher) == ("heun", "runs/mine/reflow_2")
    last = config(mine, "reflow_3")
    assert (last.start, last.pairs[0].path) == ("runs/mine/reflow_2", "runs/mine/pairs_3")
    assert (last.fit.steps, last.fit.batch_size, last.loss.name) == (7, 4, "feature")
    assert config(mine, "evaluate_3").student == "runs/mine/reflow_3"
    assert config(mine, "export_3").evaluation == "runs/mine/evaluate_3"


def test_a_stage_reads_its_own_section(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read, _ = load(reflow.ReflowConfig, ["digits", "fit.steps=100", "pairs.0.weight=2.0"])
    assert (read.run_dir, read.fit.steps, read.pairs[0].weight) == ("runs/digits/reflow", 100, 2.0)
    read, _ = load(reflow.ReflowConfig, ["digits", "section=distil"])
    assert (read.run_dir, read.times.zero) == ("runs/digits/distil", 1.0)
    read, _ = load(reflow.ReflowConfig, ["digits", "section=reflow_2", "--chain", "flow.run_dir=x"])
    assert (read.run_dir, read.start) == ("runs/digits/reflow_2", "runs/digits/reflow")
    for key in ("pairs.0.path", "pairs[0].path", "pairs"):  # as our own messages spell them
        read, _ = load(reflow.ReflowConfig, ["digits", f"{key}=~/x"])
        assert [entry.path for entry in read.pairs] == [f"{Path.home()}/x"]
    (tmp_path / "own.yaml").write_text(
        "run_dir: a\nstart: b\npairs: [c]\nfit: {steps: 1, batch_size: 2}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    read, _ = load(reflow.ReflowConfig, ["~/own.yaml", "fit.trackers=tensorboard", "run_dir=~/b"])
    assert (read.fit.trackers, read.run_dir) == (["tensorboard"], f"{tmp_path}/b")
    read, _ = load(train_classifier.ClassifierConfig, ["digits"])
    assert read.run_dir == "runs/digits/features"


def test_a_typed_number_takes_the_place_of_the_one_that_the_file_derives(tmp_path, monkeypatch):
    """`fit.steps` of `fit.epochs`, `shards` and `samples` of `per_image`; the later of two counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    new.main(["mine", "--data", "pictures", "--size", "8"])

    def numbers(*words):
        fit = load(reflow.ReflowConfig, ["mine.yaml", *words])[0].fit
        return fit.epochs, fit.steps

    assert numbers() == (20, 0)
    assert numbers("fit.steps=5") == (None, 5)
    assert numbers("fit.epochs=3") == (3, 0)
    assert numbers("fit.steps=5", "fit.epochs=3") == (3, 0)
    assert numbers("fit.epochs=3", "fit.steps=5") == (None, 5)
    chain = ["--chain", "reflow.fit.steps=5", "flow.fit.steps=4"]
    assert numbers(*chain) == (None, 5)
    assert numbers("section=reflow_2", *chain) == (None, 5)
    assert numbers("section=reflow_2", *chain, "reflow_2.fit.epochs=3") == (3, 0)
    read, _ = load(PairsConfig, ["mine.yaml", "shards=2"])
    assert (read.per_image, read.shards) == (None, 2)
    read, _ = load(EvaluateConfig, ["mine.yaml", "samples=9"])
    assert (read.per_image, read.samples) == (None, 9)
    flat = "run_dir: a\nstart: b\npairs: [c]\nfit: {steps: 1, batch_size: 2}\n"
    (tmp_path / "flat.yaml").write_text(flat)
    read, _ = load(reflow.ReflowConfig, ["flat.yaml", "fit.epochs=3"])
    assert (read.fit.epochs, read.fit.steps) == (3, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit"], "no such config file; did you mean digits?"),
        (["."], "a folder without a config.yaml"),
        (["configs/digits"], "no such config file; did you mean digits?"),
        (["digits", "ring"], "digits and ring are two experiments; name one"),
        (["digits", "fit.lr"], "no such config file; if it is a key, write fit.lr=value"),
        (["digits", "fit.lr:3"], "if it is a key, write fit.lr=value"),
        (["digits", "reflow.fit.lr=3"], "keys of one stage have no section here: write fit.lr=3"),
        (["digits", "--fit.lr", "3"], "keys have no dashes: fit.lr=value"),
        (["digits", "--dryrun"], "unknown flag; did you mean --dry-run? known: --dry-run, --help"),
        (["digits", "--dry-run=1"], "--dry-run takes no value"),
        (["digits", "section="], "section=: expected one of flow, pairs"),
        (["digits", "data=/my/pictures"], "set data={source: images, path: /my/pictures}"),
        (["digits", "fit..steps=3"], "fit..steps=3: not a key; expected KEY=value, KEY.KEY=value"),
        (["digits", ".fit=3"], "not a key"),
        (["digits", "=3"], "not a key"),
        (["digits", "pairs[0.path=x"], "not a key"),
        (["digits", "fit.steps.0=3"], "fit.steps is 500, not a list; give all of fit.steps="),
        (["digits", "--fit.lr=1e-3"], "keys have no dashes: fit.lr=1e-3"),
        (["digits", "pairs={path:x}"], "a blank is missing after the colon in 'path:x'"),
        (["digits", "pairs.0.pth=x"], "did you mean path?"),
        (["digits", "start=s3://b/x"], "only pairs go by URL"),
        (["digits", "section=refow"], "section=refow: did you mean reflow?"),
        (["digits", "section=pairs"], "section=pairs is of generate_pairs, not of reflow"),
        (["digits", "--chain", "reflw.fit.steps=2"], "did you mean reflow?"),
        (["digits", "fit.stpes=2"], "did you mean steps?"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    model = train_flow.FlowConfig if "data=/my/pictures" in words else reflow.ReflowConfig
    with pytest.raises(UserError) as error:
        load(model, words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"dta": {"source": "digits"}},
            "dta: neither a key of a stage nor a section; did you mean",
        ),
        ({"more": {"stage": "reflw"}}, "more.stage='reflw': did you mean reflow?"),
        ({"reflow": 3}, "reflow: expected a mapping"),
        ({"name": "a/b"}, "name='a/b': expected letters"),
    ],
)
def test_a_file_with_faults_is_refused(more, message):
    with pytest.raises(UserError) as error:
        make(**more)
    assert message in str(error.value)
