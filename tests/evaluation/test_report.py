"""The report, opened in a real browser where there is one, and read as a file everywhere."""

import base64
import functools
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from flowmatch.evaluation import charts, figures, report, tables

CHROMIUM = shutil.which("chromium")
PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth).length,
    nameless: images.filter(i => !i.alt).length,
    fetched: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    ground: getComputedStyle(document.body).backgroundColor,
    shown: images[0].currentSrc.length,
    text: document.body.innerText.length,
  });
});
</script></body>"""


def row(steps, distance, **more):
    return {"steps": steps, "evaluations": steps or 32, "distance": distance, "rmse": 0.0} | more


def made(folder, images):
    """A page of a small evaluation, of images or of points; a name and a key hold what HTML reads."""
    shape, more = ((1, 6, 6), {}) if images else ((2,), {})
    torch.manual_seed(0)
    if images:
        more = {"kernel": 0.2, "precision": 0.5, "recall": 0.25, "nearest": 3.0}
    result = {
        "protocol": {
            "distance": "frechet" if images else "sliced_wasserstein",
            "solver": "euler; converged: heun",
            "samples": 20,
            "features": {"name": "classifier", "held_out_accuracy": 0.925},
        },
        "floor": {"distance": 0.5, "samples": 10, **more},
    }
    cell = dict.fromkeys(("value", "low", "high"), 0.75)
    measured = dict.fromkeys(tables.PANEL, cell)
    space = {"network": "residual", "explained": 0.5, "floor": measured}
    samples, paths, folders = {}, {}, {}
    for name, first in (("teacher", 40.0), ("student", 2.0)):
        rows = [row(1, first, **more), row(None, 1.0, **more)]
        result[name] = {"round": 0, "normalised": 0.125, "rows": rows}
        space[name] = [{"steps": r["steps"], **measured} for r in rows]
        samples[name] = {r["steps"]: torch.rand(20, *shape) * 2 - 1 for r in rows}
        paths[name] = (torch.linspace(0, 1, 9), torch.randn(9, 32, *shape))
        (folder / name).mkdir()
        lines = [{"step": s, "loss": 10 / s, "images_per_second": 7.0} for s in (1, 5, 90)]
        (folder / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / name / "config.yaml").write_text(f"run_dir: of the {name}\n")
        folders[name] = str(folder / name)
    if images:
        result["protocol"]["real_samples"] = 20
        result["panel"] = {"spaces": {"code": space}, "resamples": 200, "neighbours": 5}
    return report.page(
        "a <b>name</b>",
        result,
        samples,
        real=torch.rand(16, *shape) * 2 - 1,
        paths=paths,
        folders=folders,
        config="steps: [1] # <script>alert(1)</script>\n",
        facts={"device": "cpu & more"},
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of images, and that of points, each made once."""
    return functools.cache(lambda images: made(tmp_path_factory.mktemp("page"), images))


class Links(html.parser.HTMLParser):
    """Collect what a page could fetch."""

    def __init__(self, page):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        keys = ("src", "srcset", "href", "data", "action", "poster", "background")
        self.found += [value for key, value in attributes if key in keys]


@pytest.mark.parametrize("images", [True, False], ids=["images", "points"])
def test_the_page_holds_everything_it_shows(pages, images):
    page = pages(images)
    links = Links(page)
    assert len(links.found) >= 9
    assert all(link.startswith("data:image/") for link in links.found)
    assert not {"script", "link", "iframe", "object", "b>name"} & set(links.tags)
    outside = re.sub(r"data:image/[^\"]*", "", page)
    assert "//" not in outside
    assert "url(" not in outside
    assert "default-src 'none'" in page
    for link in links.found:
        content = base64.b64decode(link.split(",")[1])
        fetched = re.findall(rb"(?:href|src)=\"([^\"]*)\"", content)
        assert all(target.startswith(b"#") for target in fetched)
    assert "&lt;script&gt;alert(1)" in page
    assert "a &lt;b&gt;name&lt;/b&gt;" in page


def test_the_page_says_what_was_measured(pages):
    page = pages(True)
    text = re.sub(r"<[^>]*>", " ", page.split("</style>")[1])
    for said in (
        *("2.00 times that of the converged teacher", "0.250 /", "held out accuracy", "0.925"),
        *("90 steps, 7 images per second", "run_dir: of the student", "straightness 0.125"),
    ):
        assert said in text
    assert re.search(r"\s1\s+1\s+40\s+2\s+2.00", text)
    assert re.search(r"real against real\s+0.5\s", text)
    assert re.search(r"student, converged\s+0.75\s+\[0.75, 0.75\]", text)
    assert "20 samples against 20 images that the models were trained on" in text


def test_logs_that_are_not_there_are_left_out(tmp_path):
    line = {"step": 1, "loss": 1.0, "images_per_second": 7.0}
    (tmp_path / "one").mkdir()
    (tmp_path / "one/metrics.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    half = report.training({"teacher": "nowhere", "student": str(tmp_path / "one")})
    assert "student: 1 steps" in half
    assert "teacher:" not in half
    assert report.training({"teacher": str(tmp_path), "student": "google/ddpm-cifar10-32"}) == ""
    assert report.configs_of({"teacher": str(tmp_path)}) == []


def opened(page, folder, *flags):
    """Open a page in chromium: (what the probe saw, the log of its console)."""
    file = folder / "report.html"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    probed = page.replace(policy, policy + "; script-src 'unsafe-inline'")
    file.write_text(probed.replace("</body>", PROBE))
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--log-level=0", f"--user-data-dir={folder}/profile", *flags),
            *("--virtual-time-budget=5000", "--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr[-2000:]
    return json.loads(title[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; the page is parsed alone")
@pytest.mark.parametrize("images", [True, False], ids=["images", "points"])
def test_a_browser_shows_the_page(pages, tmp_path, images):
    page = pages(images)
    seen, console = opened(page, tmp_path, "--window-size=1200,900")
    assert seen["images"] == 8  # curve, paths, losses, two models at two numbers of steps, real
    assert (seen["broken"], seen["nameless"], seen["fetched"]) == (0, 0, 0)
    assert seen["overflow"] <= 0
    assert seen["text"] > 500
    assert console == []
    dark = ("--window-size=500,900", "--blink-settings=preferredColorScheme=0")
    narrow, console = opened(page, tmp_path, *dark)
    assert narrow["broken"] == 0
    assert narrow["overflow"] <= 0  # nothing is wider than the screen
    assert console == []
    assert (seen["ground"], narrow["ground"]) == ("rgb(255, 255, 255)", "rgb(22, 25, 29)")


def test_the_tables_tell_what_each_model_costs_a_row():
    teacher = {"rows": [row(1, 4.0), row(2, 3.0)], "normalised": 0.1}
    dear = [r | {"evaluations": 2 * r["evaluations"]} for r in teacher["rows"][:1]]
    result = {
        "protocol": {
            **{"distance": "frechet", "solver": "euler; converged: heun", "student_solver": "heun"},
            **{"samples": 20, "real_samples": 20},
        },
        "floor": {"distance": 0.5, "samples": 10},
        "teacher": teacher,
        "student": {"rows": [*dear, row(2, 2.0)], "normalised": 0.1},
    }
    assert "| 1 | 1 / 2 | 4 | 4 |" in tables.markdown(result)
    assert "| 2 | 2 | 3 | 2 |" in tables.markdown(result)
    assert "<td>1 / 2</td>" in report.numbers(result)


def test_images_of_a_mosaic_are_separated_by_translucent_grey():
    x = np.ones((5, 3, 2, 3), np.float32)
    sheet = figures.mosaic(x)
    assert sheet.shape == (8, 11, 4)  # three rows and columns of 2x3, two lines between them
    assert (sheet[:2, :3] == 255).all()
    assert (sheet[2, :3] == figures.GUTTER).all()
    assert (sheet[:2, 3] == figures.GUTTER).all()
    assert (sheet[3:5, 8:, 3] == 0).all()  # no sixth image
    black = figures.mosaic(-x[:, :1])
    assert (black[:2, :3] == (0, 0, 0, 255)).all()


def results(distance):
    rows = [row(1, 40.0), row(16, 0.31), row(None, 0.25)]
    result = {name: {"rows": rows} for name in ("teacher", "student")}
    return result | {
        "protocol": {"distance": distance},
        "floor": {"distance": 0.2, "samples": 10_000},
    }


WHITE = np.ones((20, 3, 6, 6), np.float32)
POINTS = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
LOSSES = [{"step": s, "loss": 123456.789 / s} for s in (1, 50, 9_000_000)]
BOTH = ("teacher", "student")
FIGURES = {  # draws into a file that is given, or returns a figure
    **{
        f"{kind}, {title}": lambda path, kind=kind, title=title: figures.curve_figure(
            results(kind), *((7.2, 4.3) if title else (charts.WIDE, 3.9)), title=title
        )
        for kind in tables.DISTANCES
        for title in (True, False)
    },
    "grid": lambda path: figures.grid(
        path, {name: {k: torch.from_numpy(WHITE) for k in (1, 2, None)} for name in BOTH}
    ),
    "pairs": lambda path: figures.pairs(path, WHITE, WHITE, np.arange(20) + 10**9),
    "latents": lambda path: figures.pairs(path, WHITE[:, [0] * 4], WHITE[:, [0] * 4]),
    "points": lambda path: figures.pairs(path, POINTS, 2 * POINTS),
    "costs": lambda path: figures.costs(path, 1e7 * POINTS[:, 0] ** 2, 1e7 * POINTS[:, 1] ** 2),
    "losses": lambda path: charts.losses(dict.fromkeys(BOTH, LOSSES)),
    "values": lambda path: charts.value_paths(
        dict.fromkeys(BOTH, (torch.linspace(0, 1, 9), 1e6 * torch.randn(9, 32, 1, 6, 6)))
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_words_of_a_figure_are_cut_or_covered(name, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    figure = FIGURES[name](tmp_path / "x.png") or saved[0]
    figure.draw_without_rendering()
    drawn, size = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) >= 0
    assert drawn.x1 <= size[0] + 0.01
    assert drawn.y1 <= size[1] + 0.01
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in [*axis.get_ticklabels(which="both"), axis.offsetText]
    }
    words = [
        text
        for text in set(figure.findobj(Text)) - ticks
        if text.get_visible() and text.get_text() and getattr(text.axes, "visible", True)
    ]
    assert words
    boxes = {text: text.get_window_extent() for text in words}
    covered = [
        (a.get_text(), b.get_text())
        for i, a in enumerate(words)
        for b in words[:i]
        if boxes[a].overlaps(boxes[b])
    ]
    assert not covered


def test_a_white_sample_of_a_pair_has_a_border(tmp_path):
    figures.pairs(tmp_path / "x.png", 0 * WHITE[:3], WHITE[:3])
    shown = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
    lower = shown[shown.shape[0] // 2 + 20 :, 100:]  # beside the words
    assert (lower < 230).any()


def test_the_headline_claims_no_victory_that_the_table_does_not_show():
    def told(student, *teacher):
        rows = [
            {"steps": steps, "evaluations": steps, "distance": distance}
            for steps, distance in zip((1, 2, 4), teacher, strict=False)
        ]
        return tables.finding(
            {"student": {"rows": [rows[0] | {"distance": student}]}, "teacher": {"rows": rows}}
        )

    assert told(0.5, 0.9, 0.6, 0.4) == "1 evaluation of the student beats 2 of the teacher"
    equal = "Distance to real data against network evaluations"
    assert told(0.52501, 0.52512, 0.52508, 0.52503) == equal
