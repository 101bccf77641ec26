"""Digests of large files that are remembered beside the files' sizes and times.

To hash 24 GB takes a minute, and a stage is planned several times. A digest holds as long as name, size,
time of change and inode of each of its files stay the same.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from flowmatch.config import UserError
from flowmatch.runs.files import own_folder, write_atomic

LARGE = 2**28  # bytes; what is smaller is hashed each time
SETTLED = 2.0  # seconds: what changed less long ago may change again within the clock's resolution


def place() -> Path:
    """Return the user's folder of remembered digests."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "flowmatch" / "digests"


def digest(files: Sequence[Path], what: str, compute: Callable[[], str]) -> str:
    """Compute a digest of files, or recall it.

    Args:
        files: What it depends on.
        what: How it is computed; another way is another digest.
        compute: Computes it.

    Returns:
        The digest.
    """
    facts = stamps(files)
    if not facts or sum(size for _, size, _, _ in facts) < LARGE:
        return compute()
    key = json.dumps([what, *sorted(str(file.resolve()) for file in files)])
    file = place() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(file.read_bytes())
        if saved["files"] == [list(fact) for fact in facts] and file.stat().st_uid == os.getuid():
            return str(saved["digest"])
    found = compute()
    newest = max(changed for _, _, changed, _ in facts) / 1e9
    if stamps(files) == facts and time.time() - newest > SETTLED:
        with suppress(OSError, UserError):  # a cache that cannot be written is none
            own_folder(place(), "")
            write_atomic(file, json.dumps({"what": what, "files": facts, "digest": found}))
    return found


def stamps(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Return (name, size in bytes, time of change in ns, inode) of each file; none if one is missing."""
    try:
        found = [(file.name, os.stat(file)) for file in files]
    except OSError:
        return []
    return [(n, s.st_size, max(s.st_mtime_ns, s.st_ctime_ns), s.st_ino) for n, s in found]
