"""A small part of the torture, and that it finds what is wrong."""

import json

import numpy as np
import pytest

from scripts.torture import __main__, configs, damage, inputs, kills
from scripts.torture.world import Ended, World, leftovers

STAGES = ["points/flow", "points/pairs", "points/reflow", "pictures/features", "parquet/flow"]
STAGES += ["prompts/tiny", "prompts/conditions"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("torture"))
    world.make(STAGES)
    return world


@pytest.mark.parametrize(
    ("part", "cases"),
    [(configs.Fuzz, range(10)), (inputs.Fuzz, range(6)), (kills.Kills, range(3))],
    ids=["configs", "inputs", "kills"],
)
def test_no_command_breaks(world, part, cases):
    torture = part(world, 0)
    for i in cases:
        outcome = torture.run(i)
        assert not outcome.faults, f"case {i}: {outcome}"


def test_a_case_is_a_function_of_its_seed_and_number():
    made = [[configs.case(seed, i) for i in range(40)] for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert len({str(case) for case in made[0]}) == 40
    assert {case.kind for case in made[0]} >= {"run", "flow", "pairs", "reflow", "evaluate"}


@pytest.mark.parametrize("how", damage.BYTES)
def test_bytes_are_damaged(how):
    raw = bytes(range(1, 256))
    damaged = [damage.BYTES[how](raw, np.random.default_rng(seed)) for seed in range(20)]
    assert sum(content != raw for content in damaged) > 15
    assert damaged == [damage.BYTES[how](raw, np.random.default_rng(seed)) for seed in range(20)]


@pytest.mark.parametrize(
    "text", ['{"a": [1, {"b": 2}]}\n', '{"a": 1}\n{"a": 2}\n', "a: 1\nb: [2]\n"]
)
def test_values_are_damaged(text):
    found = [damage.value(text.encode(), np.random.default_rng(seed)) for seed in range(30)]
    assert sum(content.strip() != text.strip().encode() for content in found) > 20


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, "plan", ""), ""),
        (Ended(2, "", "train_flow: fit.steps=0: input should be 1 or more\n"), ""),
        (Ended(2, "", "  0%|          | 0/6\nusage\nflow: data: image 8 cannot be read\n"), ""),
        (Ended(75, "", ""), ""),
        (Ended(None, "", ""), "hangs"),
        (Ended(1, "", "Traceback\nKeyError: 'net'"), "exit status 1"),
        (Ended(-9, "", ""), "exit status -9"),
        (Ended(2, "", "Traceback (most recent call last):\nKeyError"), "traceback: KeyError"),
        (Ended(2, "", "\n"), "refused without a word"),
        (Ended(2, "", "train_flow: a: not YAML\n  in line 3\n"), "refused in strange lines"),
    ],
)
def test_what_is_no_refusal_is_a_fault(ended, fault):
    faults = configs.judge(ended)
    assert faults == [] if not fault else fault in faults[0]


class Silent(World):
    """Commands that do something else than they should, and say nothing."""

    def call(self, folder, *words, **more):
        made = folder / "runs/points/flow"
        made.mkdir(exist_ok=True)
        (made / "manifest.json").write_text(json.dumps({"inputs": {}, "outputs": {}}))
        (made / "manifest.json.tmp.host.1").write_text("")
        return Ended(0, "", "")


def test_a_silent_difference_and_a_leftover_are_faults(world, tmp_path, capsys):
    silent = Silent(world.root)
    silent.costs = {"runs/points/flow": world.costs["runs/points/flow"]}
    fuzz = inputs.Fuzz(silent, 0)
    fuzz.scenarios = [s for s in fuzz.scenarios if s.made == ("runs/points/flow",)]
    assert "a silent difference" in fuzz.run(0).faults[0]
    call = __main__.argparse.Namespace(seed=0, out=tmp_path)
    assert __main__.torture(kills.Kills(silent, 0), "kills", range(1), call) == 2
    printed = capsys.readouterr().out
    assert "other bytes than undisturbed: manifest.json" in printed
    assert "left: manifest.json.tmp.host.1" in printed
    assert "--seed 0 --kills 0:1" in printed
    assert "| points/flow | 1 |" in (tmp_path / "torture.md").read_text()
    assert json.loads((tmp_path / "torture.json").read_text())["kills"]["faults"][0]["case"] == 0
    planned = configs.Fuzz(silent, 0)
    flow = next(i for i in range(99) if configs.case(0, i).kind == "flow")
    assert "changes configs/runs/points/flow/manifest.json" in planned.run(flow).faults[0]


def test_what_a_dead_process_leaves_is_found(tmp_path):
    (tmp_path / "checkpoints" / "step_1.tmp").mkdir(parents=True)
    for name in (".tmpAbc", "a.tmp.host.3", "a.tmpl", "table.md"):
        (tmp_path / name).write_text("")
    assert leftovers(tmp_path) == [".tmpAbc", "a.tmp.host.3", "a.tmpl", "checkpoints/step_1.tmp"]
