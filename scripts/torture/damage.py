"""Damage at random to bytes, JSON and YAML values, command lines: pure functions of a generator."""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml

Random = np.random.Generator

ODD: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 1000, 2**40, 2**63 - 1, 2**63, 2**70, 10**400),
    *(0.0, -0.5, 0.5, 1.0, 1.5, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    *("", " ", "9", "-1", "none", "null", "auto", "a" * 64, "a" * 300, "a" * 5000, "\0", "x\0y"),
    *("a\nb", "\x1b[31m", "é", "🙂", "~", "~/x", "~nobody/x", ".", "..", "../elsewhere", "/", "x/"),
    *("/dev/null", "/dev/full/x", "/proc/self/x", "/proc/self/mem", "home/file", "home/file/x"),
    *("$HOME", "${oc.env:HOME}", "{a}", "%s", "a::b", "x[1]", "*", "?", "[x", "-x", "--x", "a=b"),
    *("file:///x", "memory://x/y", "memory://", "nonsense://x/y", "://", "http://127.0.0.1:9/x"),
    *("flow", "pairs", "points.yaml", "pictures.npz", "runs/points/flow", "runs/pictures/pairs"),
    *("runs/pictures/flow/net", "runs/points/export", "digits", "ring", "images", "VelocityMLP"),
    *([], {}, [[]], [None], [1], [1, "x"], {"a": {}}, {"a": 1}, {"name": "x"}, {"path": []}),
    *(list(range(5000)), {str(i): i for i in range(200)}, {"source": "npz", "path": "/"}),
]
CHOICES = [  # values that some keys take
    *("heun", "euler", "ab2", "dopri5", "ancestral", "midpoint", "uniform", "shift", "sigmoid"),
    *("mse", "pseudo_huber", "feature", "normalised", "velocity", "meanflow", "optimal_transport"),
    *("fp32", "bf16", "fp16", "tf32", "float16", "values", "inception", "sliced_wasserstein"),
    *("cosine", "linear", "images", "npz", "idx", "latents", "UNet2DModel", "AutoencoderKL"),
    *("DiTTransformer2DModel", "UNet2DConditionModel", "train_flow", "reflow", "pictures.npz"),
    *(
        ["UpBlock2D"],
        ["DownBlock2D", "AttnDownBlock2D"],
        [["UpBlock2D"]],
        [8],
        [8, 8, 8],
        [0, 8],
        [-8, 8],
    ),
    *([8, 12], [16, 8], [1, 2, 4], [1.5], ["x"], [0], [0.05], [0.05, 0.1], [0.1, 0.1], [10**6]),
    *("ddpm", "png", "tars", "parquet", "points.npy", "latents.npz", "runs/pictures/classifier"),
    *(4, 5, 6, 8, 12, 16, 24, 32, 64, 100, 0.1, 0.25, 0.75, 0.9, 2.0, 3.0, 10.0),
]
WORDS = [
    *(
        "=",
        "=x",
        "x=",
        "x",
        "a.b",
        "a..b=1",
        ".=1",
        "a.=1",
        "pairs[=1",
        "pairs]=1",
        "pairs[0].path=x",
    ),
    *("pairs.0.path=x", "pairs.7.path=x", "pairs[-1].path=x", "fit.steps.more=1", "fit=1", "--x"),
    *("fit.steps=[", "fit.steps={", "fit.steps={a:1}", "fit.steps=&a [*a]", "fit.steps=!!str 3"),
    *("fit.steps=!!python/name:os.system", "fit.steps=0x10", "fit.steps=1_0", "fit.steps=1e3"),
    *("fit.steps=2020-01-01", "data={source:ring}", "data=ring", "net=VelocityMLP", "section=flow"),
    *("section=nothing", "section=", "stage=reflow", "name=x", "name=../x", "seed=-1", "seed=1"),
    *("device=cuda", "device=tpu", "steps=4", "steps=[]", "steps=[1,2", "run_dir=", "run_dir=new"),
    *(
        "--dry-run",
        "--chain",
        "--fit.steps=3",
        "nothing.yaml",
        "points.yaml",
        "runs",
        "é=1",
        "a\tb=1",
    ),
    *("--rounds", "--rounds=2", "--only=flow", "--only=", "--launcher=x", "--list", "\udcff=1"),
    *("data.path=\udcff", "flow.fit.steps=2", "pairs_2.seed=1", "reflow_0.seed=1", "flow_x.seed=1"),
]


def pick(rng: Random, items: Any) -> Any:
    """Draw one of some items."""
    return items[int(rng.integers(len(items)))]


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the ways to all values below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in list(items):
        yield (*way, key)
        if isinstance(below, dict | list):
            yield from places(below, (*way, key))


def change_value(document: Any, rng: Random) -> Any:
    """Change one value in nested mappings and lists; return the document."""
    ways = list(places(document))
    if not ways or rng.random() < 0.02:
        return pick(rng, ODD)
    *way, key = pick(rng, ways)
    inner = document
    for part in way:
        inner = inner[part]
    match int(rng.integers(12)):
        case 0:
            del inner[key]
        case 1:
            inner[key] = [inner[key]]
        case 2:
            inner[key] = {str(key): inner[key]}
        case 3:
            inner[key] = str(inner[key])
        case 4 if isinstance(inner, dict):
            other = pick(
                rng, ["x", "", "name", "path", f"{key}s", f"{key}"[:-1], 3, None, "a.b", "a b"]
            )
            inner[other] = inner.pop(key)
        case 5 if isinstance(inner, dict):
            inner[pick(rng, ["x", "name", "stage", "run_dir", "seed", "fit"])] = pick(rng, ODD)
        case 6:  # one of the values of the document, in another place
            *way, other = pick(rng, ways)
            value = document
            for part in (*way, other):
                value = value[part]
            inner[key] = json.loads(json.dumps(value, default=str))
        case 7:
            inner[key] = pick(rng, ODD)
        case _:  # of the same type
            alike = [odd for odd in (*ODD, *CHOICES) if type(odd) is type(inner[key])]
            inner[key] = pick(rng, alike or ODD)
    return document


def dump_yaml(values: Any) -> bytes:
    """Write YAML; what it cannot hold is written as JSON."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text.encode("utf-8", "surrogateescape")


def flip(raw: bytes, rng: Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(raw)
    for place in rng.integers(len(raw), size=int(rng.integers(1, 9))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(raw: bytes, rng: Random) -> bytes:
    """Cut the end off."""
    return raw[: int(rng.integers(len(raw)))]


def empty(raw: bytes, rng: Random) -> bytes:
    """Leave nothing."""
    return b""


def part(raw: bytes, rng: Random) -> tuple[int, int]:
    """Draw the bounds of a part of 1 to 4,096 bytes."""
    a = int(rng.integers(len(raw)))
    return a, min(len(raw), a + int(2 ** rng.uniform(0, 12)))


def blank(raw: bytes, rng: Random) -> bytes:
    """Replace a part by NULs."""
    a, b = part(raw, rng)
    return raw[:a] + bytes(b - a) + raw[b:]


def scramble(raw: bytes, rng: Random) -> bytes:
    """Replace a part by random bytes."""
    a, b = part(raw, rng)
    return raw[:a] + rng.bytes(b - a) + raw[b:]


def move(raw: bytes, rng: Random) -> bytes:
    """Remove, insert or repeat a part: what follows moves."""
    a, b = part(raw, rng)
    return pick(rng, [raw[:a] + raw[b:], raw[:a] + rng.bytes(b - a) + raw[a:], raw[:b] + raw[a:]])


def swap(raw: bytes, rng: Random) -> bytes:
    """Exchange a part of the first half with one of the second."""
    half = len(raw) // 2
    a, c = int(rng.integers(half + 1)), int(rng.integers(half, len(raw)))
    n = max(1, min(half - a, len(raw) - c, int(2 ** rng.uniform(0, 12))))
    return raw[:a] + raw[c : c + n] + raw[a + n : c] + raw[a : a + n] + raw[c + n :]


def value(raw: bytes, rng: Random) -> bytes:
    """Change one value of a JSON or YAML document."""
    if raw.lstrip()[:1] in (b"{", b"["):
        lines = raw.strip().split(b"\n{")  # of metrics.jsonl, or the only one
        k = int(rng.integers(len(lines)))
        lines[k] = b"{" * (k > 0) + lines[k]
        lines[k] = json.dumps(change_value(json.loads(lines[k]), rng)).encode()
        return b"\n".join(b"{" * (0 < n != k) + line for n, line in enumerate(lines)) + b"\n"
    return dump_yaml(change_value(yaml.safe_load(raw), rng))


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    **{"flipped": flip, "cut": cut, "empty": empty, "blanked": blank, "scrambled": scramble},
    **{"moved": move, "swapped": swap},
}


def bytes_at_random(raw: bytes, rng: Random) -> bytes:
    """Damage bytes in one of these ways."""
    return BYTES[pick(rng, list(BYTES))](raw, rng)
