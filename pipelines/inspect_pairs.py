"""Inspect a finished set of pairs: its contents, its provenance, and pictures of its pairs.

Prints counts, bytes, environments, the chain of digests back to the data, and the transport cost
|x1 - x0|^2 beside that of the same points paired at random; writes pairs.png, cost.png and summary.json.

Exit status: 0, or 2 for a folder that is not a finished set. `flowmatch verify` finds damaged tars.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowmatch.config import UserError, expanded, one_line, require
from flowmatch.evaluation import figures
from flowmatch.flow import noise
from flowmatch.pairs import audit, shards
from flowmatch.pairs.dataset import PairData, transport_cost
from flowmatch.pairs.layout import PROMPT, STATES
from flowmatch.runs import manifest, stopping, storage
from flowmatch.runs.command import refusal
from flowmatch.runs.config import USER_ERROR
from flowmatch.runs.storage import Store

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN_IMAGES, SHOWN_POINTS = 16, 400
SHOWN_PROMPTS = 4
FETCHED = 8  # shards of a URL that the statistics use; the pictures use the first ones


def main(argv: list[str] | None = None) -> int:
    """Print the summary, draw the pictures, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="flowmatch inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder or URL of the pairs (their run_dir)")
    parser.add_argument("--out", help="folder for pictures and summary.json (default: DIR_inspect)")
    parser.add_argument("--teacher", help="the teacher's folder, if it has moved")
    parser.add_argument("--vae", help="the VAE of latents, if its run of encode has moved")
    parser.add_argument(
        "--pairs",
        type=number,
        help=f"pairs to draw (default: {SHOWN_IMAGES} for images, {SHOWN_POINTS} for points)",
    )
    parser.add_argument(
        "--samples",
        type=number,
        default=10_000,
        help="pairs for the statistics, chosen at random (default: 10000)",
    )
    call = parser.parse_args(argv)
    with stopping.heard("inspect"):
        return answer(call)


def answer(call: argparse.Namespace) -> int:
    """Do what a command line asks for; return the exit status."""
    try:
        require("matplotlib", "eval", "inspect")
        folder = storage.at(expanded(call.folder))
        local = f"{folder}_inspect"
        out = Path(
            expanded(call.out or "")
            or (f"{folder.name}_inspect" if storage.is_url(folder) else local)
        )
        storage.check_folder(out, "--out")
        if out.resolve() == Path(str(folder)).resolve():
            raise UserError(
                f"--out={out} is the set itself; name another folder (default: {local})"
            )
        data = PairData(folder, "DIR")
        data.reads_states = bool(data.times)
        found = summary(data, call.samples, call.teacher)
        costs, at_random = found["cost"].pop("values"), found["cost"].pop("values_at_random")
        out.mkdir(parents=True, exist_ok=True)
        count = call.pairs or (SHOWN_IMAGES if len(data.shape) > 1 else SHOWN_POINTS)
        first = data.batch(range(min(count, len(data))))
        found["prompts"] = first.get(PROMPT, [])[:SHOWN_PROMPTS]
        label = (
            [found["names"].get(str(k), k) for k in first["label"].tolist()]
            if data.has_labels
            else None
        )
        shown = decoded(folder, found["latents"], first["x1"], call.vae)
        latent = shown is first["x1"] if found["latents"] is not None else None
        x0, x1 = (figures.drawable(x).numpy() for x in (first["x0"], shown))
        figures.pairs(out / "pairs.png", x0, x1, label, latent)
        figures.costs(out / "cost.png", costs, at_random)
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        (out / "summary.json").write_text(text)
    except (UserError, OSError) as error:
        refused = refusal(error)
        assert refused is not None
        for line in refused.faults:
            print(f"inspect_pairs: {line}", file=sys.stderr)
        return USER_ERROR
    for line in [*tell(folder, found), f"wrote {out}/pairs.png, cost.png, summary.json"]:
        print(one_line(line))
    return 0


def decoded(folder: Store, latents: Any, x: Any, given: str | None) -> Any:
    """Decode latents with their VAE, where it is found; return anything else as it is."""
    if not latents:
        return x
    from flowmatch.models import autoencoder

    path = given or autoencoder.find(str(folder))
    if path is None:
        print("the latents are drawn as they are: their VAE is not found; name it with --vae")
        return x
    return autoencoder.load(expanded(path), "--vae", (), latents).decode(x)


def number(text: str) -> int:
    """Read a positive number of pairs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of pairs, from 1")
    return int(text)


def summary(data: PairData, samples: int, teacher: str | None) -> dict[str, Any]:
    """Gather what is told of a set; all but `cost.values` and `.values_at_random` is JSON."""
    sealed, layout = data.sealed, data.layout
    facts = sealed["facts"]
    sidecars = shards.sidecars(data.folder, range(data.shards))
    environments = Counter(
        json.dumps(side["environment"] | {"evaluations": None}, sort_keys=True)
        for side in sidecars
        if side and isinstance(side.get("environment"), dict)
    )
    return {
        "pairs": len(data),
        "shards": data.shards,
        "bytes": data.shards * layout.tar_bytes,
        "shape": list(data.shape),
        "latents": facts.get("latents"),
        "names": facts.get("id2label") or {},
        "dtype": layout.dtype,
        "kind": facts.get("kind"),
        "remark": data.remark,
        "evaluations": facts.get("evaluations"),
        "config": sealed["config"],
        "environments": [[json.loads(text), n] for text, n in environments.most_common()],
        "without_sidecar": sum(side is None for side in sidecars),
        "provenance": list(chain(data.folder, sealed, teacher)),
        **statistics(data, samples),
    }


def statistics(data: PairData, samples: int) -> dict[str, Any]:
    """Read some pairs at random: cost, moments, labels."""
    rng, size = noise.generator(0, 0, noise.SAMPLER), data.layout.shard_size
    some = np.arange(data.shards)
    if data.cache is not None:
        some = np.sort(rng.choice(data.shards, min(FETCHED, data.shards), replace=False))
        data.cache.fetch(map(shards.tar_name, some[: data.cache.capacity].tolist()))
    count = min(samples, len(some) * size)
    shard, index = np.divmod(np.sort(rng.choice(len(some) * size, count, replace=False)), size)
    ids = some[shard] * size + index
    cost, at_random = [], []
    labels: Counter[int] = Counter()
    bends: list[np.ndarray] = []
    moments: dict[str, list[tuple[float, ...]]] = {name: [] for name in ("x0", "x1")}
    for batch in data.parts(ids):
        x0, x1 = (batch[name].double().flatten(1) for name in ("x0", "x1"))  # [B, D]
        cost.append(transport_cost(x0, x1))
        at_random.append(transport_cost(x0, x1.roll(1, 0)))
        for name, x in (("x0", x0), ("x1", x1)):
            sums = (
                x.numel(),
                float(x.sum()),
                float(x.square().sum()),
                float(x.min()),
                float(x.max()),
            )
            moments[name].append(sums)
        labels.update(batch["label"].tolist() if data.has_labels else ())
        if data.times:
            lines = [(1 - t) * x0 + t * x1 for t in data.times]
            apart = batch[STATES].double().flatten(2) - torch.stack(lines, 1)  # [B, K, D]
            bends.append(apart.square().sum(2).numpy())
    values, others = np.concatenate(cost), np.concatenate(at_random)
    return {
        "samples": count,
        "samples_of_shards": len(some),
        "cost": {
            "mean": float(values.mean()),
            "quantiles": dict(
                zip(map(str, QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True)
            ),
            "mean_at_random": float(others.mean()),
            "values": values,
            "values_at_random": others,
        },
        **{name: moment(parts) for name, parts in moments.items()},
        "states": {
            f"{t:.4g}": float((bend / values.mean()) ** 0.5)
            for t, bend in zip(
                data.times, np.concatenate(bends).mean(0) if bends else (), strict=True
            )
        },
        "labels": {str(label): labels[label] for label in sorted(labels)},
    }


def moment(parts: list[tuple[float, ...]]) -> dict[str, float]:
    """Join the sums of the parts: mean, standard deviation, smallest, largest."""
    n, total, squares, low, high = zip(*parts, strict=True)
    mean = sum(total) / sum(n)
    deviation = max(0.0, sum(squares) / sum(n) - mean**2) ** 0.5
    return {"mean": mean, "deviation": deviation, "min": min(low), "max": max(high)}


def chain(
    folder: Store, sealed: dict[str, Any], teacher: str | None, depth: int = 0
) -> Iterator[Any]:
    """Follow the inputs of a sealed folder, through config.yaml, as long as their folders are there.

    Yields {depth, input, digest, path, what}; what says what stands at the path, or why it ends there.
    """
    config = audit.read_yaml(folder) or {}
    for name, digest in sorted(sealed["inputs"].items()):
        link = {"depth": depth, "input": name, "digest": digest, "path": None}
        if name == "data":
            yield link | {"what": describe(config.get("data"))}
            continue
        path = teacher if name == "teacher" and teacher else place(config, name)
        here = path and find(folder, path)
        if not here:
            yield link | {"path": path, "what": "not here"}
            continue
        link["path"] = str(here)
        sealed_at, index, lone = here.sizes(["manifest.json", "model_index.json", "config.json"])
        if sealed_at is None and (index is not None or lone is not None):
            yield link | {"what": f"a diffusers {'model' if index is None else 'pipeline'}"}
            continue
        try:
            source, own = manifest.read_hashed(here, name)
        except UserError as error:
            yield link | {"what": error.faults[0]}
            continue
        facts = source["facts"]
        mine = own if name.startswith("pairs.") else facts.get("net")
        what = source["stage"] + (f", round {facts['round']}" if "round" in facts else "")
        if mine != digest:
            yield link | {"what": f"{what}; ANOTHER by now: its digest is {mine}"}
            continue
        yield link | {"what": what}
        yield from chain(here, source, None, depth + 1)


def find(folder: Store, path: str) -> Store | None:
    """Find an input where it was, or beside the folder that it went into."""
    for there in (path, folder.beside(path.rstrip("/").rpartition("/")[2])):
        with suppress(UserError):  # a store that is not reached from here
            if (store := storage.at(there)).exists():
                return store
    return None


def place(config: dict[str, Any], name: str) -> str | None:
    """Find the path of an input in a stage's config; inputs of a list are NAME.INDEX."""
    key, _, index = name.partition(".")
    value = config.get(key)
    if index and isinstance(value, list) and index.isdecimal() and int(index) < len(value):
        value = value[int(index)].get("path") if isinstance(value[int(index)], dict) else None
    return value if isinstance(value, str) else None


def describe(data: Any) -> str:
    """Describe a data config."""
    if not isinstance(data, dict) or "source" not in data:
        return "data"
    return " ".join(str(data[key]) for key in ("source", "path") if data.get(key))


def tell(folder: Store, found: dict[str, Any]) -> Iterator[str]:
    """Write the summary for a reader."""
    config, cost = found["config"], found["cost"]
    yield (
        f"{folder}: {found['pairs']:,} pairs of {found['shape']} in {found['shards']} shards, "
        f"{found['bytes'] / 1e6:,.1f} MB, {found['dtype']}"
    )
    solver = config.get("solver")
    name = solver.get("name") if isinstance(solver, dict) else solver
    made = (
        f"{found['kind']} by {name}, {found['evaluations']} evaluations a pair, "
        f"{config.get('precision', 'fp32')}, guidance {config.get('guidance')}, "
        f"seed {config.get('seed')}"
    )
    yield f"  {found['remark'] or made}"
    for environment, count in found["environments"]:
        told = [f"{name} {value}" for name, value in environment.items() if value is not None]
        words = ", ".join(told)
        yield f"  {count} shards made with {words}"
    if len(found["environments"]) > 1:
        yield "  WARNING: a mixture; equal bytes are promised within one environment only"
    if found["without_sidecar"]:
        yield f"  WARNING: {found['without_sidecar']} shards without sidecar; see flowmatch verify"
    yield "made from"
    for link in found["provenance"]:
        path = f" {link['path']}" if link["path"] else ""
        yield f"  {'  ' * link['depth']}{link['input']} {str(link['digest'])[:12]}{path}: {link['what']}"
    ratio = cost["mean"] / cost["mean_at_random"] if cost["mean_at_random"] else float("nan")
    few = f" in {found['samples_of_shards']} shards" * (
        found["samples_of_shards"] < found["shards"]
    )
    yield (
        f"transport cost |x1 - x0|^2 of {found['samples']:,} pairs{few}: mean {cost['mean']:.4g}; "
        f"paired at random {cost['mean_at_random']:.4g} ({ratio:.2f} of it)"
    )
    spread = [f"{float(q):.0%} {value:.4g}" for q, value in cost["quantiles"].items()]
    yield f"  quantiles: {', '.join(spread)}"
    for name in ("x0", "x1"):
        m = found[name]
        yield (
            f"{name}: mean {m['mean']:.3f}, standard deviation {m['deviation']:.3f}, "
            f"{m['min']:.3g} to {m['max']:.3g}"
        )
    if found["states"]:
        told = [f"t = {t}: {bend:.3g}" for t, bend in found["states"].items()]
        yield f"states, distance from the line in units of |x1 - x0|: {', '.join(told)}"
    if found["labels"]:
        names = found["names"]
        counts = (f"{names.get(label, label)}: {n}" for label, n in found["labels"].items())
        yield "labels: " + ", ".join(counts)
    if found["prompts"]:
        yield "prompts: " + ", ".join(map(repr, found["prompts"]))


if __name__ == "__main__":
    sys.exit(main())
