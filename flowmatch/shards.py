"""The pair store on disk: shards of (x0, x1[, label]) in plain tar files, and their commits.

Shard k is `pairs-%06d.tar`: an uncompressed USTAR archive of blocks of pairs, one .npy member an
array, named SHARD-INDEX.x0.npy, .x1.npy[, .y.npy][, .i.npy], where INDEX is the place of the block's
first pair in its shard. Every place is arithmetic (`Layout.offsets`), so no index is stored; stock
`webdataset` and `datasets` read the same files. The sidecar `.meta/pairs-%06d.json`, written last,
is the commit.

Shard k is a pure function of its fingerprint and k: two workers that make it make the same bytes.
"""

import hashlib
import json
import math
import os
import re
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowmatch import stores
from flowmatch.config import UserError
from flowmatch.folders import worker
from flowmatch.stores import Place, Store

META = ".meta"  # hidden: a visible .json beside the tars would make load_dataset read that instead
HEAD = 512 + 128  # bytes before a member's values: tar header, .npy header
CHUNK = 2**22  # bytes of one write
RECORD = tarfile.RECORDSIZE  # a tar's size is a multiple of it
SIDECAR = re.compile(r"pairs-\d{6,}\.json")
LARGEST_MEMBER = 8 * 1024**3  # USTAR writes sizes in 11 octal digits

Block = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Layout:
    """Say where every pair of a shard lies; the same for all shards of a set.

    shape: one x0 or x1, without batch. dtype: "float16" or "float32", as stored. labels: an int64
    label with each pair. shard_size: pairs in a shard. block: pairs in a tar member; the last block
    of a shard may be shorter. index: the number of each pair in the set, int64, with it: that of the
    data item it was made from. Raises UserError for what cannot be stored.
    """

    shape: tuple[int, ...]
    dtype: str
    labels: bool
    shard_size: int
    block: int
    index: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON knows lists only
        faults = []
        sizes = (*self.shape, self.shard_size, self.block)
        if not all(type(size) is int for size in sizes) or not {
            type(self.labels),
            type(self.index),
        } == {bool}:
            raise UserError(f"{self}: expected whole numbers; labels, index true or false")
        if not self.shape or min(self.shape) < 1:
            faults.append(f"shape={self.shape}: expected one or more positive sizes")
        if self.dtype not in ("float16", "float32"):
            faults.append(f"dtype={self.dtype!r}: expected float16 or float32")
        if not 1 <= self.shard_size <= 10**6:
            faults.append(f"shard_size={self.shard_size}: expected 1 to 1000000 pairs")
        if not 1 <= self.block <= self.shard_size:
            faults.append(f"block={self.block}: expected 1 to shard_size={self.shard_size} pairs")
        if not faults and self.block * self.members["x0"][1] + 128 >= LARGEST_MEMBER:
            faults.append(
                f"block={self.block}: a tar member must stay under 8 GiB; use fewer pairs"
            )
        if faults:
            raise UserError(faults)
        npy_header(self, "x0", self.block)

    @cached_property
    def members(self) -> dict[str, tuple[np.dtype, int]]:
        """Give each array of a block in its order: name -> (dtype, bytes of one pair)."""
        value = np.dtype(self.dtype).newbyteorder("<")
        arrays = {"x0": (value, value.itemsize * math.prod(self.shape))}
        arrays["x1"] = arrays["x0"]
        for name, there in (("y", self.labels), ("i", self.index)):
            arrays |= {name: (np.dtype("<i8"), 8)} if there else {}
        return arrays

    @cached_property
    def blocks(self) -> int:
        """Count the blocks of a shard."""
        return -(-self.shard_size // self.block)

    @cached_property
    def block_bytes(self) -> int:
        """Give the bytes of a full block, headers and padding included."""
        return sum(self.member_bytes(name, self.block) for name in self.members)

    @cached_property
    def tar_bytes(self) -> int:
        """Give the bytes of a whole tar."""
        last = sum(self.member_bytes(name, self.pairs(self.blocks - 1)) for name in self.members)
        content = (self.blocks - 1) * self.block_bytes + int(last)
        return -(-(content + 1024) // RECORD) * RECORD  # two zero blocks end a tar

    def pairs(self, block: Any) -> Any:
        """Count the pairs in block number `block` (int or array)."""
        return np.minimum(self.block, self.shard_size - block * self.block)

    def member_bytes(self, name: str, pairs: Any) -> Any:
        """Give the bytes of a member that holds `pairs` pairs (int or array)."""
        return 512 + -(-(128 + pairs * self.members[name][1]) // 512) * 512

    def offsets(self, index: Any) -> dict[str, Any]:
        """Find pair number `index` (int or array) of a shard: name -> offset of its first byte."""
        block, row = np.divmod(index, self.block)
        pairs, start, places = self.pairs(block), block * self.block_bytes, {}
        for name, (_, size) in self.members.items():
            places[name] = start + HEAD + row * size
            start = start + self.member_bytes(name, pairs)
        return places

    def numbers(self, shard: int, block: int) -> np.ndarray:
        """Number the pairs of a block within the set; int64."""
        begin = shard * self.shard_size + block * self.block
        return begin + np.arange(self.pairs(block), dtype=np.int64)

    def member(self, shard: int, block: int, name: str) -> str:
        """Name the member of one block's array."""
        return f"{shard:06d}-{block * self.block:06d}.{name}.npy"


def npy_header(layout: Layout, name: str, pairs: int) -> bytes:
    """Write the .npy header (version 1.0) of a block's array: always 128 bytes."""
    shape = (int(pairs), *(layout.shape if name in ("x0", "x1") else ()))
    entries = {"descr": layout.members[name][0].str, "fortran_order": False, "shape": shape}
    fields = "".join(f"'{key}': {value!r}, " for key, value in entries.items())
    text = f"{{{fields}}}".encode()
    if len(text) > 117:
        raise UserError(f"shape={layout.shape}: too many dimensions for a .npy header of 128 bytes")
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117) + b"\n"


def tar_header(name: str, size: int) -> bytes:
    """Write a member's USTAR header: no time, owner or umask gets into the bytes."""
    info = tarfile.TarInfo(name)  # mtime, uid, gid 0, mode 0644
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def tar_name(k: int) -> str:
    """Name the tar of shard k."""
    return f"pairs-{k:06d}.tar"


def _pieces(k: int, layout: Layout, blocks: Iterable[Block]) -> Iterator[bytes | memoryview]:
    written = number = 0
    for number, arrays in enumerate(blocks, 1):
        if number > layout.blocks:
            raise ValueError(f"shard {k}: more than the {layout.blocks} blocks of its layout")
        pairs = int(layout.pairs(number - 1))
        number_of = layout.numbers(k, number - 1) if layout.index else None
        for name, array in zip(("x0", "x1", "y", "i"), (*arrays, number_of), strict=True):
            if name not in layout.members and array is None:
                continue
            dtype = layout.members[name][0] if name in layout.members else None
            shape = (pairs, *(layout.shape if name in ("x0", "x1") else ()))
            if array is None or array.dtype != dtype or array.shape != shape:
                given = "nothing" if array is None else f"{array.dtype} {array.shape}"
                wanted = f"{dtype} {shape}" if dtype else "nothing: the layout has no labels"
                raise ValueError(f"shard {k} block {number - 1} {name}: {given}; expected {wanted}")
            if not np.isfinite(array).all():
                raise UserError(
                    f"shard {k} block {number - 1}: {name} holds values that are not finite in "
                    f"{layout.dtype}; use dtype=float32, or look at the teacher's samples"
                )
            values = np.ascontiguousarray(array, dtype)
            yield tar_header(layout.member(k, number - 1, name), 128 + values.nbytes)
            yield npy_header(layout, name, pairs)
            yield values.data
            yield bytes(-(128 + values.nbytes) % 512)
            written += int(layout.member_bytes(name, pairs))
    if number < layout.blocks:
        raise ValueError(f"shard {k}: {number} blocks; its layout has {layout.blocks}")
    yield bytes(layout.tar_bytes - written)


def _chunks(pieces: Iterable[bytes | memoryview]) -> Iterator[bytearray]:
    """Join pieces into chunks of CHUNK bytes.

    The kernel keeps aligned writes in large pages: mapped anew, such a file reads 1.3x as fast.
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
    blocks: Iterable[Block],
    fingerprint: str,
    environment: Mapping[str, Any],
    card: str,
) -> dict[str, Any]:
    """Write shard k as its blocks arrive, and commit it; return its sidecar.

    folder: path or URL; what goes into a store is built in local scratch, and put there whole.
    blocks: (x0, x1, y or None) for each block in order: x0, x1 [n, *shape] of the stored dtype, y
    int64 [n], n = layout.pairs(block). environment: what bitwise equality of x1 also hangs on
    (versions, device, settings); not part of the fingerprint. card: Markdown body of the folder's
    README.md.
    A shard that another worker committed meanwhile is kept and its sidecar returned: what is
    committed never changes. On any exception nothing is left. Raises UserError for values that are
    not finite, ValueError for blocks that do not fit the layout.
    """
    started, store = time.perf_counter(), stores.at(folder)
    store.make(META)
    temporary = store.scratch / f"{tar_name(k)}.tmp.{worker()}"
    hashed = hashlib.sha256()
    try:
        with open(temporary, "wb") as file:
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
        store.put(temporary, tar_name(k))
    finally:
        temporary.unlink(missing_ok=True)
    facts = {
        "shard": k,
        "count": layout.shard_size,
        "bytes": layout.tar_bytes,
        "sha256": hashed.hexdigest(),
        "fingerprint": fingerprint,
        "layout": asdict(layout) | {"shape": list(layout.shape)},
        "environment": dict(environment),
        "seconds": time.perf_counter() - started,
    }
    store.write(sidecar_name(k), json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return facts


def write_card(store: Store, body: str) -> None:
    """Write README.md where it is not there or says something else.

    Its head makes load_dataset(folder) read the tars; without it a manifest beside one tar wins.
    """
    text = '---\nconfigs:\n- config_name: default\n  data_files: "*.tar"\n---\n\n' + body
    if store.read_all(["README.md"]) != [text.encode()]:
        store.write("README.md", text)


def sidecar_name(k: int) -> str:
    """Name the sidecar of shard k."""
    return f"{META}/pairs-{k:06d}.json"


def committed(folder: Place) -> set[int]:
    """List the shards that have a sidecar, by one listing of the folder."""
    names = stores.at(folder).names(META)
    return {int(name[6:-5]) for name in names if SIDECAR.fullmatch(name)}


def sidecars(folder: Place, shards: Iterable[int]) -> list[dict[str, Any] | None]:
    """Read the sidecars of some shards; None for one that is missing or damaged."""
    found = stores.at(folder).read_all([sidecar_name(k) for k in shards])
    return [None if data is None else _facts(data) for data in found]


def sidecar(folder: Place, k: int) -> dict[str, Any] | None:
    """Read the sidecar of shard k; None where it is missing or damaged."""
    return sidecars(folder, [k])[0]


def _facts(data: bytes) -> dict[str, Any] | None:
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return None
    needed = {"fingerprint", "bytes", "sha256", "count"}
    return facts if isinstance(facts, dict) and needed <= facts.keys() else None


def done(folder: Place, k: int, fingerprint: str) -> bool:
    """Tell whether shard k is committed and its tar has the committed size.

    Raises UserError where its sidecar tells of another fingerprint.
    """
    return not missing(folder, [k], fingerprint)


def missing(folder: Place, shards: Iterable[int], fingerprint: str) -> list[int]:
    """List the shards that are not done; raise UserError like `done`."""
    store, numbers = stores.at(folder), list(shards)
    every = dict(zip(numbers, sidecars(store, numbers), strict=True))
    committed = {k: facts for k, facts in every.items() if facts is not None}
    for k, facts in committed.items():
        if facts["fingerprint"] != fingerprint:
            raise UserError(
                f"{store / tar_name(k)} was made by another config or teacher (fingerprint "
                f"{facts['fingerprint']}, expected {fingerprint}); use another run_dir, or delete this"
            )
    sizes = store.sizes([tar_name(k) for k in committed])
    for k, size in zip(list(committed), sizes, strict=True):
        if size != committed[k]["bytes"]:
            del committed[k]
    return [k for k in numbers if k not in committed]
