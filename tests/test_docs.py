"""The pages: their code runs, and prints and draws what they show; what they link to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowmatch.evaluation import features
from scripts.run_page import blocks

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/flow-matching.md"
PAGES = [PAGE, *(ROOT / f"docs/{name}.md" for name in ("distributed", "experiments"))]
PAGES += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NUMBER = re.compile(r"\d*\.?\d+(?:e[-+]?\d+)?")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_or_names_is_there(page):
    text = page.read_text()
    links = [to for to in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in to]
    missing = [to for to in links if not (page.parent / to).exists()]
    named = re.findall(r"`((?:flowmatch|pipelines|scripts|tests|configs|docs)/[\w/.-]+)`", text)
    missing += [name for name in named if "/mine/" not in name and not (ROOT / name).exists()]
    assert links + named
    assert not missing


def test_the_code_in_the_readme_that_needs_no_run_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = [code for _, code in blocks((ROOT / "README.md").read_text()) if "runs/" not in code]
    assert alone
    for code in alone:
        exec(compile(code, "README.md", "exec"), {})


def test_the_lpips_of_the_readme_is_its_formula(tmp_path, monkeypatch):
    """The loss sees the pixels and, beside them, LPIPS: sum_l mean_hw sum_c w_lc (a_lc - b_lc)^2."""
    monkeypatch.chdir(tmp_path)
    (code,) = [code for _, code in blocks((ROOT / "README.md").read_text()) if "Lpips" in code]
    torch.manual_seed(0)
    code = re.sub(r"torch\.ones\((\d+)\)", r"torch.rand(\1)", code)
    exec(compile(code, "README.md", "exec"), given := {})
    module, _, _ = features.perceptual("looks.pt2", "loss.features", 3, (1, 8, 8), "cpu")
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
