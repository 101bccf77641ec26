"""What is wrong with a set of pairs: what is there, held against its sidecars and its manifest.

A tar that is damaged goes unnoticed by stock readers: a bad header is the end of the archive to them.
Nothing is changed here; `pipelines.verify_pairs` reports, and sets aside what is bad.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO

from flowmatch.config import UserError, differences, restrict
from flowmatch.pairs.layout import Layout, flaw
from flowmatch.pairs.shards import META, README, numbers, sidecar_name, sidecars, tar_name
from flowmatch.runs import manifest, storage
from flowmatch.runs.storage import Place, Store

BAD = ".bad"  # what is set aside ends in it: no reader takes it for a shard
SHA256 = re.compile(r"[0-9a-f]{64}")
Advance = Callable[[int], Any]  # told of every few bytes that were read


@dataclass(frozen=True)
class Fault:
    """What is wrong, and what has to be out of the way before generate_pairs makes it anew.

    aside: paths in the folder; empty where generate_pairs sees by itself that a shard is not done.
    """

    what: str
    aside: tuple[str, ...] = ()


@dataclass
class Findings:
    """What a look at a folder found. shards: how many belong to the set; sound: how many are."""

    shards: int = 0
    sound: int = 0
    layout: Layout | None = None
    sealed: bool = False
    faults: list[Fault] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_yaml(folder: Store) -> dict[str, Any] | None:
    """Read config.yaml as plain data; None where it is no mapping."""
    import yaml

    try:
        values = yaml.safe_load(folder.read("config.yaml"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, UserError):
            raise
        return None
    return values if isinstance(values, dict) else None


def read_config(folder: Store) -> dict[str, Any] | None:
    """Read config.yaml; None where it is not there or not a stage's."""
    values = read_yaml(folder)
    wanted = {"run_dir", "teacher", "shards", "inputs"}
    if values is None or not wanted <= values.keys():
        return None
    whole = type(values["shards"]) is int and values["shards"] > 0
    return values if whole and isinstance(values["inputs"], dict) else None


@dataclass
class Promise:
    """What the seal says of the set. outputs: tar -> sha256, empty where there is no sound seal."""

    config: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    shards: int | None = None
    layout: Layout | None = None
    fingerprint: str | None = None
    classes: int | None = None
    outputs: dict[str, str] = field(default_factory=dict)


def examine(place: Place, full: bool, advance: Advance = lambda _: None) -> Findings:
    """Look at a folder of pairs: names, sizes, counts, sidecars, fingerprints, headers of members.

    place: path or URL; the headers of a URL's tars are looked at with `full` alone, which fetches them.
    full: also the sha256 of every tar, that every value is finite, that labels are classes. advance: is
    told of the bytes that were read. Raises UserError where the folder holds no pairs.
    """
    folder = storage.at(place)
    if not folder.exists():
        raise UserError(f"{folder} is not there, or is no folder; expected a folder of pairs")
    top, hidden = folder.names(), folder.names(META)
    tars, sides = numbers(top, "tar"), numbers(hidden, "json")
    config, found = read_config(folder), Findings(sealed=manifest.sealed(folder))
    if not (tars or sides or config or found.sealed):
        raise UserError(f"{folder} is not a folder of pairs: it holds no tar, sidecar or config")
    promise = read_manifest(folder, found, bool(tars or sides)) if found.sealed else Promise()
    if config is None and "config.yaml" in top:
        what = f"{folder / 'config.yaml'} is damaged: generate_pairs would not read it"
        found.faults.append(Fault(what, ("config.yaml",)))
    facts = {k: side for k, side in zip(sides, sidecars(folder, sides), strict=True) if side}
    agree(promise, facts)
    planned = config["shards"] if config else max([-1, *tars, *sides]) + 1
    found.shards, found.layout = promise.shards or planned, promise.layout
    if config and promise.config:
        said = restrict(config, promise.config)
        pairs = zip((promise.config, promise.inputs), (said, config["inputs"]), strict=True)
        changed = [line for was, now in pairs for line in differences(was, now)]
        if changed:
            what = f"{folder / 'config.yaml'} is not what was sealed: {', '.join(changed)}"
            found.faults.append(Fault(what, ("config.yaml",)))

    missing = gaps(tars | sides, found.shards)
    if missing and not promise.outputs:
        names = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in missing)
        found.faults.append(Fault(f"{folder} is not finished: shards {names} are not made yet"))
    here = sorted(k for k in tars | sides if k < found.shards)
    every = range(found.shards) if promise.outputs else here
    sizes = folder.sizes([tar_name(k) for k in every])
    for k, size in zip(every, sizes, strict=True):
        beside = (k in sides, facts.get(k))
        faults = list(shard_faults(folder, k, size, *beside, promise, full, advance))
        found.sound += not any(fault.aside != (manifest.NAME,) for fault in faults)
        found.faults += faults
    found.faults += strangers(folder, top, found.shards, tars, sides)
    if found.sealed and README not in top:
        what = f"{folder / README} is missing: load_dataset may read {manifest.NAME} for pairs"
        found.faults.append(Fault(what))
    if not found.faults and not found.sealed:
        what = f"{folder} is not sealed: every shard is made, {manifest.NAME} is not written"
        found.faults.append(Fault(what))
    left = [name for name in top if ".tmp." in name or BAD in name]
    left += [f"{META}/{n}" for n in hidden if ".tmp." in n or BAD in n or n.endswith(".lease")]
    found.remarks += [f"left over, and read by nobody: {folder / name}" for name in left]
    return found


def gaps(present: set[int], number: int) -> list[tuple[int, int]]:
    """List the runs (first, last) of 0 to number - 1 that are not present."""
    marks = [-1, *sorted(k for k in present if k < number), number]
    return [(a + 1, b - 1) for a, b in pairwise(marks) if b - a > 1]


def read_manifest(folder: Store, found: Findings, pairs_here: bool) -> Promise:
    """Read what the seal promises; a damaged one is a fault."""
    name = str(folder / manifest.NAME)
    try:
        sealed = manifest.read(folder, "DIR")
        facts, outputs = sealed["facts"], sealed["outputs"]
        if "layout" not in facts and not pairs_here:
            raise UserError(f"{folder} holds the result of {sealed['stage']}, not pairs")
        layout = read_layout(facts["layout"])
        number, count = facts["shards"], facts["count"]
        classes, fingerprint = facts["classes"], facts["fingerprint"]
        given = (sealed["config"], sealed["inputs"], facts["round"])
        prints = [manifest.pair_fingerprint(*given, n) for n in range(1, manifest.PAIR_FORMAT + 1)]
    except (manifest.Damaged, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError) and not isinstance(error, manifest.Damaged):
            raise
        found.faults.append(Fault(f"{name} is damaged: {error!r}", (manifest.NAME,)))
        return Promise()
    wrong = []
    if type(number) is not int or number < 1 or number != len(outputs):
        wrong.append(f"shards={number!r}, and {len(outputs)} tars")
    elif outputs.keys() != {tar_name(k) for k in range(number)}:
        wrong.append(f"its tars are not {tar_name(0)} to {tar_name(number - 1)}")
    elif count != number * layout.shard_size:
        wrong.append(f"count={count!r}, expected {number * layout.shard_size}")
    if fingerprint not in prints:
        wrong.append(f"fingerprint={fingerprint!r} is not that of its config, inputs and round")
    if not (classes is None or type(classes) is int) or (classes is None) == layout.labels:
        wrong.append(f"classes={classes!r}, and labels={layout.labels}")
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
    """Fill in fingerprint and layout, where no manifest gives them, from most of the sidecars."""
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
    """Build the layout that a manifest or sidecar tells of; raise TypeError where it is none."""
    try:
        return Layout(**values)
    except UserError as error:
        raise TypeError(str(error)) from None


def is_hash(value: Any) -> bool:
    """Tell whether a value is a sha256 in hexadecimal."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def shard_faults(
    folder: Store,
    k: int,
    size: int | None,
    beside: bool,
    side: Any,
    promise: Promise,
    full: bool,
    advance: Advance,
) -> Iterator[Fault]:
    """Say what is wrong with shard k. size: of its tar; side: its sidecar; beside: is there a file."""
    tar, hidden = tar_name(k), sidecar_name(k)
    path, layout = folder / tar, promise.layout
    if side is None:
        yield Fault(f"{path}: its sidecar {hidden} is {'damaged' if beside else 'missing'}")
        return
    both = (tar,) * (size is not None) + (hidden,)
    if side["fingerprint"] != promise.fingerprint or layout is None:
        given = f"fingerprint {side['fingerprint']!r}, expected {promise.fingerprint}"
        yield Fault(f"{path} was made by another config or teacher ({given})", both)
        return
    if size is None:
        yield Fault(f"{path} is missing")
        return
    if size != side["bytes"]:
        yield Fault(f"{path} has {size} bytes, its sidecar says {side['bytes']!r}")
        return
    # From here on generate_pairs would take the shard for done.
    meant = {"layout": layout.entries(), "shard": k}
    meant |= {"count": layout.shard_size, "bytes": layout.tar_bytes}
    wrong = [name for name, value in meant.items() if side.get(name) != value]
    if wrong or not is_hash(side["sha256"]):
        said = ", ".join(f"{name}={side.get(name)!r}" for name in wrong or ["sha256"])
        yield Fault(f"{path}: its sidecar {hidden} says {said}; that is no shard of this set", both)
        return
    what, digest = "", None
    if full or not storage.is_url(folder):
        with folder.opened(tar) as file:
            what, digest = read_tar(file, k, layout, promise.classes, full, advance)
    sealed = promise.outputs.get(tar, side["sha256"])
    if what:
        yield Fault(f"{path} is damaged: {what}", both)
    elif digest is None and side["sha256"] != sealed:
        yield Fault(f"{path}: its sidecar and {manifest.NAME} name different sha256", both)
    elif digest is not None and digest == side["sha256"] != sealed:
        name = folder / manifest.NAME
        yield Fault(f"{name} names another sha256 for {tar} than tar and sidecar", (manifest.NAME,))
    elif digest is not None and digest != side["sha256"]:
        yield Fault(
            f"{path} is damaged: its bytes are not those that were committed (sha256)", both
        )


def read_tar(
    file: BinaryIO, k: int, layout: Layout, classes: int | None, full: bool, advance: Advance
) -> tuple[str, str | None]:
    """Hold a tar of the right size against its layout: (what is wrong or "", sha256 if full).

    Stock readers take a bad header for the end of the tar, and say nothing.
    """
    hashed = hashlib.sha256()
    for block in range(layout.blocks):
        pairs = int(layout.pairs(block))
        for name in layout.members:
            member, start = layout.member(k, block, name), file.tell()
            head = layout.head(k, block, name)
            rest = int(layout.member_bytes(name, pairs)) - len(head)
            if file.read(len(head)) != head:
                return f"at byte {start} expected the header of {member}", None
            if not full:
                file.seek(rest, os.SEEK_CUR)
                continue
            content = file.read(rest)
            hashed.update(head)
            hashed.update(content)
            advance(len(head) + rest)
            if what := flaw(layout, k, block, name, content, classes):
                return f"{member} {what}", None
    end = file.read()
    if end.strip(b"\0"):
        return "the end of the archive is not zeros", None
    hashed.update(end)
    return "", hashed.hexdigest() if full else None


def strangers(
    folder: Store, top: list[str], number: int, tars: set[int], sides: set[int]
) -> Iterator[Fault]:
    """Name the tars and sidecars that do not belong to the set."""
    known = {tar_name(k) for k in tars | sides}
    for k in sorted(k for k in tars | sides if k >= number):
        aside = (tar_name(k),) * (k in tars) + (sidecar_name(k),) * (k in sides)
        grow = f"give shards={k + 1} or more to keep it"
        yield Fault(f"{folder / aside[0]} is beyond the {number} shards of the set; {grow}", aside)
    for name in top:
        if name.endswith(".tar") and name not in known:
            yield Fault(f"{folder / name} is no shard, and stock readers would read it", (name,))
