"""`flowmatch monitor RUN`: follow a run from another terminal, as lines and as one HTML page.

It only reads the run folder, apart from the page that it writes there, so it can start, stop and start
again at any time while the run trains.
"""

import argparse
import base64
import html
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowmatch.config import UserError, expanded
from flowmatch.runs import lines, manifest, stopping
from flowmatch.runs.files import write_atomic

PAGE = "monitor.html"
SHOWN = 6  # earlier pictures on the page
WIDE, HIGH, LEFT, BOTTOM = 460, 210, 54, 26  # of a chart, in its own units

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --soft: #5c6570; --line: #dfe3e8; --ground: #fff;
  --card: #f6f7f9; --mark: #c03a50; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a3acb6; --line: #343b44;
  --ground: #16191d; --card: #1f242a; --mark: #ff8093; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
h2 small { font-weight: 400; color: var(--soft); margin-left: .5rem; }
p { margin: .3rem 0; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
progress { width: 100%; height: .5rem; accent-color: var(--mark); }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } .charts figure { flex: 1 1 20rem; }
figure { margin: .6rem 0; } svg { width: 100%; max-width: 40rem; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .axis { stroke: var(--line); }
svg .curve { stroke: var(--mark); stroke-width: 2; fill: none; stroke-linejoin: round; }
svg .dot { fill: var(--mark); }
img { max-width: max(100%, 30rem); display: block; } .wide { overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); margin: .6rem 0; }
"""
DOCUMENT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{style}</style></head><body>
<h1>{title}</h1>
<p class=soft>{state}</p>
{body}
</body></html>
"""


def main(argv: list[str]) -> None:
    """Run the command."""
    from flowmatch.runs.command import exit_codes

    parser = argparse.ArgumentParser("flowmatch monitor", allow_abbrev=False)
    parser.add_argument("run", help="run folder of a stage, or the folder of an experiment")
    parser.add_argument("--every", type=float, default=5, help="seconds between two readings")
    parser.add_argument("--once", action="store_true", help="write the page once, and stop")
    call = parser.parse_args(argv)
    with exit_codes("monitor"):
        if not 0 < call.every < 1e6:
            raise UserError(f"--every {call.every:g}: expected seconds, more than 0, less than 1e6")
        follow(Path(expanded(call.run)), call.every, call.once)


def follow(run: Path, every: float = 5, once: bool = False) -> None:
    """Print what is new in a run and rewrite its page, until it is sealed or the user stops.

    Args:
        run: The folder of a stage or of an experiment.
        every: Seconds between two readings.
        once: Whether one reading is enough.

    Raises:
        UserError: There is no such folder, or no stage in it.
    """
    told: dict[str, tuple[Any, ...]] = {}
    try:
        while True:
            stages = read(run)
            write_atomic(run / PAGE, page(run, stages, 0 if once else every))
            if not told:
                often = "written" if once else f"rewritten every {every:g} seconds"
                print(f"monitor: {run / PAGE} is {often}", flush=True)
            for stage in stages:
                if told.get(stage.name) != stage.news:
                    told[stage.name] = stage.news
                    print(f"{stage.name}: {stage.line}", flush=True)
            over = len(stages) == 1 and stages[0].folder == run and stages[0].sealed
            if once or over:
                write_atomic(run / PAGE, page(run, stages, 0))
                return
            time.sleep(every)
    except stopping.Stopped:  # by Ctrl-C, which is how a user ends it
        write_atomic(run / PAGE, page(run, read(run), 0))
        print(f"monitor: {run / PAGE} stays as it is", flush=True)


@dataclass(frozen=True)
class Stage:
    """What a run folder says of its stage.

    Attributes:
        folder: The run folder.
        metrics: Lines of metrics.jsonl.
        held: Lines of held_out.jsonl.
        pictures: Files of samples, oldest first.
        steps: Updates of the whole run; or shards of a set of pairs; 0 where there are neither.
        batch: Samples in an update; 0 for other stages than training.
        shards: Finished shards of a set of pairs.
        sealed: Whether it is done.
        ended: Updates of a sealed training run; metrics.jsonl has no line for the last ones.
    """

    folder: Path
    metrics: Sequence[dict[str, Any]]
    held: Sequence[dict[str, Any]]
    pictures: Sequence[Path]
    steps: int
    batch: int
    shards: int
    sealed: bool
    ended: int

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.absolute().name

    @property
    def done(self) -> int:
        """Updates, or shards, that are done."""
        if self.ended:
            return self.ended
        return int(self.metrics[-1]["step"]) if self.metrics else self.shards

    @property
    def news(self) -> tuple[Any, ...]:
        """What is printed when it changes."""
        return self.done, self.sealed, len(self.held), len(self.pictures)

    @property
    def line(self) -> str:
        """Where it stands, in words."""
        parts = []
        if self.steps:
            what = "update" if self.batch else "shard"
            parts.append(f"{what} {self.done:,} of {self.steps:,}")
        if self.metrics:
            last = self.metrics[-1]
            parts += [f"loss {last['loss']:.4g}"] if "loss" in last else []
            parts += [f"held out {self.held[-1]['held_out_loss']:.4g}"] if self.held else []
            if rate := last.get("images_per_second"):
                left = (self.steps - self.done) * self.batch / rate
                parts.append(f"{rate:,.0f} images/s")
                parts += [f"{duration(left)} left"] if left > 0 and not self.sealed else []
        if self.pictures:
            parts.append(f"samples {self.pictures[-1]}")
        if self.sealed:
            parts.append("sealed")
        return ", ".join(parts) or "begun"


def duration(seconds: float) -> str:
    """Write seconds in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read(run: Path) -> list[Stage]:
    """Read the stages in a folder, in the order in which they began.

    Args:
        run: The folder of a stage or of an experiment.

    Raises:
        UserError: There is none.
    """
    files = [run / "config.yaml"] if (run / "config.yaml").is_file() else []
    files = files or sorted(
        run.glob("*/config.yaml"), key=lambda file: (file.stat().st_ctime, file)
    )
    if not files:
        what = "holds no run" if run.is_dir() else "does not exist"
        raise UserError(
            f"{run} {what}; expected a stage's folder, or that of an experiment (runs/NAME)"
        )
    return [read_stage(file.parent) for file in files]


def read_stage(folder: Path) -> Stage:
    """Read one run folder; damaged lines are left out."""
    import yaml

    def logged(name: str, key: str) -> list[dict[str, Any]]:
        return [line for line, _ in lines.read_metrics(folder / name)[0] if key in line]

    text, _ = lines.read_text((folder / "config.yaml").read_bytes())
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    config = config if isinstance(config, dict) else {}
    fit = config["fit"] if isinstance(config.get("fit"), dict) else {}

    def number(value: Any) -> int:
        return value if isinstance(value, int) else 0  # damaged

    sealed, steps = (folder / manifest.NAME).is_file(), number(fit.get("steps"))
    ended = 0
    if sealed and steps:
        with suppress(UserError):
            ended = number(manifest.read(folder, "monitor")["facts"].get("step", steps))
    return Stage(
        folder,
        logged("metrics.jsonl", "loss"),
        logged("held_out.jsonl", "held_out_loss"),
        sorted(folder.glob("samples/step_*.png")),
        steps or number(config.get("shards")),
        number(fit.get("batch_size")),
        len(list(folder.glob("pairs-*.tar"))),
        sealed,
        ended,
    )


def page(run: Path, stages: Sequence[Stage], every: float) -> str:
    """Write the page.

    Args:
        run: The folder that is followed.
        stages: From `read`.
        every: Seconds after which the browser reads it again; 0: never.
    """
    refresh = f'\n<meta http-equiv="refresh" content="{max(1, round(every))}">' if every else ""
    state = f"as of {time.strftime('%Y-%m-%d %H:%M:%S')}"
    if every:
        state += f"; the page loads itself again every {every:g} seconds"
    return DOCUMENT.format(
        title=html.escape(str(run)),
        refresh=refresh,
        style=STYLE,
        state=state,
        body="\n".join(section(stage) for stage in stages),
    )


def section(stage: Stage) -> str:
    """Write what the page says of a stage."""
    words = stage.line.partition(", samples ")[0]
    words += ", sealed" if stage.sealed and not words.endswith("sealed") else ""
    parts = [f"<h2>{html.escape(stage.name)} <small>{html.escape(words)}</small></h2>"]
    if stage.steps and not stage.sealed:
        parts.append(f"<progress value={stage.done} max={stage.steps}></progress>")
    charts = [
        ("Loss of training", chart(stage.metrics, "loss")),
        ("Held-out loss of the averaged network", chart(stage.held, "held_out_loss")),
    ]
    figures = "".join(
        f"<figure>{svg}<figcaption>{t}</figcaption></figure>" for t, svg in charts if svg
    )
    parts += [f"<div class=charts>{figures}</div>"] if figures else []
    if stage.pictures:
        parts.append(picture(stage.pictures[-1], newest=True))
        earlier = stage.pictures[:-1]
        if earlier:
            kept = [earlier[i * (len(earlier) - 1) // max(1, SHOWN - 1)] for i in range(SHOWN)]
            shown = "".join(picture(file) for file in reversed(list(dict.fromkeys(kept))))
            parts.append(f"<details><summary>Earlier samples</summary>{shown}</details>")
    return f"<section>{''.join(parts)}</section>"


def picture(file: Path, newest: bool = False) -> str:
    """Embed a picture of samples."""
    step = int(file.stem.partition("_")[2])
    note = ". Samples in the same place come from the same noise" if newest else ""
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except FileNotFoundError:  # a run that resumes has removed it
        return ""
    return (
        f'<figure><div class=wide><img src="data:image/png;base64,{data}" alt="samples after update '
        f'{step}"></div><figcaption>After update {step:,}{note}</figcaption></figure>'
    )


def chart(metrics: Sequence[dict[str, Any]], key: str) -> str:
    """Draw a value against the updates as an SVG; nothing for fewer than two finite values."""
    points = [(m["step"], m[key]) for m in metrics if key in m and abs(m[key]) < float("inf")]
    if len(points) < 2:
        return ""
    every = -(-len(points) // 400)
    points = points[::every] + points[-1:] * (len(points) % every != 1 and every > 1)
    xs, ys = zip(*points, strict=True)
    low, high = min(ys), max(ys)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - pad, high + pad

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0] or 1)
        return LEFT + across * (WIDE - LEFT - 12), (HIGH - BOTTOM) * (
            1 - (y - low) / (high - low)
        ) + 4

    drawn = [
        f'<line class=axis x1="{LEFT}" x2="{WIDE}" y1="{v:.1f}" y2="{v:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        for y in (low + pad, (low + high) / 2, high - pad)
        for _, v in [place(xs[0], y)]
    ]
    for x, anchor in ((xs[0], "start"), (xs[-1], "end")):
        drawn.append(
            f'<text x="{place(x, low)[0]:.1f}" y="{HIGH - 4}" text-anchor="{anchor}">{x:,}</text>'
        )
    drawn.append(f'<text x="{(LEFT + WIDE) / 2}" y="{HIGH - 4}" text-anchor="middle">update</text>')
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in points))
    drawn.append(f'<polyline class=curve points="{path}"/>')
    if len(points) <= 40:
        drawn += [
            f'<circle class=dot cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
            for a, b in (place(*point) for point in points)
        ]
    return f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img">{"".join(drawn)}</svg>'
