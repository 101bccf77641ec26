"""The parts of a conversion: files that a worker builds aside, brings to their names, and commits.

Part k is made of shard k of a set. Its sidecar `.meta/part-%06d.json`, written last, is the commit: it
has the names and sizes of the part's files. The part after the last one joins them; files of parts whose
names begin with a dot are needed until then.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowmatch.config import UserError
from flowmatch.pairs import leases
from flowmatch.pairs.shards import META
from flowmatch.runs.files import sync, worker
from flowmatch.runs.storage import Store

BUILT = "build-"


def sidecar_name(k: int) -> str:
    """Return the name of part k's sidecar."""
    return f"{META}/part-{k:06d}.json"


def facts_of(content: bytes) -> dict[str, Any] | None:
    """Parse a sidecar; None for one that is damaged."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(facts, dict) and isinstance(facts.get("files"), dict)
    return facts if sound and isinstance(facts.get("fingerprint"), str) else None


def missing(
    store: Store, parts: Sequence[int], fingerprint: str, joined: bool = False
) -> list[int]:
    """Return the parts that are not committed, or whose files have other sizes by now.

    Args:
        store: of the conversion.
        parts: their numbers.
        fingerprint: of the conversion.
        joined: whether the parts are joined, so that files with a dot are needed no longer.

    Raises:
        UserError: A part is of another conversion.
    """
    found = []
    contents = store.read_all([sidecar_name(k) for k in parts])
    for k, content in zip(parts, contents, strict=True):
        facts = None if content is None else facts_of(content)
        if facts is None:
            found.append(k)
            continue
        if facts["fingerprint"] != fingerprint:
            raise UserError(
                f"{store} holds part {k} of another set, or with other options; use another folder"
            )
        files = facts["files"].items()
        kept = {name: size for name, size in files if not (joined and name.startswith("."))}
        if store.sizes(list(kept)) != list(kept.values()):
            found.append(k)
    return found


def make(store: Store, k: int, fingerprint: str, build: Callable[[Path], None]) -> None:
    """Build part k below an empty folder, rename its files to their names, and commit them."""
    root = Path(str(store))
    built = root / META / f"{BUILT}{k:06d}.{worker()}"
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    files: dict[str, int] = {}
    folders = {root}
    try:
        build(built)
        for path in sorted(path for path in built.rglob("*") if path.is_file()):
            sync(path)
            files[str(path.relative_to(built))] = path.stat().st_size
        for name in files:
            target = root / name
            if target.parent not in folders:
                target.parent.mkdir(parents=True, exist_ok=True)
                folders.add(target.parent)
            os.replace(built / name, target)
        for place in folders:
            sync(place)
        facts = {"fingerprint": fingerprint, "part": k, "files": files}
        store.write(sidecar_name(k), json.dumps(facts, indent=1, sort_keys=True) + "\n")
    except BaseException:
        shutil.rmtree(built, ignore_errors=True)
        if any((root / name).exists() for name in files):
            with contextlib.suppress(OSError):
                built.mkdir()  # so that `begun` knows the folder, and the next worker takes it up
        raise
    shutil.rmtree(built, ignore_errors=True)  # not before the sidecar: see `begun`


def tidy(store: Store, parts: Sequence[int]) -> None:
    """Remove the files of parts that are joined."""
    contents = store.read_all([sidecar_name(k) for k in parts])
    for facts in (facts_of(content) for content in contents if content is not None):
        for name in (facts or {"files": {}})["files"]:
            if name.startswith("."):
                store.remove(name)


def begun(store: Store) -> bool:
    """Return whether a folder holds a part, or one that is being built."""
    return any(name.startswith(("part-", BUILT)) for name in store.names(META))


def sweep(store: Store) -> None:
    """Remove what dead workers of this host were building."""
    for path in (Path(str(store)) / META).glob(f"{BUILT}*"):
        if leases.is_dead(path.name.partition(".")[2]):
            shutil.rmtree(path, ignore_errors=True)
