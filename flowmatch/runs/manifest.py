"""The seal of a finished stage: `manifest.json`, a pure function of content, written last.

A manifest names its inputs by the digest of *their* manifests, so provenance is a chain that ends at
the data. It holds no clock, host or path: two runs of one config write the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowmatch.config import NotReady, UserError
from flowmatch.runs import storage
from flowmatch.runs.storage import Place

FORMAT = 1  # raised when a manifest of an older format no longer means the same
PAIR_FORMAT = 1  # raised when the same config would make other pairs
NAME = "manifest.json"
ADDED = {"precision": "fp32"}  # keys that older sets of pairs lack, and what they were made with


class Damaged(UserError):
    """A manifest that is none any more."""


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hash a file's bytes; hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """Write a value as the one JSON text that equal values share."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Hash a JSON value; hexadecimal sha256 of its canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def pair_fingerprint(
    config: Mapping[str, Any], inputs: Mapping[str, str], round: int, pair_format: int = PAIR_FORMAT
) -> str:
    """Hash all that the bytes of a set of pairs come from. config: content fields only."""
    config = {key: value for key, value in config.items() if (key, value) not in ADDED.items()}
    value = {"format": pair_format, "config": config, "inputs": inputs, "round": round}
    return fingerprint(value)


def seal(
    folder: Place,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    outputs: Iterable[str] | Mapping[str, str],
    **facts: Any,
) -> dict[str, Any]:
    """Write the manifest that means done.

    config: content fields only. inputs: name -> digest. outputs: paths relative to the folder (hashed
    here) or path -> sha256; only reproducible files belong there. facts: what later stages must know.
    """
    if not isinstance(outputs, Mapping):
        outputs = {name: sha256_file(Path(str(folder)) / name) for name in sorted(outputs)}
    manifest = {"format": FORMAT, "stage": stage, "config": config, "inputs": inputs}
    manifest |= {"facts": facts, "outputs": outputs}
    storage.at(folder).write(NAME, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def sealed(folder: Place) -> bool:
    """Tell whether a stage's folder holds a manifest."""
    return storage.at(folder).sizes([NAME]) != [None]


def read(folder: Place, key: str, stages: Iterable[str] = ()) -> dict[str, Any]:
    """Read the manifest of a sealed folder that the config's `key` names.

    Raises UserError where the folder is missing, unsealed, of an unknown format, or the work of a
    stage that is not among `stages`.
    """
    return read_hashed(folder, key, stages)[0]


def read_hashed(folder: Place, key: str, stages: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """Read a manifest like `read`, and the digest of the very bytes that were read."""
    folder = storage.at(folder)
    try:
        text = folder.read(NAME)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            missing = f"{key}={folder} does not exist; run the stage that makes it first"
            raise NotReady(missing, [folder]) from None
        unfinished = f"{key}={folder} has no {NAME}: its stage has not finished; repeat it first"
        raise NotReady(unfinished, [folder]) from None
    try:
        manifest = json.loads(text)
        known, stage = manifest["format"], manifest["stage"]
        for part in ("facts", "outputs", "inputs", "config"):
            if not isinstance(manifest[part], dict):
                raise TypeError(f"{part} is no mapping")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(
            f"{key}={folder}: {NAME} is damaged ({error!r}); delete it and repeat its stage"
        ) from None
    if known != FORMAT:
        raise UserError(f"{key}={folder}: {NAME} has format {known!r}, this version reads {FORMAT}")
    if stages and stage not in stages:
        wanted = " or ".join(stages)
        raise UserError(f"{key}={folder} holds the result of {stage}; expected one of {wanted}")
    return manifest, hashlib.sha256(text).hexdigest()


def find(folder: Place, key: str, stages: Iterable[str] = ()) -> dict[str, Any] | None:
    """Read a manifest like `read`; None where there is none, or another worker takes it away."""
    try:
        return read(folder, key, stages)
    except NotReady:
        return None


def verify(folder: Place, key: str, manifest: Mapping[str, Any]) -> None:
    """Hash the outputs again; raise UserError naming each file that is missing or changed."""
    folder, faults = Path(str(folder)), []
    for name, expected in manifest["outputs"].items():
        if not (folder / name).is_file():
            faults.append(f"{key}={folder}: {name} is missing")
        elif sha256_file(folder / name) != expected:
            faults.append(
                f"{key}={folder}: {name} is not the file that was sealed (sha256 differs)"
            )
    if faults:
        hint = f"delete {folder / NAME} and repeat its stage to make it again"
        raise UserError([f"{fault}; {hint}" for fault in faults])


def digest(folder: Place) -> str:
    """Hash a sealed folder: sha256 of its manifest's bytes."""
    return hashlib.sha256(storage.at(folder).read(NAME)).hexdigest()
