"""The pair store on disk: shards of (x0, x1[, states][, label][, prompt]) in plain tars, and commits.

Shard k is `pairs-%06d.tar`: an uncompressed USTAR archive of blocks of pairs with one .npy member for
each array, named SHARD-INDEX.x0.npy, .x1.npy[, .xt.npy][, .y.npy][, .i.npy], where INDEX is the number
of the block's first pair in its shard. If there are prompts, .prompt.json is the last member: a JSON
list, padded with spaces to a fixed size. All offsets are computed (`Layout.offsets`), so no index is
stored; stock `webdataset` and `datasets` read the same files. The sidecar `.meta/pairs-%06d.json`,
written last, is the commit.

Shard k is a pure function of its fingerprint and k: two workers that make it write the same bytes.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flowmatch.config import UserError
from flowmatch.pairs.layout import PROMPT, STATES, Layout, shape_of, write_prompts
from flowmatch.runs import manifest, storage
from flowmatch.runs.files import create, worker
from flowmatch.runs.storage import Place, Store

META = ".meta"  # hidden: load_dataset would read a visible .json beside the tars instead of them
CHUNK = 2**22  # bytes that are written at once
README = "README.md"

Block = tuple[np.ndarray | None, np.ndarray, np.ndarray | None]
Prompted = tuple[Any, ...]  # a Block with its states, its prompts, or both behind it


class Vanished(Exception):
    """Another worker took a half tar for that of a dead one and removed it: make the shard again."""


def tar_name(k: int) -> str:
    """Return the name of shard k's tar."""
    return f"pairs-{k:06d}.tar"


def _pieces(
    k: int, layout: Layout, blocks: Iterable[Block | Prompted]
) -> Iterator[bytes | memoryview]:
    written = number = 0
    for number, (x0, x1, y, *rest) in enumerate(blocks, 1):
        if number > layout.blocks:
            raise ValueError(f"shard {k}: more than the {layout.blocks} blocks of its layout")
        pairs = int(layout.pairs(number - 1))
        number_of = layout.numbers(k, number - 1) if layout.index else None
        states = rest.pop(0) if layout.states else None
        arrays = {"x0": x0, "x1": x1, STATES: states, "y": y, "i": number_of}
        for name, array in arrays.items():
            if name not in layout.members and array is None:
                continue
            dtype = layout.members[name][0] if name in layout.members else None
            shape = shape_of(layout, name, pairs)
            if array is None or array.dtype != dtype or array.shape != shape:
                actual = "nothing" if array is None else f"{array.dtype} {array.shape}"
                expected = (
                    f"{dtype} {shape}" if dtype else f"nothing: the layout has none of {name}"
                )
                raise ValueError(
                    f"shard {k} block {number - 1} {name}: {actual}; expected {expected}"
                )
            if not np.isfinite(array).all():
                raise UserError(
                    f"shard {k} block {number - 1}: {name} holds values that are not finite in "
                    f"{layout.dtype}; use dtype=float32, or check the teacher's samples"
                )
            values = np.ascontiguousarray(array, dtype)
            yield layout.head(k, number - 1, name)
            yield values.data
            yield bytes(-(128 + values.nbytes) % 512)
            written += int(layout.member_bytes(name, pairs))
        texts = rest[0] if rest else []
        if [type(text) for text in texts] != [str] * (pairs if layout.prompt_bytes else 0):
            expected = (
                f"{pairs} strings" if layout.prompt_bytes else "none: the layout has no prompts"
            )
            raise ValueError(
                f"shard {k} block {number - 1}: {len(texts)} prompts; expected {expected}"
            )
        if layout.prompt_bytes:
            room = pairs * layout.prompt_bytes
            yield layout.head(k, number - 1, PROMPT)
            yield write_prompts(texts, room, f"shard {k} block {number - 1}")
            yield bytes(-room % 512)
            written += int(layout.member_bytes(PROMPT, pairs))
    if number < layout.blocks:
        raise ValueError(f"shard {k}: {number} blocks; expected the {layout.blocks} of its layout")
    yield bytes(layout.tar_bytes - written)


def _chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytearray]:
    """Join pieces into chunks of CHUNK bytes.

    The kernel keeps large aligned writes in large pages; reading such a file through a fresh memory
    map is 1.3x as fast.
    """
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= CHUNK:
            yield held[:CHUNK]
            del held[:CHUNK]
    yield held


def write_shard(
    folder: Place,
    k: int,
    layout: Layout,
    blocks: Iterable[Block | Prompted],
    fingerprint: str,
    environment: Mapping[str, Any],
    card: str,
) -> dict[str, Any]:
    """Write shard k as its blocks arrive, and commit it.

    If another worker has committed the shard in the meantime, its shard is kept: committed files
    never change. After an exception no file of the shard is left.

    Args:
        folder: path or URL. For a URL the tar is built in local scratch and uploaded whole.
        k: the number of the shard.
        layout: of the set.
        blocks: (x0 or None, x1, y or None[, states][, prompts]) for each block in order, with n =
            layout.pairs(block): x0 and x1 [n, *shape] and states [n, K, *shape] of the stored dtype,
            y int64 [n], prompts a list of n strings. Of the first three, what the layout does not
            store is None; the other two are there where the layout stores them.
        fingerprint: hash of all that the bytes come from, see `manifest.pair_fingerprint`.
        environment: versions, device and settings on which bitwise equality of x1 also depends; not
            part of the fingerprint.
        card: Markdown body of the folder's README.md.

    Returns:
        The content of the shard's sidecar.

    Raises:
        Vanished: another worker has removed the half tar.
        UserError: for values that are not finite, and prompts that do not fit.
        ValueError: for blocks that do not fit the layout.
    """
    started, store = time.perf_counter(), storage.at(folder)
    store.make(META)
    temporary = store.scratch / f"{tar_name(k)}.tmp.{worker()}"
    hashed = hashlib.sha256()
    try:
        with create(temporary) as file:
            for chunk in _chunks(_pieces(k, layout, blocks)):
                hashed.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        write_card(store, card)
        if done(store, k, fingerprint):
            committed = sidecar(store, k)
            assert committed is not None
            return committed
        try:
            store.put(temporary, tar_name(k))
        except (FileNotFoundError, UserError):
            if temporary.exists():
                raise
            raise Vanished(k) from None
    finally:
        temporary.unlink(missing_ok=True)
    facts = {
        "shard": k,
        "count": layout.shard_size,
        "bytes": layout.tar_bytes,
        "sha256": hashed.hexdigest(),
        "fingerprint": fingerprint,
        "layout": layout.entries(),
        "environment": dict(environment),
        "seconds": time.perf_counter() - started,
    }
    store.write(sidecar_name(k), json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return facts


def write_card(store: Store, body: str) -> None:
    """Write the folder's README.md if it is missing or differs.

    Its header makes load_dataset(folder) read the tars; without it, load_dataset reads manifest.json
    where there is only one tar.
    """
    text = '---\nconfigs:\n- config_name: default\n  data_files: "*.tar"\n---\n\n' + body
    if store.read_all([README]) != [text.encode()]:
        store.write(README, text)


def sidecar_name(k: int) -> str:
    """Return the name of shard k's sidecar."""
    return f"{META}/pairs-{k:06d}.json"


def committed(folder: Place) -> set[int]:
    """Return the numbers of the shards that have a sidecar; needs one listing of the folder."""
    return numbers(storage.at(folder).names(META), "json")


def numbers(names: Iterable[str], ending: str) -> set[int]:
    """Return the numbers of the shards whose tars ("tar") or sidecars ("json") are among the names."""
    matches = (re.fullmatch(rf"pairs-(\d{{6,}})\.{ending}", name) for name in names)
    digits = (match[1] for match in matches if match)
    return {int(text) for text in digits if text == f"{int(text):06d}"}  # not 0000001, a second 1


def sidecars(folder: Place, shards: Iterable[int]) -> list[dict[str, Any] | None]:
    """Read the sidecars of some shards; None for one that is missing or damaged."""
    contents = storage.at(folder).read_all([sidecar_name(k) for k in shards])
    return [None if content is None else _facts(content) for content in contents]


def sidecar(folder: Place, k: int) -> dict[str, Any] | None:
    """Read the sidecar of shard k; None if it is missing or damaged."""
    return sidecars(folder, [k])[0]


def _facts(data: bytes) -> dict[str, Any] | None:
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return None
    needed = {"fingerprint", "bytes", "sha256", "count"}
    return facts if isinstance(facts, dict) and needed <= facts.keys() else None


def done(folder: Place, k: int, fingerprint: str) -> bool:
    """Return whether shard k is committed and its tar has the committed size.

    Raises:
        UserError: if its sidecar has another fingerprint.
    """
    return not missing(folder, [k], fingerprint)


def missing(folder: Place, shards: Iterable[int], fingerprint: str) -> list[int]:
    """Return the shards that are not done, in their order; raise UserError like `done`."""
    store, numbers = storage.at(folder), list(shards)
    every = dict(zip(numbers, sidecars(store, numbers), strict=True))
    committed = {k: facts for k, facts in every.items() if facts is not None}
    for k, facts in committed.items():
        if facts["fingerprint"] != fingerprint:
            raise UserError(
                f"{store / tar_name(k)} was made with another config or teacher (fingerprint "
                f"{facts['fingerprint']}, expected {fingerprint}); use another run_dir, or delete the "
                "folder"
            )
    sizes = store.sizes([tar_name(k) for k in committed])
    for k, size in zip(list(committed), sizes, strict=True):
        if size != committed[k]["bytes"] or committed[k].get("shard") != k:  # of another shard
            del committed[k]
    return [k for k in numbers if k not in committed]


def refuse_fewer(store: storage.Store, number: int) -> None:
    """Raise UserError where a set has more shards than are asked for: stock readers take every tar."""
    there = max(committed(store), default=-1) + 1
    if (sealed := manifest.find(store, "run_dir")) is not None:
        sealed_number = sealed["facts"].get("shards")  # None where it is damaged
        there = max(there, sealed_number if isinstance(sealed_number, int) else 0)
    if there > number:
        raise UserError(
            f"shards={number}: run_dir={store} has {there} already, and a set never shrinks; set "
            f"shards={there} or more, or use another run_dir"
        )
