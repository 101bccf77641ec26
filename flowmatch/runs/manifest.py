"""The seal of a finished stage: `manifest.json`, a pure function of content, written last.

A manifest identifies its inputs with the digests of *their* manifests, so that provenance is a chain
that ends at the data. It contains no time, host or path: two runs of one config write the same bytes.
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

FORMAT = 1  # incremented when a manifest of an older format no longer means the same
PAIR_FORMAT = 1  # incremented when the same config would make other pairs
NAME = "manifest.json"
# keys that older sets of pairs lack, with the values they were made with
ADDED: dict[str, Any] = {
    "precision": "fp32",
    "prompts": None,
    "call": {},
    "x0": "stored",
    "states": [],
}

ADDED_DATA = {
    "fit": "crop",
    "crop": "centre",
    "small": "refuse",
    "bad": "refuse",
    "background": None,
}

FACTS: dict[str, tuple[type, ...]] = {  # kinds of the facts that later stages read
    **{"round": (int,), "net": (str,), "features": (list,), "one_step": (bool,), "shape": (list,)},
    **{"classes": (int, type(None)), "sha256": (str,), "kind": (str,)},
    "accuracy": (int, float, type(None)),  # None: of a network that learns no labels
    **{"layout": (dict,), "shards": (int,), "count": (int,), "fingerprint": (str,)},
    **{"lora": (dict,), "base": (str,)},
    **dict.fromkeys(("script", "call", "prompts", "id2label"), (dict, type(None))),
    **{"samples": (int,), "windows": (int,), "for_steps": (list,)},
    **{"latents": (dict,), "parts": (dict,)},
}
PAIR_STAGES = ("generate_pairs", "import")  # whose results are sets of pairs
NEEDED = {  # stage -> facts that all of its manifests have
    **{stage: {"round"} for stage in ("train_flow", "reflow", "finish", *PAIR_STAGES, "export")},
    "encode": {"samples", "shape", "shard_size", "latents"},
    "train_classifier": {"accuracy", "sha256", "shape", "classes"},
}


class Damaged(UserError):
    """A manifest that cannot be parsed."""


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """Return the JSON text of a value; equal values have the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the sha256 of a JSON value's canonical text, hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def pair_fingerprint(
    config: Mapping[str, Any], inputs: Mapping[str, str], round: int, pair_format: int = PAIR_FORMAT
) -> str:
    """Hash everything that determines the bytes of a set of pairs.

    Args:
        config: content fields only.
        inputs: name -> digest.
        round: of the teacher.
        pair_format: PAIR_FORMAT, or that of an older set.
    """
    config = {key: value for key, value in config.items() if (key, value) not in ADDED.items()}
    if isinstance(data := config.get("data"), dict):
        config["data"] = {k: v for k, v in data.items() if (k, v) not in ADDED_DATA.items()}
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
    """Write the manifest, which marks a stage as finished.

    Args:
        folder: of the stage.
        stage: its name.
        config: content fields only.
        inputs: name -> digest.
        outputs: paths relative to the folder, which are hashed here, or path -> sha256. Only
            reproducible files belong there.
        facts: JSON values that later stages need.

    Returns:
        The manifest.
    """
    if not isinstance(outputs, Mapping):
        outputs = {name: sha256_file(Path(str(folder)) / name) for name in sorted(outputs)}
    manifest = {"format": FORMAT, "stage": stage, "config": config, "inputs": inputs}
    manifest |= {"facts": facts, "outputs": outputs}
    storage.at(folder).write(NAME, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def sealed(folder: Place) -> bool:
    """Return whether a stage's folder has a manifest."""
    return storage.at(folder).sizes([NAME]) != [None]


def read(folder: Place, key: str, stages: Iterable[str] = ()) -> dict[str, Any]:
    """Read the manifest of a sealed folder.

    Args:
        folder: path or URL.
        key: the config key that names the folder, for errors.
        stages: names of the stages that may have made it; empty for any.

    Raises:
        NotReady: if the folder is missing or not sealed.
        UserError: if the manifest is damaged, of an unknown format, or of another stage.
    """
    return read_hashed(folder, key, stages)[0]


def read_hashed(folder: Place, key: str, stages: Iterable[str] = ()) -> tuple[dict[str, Any], str]:
    """Read a manifest like `read`; return it and the digest of the same bytes."""
    folder = storage.at(folder)
    try:
        text = folder.read(NAME)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.isfile(str(folder)):
            raise UserError(
                f"{key}={folder} is a file; expected the folder of a finished stage"
            ) from None
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
                raise TypeError(f"{part} is not a mapping")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(
            f"{key}={folder}: {NAME} is damaged ({error!r}); delete it and repeat its stage"
        ) from None
    if known != FORMAT:
        raise UserError(f"{key}={folder}: {NAME} has format {known!r}, this version reads {FORMAT}")
    if stages and stage not in stages:
        expected = " or ".join(stages)
        raise UserError(f"{key}={folder} holds the result of {stage}; expected one of {expected}")
    if fault := odd_fact(manifest["facts"], stage):
        raise Damaged(
            f"{key}={folder}: {NAME} is damaged ({fault}); delete it and repeat its stage"
        )
    return manifest, hashlib.sha256(text).hexdigest()


def odd_fact(facts: Mapping[str, Any], stage: Any) -> str:
    """Name a fact that a stage's manifest lacks, or that is of another kind than it writes; else ""."""
    needed = NEEDED.get(stage, set()) if isinstance(stage, str) else set()
    for name in sorted(needed - facts.keys()):
        return f"its facts have no {name}"
    for name in sorted(FACTS.keys() & facts.keys()):
        value = facts[name]
        wrong = type(value) not in FACTS[name] or (name == "round" and value < 0)
        kind = {"features": str, "for_steps": int}.get(name)  # of the items of a list
        if wrong or (kind is not None and any(type(each) is not kind for each in value)):
            return f"{name}={value!r}"
    return ""


def find(folder: Place, key: str, stages: Iterable[str] = ()) -> dict[str, Any] | None:
    """Read a manifest like `read`; return None if there is none, or another worker removes it."""
    try:
        return read(folder, key, stages)
    except NotReady:
        return None


def verify(folder: Place, key: str, manifest: Mapping[str, Any]) -> None:
    """Hash the outputs again; raise UserError that names each missing or changed file."""
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
    """Return the digest of a sealed folder: the sha256 of its manifest's bytes."""
    return hashlib.sha256(storage.at(folder).read(NAME)).hexdigest()
