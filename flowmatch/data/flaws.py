"""What may be wrong with a picture: its kinds, how many there are of each, and the ways out."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from flowmatch.config import UserError

KINDS = {  # kind -> what several of them are; the key that skips them; the ways out
    "unreadable": ("cannot be read", "bad", "set {key}.bad=skip, or remove such files"),
    "missing": ("are missing", "bad", "set {key}.bad=skip, or remove these rows"),
    "huge": (
        "have too many pixels",
        "bad",
        "a small file can unpack into too much memory: to allow it, raise {key}.megapixels, or set "
        "{key}.bad=skip",
    ),
    "mode": (
        "are no 8-bit pictures in grey or colour",
        "bad",
        "expected 8-bit grey or colour (L, RGB, RGBA, P, CMYK); convert the files, or set "
        "{key}.bad=skip",
    ),
    "transparent": (
        "are partly transparent",
        "",
        "set {key}.background to white, grey or black",
    ),
    "small": (
        "are smaller than {key}.size={size}",
        "small",
        "set {key}.small to enlarge or skip, or use a smaller {key}.size",
    ),
    "channels": (
        "have other channels than the first",
        "",
        "set {key}.channels to 1 or 3, which converts all",
    ),
    "shape": ("have another shape than the first", "", "set {key}.size"),
}

CHANGES = {  # what is done to a picture that is taken, and how the plan says it of several
    "frames": "hold several frames, of which the first is read",
    "transparent": "have transparent pixels, laid on {config.background}",
    "small": "are enlarged to size={config.size}",
}


class Flaw(UserError):
    """Something is wrong with one picture.

    Args:
        kind: one of KINDS.
        name: of the picture.
        told: what is wrong, after the name.
        key: the key of the data.
        size: `size` of the data, for the kind `small`.
    """

    def __init__(self, kind: str, name: str, told: str, key: str, size: Any = None):
        self.kind, self.name, self.told = kind, name.removeprefix(f"{key}: "), told
        several, self.way, out = KINDS[kind]
        self.several = several.format(key=key, size=size)
        self.out = out.format(key=key)
        single = f", smaller than {key}.size={size}" if kind == "small" else ""
        super().__init__(f"{key}: {self.name} {told}{single}; {self.out}")


def by_kind(flaws: Sequence[Flaw]) -> Iterator[tuple[str, list[Flaw]]]:
    """Group flaws by what they are, in the order of KINDS."""
    order = list(KINDS)
    ordered = sorted(flaws, key=lambda flaw: (order.index(flaw.kind), flaw.several))
    for several, group in groupby(ordered, lambda flaw: flaw.several):
        yield several, list(group)


def lines(flaws: Sequence[Flaw], key: str, seen: int, count: int) -> list[str]:
    """Write a line for each kind of flaw, with its number and the first picture."""
    written = []
    for several, group in by_kind(flaws):
        first = group[0]
        some = f"{count:,} images" if seen == count else f"{seen:,} images seen, of {count:,},"
        if len(group) == 1:
            written.append(str(first))
        else:
            detail = first.told
            written.append(
                f"{key}: {len(group):,} of {some} {several}; first: {first.name} {detail}; {first.out}"
            )
    return written


def left_out(flaws: Sequence[Flaw], key: str, count: int) -> list[str]:
    """Say how many pictures are skipped, for the plan: a line for each kind."""
    return [
        f"{len(group):,} of {count:,} images left out ({key}.{group[0].way}=skip): they {several}; "
        f"first {group[0].name}"
        for several, group in by_kind(flaws)
    ]


def told(changes: dict[str, tuple[int, str]], config: Any, seen: int, count: int) -> list[str]:
    """Say how many pictures are changed, and how, for the plan: a line for each key of CHANGES."""
    some = f"{count:,} images" if seen == count else f"{seen:,} images looked at, of {count:,},"
    order = list(CHANGES)
    return [
        f"{number:,} of the {some} {CHANGES[change].format(config=config)}; first {first}"
        for change, (number, first) in sorted(
            changes.items(), key=lambda item: order.index(item[0])
        )
    ]
