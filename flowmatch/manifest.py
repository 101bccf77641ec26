"""The seal of a finished stage: `manifest.json`, a pure function of content, written last.

A manifest names its inputs by the digest of *their* manifests, so provenance is a chain that ends at
the data. It holds no clock, host or path: two runs of one config write the same bytes.
"""

import hashlib
import json
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowmatch.config import NotReady, UserError

FORMAT = 1  # raised when a manifest of an older format no longer means the same
NAME = "manifest.json"


class Damaged(UserError):
    """A manifest that is none any more."""


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file so that a reader sees all of it or none, also after a power cut."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp.{worker()}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def worker() -> str:
    """Name this process among all that may share a folder: HOST.PID."""
    return f"{socket.gethostname()}.{os.getpid()}"


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def seal(
    folder: str | os.PathLike[str],
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
    folder = Path(folder)
    if not isinstance(outputs, Mapping):
        outputs = {name: sha256_file(folder / name) for name in sorted(outputs)}
    manifest = {"format": FORMAT, "stage": stage, "config": config, "inputs": inputs}
    manifest |= {"facts": facts, "outputs": outputs}
    write_atomic(folder / NAME, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def sealed(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a stage's folder holds a manifest."""
    return (Path(folder) / NAME).is_file()


def read(folder: str | os.PathLike[str], key: str, stages: Iterable[str] = ()) -> dict[str, Any]:
    """Read the manifest of a sealed folder that the config's `key` names.

    Raises UserError where the folder is missing, unsealed, of an unknown format, or the work of a
    stage that is not among `stages`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotReady(f"{key}={folder} does not exist; run the stage that makes it first")
    if not sealed(folder):
        raise NotReady(f"{key}={folder} has no {NAME}: its stage has not finished; repeat it first")
    try:
        manifest = json.loads((folder / NAME).read_bytes())
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
    return manifest


def verify(folder: str | os.PathLike[str], key: str, manifest: Mapping[str, Any]) -> None:
    """Hash the outputs again; raise UserError naming each file that is missing or changed."""
    folder, faults = Path(folder), []
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


def digest(folder: str | os.PathLike[str]) -> str:
    """Hash a sealed folder: sha256 of its manifest's bytes."""
    return sha256_file(Path(folder) / NAME)
