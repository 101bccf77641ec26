"""The bytes of a shard as arithmetic: its blocks, their tar members, the offset of each pair."""

import hashlib
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

from flowmatch.config import UserError

RECORD = tarfile.RECORDSIZE  # a tar's size is a multiple of it
LARGEST_MEMBER = 8 * 1024**3  # USTAR writes sizes in 11 octal digits
PROMPT, STATES = "prompt", "xt"
Advance = Callable[[int], Any]  # called with the number of bytes that were read since the last call


@dataclass(frozen=True)
class Layout:
    """Where every pair of a shard lies; one layout holds for all shards of a set.

    Args:
        shape: of one x0 or x1, without the batch.
        dtype: "float16" or "float32", as stored.
        labels: whether an int64 label is stored with each pair.
        shard_size: pairs in a shard, 1 to 1,000,000.
        block: pairs in a tar member; the last block of a shard may be shorter.
        index: whether the number of each pair in the set is stored, int64. In an inverted set it is
            the number of the data item that the pair was made from.
        prompt_bytes: bytes for the prompt of each pair, 0 for no prompts. The prompts of a block
            share the bytes of all its pairs.
        noise: whether x0 is stored; without it readers draw it again from the seed of the set.
        states: number K of states of the path between x0 and x1 that are stored, 0 or more.

    Raises:
        UserError: for values that cannot be stored.
    """

    shape: tuple[int, ...]
    dtype: str
    labels: bool
    shard_size: int
    block: int
    index: bool = False
    prompt_bytes: int = 0
    noise: bool = True
    states: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON knows lists only
        faults = []
        sizes = (*self.shape, self.shard_size, self.block, self.prompt_bytes, self.states)
        if not all(type(size) is int for size in sizes) or not {
            type(self.labels),
            type(self.index),
            type(self.noise),
        } == {bool}:
            raise UserError(
                f"{self}: expected integers for the sizes, and true or false for labels, index and noise"
            )
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
        if self.states < 0:
            faults.append(f"states={self.states}: expected 0 or more")
        largest = max(size for _, size in self.members.values()) if not faults else 0
        if self.block * largest + 128 >= LARGEST_MEMBER:
            faults.append(
                f"block={self.block}: a tar member must be smaller than 8 GiB; use a smaller block"
            )
        if faults:
            raise UserError(faults)
        npy_header(self, "x1", self.block)

    def entries(self) -> dict[str, Any]:
        """Return the fields as JSON values; `Layout(**entries)` makes an equal layout."""
        entries = asdict(self) | {"shape": list(self.shape)}
        if not self.prompt_bytes:  # sets made before there were prompts lack this entry
            del entries["prompt_bytes"]
        if self.noise:  # likewise
            del entries["noise"]
        if not self.states:  # likewise
            del entries["states"]
        return entries

    @cached_property
    def members(self) -> dict[str, tuple[np.dtype, int]]:
        """The arrays of a block in their order: name -> (dtype, bytes of one pair)."""
        value = np.dtype(self.dtype).newbyteorder("<")
        state = (value, value.itemsize * math.prod(self.shape))
        arrays = {"x0": state, "x1": state} if self.noise else {"x1": state}
        if self.states:
            arrays[STATES] = (value, self.states * state[1])
        for name, stored in (("y", self.labels), ("i", self.index)):
            arrays |= {name: (np.dtype("<i8"), 8)} if stored else {}
        if self.prompt_bytes:
            arrays[PROMPT] = (np.dtype(np.uint8), self.prompt_bytes)
        return arrays

    @cached_property
    def blocks(self) -> int:
        """Number of blocks in a shard."""
        return -(-self.shard_size // self.block)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of a full block, with headers and padding."""
        return sum(self.member_bytes(name, self.block) for name in self.members)

    @cached_property
    def tar_bytes(self) -> int:
        """Bytes of a whole tar."""
        last = sum(self.member_bytes(name, self.pairs(self.blocks - 1)) for name in self.members)
        content = (self.blocks - 1) * self.block_bytes + int(last)
        return -(-(content + 1024) // RECORD) * RECORD  # two zero blocks end a tar

    def pairs(self, block: Any) -> Any:
        """Return the number of pairs in block number `block` (int or array)."""
        return np.minimum(self.block, self.shard_size - block * self.block)

    def member_bytes(self, name: str, pairs: Any) -> Any:
        """Return the bytes of a member that holds `pairs` pairs (int or array)."""
        return -(-(head_bytes(name) + pairs * self.members[name][1]) // 512) * 512

    def offsets(self, index: Any) -> dict[str, Any]:
        """Locate a pair in its tar.

        Args:
            index: the number of the pair in its shard (int or array).

        Returns:
            Name of each array -> offset of the pair's first byte in the tar, shaped like `index`.
        """
        block, row = np.divmod(index, self.block)
        pairs, start, places = self.pairs(block), block * self.block_bytes, {}
        for name, (_, size) in self.members.items():
            places[name] = start + head_bytes(name) + row * size
            start = start + self.member_bytes(name, pairs)
        return places

    def numbers(self, shard: int, block: int) -> np.ndarray:
        """Return the numbers that the pairs of a block have in the set; int64 [n]."""
        begin = shard * self.shard_size + block * self.block
        return begin + np.arange(self.pairs(block), dtype=np.int64)

    def member(self, shard: int, block: int, name: str) -> str:
        """Return the name of the tar member that holds one array of a block."""
        ending = "json" if name == PROMPT else "npy"
        return f"{shard:06d}-{block * self.block:06d}.{name}.{ending}"

    def head(self, shard: int, block: int, name: str) -> bytes:
        """Return the bytes before a member's values: its tar header and, for an array, .npy header."""
        pairs = int(self.pairs(block))
        npy = npy_header(self, name, pairs)
        size = len(npy) + pairs * self.members[name][1]
        return tar_header(self.member(shard, block, name), size) + npy


def head_bytes(name: str) -> int:
    """Return the number of bytes before a member's values; JSON has a tar header only."""
    return 512 if name == PROMPT else 512 + 128


def npy_header(layout: Layout, name: str, pairs: int) -> bytes:
    """Return the .npy header (version 1.0, 128 bytes) of a block's array; b"" for prompts."""
    if name == PROMPT:
        return b""
    shape = shape_of(layout, name, pairs)
    entries = {"descr": layout.members[name][0].str, "fortran_order": False, "shape": shape}
    fields = "".join(f"'{key}': {value!r}, " for key, value in entries.items())
    text = f"{{{fields}}}".encode()
    if len(text) > 117:
        raise UserError(
            f"shape={layout.shape}: too many dimensions for a .npy header of 128 bytes; flatten some"
        )
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117) + b"\n"


def shape_of(layout: Layout, name: str, pairs: int) -> tuple[int, ...]:
    """Return the shape of an array of a block: [pairs], or with the shape of a pair, or of K states."""
    states = (layout.states,) if name == STATES else ()
    return (int(pairs), *states, *(layout.shape if name in ("x0", "x1", STATES) else ()))


def tar_header(name: str, size: int) -> bytes:
    """Return a member's USTAR header; it holds no time, owner or umask."""
    info = tarfile.TarInfo(name)  # mtime, uid, gid 0, mode 0644
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def write_prompts(prompts: list[str], room: int, where: str) -> bytes:
    """Return a block's prompts as a JSON list in UTF-8, padded with spaces to `room` bytes.

    Raises:
        UserError: naming `where`, for prompts that need more bytes or are not Unicode text.
    """
    try:
        text = json.dumps(prompts, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: a prompt is not Unicode text ({error}); correct the prompt"
        ) from None
    if len(text) > room:
        least = -(-len(text) // len(prompts))
        raise UserError(
            f"{where}: its {len(prompts)} prompts need {len(text)} bytes as JSON, but the layout has "
            f"{room}; use prompt_bytes={least} or more"
        )
    return text.ljust(room)


def bytes_per_pair(prompts: Iterable[str]) -> int:
    """Return the least `prompt_bytes` with which any block of these prompts can be written.

    It is the JSON of the longest prompt and the 2 bytes that its place in a list takes, for blocks of
    any length.
    """
    return 2 + max(len(json.dumps(text, ensure_ascii=False).encode()) for text in prompts)


def read_prompts(content: bytes, pairs: int) -> list[str]:
    """Parse the prompts of a block; raise ValueError if they are not a list of `pairs` strings."""
    try:
        prompts = json.loads(content.decode())
    except (ValueError, RecursionError):
        prompts = None
    if not (isinstance(prompts, list) and len(prompts) == pairs) or {str} != set(
        map(type, prompts)
    ):
        raise ValueError(f"is not a JSON list of {pairs} strings")
    return prompts


def flaw(
    layout: Layout, shard: int, block: int, name: str, content: bytes, classes: int | None
) -> str:
    """Check the values of a member.

    Args:
        content: the bytes of the values, padding allowed after them.
        classes: the number of classes that labels must lie below; None where it is unknown.

    Returns:
        What is wrong with them, or "".
    """
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
            return f"holds labels outside 0 to {classes - 1}"
    elif name == "i" and not np.array_equal(values, layout.numbers(shard, block)):
        return "holds other numbers than those of its pairs"
    elif not np.isfinite(values).all():
        return "holds values that are not finite"
    return ""


def read_tar(
    file: BinaryIO, k: int, layout: Layout, classes: int | None, full: bool, advance: Advance
) -> tuple[str, str | None]:
    """Compare a tar of the right size with its layout.

    Stock readers take a bad header for the end of the tar and report no error.

    Returns:
        What is wrong, or "", and the tar's sha256 if `full` and nothing is wrong, else None.
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
