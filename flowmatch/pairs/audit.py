"""The faults of a set of pairs: its files compared with its sidecars and its manifest.

Stock readers do not notice a damaged tar, because a bad header looks like the end of the archive.
Nothing is changed here; `flowmatch verify` reports the faults, and renames bad files if asked to.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from flowmatch.config import UserError, differences, restrict
from flowmatch.pairs.layout import Advance, Layout, read_tar
from flowmatch.pairs.shards import META, README, numbers, sidecar_name, sidecars, tar_name
from flowmatch.runs import manifest, storage
from flowmatch.runs.storage import Place, Store

BAD = ".bad"  # ending of a bad file that was renamed, so that no reader takes it for a shard
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fault:
    """What is wrong, and which files must be renamed before generate_pairs makes them again.

    Args:
        what: the fault, for the user.
        aside: paths in the folder; empty if generate_pairs notices by itself that a shard is not done.
    """

    what: str
    aside: tuple[str, ...] = ()


@dataclass
class Findings:
    """The result of an examination.

    Args:
        shards: number of shards that belong to the set.
        sound: number of those without a fault.
        layout: of the set, if it is known.
        sealed: whether the folder has a manifest.
        imported: the format that the set was imported from; None for one that was generated.
        faults: what is wrong.
        remarks: what is unusual and harmless.
    """

    shards: int = 0
    sound: int = 0
    layout: Layout | None = None
    sealed: bool = False
    imported: str | None = None
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_yaml(folder: Store) -> dict[str, Any] | None:
    """Read config.yaml as plain data; None if it is not a mapping."""
    import yaml

    try:
        values = yaml.safe_load(folder.read("config.yaml"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        return None
    return values if isinstance(values, dict) else None


def read_config(folder: Store) -> dict[str, Any] | None:
    """Read the config.yaml of generate_pairs; None if it is missing or not one."""
    values = read_yaml(folder)
    needed = {"run_dir", "teacher", "shards", "inputs"}
    if values is None or not needed <= values.keys():
        return None
    positive = type(values["shards"]) is int and values["shards"] > 0
    return values if positive and isinstance(values["inputs"], dict) else None


@dataclass
class Promise:
    """What the manifest says about the set; empty if there is no sound manifest."""

    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    shards: int | None = None
    layout: Layout | None = None
    fingerprint: str | None = None
    classes: int | None = None
    outputs: dict[str, str] = field(default_factory=dict)  # tar -> sha256


def examine(place: Place, full: bool, advance: Advance = lambda _: None) -> Findings:
    """Check a folder of pairs: names, sizes, counts, sidecars, fingerprints, headers of tar members.

    Args:
        place: path or URL. The tars of a URL are read only with `full`, which fetches them.
        full: check also the sha256 of every tar, that every value is finite, and that every label is a
            class.
        advance: called with the number of bytes that were read.

    Raises:
        UserError: if the folder is not one of pairs.
    """
    folder = storage.at(place)
    if not folder.exists():
        raise UserError(f"{folder} does not exist or is not a folder; expected a folder of pairs")
    top, hidden = folder.names(), folder.names(META)
    tars, sides = numbers(top, "tar"), numbers(hidden, "json")
    config, found = read_config(folder), Findings(sealed=manifest.sealed(folder))
    if not (tars or sides or config or found.sealed):
        raise UserError(
            f"{folder} is not a folder of pairs: it has no tar, sidecar or config; expected the run_dir "
            "of generate_pairs"
        )
    promise = read_manifest(folder, found, bool(tars or sides)) if found.sealed else Promise()
    if config is None and "config.yaml" in top:
        what = f"{folder / 'config.yaml'} is damaged: generate_pairs cannot read it"
        found.faults.append(Fault(what, ("config.yaml",)))
    facts = {k: side for k, side in zip(sides, sidecars(folder, sides), strict=True) if side}
    agree(promise, facts)
    told = [side.get("environment") for side in facts.values()]
    found.imported = next((each["imported"] for each in told if each and "imported" in each), None)
    planned = config["shards"] if config else max([-1, *tars, *sides]) + 1
    found.shards, found.layout = promise.shards or planned, promise.layout
    if config and promise.config:
        said = restrict(config, promise.config)
        pairs = zip((promise.config, promise.inputs), (said, config["inputs"]), strict=True)
        changed = [line for was, now in pairs for line in differences(was, now)]
        if changed:
            what = f"{folder / 'config.yaml'} differs from what was sealed: {', '.join(changed)}"
            found.faults.append(Fault(what, ("config.yaml",)))

    missing = gaps(tars | sides, found.shards)
    if missing and not promise.outputs:
        names = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in missing)
        found.faults.append(Fault(f"{folder} is not finished: shards {names} are not made yet"))
    present = sorted(k for k in tars | sides if k < found.shards)
    every = range(found.shards) if promise.outputs else present
    sizes = folder.sizes([tar_name(k) for k in every])
    for k, size in zip(every, sizes, strict=True):
        side = facts.get(k)
        faults = list(shard_faults(folder, k, size, k in sides, side, promise, full, advance))
        found.sound += not any(fault.aside != (manifest.NAME,) for fault in faults)
        found.faults += faults
    found.faults += strangers(folder, top, found.shards, tars, sides)
    if found.sealed and README not in top:
        what = f"{folder / README} is missing: load_dataset may read {manifest.NAME} as the pairs"
        found.faults.append(Fault(what))
    if not found.faults and not found.sealed:
        what = f"{folder} is not sealed: every shard is made, but {manifest.NAME} is not written"
        found.faults.append(Fault(what))
    left = [name for name in top if ".tmp." in name or BAD in name]
    left += [f"{META}/{n}" for n in hidden if ".tmp." in n or BAD in n or n.endswith(".lease")]
    found.remarks += [f"left over, never read: {folder / name}" for name in left]
    return found


def gaps(present: set[int], number: int) -> list[tuple[int, int]]:
    """Return the runs (first, last) of numbers from 0 to number - 1 that are not present."""
    marks = [-1, *sorted(k for k in present if k < number), number]
    return [(a + 1, b - 1) for a, b in pairwise(marks) if b - a > 1]


def read_manifest(folder: Store, found: Findings, pairs_here: bool) -> Promise:
    """Read the manifest; add a fault if it is damaged."""
    name = str(folder / manifest.NAME)
    try:
        sealed = manifest.read(folder, "DIR")
        facts, outputs = sealed["facts"], sealed["outputs"]
        if "layout" not in facts and not pairs_here:
            raise UserError(
                f"{folder} holds the result of {sealed['stage']}; expected that of generate_pairs"
            )
        layout = read_layout(facts["layout"])
        number, count = facts["shards"], facts["count"]
        classes, fingerprint = facts["classes"], facts["fingerprint"]
        parts = (sealed["config"], sealed["inputs"], facts["round"])
        prints = [manifest.pair_fingerprint(*parts, n) for n in range(1, manifest.PAIR_FORMAT + 1)]
    except (manifest.Damaged, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError) and not isinstance(error, manifest.Damaged):
            raise
        found.faults.append(Fault(f"{name} is damaged: {error!r}", (manifest.NAME,)))
        return Promise()
    wrong = []
    if type(number) is not int or number < 1 or number != len(outputs):
        wrong.append(f"shards={number!r}, but it lists {len(outputs)} tars")
    elif outputs.keys() != {tar_name(k) for k in range(number)}:
        wrong.append(f"its tars are not {tar_name(0)} to {tar_name(number - 1)}")
    elif count != number * layout.shard_size:
        wrong.append(f"count={count!r}, expected {number * layout.shard_size}")
    if fingerprint not in prints:
        wrong.append(f"fingerprint={fingerprint!r} is not that of its config, inputs and round")
    if not (classes is None or type(classes) is int) or (classes is None) == layout.labels:
        wrong.append(f"classes={classes!r}, but labels={layout.labels}")
    if not isinstance(times := facts.get("times", []), list) or len(times) != layout.states:
        wrong.append(f"times={times!r}, but states={layout.states}")
    if wrong:
        found.faults.append(Fault(f"{name} is damaged: {'; '.join(wrong)}", (manifest.NAME,)))
        return Promise()
    return Promise(
        config=sealed["config"],
        inputs=sealed["inputs"],
        shards=number,
        layout=layout,
        fingerprint=fingerprint,
        classes=classes,
        outputs=outputs,
    )


def agree(promise: Promise, facts: dict[int, Any]) -> None:
    """Take the fingerprint and layout that no manifest gives from the majority of the sidecars."""
    prints = Counter(side["fingerprint"] for side in facts.values() if is_hash(side["fingerprint"]))
    if promise.fingerprint is None and prints:
        promise.fingerprint = prints.most_common(1)[0][0]
    votes = [
        json.dumps(side.get("layout"))
        for side in facts.values()
        if side["fingerprint"] == promise.fingerprint
    ]
    for text, _ in Counter(votes).most_common() if promise.layout is None else ():
        try:
            promise.layout = read_layout(json.loads(text))
            return
        except TypeError:
            continue


def read_layout(values: Any) -> Layout:
    """Make a Layout from the entries of a manifest or sidecar; raise TypeError if they are not one."""
    try:
        return Layout(**values)
    except UserError as error:
        raise TypeError(str(error)) from None


def is_hash(value: Any) -> bool:
    """Return whether a value is a sha256 in hexadecimal."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def shard_faults(
    folder: Store,
    k: int,
    size: int | None,
    has_side: bool,
    side: Any,
    promise: Promise,
    full: bool,
    advance: Advance,
) -> Iterator[Fault]:
    """Yield the faults of shard k.

    Args:
        folder: of the set.
        k: number of the shard.
        size: of its tar in bytes, None if there is no tar.
        has_side: whether there is a sidecar file.
        side: the content of the sidecar, None if it is missing or damaged.
        promise: what the manifest says.
        full: whether to read and hash the values.
        advance: called with the number of bytes that were read.
    """
    tar, hidden = tar_name(k), sidecar_name(k)
    path, layout = folder / tar, promise.layout
    if side is None:
        yield Fault(f"{path}: its sidecar {hidden} is {'damaged' if has_side else 'missing'}")
        return
    both = (hidden,) if size is None else (tar, hidden)
    if side["fingerprint"] != promise.fingerprint or layout is None:
        prints = f"fingerprint {side['fingerprint']!r}, expected {promise.fingerprint}"
        yield Fault(f"{path} was made with another config or teacher ({prints})", both)
        return
    if size is None:
        yield Fault(f"{path} is missing")
        return
    if size != side["bytes"]:
        yield Fault(f"{path} has {size} bytes, its sidecar says {side['bytes']!r}")
        return
    # generate_pairs would regard the shard as done from here on.
    expected = {"layout": layout.entries(), "shard": k}
    expected |= {"count": layout.shard_size, "bytes": layout.tar_bytes}
    wrong = [name for name, value in expected.items() if side.get(name) != value]
    if wrong or not is_hash(side["sha256"]):
        entries = ", ".join(f"{name}={side.get(name)!r}" for name in wrong or ["sha256"])
        yield Fault(f"{path}: its sidecar {hidden} has {entries}: not a shard of this set", both)
        return
    what, digest = "", None
    if full or not storage.is_url(folder):
        with folder.opened(tar) as file:
            what, digest = read_tar(file, k, layout, promise.classes, full, advance)
    sealed = promise.outputs.get(tar, side["sha256"])
    if what:
        yield Fault(f"{path} is damaged: {what}", both)
    elif digest is None and side["sha256"] != sealed:
        yield Fault(f"{path}: its sidecar and {manifest.NAME} have different sha256", both)
    elif digest is not None and digest == side["sha256"] != sealed:
        name = folder / manifest.NAME
        what = f"{name} has another sha256 for {tar} than the tar and its sidecar"
        yield Fault(what, (manifest.NAME,))
    elif digest is not None and digest != side["sha256"]:
        what = f"{path} is damaged: its bytes are not those that were committed (sha256 differs)"
        yield Fault(what, both)


def strangers(
    folder: Store, top: list[str], number: int, tars: set[int], sides: set[int]
) -> Iterator[Fault]:
    """Yield a fault for each tar and sidecar that does not belong to the set."""
    known = {tar_name(k) for k in tars | sides}
    for k in sorted(k for k in tars | sides if k >= number):
        aside = ([tar_name(k)] if k in tars else []) + ([sidecar_name(k)] if k in sides else [])
        what = f"{folder / aside[0]} is beyond the {number} shards of the set"
        yield Fault(f"{what}; use shards={k + 1} or more to keep it", tuple(aside))
    for name in top:
        if name.endswith(".tar") and name not in known:
            yield Fault(f"{folder / name} is not a shard, but stock readers read it", (name,))
