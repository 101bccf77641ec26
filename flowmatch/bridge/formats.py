"""The formats by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmatch.bridge import rectified
from flowmatch.bridge.diffsynth import DiffSynth
from flowmatch.bridge.fastvideo import FastVideo
from flowmatch.bridge.sample import Format, Reader
from flowmatch.bridge.self_forcing import SelfForcing
from flowmatch.bridge.tars import FASTGEN, NPY

FORMATS: dict[str, Format] = {
    one.name: one for one in (FASTGEN, SelfForcing(), FastVideo(), DiffSynth(), NPY)
}
READERS: dict[str, Callable[[Path, dict[str, Any]], Reader]] = {
    **{name: one.read for name, one in FORMATS.items()},
    "rfpp": rectified.read_rfpp,
    "rectifiedflow": rectified.read_rectifiedflow,
}
