"""The place of a set of pairs: a local folder, or a prefix of an object store that fsspec reaches.

Both have the same methods, with names relative to the place. A file appears whole or not at all: in a
folder it is renamed from a temporary name; in a store it is uploaded with one PUT from local scratch
(below TMPDIR). No object is ever written as a stream, because a client that fails in the middle of
`with fs.open(url, "wb")` commits the part that was written.
"""

import errno
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from flowmatch.config import NotReady, UserError
from flowmatch.runs.files import Folder, own_folder, worker

EXCLUSIVE = {"s3", "s3a", "memory"}  # protocols whose client can refuse to replace an object
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of the local disk, not of the store
CONFLICT = "ConditionalRequestConflict"


@dataclass(frozen=True)
class Bucket:
    """A prefix of an object store. An error of its client becomes a UserError that names the object.

    Args:
        url: of the prefix.
        fs: fsspec's client.
        root: the prefix as the client writes it.
        exclusive: whether `create` is exclusive; without that there are no leases.
        kept: small objects that were read before, with their stamps.
    """

    url: str
    fs: Any = field(repr=False)
    root: str = field(repr=False)
    exclusive: bool = False
    kept: dict[str, tuple[str, bytes]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return at, (self.url,)  # another process has a client of its own

    def __truediv__(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.url}/{name}"

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.root.rpartition("/")[2]

    def beside(self, name: str) -> "Bucket":
        """Return the prefix of that name beside this one."""
        return _bucket(f"{self.url.rpartition('/')[0]}/{name}", os.getpid())

    @property
    def scratch(self) -> Path:
        """The local folder in which files are built; it is made here."""
        key = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        own = Path(tempfile.gettempdir()) / f"flowmatch-{os.getuid()}"
        for folder in (own, own / key):
            own_folder(folder, "set TMPDIR to a folder of your own")
        return own / key

    def make(self, *parts: str) -> None:
        """Do nothing: an object store has no folders."""

    def exists(self) -> bool:
        """Return whether there is an object under the prefix."""
        return bool(self._list("", directories=True))

    def names(self, part: str = "") -> list[str]:
        """List the objects directly under the prefix, or under a part of it; sorted, never cached."""
        return sorted(self._list(part))

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Return the sizes of some objects in bytes; None for one that is missing."""
        if len(names) == 1:
            with self._asking(names[0]):
                try:
                    return [int(self.fs.info(self._path(names[0]))["size"])]
                except FileNotFoundError:
                    return [None]
        infos = self._infos(names)
        return [infos[name]["size"] if name in infos else None for name in names]

    def read(self, name: str) -> bytes:
        """Read an object; raises FileNotFoundError."""
        with self._asking(name):
            return self.fs.cat_file(self._path(name))

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Read some small objects at once; None for one that is missing.

        An object that the listing shows unchanged since the last time is not read again.
        """
        if len(names) == 1:
            try:
                return [self.read(names[0])]
            except FileNotFoundError:
                return [None]
        stamps = {name: str(sorted(info.items())) for name, info in self._infos(names).items()}
        kept = {n: self.kept[n] for n in stamps if self.kept.get(n, ("",))[0] == stamps[n]}
        stale = [n for n in stamps if n not in kept]
        with self._asking(f"{len(stale)} objects"):
            fetched = (
                self.fs.cat([self._path(n) for n in stale], on_error="return") if stale else {}
            )
        for name in stale:
            data = fetched.get(self._path(name))
            if isinstance(data, bytes):
                kept[name] = (stamps[name], data)
            elif not isinstance(data, FileNotFoundError):
                raise self._error(name, data)
        self.kept.update(kept)  # in one step: other threads read too
        return [kept[n][1] if n in kept else None for n in names]

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """Fetch a whole object and open it; raises FileNotFoundError."""
        copy = self.scratch / f"{name}.tmp.{worker()}"
        try:
            self.fetch(name, copy)
            with open(copy, "rb") as file:
                yield file
        finally:
            copy.unlink(missing_ok=True)

    def fetch(self, name: str, target: Path) -> None:
        """Copy an object to a local file, partial after an error; raises FileNotFoundError."""
        with self._asking(name):
            self.fs.get_file(self._path(name), str(target))

    def write(self, name: str, content: bytes | str) -> None:
        """Write a whole object."""
        data = content.encode() if isinstance(content, str) else content
        with self._asking(name, writing=True):
            self.fs.pipe_file(self._path(name), data)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object if there is none of that name; return whether it was written."""
        with self._asking(name, writing=True):
            try:
                self.fs.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:  # S3 where another creates or removes it at the same time
                if CONFLICT not in str(error.__cause__):
                    raise
                return False
        return True

    def put(self, built: Path, name: str) -> None:
        """Copy a whole file of `scratch` into the store."""
        with self._asking(name, writing=True):
            self.fs.put_file(str(built), self._path(name))

    def remove(self, name: str) -> None:
        """Remove an object if it exists."""
        with self._asking(name):
            try:
                self.fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def move(self, name: str, target: str) -> None:
        """Rename an object: copy, then remove."""
        with self._asking(name, writing=True):
            self.fs.cp_file(self._path(name), self._path(target))
            self.fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _list(self, part: str, directories: bool = False) -> dict[str, dict[str, Any]]:
        path = f"{self.root}/{part}".rstrip("/")
        with self._asking(part):
            try:
                self.fs.invalidate_cache(path)
                infos = self.fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        names = {info["name"].rstrip("/").rpartition("/")[2]: info for info in infos}
        return {n: i for n, i in names.items() if directories or i.get("type") == "file"}

    def _infos(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Look up some objects with one listing for each of their folders."""
        parts = {name.rpartition("/")[0] for name in names}
        listed = {
            f"{part}/{name}" if part else name: info
            for part in parts
            for name, info in self._list(part).items()
        }
        return {name: listed[name] for name in names if name in listed}

    @contextmanager
    def _asking(self, name: str, writing: bool = False) -> Iterator[None]:
        """Turn any exception of the client into a UserError that names the object.

        A FileNotFoundError of a read and an error of the local disk pass unchanged.
        """
        try:
            yield
        except FileNotFoundError as error:
            if not writing:
                raise
            raise self._error(name, error) from error
        except UserError:
            raise
        except Exception as error:  # the errors of clients share no base class
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            raise self._error(name, error) from error

    def _error(self, name: str, error: Any) -> UserError:
        message, place = " ".join(str(error).split()) or repr(error), str(self / name).rstrip("/")
        return UserError(
            f"{place}: the store refuses ({type(error).__name__}: {message}); check that it "
            "exists and can be reached, and that its client has credentials; then repeat the command"
        )


Store = Folder | Bucket
Place = str | os.PathLike[str] | Store
_unplugged = False


class Unread(NotReady):
    """A URL that a dry run does not read: who wrote a config shall not learn who plans it."""


@contextmanager
def unplugged(dry_run: bool) -> Iterator[None]:
    """Let `at` raise Unread for every URL during a dry run."""
    global _unplugged
    before, _unplugged = _unplugged, dry_run
    try:
        yield
    finally:
        _unplugged = before


def is_unplugged() -> bool:
    """Return whether this is a dry run, which contacts no host that a config names."""
    return _unplugged


def at(place: Place) -> Store:
    """Return the folder or store of a path or URL.

    Raises:
        UserError: fsspec has no client for the URL.
        Unread: This is a dry run, and the place a URL.
    """
    if isinstance(place, (Folder, Bucket)):
        return place
    if _unplugged and is_url(place):
        raise Unread(f"{place} is read when the stage runs: a dry run contacts no host", [place])
    return _bucket(str(place), os.getpid()) if is_url(place) else Folder(Path(place))


def check_folder(place: Place, key: str) -> None:
    """Check that a folder can be made there: no part of its path is a file.

    Raises UserError that names the file. key: the config's key, for the message.
    """
    if is_url(place):
        return
    path = Path(str(place))
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            what = "is a file" if part == path else f"lies below the file {part}"
            raise UserError(f"{key}={place} {what}; expected a folder, or a path for a new one")


def is_url(place: Place) -> bool:
    """Return whether a place is in an object store."""
    return isinstance(place, Bucket) or (isinstance(place, str) and "://" in place)


@functools.cache  # one client for each process, which keeps small objects; a fork makes its own
def _bucket(url: str, process: int) -> Bucket:
    import fsspec

    protocol = url.partition("://")[0]
    to_fs: Callable[..., Any] = fsspec.core.url_to_fs
    try:
        # A cached listing would hide the commits of other workers.
        fs, root = to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from None
    except ValueError as error:
        expected = "a local folder, or a URL such as s3://BUCKET/PREFIX, gs://, hf://"
        raise UserError(f"{url}: {error}; expected {expected}") from None
    if not root.strip("/"):
        raise UserError(f"{url} has no bucket; expected a URL such as {protocol}://BUCKET/PREFIX")
    if protocol in ("file", "local"):
        raise UserError(f"{url} is a local folder; use the path {root}")
    return Bucket(url.rstrip("/"), fs, root.rstrip("/"), protocol in EXCLUSIVE)
