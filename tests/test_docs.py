"""The pages: their code runs, prints and draws what they show; their links exist; the site builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowmatch.evaluation import features
from scripts.run_page import blocks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = DOCS / "concepts/flow-matching.md"
GENERATED = DOCS / "reference/config"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if not path.is_relative_to(GENERATED)]
PAGES = [path for path in PAGES if not {"_build", "models"} & set(path.parts)]  # models: cards
PAGES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
HISTORY = ("log.md", "CHANGELOG.md")  # they name files of earlier versions
NEEDS_MORE = ("runs/", "stabilityai/", "VelocityField")  # a run, a hub, or the module around it
NUMBER = re.compile(r"\d*\.?\d+(?:e[-+]?\d+)?")

spec = importlib.util.spec_from_file_location("config_reference", DOCS / "config_reference.py")
config_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(config_reference)


def name_of(page):
    return str(page.relative_to(ROOT))


def run(page, into):
    command = [sys.executable, "-m", "scripts.run_page", str(page), "--into", str(into)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def prose(text):
    """Take a page's code, mathematics, links and pictures out."""
    for found in (r"```.*?```", r"\$\$.*?\$\$", r"\$[^$]+\$", r"!?\[[^\]]*\]\([^)]*\)", r"`[^`]*`"):
        text = re.sub(found, " ", text, flags=re.DOTALL)
    return text


def agrees(said, measured):
    """Compare as another build of a BLAS would allow: 5%, or one unit of the last digit said."""
    if "." not in said:
        return said == measured
    unit = 10.0 ** -len(said.split(".")[1])
    return abs(float(said) - float(measured)) <= max(0.05 * abs(float(said)), 1.01 * unit)


@pytest.mark.slow
def test_the_page_prints_and_draws_what_it_shows(tmp_path):
    done = run(PAGE, tmp_path)
    assert done.returncode == 0, done.stderr
    text = PAGE.read_text()
    shown = "".join(block for _, block in blocks(text, "text")).splitlines()
    printed = done.stdout.splitlines()
    assert [NUMBER.sub("#", line) for line in shown] == [NUMBER.sub("#", s) for s in printed]
    for said, found in zip(shown, printed, strict=True):
        numbers = zip(NUMBER.findall(said), NUMBER.findall(found), strict=True)
        assert all(agrees(*pair) for pair in numbers), f"the page says {said!r}, printed {found!r}"
    measured = NUMBER.findall(done.stdout)
    for said in NUMBER.findall(prose(text)):
        if "." in said:
            assert any(agrees(said, number) for number in measured), f"nothing printed is {said}"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert len(pictures) > 5
    assert made == set(pictures)
    assert sum((PAGE.parent / picture).stat().st_size for picture in pictures) < 600_000


def headings(text):
    """List the anchors of a page's headings, as MyST and code forges make them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_links_to_or_names_is_there(page):
    text = page.read_text()
    missing = []
    for to in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = to.partition("#")
        target = page.parent / path if path else page
        if "://" in to or target.is_relative_to(GENERATED):
            continue
        if not target.exists() or (anchor and anchor not in headings(target.read_text())):
            missing.append(to)
    if page.name not in HISTORY:
        named = re.findall(r"`((?:flowmatch|pipelines|scripts|tests|configs|docs)/[\w/.-]+)`", text)
        missing += [name for name in named if "NAME" not in name and not (ROOT / name).exists()]
    assert not missing


def test_every_page_has_a_place_in_the_contents():
    """Sphinx warns of a page without one only when it builds; this takes no time."""
    listed = set()
    for page in DOCS.rglob("*.md"):
        for tree in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    generated = {GENERATED / f"{stage}.md" for stage in config_reference.STAGES}
    written = {page for page in PAGES if page.is_relative_to(DOCS)} - {DOCS / "index.md"}
    assert listed == written | generated


def test_the_readme_is_for_someone_who_has_ten_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 160


CODE = [(page, line, code) for page in PAGES for line, code in blocks(page.read_text())]
CODE = [found for found in CODE if found[0] != PAGE]  # it has its own test


@pytest.mark.parametrize(
    ("page", "line", "code"), CODE, ids=lambda it: name_of(it) if isinstance(it, Path) else None
)
def test_the_code_of_a_page_runs(page, line, code, tmp_path, monkeypatch):
    """All of it is Python; what needs no run, hub or surrounding module is executed."""
    monkeypatch.chdir(tmp_path)
    compiled = compile("\n" * line + code, str(page), "exec")
    if not any(word in code for word in NEEDS_MORE):
        exec(compiled, {})


def test_most_pages_with_code_are_executed():
    executed = [page.name for page, _, code in CODE if not any(word in code for word in NEEDS_MORE)]
    assert {"teachers.md", "samplers.md", "losses.md"} <= set(executed)


def code_with(page, word):
    (code,) = [code for _, code in blocks((DOCS / page).read_text()) if word in code]
    return code


def test_the_lpips_of_the_guide_is_its_formula(tmp_path, monkeypatch):
    """The loss sees the pixels and, beside them, LPIPS: sum_l mean_hw sum_c w_lc (a_lc - b_lc)^2."""
    monkeypatch.chdir(tmp_path)
    code = code_with("guides/losses.md", "Lpips")
    torch.manual_seed(0)
    code = re.sub(r"torch\.ones\((\d+)\)", r"torch.rand(\1)", code)
    exec(compile(code, "losses.md", "exec"), given := {})
    module, _, _ = features.perceptual("features.pt2", "loss.features", 3, (1, 8, 8), "cpu")
    a, b = torch.randn(2, 3, 1, 8, 8)
    wanted, maps = (a - b).square().flatten(1).sum(1), [a, b]
    with torch.no_grad():
        for layer, weight in zip(given["layers"], given["weights"], strict=True):
            maps = [layer(x) for x in maps]
            units = [x / x.square().sum(1, keepdim=True).sqrt() for x in maps]
            away = (units[0] - units[1]).square() * weight[:, None, None]
            wanted = wanted + away.sum(1).mean((1, 2))
        found = (module(a) - module(b)).square().sum(1)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("stage", config_reference.STAGES)
def test_the_reference_has_every_key(stage):
    """Found on the models themselves, not by `describe`, from which the page is made."""
    from pydantic import BaseModel

    def keys(model, prefix=""):
        for name, field in model.model_fields.items():
            inner = [
                kind
                for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ]
            many = "list[" in str(field.annotation)
            if not inner or inner[0] is not field.annotation:
                yield prefix + name
            for kind in inner:
                yield from keys(kind, f"{prefix}{name}{'[]' * many}.")

    page = config_reference.page(stage)
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]*)` \| (.+) \|$", page, flags=re.MULTILINE)
    assert {key for key, _, _ in rows} == set(keys(config_reference.model(stage)))
    assert len(rows) == len({key for key, _, _ in rows})
    assert all(len(meaning) > 3 for _, _, meaning in rows)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), "docs", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for page, word in (
        ("guides/own-data", "data.channels"),
        ("reference/config/reflow", "times.zero"),
        ("reference/api/flow", "flowmatch.flow.solvers.integrate"),
        ("reference/api/training", "flowmatch.pairs.dataset.PairData"),
        ("reference/api/diffusers", "flowmatch.RectifiedFlowScheduler"),
        ("concepts/flow-matching", "<math"),
    ):
        assert word in (tmp_path / f"site/{page}.html").read_text()


def test_a_page_stops_at_the_block_that_fails_and_names_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nx = 2\n```\n```text\n4\n```\n\nMore.\n\n```python\nprint(x + 2)\n\n"
        "x / 0\n```\n\n```python\nprint('not reached')\n```\n"
    )
    done = run(page, tmp_path)
    assert done.returncode == 1
    assert done.stdout == "4\n"
    assert 'page.md", line 15, in' in done.stderr
    assert done.stderr.endswith("page.md:12: this block failed\n")
