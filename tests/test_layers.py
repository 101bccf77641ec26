"""The folders' order: imports go down only, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {  # folder -> the folders that it may import, beside itself and flowmatch/config.py
    "flow": [],
    "runs": [],
    "data": ["flow", "runs"],
    "models": ["flow", "runs", "data"],
    "pairs": ["flow", "runs", "models", "data"],
    "bridge": ["flow", "runs", "models", "data", "pairs"],
    "training": ["flow", "runs", "models", "data"],
    "evaluation": ["flow", "runs", "models", "data"],
    "export": ["flow", "runs", "models", "data"],
}
ALONE = (  # copied beside weights, or run as a script
    *("export/scheduler.py", "export/pipeline.py", "models/mlp.py", "export/sample_fresh.py"),
)
SLOW = {"diffusers", "accelerate", "datasets", "torchmetrics", "scipy", "sklearn", "matplotlib"}
SLOW |= {"torchdiffeq", "webdataset", "lmdb"}  # the first brings scipy
STAGES = [
    "tiny_pipeline",
    "encode",
    "train_flow",
    "generate_pairs",
    "encode_prompts",
    "reflow",
    "finish",
    "train_classifier",
    "evaluate",
    "evaluate_prompts",
    "export",
]
MODULES = sorted(p for p in (ROOT / "flowmatch").glob("*/*.py") if p.stem != "__init__")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "flowmatch"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """List (module, at module level) of all imports in a file, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "flowmatch":
                names = [f"flowmatch.{alias.name}" for alias in node.names]
            found += [(name, id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_only(path):
    room = path.parent.name
    for module, top in imports(path):
        parts = module.split(".")
        if parts[0] == "flowmatch" and parts[1:2] not in ([], ["config"]):
            assert parts[1] in [room, *BELOW[room]], f"{name_of(path)} imports {module}"
        assert parts[0] not in ("pipelines", "scripts"), f"{name_of(path)} imports {module}"
        if name_of(path) not in ALONE:  # whose classes are built upon diffusers'
            assert not (top and parts[0] in SLOW), f"{name_of(path)} imports {module} at its top"


def test_there_is_no_circle_among_modules():
    arrows = {
        f"flowmatch.{name_of(path)[:-3].replace('/', '.')}": [
            module for module, _ in imports(path) if module.startswith("flowmatch.")
        ]
        for path in MODULES
    }
    seen: dict[str, bool] = {}  # module -> whether all that it imports has been followed

    def follow(module: str, way: list[str]) -> None:
        assert seen.get(module, True), f"a circle: {' -> '.join([*way, module])}"
        if module in arrows and module not in seen:
            seen[module] = False
            for other in arrows[module]:
                follow(other, [*way, module])
            seen[module] = True

    for module in arrows:
        follow(module, [])


def test_the_folders_are_those_of_the_plan():
    found = {path.parent.name for path in (ROOT / "flowmatch").glob("*/__init__.py")}
    assert found == set(BELOW)
    tops = {path.stem for path in (ROOT / "flowmatch").glob("*.py")}
    assert tops <= {"__init__", "__main__", "cli", "config", "experiment"}
    for folder in BELOW:
        assert len(list((ROOT / "flowmatch" / folder).glob("*.py"))) > 3


def test_what_is_copied_beside_weights_stands_alone():
    for name in ALONE:
        ours = [m for m, _ in imports(ROOT / "flowmatch" / name) if m.startswith("flowmatch")]
        assert not ours, f"{name} imports {ours}"


def test_stages_never_import_one_another():
    for path in sorted((ROOT / "pipelines").glob("*.py")):
        for module, _ in imports(path):
            assert not module.startswith(("pipelines", "scripts")), f"{path.stem} imports {module}"


def test_configs_help_and_the_command_need_no_torch():
    """One process: the help of every stage, the command's own, and every shipped experiment."""
    code = f"""
import sys
from flowmatch import cli
from flowmatch.config import validate
from flowmatch.runs.experiment import Experiment, find_config, shipped
from flowmatch.runs.values import read_yaml
for name in {STAGES!r}:
    cli.main([name, "--help"])
cli.main(["--help"])
for name in shipped():
    experiment = Experiment(read_yaml(find_config(name)), name)
    for section in experiment.sections:
        model = cli.stage_of(experiment.stage_of(section)).config
        validate(model, experiment.values(section, model))
print(sorted({{m.split(".")[0] for m in sys.modules}} & {SLOW | {"torch"}!r}))
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    for name in STAGES:
        assert f"usage: flowmatch {name}" in out.stdout, out.stderr
    assert out.stdout.splitlines()[-1] == "[]"


def lines_of(path: Path) -> int:
    """Count the lines of a file without its docstrings."""
    text = path.read_text()
    lines = len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def test_files_stay_small():
    for path in [*MODULES, *(ROOT / "pipelines").glob("*.py")]:
        assert lines_of(path) <= 330, f"{path.name} grows a second job"
