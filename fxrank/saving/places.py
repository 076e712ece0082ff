"""Places to write to: tried before they are needed, held by one run at a time, filled by whole files.

A file is written beside its place, under a name of its own, and moved into it: what was there before stays until the new
one is whole, a symbolic link is replaced and not written through, and a writing that fails leaves nothing behind.
"""

import errno
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows, where runs do not hold their folders
    fcntl = None

LOCK = "run.lock"
_held: set[Path] = set()
"""The folders that runs of this very process hold: a process is not kept out by its own lock."""


def put(place: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Let `write` make a file, and move it to `place`; `durable` flushes it to the disk first. If anything fails, what was
    there stays as it was. Raises `OSError`, and what `write` raises.
    """
    partial = place.with_name(place.name + ".partial")
    partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which would be followed
    try:
        write(partial)
        if durable:
            _flush(partial)
        os.replace(partial, place)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if durable and os.name == "posix":  # the new name must reach the disk too
        _flush(place.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_places(folder: Path, names: Iterable[str]) -> None:
    """Make the folder, and raise `OSError` unless files of these names can be written into it. Nothing else is left there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            for place in (folder / name, folder / f"{name}.partial"):
                if place.is_dir() and not place.is_symlink():
                    raise IsADirectoryError(errno.EISDIR, f"{place.name} in it is a folder")
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(
            error.errno,
            f"output_dir must be a folder that can be written; {folder} is not: {error.strerror or error}. Change that, or pass another",
        ) from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Meanwhile no other run may hold the folder. Raises `BlockingIOError` that names the process that does.

    The system lets go of the lock of a process that dies, however it does: what is left then is a file, taken over by the next.
    """
    own = folder.resolve()
    if own in _held:
        raise _in_use(folder, f"process {os.getpid()}, this very one,")
    descriptor = _locked(folder)
    _held.add(own)
    try:
        yield
    finally:
        _held.discard(own)
        if descriptor is not None:
            with suppress(OSError):
                (folder / LOCK).unlink()  # while it is still locked: nobody else can have taken it
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """An open file that is locked; None where the system or the disk knows no locks.

    Of the kind that belongs to the process: its children, a loader's workers, do not inherit it, and may outlive it.
    """
    while fcntl is not None:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 300).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(folder, holder or "another process") from None
            return None
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except FileNotFoundError:  # the one that had it has ended meanwhile, and taken it away
            pass
        os.close(descriptor)
    return None


def _in_use(folder: Path, holder: str) -> BlockingIOError:
    return BlockingIOError(
        errno.EWOULDBLOCK,
        f"a folder belongs to one run at a time; {folder} is in use by {holder}. Wait for its end, stop it, or pass another output_dir",
    )
