"""Modules whose code a person trusts: `trust=package.module` on the command line, never in a file."""

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowmatch.config import UserError

NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_modules: list[str] = []  # of this process


def take(words: Sequence[str]) -> list[str]:
    """Take the words `trust=package.module` out of a command line; the modules are trusted from now on.

    Raises:
        UserError: A word names no module.
    """
    rest = []
    for word in words:
        key, _, name = word.partition("=")
        if key != "trust":
            rest.append(word)
        elif NAME.fullmatch(name):
            trust(name)
        else:
            raise UserError(f"{word}: expected a module, such as trust=mypackage.networks")
    return rest


def trust(module: str) -> None:
    """Let the classes of a module be used."""
    if module not in _modules:
        _modules.append(module)


def find(module: str, where: str) -> Any:
    """Import a trusted module; the working directory is searched, too.

    Args:
        module: Its name.
        where: What names it, for the message.

    Raises:
        UserError: It is not trusted, or cannot be imported.
    """
    if module not in _modules:
        raise UserError(
            f"{where} is not of diffusers, and to use it runs the code of {module}; if you trust that, "
            f"add trust={module} to the command line"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except Exception as error:  # code from outside raises anything
        told = " ".join(str(error).split())
        raise UserError(
            f"{where}: trust={module} cannot be imported: {type(error).__name__}: {told}"
        ) from None


def digests() -> dict[str, str]:
    """Hash the files of the trusted modules that are in use, and of what lies in their packages."""
    found = {}
    for name in _modules:
        if (file := getattr(sys.modules.get(name), "__file__", None)) is None:
            continue
        files = (
            sorted(Path(file).parent.rglob("*.py"))
            if Path(file).stem == "__init__"
            else [Path(file)]
        )
        digest = hashlib.sha256()
        for one in files:
            digest.update(f"{one.relative_to(Path(file).parent)}\0".encode() + one.read_bytes())
        found[name] = digest.hexdigest()
    return found


def holding(name: str, where: str) -> Any:
    """Return the first object of a name in the trusted modules; None where there is none."""
    for module in _modules:
        if (found := getattr(find(module, where), name, None)) is not None:
            return found
    return None
