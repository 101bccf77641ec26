"""The bytes of a shard, by arithmetic: its blocks, their members, where each pair lies in them."""

import json
import math
import tarfile
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flowmatch.config import UserError

RECORD = tarfile.RECORDSIZE  # a tar's size is a multiple of it
LARGEST_MEMBER = 8 * 1024**3  # USTAR writes sizes in 11 octal digits
PROMPT = "prompt"


@dataclass(frozen=True)
class Layout:
    """Say where every pair of a shard lies; the same for all shards of a set.

    shape: one x0 or x1, without batch. dtype: "float16" or "float32", as stored. labels: an int64
    label with each pair. shard_size: pairs in a shard. block: pairs in a tar member; the last block
    of a shard may be shorter. index: the number of each pair in the set, int64, with it: that of the
    data item it was made from. prompt_bytes: room for each pair's prompt, 0 for no prompts; those of a
    block share theirs. Raises UserError for what cannot be stored.
    """

    shape: tuple[int, ...]
    dtype: str
    labels: bool
    shard_size: int
    block: int
    index: bool = False
    prompt_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON knows lists only
        faults = []
        sizes = (*self.shape, self.shard_size, self.block, self.prompt_bytes)
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
        if self.prompt_bytes < 0:
            faults.append(f"prompt_bytes={self.prompt_bytes}: expected 0 or more")
        largest = max(size for _, size in self.members.values()) if not faults else 0
        if self.block * largest + 128 >= LARGEST_MEMBER:
            faults.append(
                f"block={self.block}: a tar member must stay under 8 GiB; use fewer pairs"
            )
        if faults:
            raise UserError(faults)
        npy_header(self, "x0", self.block)

    def entries(self) -> dict[str, Any]:
        """Give what is stored of it, as JSON knows it; Layout(**entries) is the same again."""
        entries = asdict(self) | {"shape": list(self.shape)}
        if not self.prompt_bytes:  # sets made before there were prompts say nothing of them
            del entries["prompt_bytes"]
        return entries

    @cached_property
    def members(self) -> dict[str, tuple[np.dtype, int]]:
        """Give each array of a block in its order: name -> (dtype, bytes of one pair)."""
        value = np.dtype(self.dtype).newbyteorder("<")
        arrays = {"x0": (value, value.itemsize * math.prod(self.shape))}
        arrays["x1"] = arrays["x0"]
        for name, there in (("y", self.labels), ("i", self.index)):
            arrays |= {name: (np.dtype("<i8"), 8)} if there else {}
        if self.prompt_bytes:
            arrays[PROMPT] = (np.dtype(np.uint8), self.prompt_bytes)
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
        return -(-(head_bytes(name) + pairs * self.members[name][1]) // 512) * 512

    def offsets(self, index: Any) -> dict[str, Any]:
        """Find pair number `index` (int or array) of a shard: name -> offset of its first byte."""
        block, row = np.divmod(index, self.block)
        pairs, start, places = self.pairs(block), block * self.block_bytes, {}
        for name, (_, size) in self.members.items():
            places[name] = start + head_bytes(name) + row * size
            start = start + self.member_bytes(name, pairs)
        return places

    def numbers(self, shard: int, block: int) -> np.ndarray:
        """Number the pairs of a block within the set; int64."""
        begin = shard * self.shard_size + block * self.block
        return begin + np.arange(self.pairs(block), dtype=np.int64)

    def member(self, shard: int, block: int, name: str) -> str:
        """Name the member of one block's array."""
        ending = "json" if name == PROMPT else "npy"
        return f"{shard:06d}-{block * self.block:06d}.{name}.{ending}"

    def head(self, shard: int, block: int, name: str) -> bytes:
        """Write what stands before a member's values: its tar header, an array's .npy header."""
        pairs = int(self.pairs(block))
        npy = npy_header(self, name, pairs)
        size = len(npy) + pairs * self.members[name][1]
        return tar_header(self.member(shard, block, name), size) + npy


def head_bytes(name: str) -> int:
    """Count the bytes before a member's values: tar header, .npy header; JSON has none of its own."""
    return 512 if name == PROMPT else 512 + 128


def npy_header(layout: Layout, name: str, pairs: int) -> bytes:
    """Write the .npy header (version 1.0) of a block's array: 128 bytes; none of prompts."""
    if name == PROMPT:
        return b""
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


def write_prompts(prompts: list[str], room: int, where: str) -> bytes:
    """Write a block's prompts as a JSON list in UTF-8, filled up with spaces to `room` bytes.

    Raises UserError, which names `where`, for prompts that need more bytes, or are no Unicode.
    """
    try:
        text = json.dumps(prompts, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a prompt is no Unicode text ({error}); mend it") from None
    if len(text) > room:
        least = -(-len(text) // len(prompts))
        raise UserError(
            f"{where}: its {len(prompts)} prompts need {len(text)} bytes as JSON, and have {room}; "
            f"use prompt_bytes={least} or more"
        )
    return text.ljust(room)


def read_prompts(content: bytes, pairs: int) -> list[str]:
    """Read the prompts of a block; raise ValueError for what is no list of so many strings."""
    try:
        prompts = json.loads(content.decode())
    except (ValueError, RecursionError):
        prompts = None
    if not (isinstance(prompts, list) and len(prompts) == pairs) or {str} != set(
        map(type, prompts)
    ):
        raise ValueError(f"is no JSON list of {pairs} strings")
    return prompts


def flaw(
    layout: Layout, shard: int, block: int, name: str, content: bytes, classes: int | None
) -> str:
    """Say why a member cannot hold these values, "" where it can. classes: that labels are of."""
    pairs = int(layout.pairs(block))
    dtype, size = layout.members[name]
    if name == PROMPT:
        try:
            read_prompts(content[: pairs * size], pairs)
        except ValueError as error:
            return str(error)
        return ""
    values = np.frombuffer(content, dtype, count=pairs * size // dtype.itemsize)
    if name == "y":
        if classes is not None and not ((values >= 0) & (values < classes)).all():
            return f"holds labels that are not 0 to {classes - 1}"
    elif name == "i" and not np.array_equal(values, layout.numbers(shard, block)):
        return "holds other numbers than those of its pairs"
    elif not np.isfinite(values).all():
        return "holds values that are not finite"
    return ""
