"""The house's order: imports go down only, heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "base": ["config"],
    "math": [
        *(
            "path",
            "conversions",
            "times",
            "coupling",
            "grids",
            "solvers",
            "samplers",
            "noise",
            "losses",
            "objectives",
            "ema",
        ),
        *("metrics", "toy"),
    ],
    "artefacts": [
        *("folders", "stores", "manifest", "layout", "shards", "claims", "behind", "progress"),
        *("cache", "pairs", "mixture", "truncation", "audit"),
    ],
    "export": ["scheduler", "pipeline", "mlp"],
    "models": [
        *("precision", "second_time", "nets", "foreign", "images", "sources", "tables", "data"),
        "teachers",
        "batches",
        *("features", "judge", "scores", "rows"),
    ],
    "loop": ["stage", "run", "sharding", "compiled", "state", "fit"],
    "draw": ["draw", "plane", "charts", "report", "card"],
}
ORDER = list(LAYERS)
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
HEAVY = {
    "diffusers": {"nets", "foreign", "teachers", "scheduler", "pipeline", "mlp", "state"},
    "accelerate": {"run", "fit", "state"},
    "datasets": {"sources", "images", "tables"},
}


SLOW = {"diffusers", "accelerate", "datasets", "torchmetrics", "scipy", "sklearn", "matplotlib"}
SLOW |= {"torchdiffeq"}  # it brings scipy
STAGES = ["train_flow", "generate_pairs", "reflow", "train_classifier", "evaluate", "export"]


def imports(path: Path) -> list[tuple[str, bool]]:
    """List (module, at module level) of all imports in a file; `from flowmatch import x` is x."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = (
                [f"flowmatch.{a.name}" for a in node.names] if node.module == "flowmatch" else []
            )
            found += [(name, id(node) in top) for name in names or [node.module]]
    return found


MODULES = sorted(path for path in (ROOT / "flowmatch").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_what_lies_below_it(path):
    assert path.stem in LAYER, f"{path.name} has no layer yet: name it in LAYERS"
    for module, _ in imports(path):
        if module.startswith("flowmatch."):
            other = module.split(".")[1]
            below, above = ORDER.index(LAYER[other]), ORDER.index(LAYER[path.stem])
            assert below <= above, f"{path.stem} ({LAYER[path.stem]}) imports {other}"
        assert not module.startswith(("pipelines", "scripts")), f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_heavy_libraries_stay_in_their_modules(path):
    for module, top in imports(path):
        library = module.split(".")[0]
        if library in HEAVY:
            assert path.stem in HEAVY[library], f"{path.stem} imports {library}"
        if LAYER[path.stem] != "export":  # whose classes are built upon diffusers'
            assert not (top and library in SLOW), f"{path.stem} imports {library} at module level"


def test_what_is_copied_beside_weights_stands_alone():
    for name in LAYERS["export"]:
        ours = [m for m, _ in imports(ROOT / f"flowmatch/{name}.py") if m.startswith("flowmatch")]
        assert not ours, f"{name} imports {ours}"


def test_stages_never_import_one_another():
    for path in sorted((ROOT / "pipelines").glob("*.py")):
        for module, _ in imports(path):
            assert not module.startswith(("pipelines", "scripts")), f"{path.stem} imports {module}"


def test_importing_flowmatch_loads_no_torch():
    code = "import sys, flowmatch; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_says_its_keys_without_the_heavy_libraries(name):
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        f"runpy.run_module('pipelines.{name}', run_name='__main__')\n"
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & {SLOW!r}))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"usage: python -m pipelines.{name}" in out.stdout, out.stderr
    assert out.stdout.splitlines()[-1] == "[]"


def test_files_stay_small():
    for path in [*MODULES, *(ROOT / "pipelines").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 330, f"{path.name} grows a second job"
