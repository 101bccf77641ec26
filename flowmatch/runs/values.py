"""Plain values of a config: read from YAML files and `key=value` words, merged and assigned."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowmatch.config import UserError, flatten

KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*")


def read_yaml(file: str) -> dict[str, Any]:
    """Read a YAML file, or a URL of one, into plain values.

    Raises UserError where it is missing, is not a mapping, or holds an interpolation such as
    `${oc.env:NAME}`: a config is data and runs nothing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        read: Any = OmegaConf.load(_fetched(file) if "://" in file else file)
        if not OmegaConf.is_dict(read):
            raise UserError(f"{file}: expected a mapping of keys to values")
        values = OmegaConf.to_container(read, resolve=False)
    except FileNotFoundError:
        raise UserError(f"{file}: no such config file") from None
    except UserError:
        raise
    except (
        *(YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, KeyError),
        *(AttributeError, ImportError, RecursionError),
    ) as error:
        raise UserError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
    for key, value in flatten(values).items():
        if "${" in str(value):
            raise UserError(f"{file}: {key}={value!r}: '${{...}}' is not replaced; write the value")
    assert isinstance(values, dict)
    if Path(file).name == "config.yaml":  # of a run folder: the digests that `begin` compares
        for digests in ("inputs", "code"):
            values.pop(digests, None)
    return {str(key): value for key, value in values.items()}


def parse_word(word: str) -> tuple[str, Any]:
    """Split `key=value` and read the value as YAML. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, _, text = word.partition("=")
    try:
        read = OmegaConf.from_dotlist([f"value={text}"])
        value = OmegaConf.to_container(read, resolve=False)["value"]  # type: ignore[call-overload, index]
    except (
        *(YAMLError, OmegaConfBaseException, ValueError, TypeError, KeyError),
        *(AttributeError, RecursionError),
    ) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{word}: not readable as key=value: {told}") from None
    if "${" in str(value):
        raise UserError(f"{word}: '${{...}}' is not replaced; write the value")
    for name, inner in flatten(value).items():
        if inner is None and ":" in name:  # {source:digits} is a mapping of one key
            raise UserError(f"{word}: a blank is missing after the colon in {name!r}")
    return key, value


def merge(below: Any, above: Any) -> Any:
    """Merge nested mappings, the values of `above` first; lists and plain values are replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: merge(below.get(key), value) for key, value in above.items()}


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings and lists: `fit.steps`, `pairs.0.path`, `pairs[0].path`.

    A mapping is merged into the one that is there. Raises UserError where the way is blocked.
    """
    if not KEY.fullmatch(key):
        raise UserError(
            f"{key}={value}: not a key; expected KEY=value, KEY.KEY=value or KEY[0].KEY=value"
        )
    parts = re.findall(r"[^.\[\]]+", key)
    here: Any = values
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        empty: Any = [] if not last and parts[number + 1].isdecimal() else {}
        if isinstance(here, list):
            at = int(part) if part.isdecimal() else len(here) + 1
            if at > len(here):
                raise UserError(
                    f"{key}: the list holds {len(here)} entries; expected a number there"
                )
            if at == len(here):
                here.append(None)
        elif isinstance(here, dict):
            at = part  # type: ignore[assignment]
            here.setdefault(part, None)
        else:
            before = ".".join(parts[:number])
            kind = "list" if part.isdecimal() else "mapping"
            raise UserError(f"{key}: {before} is {here!r}, not a {kind}; give all of {before}=")
        if last:
            here[at] = merge(here[at], value)
        elif here[at] is None:
            here[at] = empty
        here = here[at]


def _fetched(url: str) -> Any:
    import fsspec  # the config.yaml of pairs in an object store

    try:
        with fsspec.open(url) as file:
            return io.BytesIO(file.read())
    except FileNotFoundError:
        raise
    except Exception as error:  # each client has its own kinds, which share no base
        told = " ".join(str(error).split()) or repr(error)
        raise UserError(
            f"{url}: the store refuses ({type(error).__name__}: {told}); check that its client is "
            "installed, reaches it and has credentials"
        ) from error


def leave_derived(values: dict[str, Any], model: Any, typed: Sequence[str]) -> None:
    """Let `fit.steps`, typed on a command line, take the place of the `fit.epochs` of a file.

    So for each key that a stage can derive from another. Of two that are typed the later counts.

    Args:
        values: Of the stage; changed in place.
        model: Config class of the stage.
        typed: Keys of the command line, in its order.
    """
    for key, source in getattr(model, "DERIVED", {}).items():
        named = [word for word in typed if word in (key, source)]
        if named[-1:] == [key]:
            assign(values, source, None)
        elif named:
            *way, last = key.split(".")
            here: Any = values
            for part in way:
                here = here.get(part) if isinstance(here, dict) else None
            if isinstance(here, dict):
                here.pop(last, None)
