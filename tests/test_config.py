"""Configs: every fault at once, with key, what was given, what is allowed; content apart from run."""

import contextlib
import typing
from functools import partial
from typing import ClassVar, Literal

import fsspec
import pydantic
import pytest

from flowmatch import cli
from flowmatch import config as configs
from flowmatch.config import Config, NotReady, UserError, option, required, together
from flowmatch.runs.command import load
from flowmatch.runs.experiment import STAGES
from pipelines import evaluate, generate_pairs, train_flow


class Inner(Config):
    lr: float = option(1e-3, "learning rate", gt=0)
    every: int = option(10, "interval", run=True, ge=1)


class Entry(Config):
    called: ClassVar[str] = "path"

    path: str = required("folder", run=True)
    weight: float = option(1.0, "share", gt=0)


class Outer(Config):
    fit: Inner = option(Inner(every=20), "the loop")
    kind: Literal["u", "v"] = option("u", "which")
    sets: list[Entry] = required("sets")
    steps: int = required("steps", ge=1)


GOOD = ["sets=[{path: a}]", "steps=3"]


def faults(words):
    with pytest.raises(UserError) as error:
        load(Outer, words)
    return error.value.faults


def test_all_faults_are_listed_at_once_with_key_given_and_allowed():
    lines = faults(["fit.lr=-1", "fit.every=x", "fit.momentum=3", "kind=w", "sets=[{pth: 3}]"])
    assert len(lines) == 7
    text = "\n".join(lines)
    for expected in (
        "fit.lr=-1: input should be greater than 0",
        "fit.every='x': input should be a valid integer",
        "fit.momentum: unknown key (given 3); known keys: every, lr",
        "kind='w': input should be 'u' or 'v'",
        "sets.0.path: missing",
        "sets.0.pth: unknown key (given 3); did you mean path? known keys: path, weight",
        "steps: missing; set it in the config file or as steps=value",
    ):
        assert expected in text


@pytest.mark.parametrize(
    "word", ["steps=true", "steps='3'", "steps=3.0", "fit.lr=true", "fit.lr=.inf", "fit=3"]
)
def test_nothing_is_converted_silently(word):
    assert len(faults([*GOOD, word])) == 1


@pytest.mark.parametrize("number", [2**63, 10**400])
def test_a_number_that_nothing_counts_is_refused(number):
    """Not an OverflowError where it is first used."""
    message = "steps.*=.*expected a whole number below 2\\^63"
    for model, word in (
        (train_flow.FlowConfig, f"fit.steps={number}"),
        (evaluate.EvaluateConfig, f"steps=[1, {number}]"),
    ):
        with pytest.raises(UserError, match=message):
            load(model, ["configs/ring.yaml", word])


def test_values_are_yaml_and_the_last_one_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\nfit:\n  lr: 1e-4\nsets:\n- path: x\n  weight: 2\n")
    config, call = load(Outer, [str(file), "steps=7", "sets=[{path: y}]", "--dry-run"])
    assert (config.steps, config.fit.lr, config.sets[0].path) == (7, 1e-4, "y")
    assert config.fit.every == 20  # a key left out is the stage's default, as --help prints it
    assert call.dry_run


def test_file_faults_name_the_file(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\n")
    lines = faults([str(bad), str(tmp_path / "none.yaml")])
    assert len(lines) == 2
    assert "not readable as YAML" in lines[0]
    assert "no such config file" in lines[1]
    assert faults(["--fast", "--fit.lr=3"]) == [
        "--fast: unknown flag; known: --dry-run, --help, --version",
        "--fit.lr=3: unknown flag; keys have no dashes: fit.lr=3",
    ]


def fields_of(model):
    """Yield (class, name, field) of a config and of those inside it."""
    for name, field in model.model_fields.items():
        inner = configs._config_type(field.annotation)
        yield from [(model, name, field)] if inner is None else fields_of(inner)


NO_PATHS = {
    "judge",
    "caption_column",
    "column",
    "weight_column",
    "split",
    "subset",
    "revision",
    "negative",
    "push_to_hub",
    "license",
}


def test_every_path_is_expanded_and_those_that_are_no_urls_say_so(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    models = [cli.stage_of(stage).config for stage in STAGES]
    found = {(m.__name__, n): field for model in models for m, n, field in fields_of(model)}
    urls = set()
    for (model, name), field in found.items():
        texts = (str, str | None, configs.LocalPath | None)
        if not configs.is_run(field) or field.annotation not in texts or name in NO_PATHS:
            continue
        kind = pydantic.TypeAdapter(typing.Annotated[field.annotation, "", *field.metadata])
        assert kind.validate_python("~/x") == "/home/me/x", f"{model}.{name}"
        with pytest.raises(pydantic.ValidationError, match="cannot hold the character 0"):
            kind.validate_python("a\0")
        with pytest.raises(pydantic.ValidationError, match="there is no such home folder"):
            kind.validate_python("~nobody-here/x")
        with contextlib.suppress(pydantic.ValidationError):
            urls.add(name if kind.validate_python("s3://b/x") else "")
    assert len(found) > 50
    assert urls == {"run_dir", "path"}  # of pairs; of others the plan says it
    for word in ("teacher=s3://b/x", "student=hf://a/b", "classifier=gs://b/x"):
        given = ["run_dir=x", "teacher=y", "student=z", "data=digits", word]
        with pytest.raises(UserError, match="only pairs go by URL"):
            load(evaluate.EvaluateConfig, given)
    with pytest.raises(UserError, match="run_dir=''"):
        load(evaluate.EvaluateConfig, ["run_dir=''", "teacher=y", "student=z", "data=digits"])


def test_run_fields_are_not_content():
    a, _ = load(Outer, GOOD)
    b, _ = load(Outer, ["sets=[{path: b}]", "steps=3", "fit.every=99"])
    c, _ = load(Outer, [*GOOD, "fit.lr=0.5"])
    assert configs.content(a) == configs.content(b)
    assert configs.content(a)["sets"] == [{"weight": 1.0}]
    assert configs.differences(configs.content(a), configs.content(c)) == ["fit.lr: 0.001 -> 0.5"]


def test_dump_is_read_back(tmp_path):
    config, _ = load(Outer, [*GOOD, "fit.lr=3e-5"])
    (tmp_path / "c.yaml").write_text(configs.dump(config))
    again, _ = load(Outer, [str(tmp_path / "c.yaml")])
    assert again == config


def test_usage_prints_every_key_with_meaning_and_default():
    text = configs.usage(Outer, "stage", "Do it.")
    for key in (
        "fit.lr = 0.001",
        "fit.every = 20",
        "kind = 'u'",
        "sets[].weight = 1.0",
        "steps = ",
    ):
        assert key in text
    assert "interval (run)" in text


def raising(error):
    raise error


def test_the_faults_of_several_calls_are_raised_together():
    assert together(lambda: 1, lambda: 2) == [1, 2]
    missing = partial(raising, NotReady("two", ["runs/a"]))
    with pytest.raises(UserError) as error:
        together(partial(raising, UserError("one")), missing)
    assert error.value.faults == ["one", "two"]
    assert not isinstance(error.value, NotReady)
    with pytest.raises(NotReady) as waiting:
        together(missing, lambda: 1, partial(raising, NotReady("three", ["runs/b"])))
    assert waiting.value.places == ["runs/a", "runs/b"]
    with pytest.raises(ZeroDivisionError):
        together(partial(raising, ZeroDivisionError()))


def test_a_name_stands_for_a_config_and_a_value_for_a_list():
    config, _ = load(Outer, ["sets=a", "steps=3"])
    assert [entry.path for entry in config.sets] == ["a"]
    words = ["run_dir=x", "teacher=y", "student=z", "data=digits", "solver=heun", "steps=4"]
    config, _ = load(evaluate.EvaluateConfig, words)
    assert (config.data.source, config.solver.name, config.steps) == ("digits", "heun", [4])


def test_keys_reach_into_lists():
    for key in ("sets.0.weight", "sets[0].weight"):
        config, _ = load(Outer, [*GOOD, f"{key}=2.5", "sets.1={path: b}"])
        assert [(entry.path, entry.weight) for entry in config.sets] == [("a", 2.5), ("b", 1.0)]
    assert faults([*GOOD, "sets.5.path=x"]) == [
        "sets.5.path: the list holds 1 entries; expected a number there"
    ]
    assert "steps is 3, not a mapping" in faults([*GOOD, "steps.more=1"])[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fit={lr:3}", "a blank is missing after the colon in 'lr:3'"),
        ("kind=${oc.env:HOME}", "'${...}' is not replaced; write the value"),
        ("fit.every=none", "for no value write null"),
        ("fit.evry=3", "did you mean every?"),
        ("lr=3", "lr: unknown key (given 3); did you mean fit.lr? known keys: "),
    ],
)
def test_common_slips_are_explained(word, message):
    assert message in faults([*GOOD, word])[0]


def test_content_of_before_a_field_is_completed_with_its_default():
    from pipelines.reflow import ReflowConfig

    written = {"pairs": [{"path": "a"}], "start": "b", "fit": {"steps": 1, "batch_size": 2}}
    whole = configs.content(configs.validate(ReflowConfig, {"run_dir": "c", **written}))
    old = {name: value for name, value in whole.items() if name != "seed"}
    old["fit"] = {name: value for name, value in whole["fit"].items() if name != "lr"}
    old["times"] = {name: value for name, value in whole["times"].items() if name != "zero"}
    old["pairs"] = [{name: value for name, value in whole["pairs"][0].items() if name != "weight"}]
    assert old != whole
    assert configs.complete(old, ReflowConfig) == whole
    assert whole["times"]["zero"] == 0.5  # this stage's default, not that of TimesConfig
    del old["fit"]["batch_size"]  # has no default
    assert "batch_size" not in configs.complete(old, ReflowConfig)["fit"]


def test_a_config_in_a_store_that_refuses_is_our_error(monkeypatch):
    """Clients have their own kinds of errors, which share no base."""

    class NoCredentials(Exception):
        pass

    def refuse(fs, path, *more, **options):
        raise NoCredentials("Unable to locate\ncredentials")

    assert faults(["memory://nowhere/config.yaml"]) == [
        "memory://nowhere/config.yaml: no such config file"
    ]
    assert "Protocol not known" in faults(["nonsense://nowhere/config.yaml"])[0]
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "open", refuse)
    (line,) = faults(["memory://b/config.yaml"])
    assert line.startswith(
        "memory://b/config.yaml: the store refuses (NoCredentials: Unable to locate credentials)"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["times.name=uniform", "times.std=0.5"], "times.std.*belongs to name=logit_normal"),
        (["times.name=noise_heavy", "times.a=5.0"], "times.a.*belongs to name=u_shape"),
        (["loss.name=mse", "loss.c=0.1"], "loss.c.*belongs to name=pseudo_huber and feature"),
        (["loss={name: feature, features: x, c: 5.0, power: 1.0}"], "loss.power.*leave c=5.0 out"),
        (["loss.name=normalised"], "loss.power=0.0: name=normalised needs one above 0"),
        (["loss={name: feature, features: x, eps: 0.1}"], "loss.eps=0.1: with power=0 there is no"),
        (["loss.name=pseudo_huber", "loss.eps=0.1"], "loss.eps.*belongs to name=normalised"),
        (
            ["coupling.name=independent", "coupling.block=32"],
            "coupling.block.*belongs to name=optimal_transport",
        ),
        (["data={source: digits, samples: 500}"], "data.samples.*belongs to source=ring"),
        (["data={source: npz, path: x, subset: a}"], "data.subset.*belongs to source=images"),
        (
            ["data={source: images, path: x, label_column: a}"],
            "data.labels.*label_column=a is read",
        ),
        (["fit.ema=[0.05]", "fit.ema_decay=0.9"], "fit.ema.*ema_decay=0.9 is that of"),
    ],
)
def test_what_a_choice_leaves_without_effect_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        load(train_flow.FlowConfig, ["configs/ring.yaml", *words])


@pytest.mark.parametrize(
    "solver",
    [
        "{name: ab2, shift: 9.0}",
        "{grid: shift, kappa: 2.0}",
        "{rho: 3.0}",
        "{grid: sigmoid, sigma_max: 70.0}",
        "{name: heun, rtol: 1.0e-3}",
    ],
)
def test_what_a_grid_or_solver_does_not_look_at_is_refused(solver):
    words = [f"{key}=runs/x" for key in ("teacher", "run_dir")]
    with pytest.raises(UserError, match="belongs to"):
        load(generate_pairs.PairsConfig, [*words, f"solver={solver}"])


def test_the_tolerance_of_the_reference_is_that_of_its_adaptive_solver():
    words = ["configs/ring.yaml", "converged_tolerance=1.0e-4"]
    with pytest.raises(UserError, match="belongs to converged_solver=dopri5"):
        load(evaluate.EvaluateConfig, words)
    config, _ = load(evaluate.EvaluateConfig, [*words, "converged_solver=dopri5"])
    assert (config.converged.rtol, config.converged.atol) == (1e-4, 1e-4)


def test_a_missing_extra_is_named(monkeypatch):
    from flowmatch.data import dataset
    from flowmatch.data.config import DataConfig

    missing = {"sklearn": ("digits", "eval"), "datasets": ("images", "data")}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for library, (source, extra) in missing.items():
        data = DataConfig(source=source, path="" if source == "digits" else "x")
        with pytest.raises(UserError) as error:
            dataset.load(data, "reference")
        assert error.value.faults == [
            f"reference.source={source} needs {library}, which is not installed: "
            f"pip install 'flowmatch[{extra}]'"
        ]
