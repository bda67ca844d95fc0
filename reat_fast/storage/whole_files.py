"""Files and folders that are whole or not there at all.

Each is written under another name and moved into place, so that what bears its proper name is whole
whenever the program or the machine ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then move it into place when it is on the disk.

    Errors: OSError naming the file, with what was there before still in place.
    """
    partial = path.with_name(path.name + ".part")
    try:
        partial.open("ab").close()  # PyTorch has one error for any reason: here it is named
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        full = "inline_container" in str(error)  # so PyTorch calls a disk that takes no more
        if isinstance(error, RuntimeError) and not full:
            raise
        reason = "No space left on device" if full else getattr(error, "strerror", None) or error
        raise OSError(f"{path}: cannot be written ({reason})") from error
    finally:
        with contextlib.suppress(OSError):  # of a read-only folder
            partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk too, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def refuse_unwritable(path: Path) -> None:
    """Make the folder of a file and see whether it takes one, before there is work to lose.

    Errors: OSError naming the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError("is a folder; name a file")
        with path.with_name(path.name + ".part").open("wb") as file:
            file.truncate()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            path.with_name(path.name + ".part").unlink()


@contextmanager
def replacing(target: Path, names: Collection[str]) -> Iterator[Path]:
    """Give a place beside `target` for a file or folder, which takes its place when all went well.

    names: of the files that such a folder holds; a folder with others in it is never removed.
    Whatever goes wrong, what was written is removed and what was there before is there still.
    Errors: OSError naming the target, also for one raised while the place is filled, and where
    another process is filling it.
    """
    part, old = (target.with_name(f"{target.name}.{end}") for end in ("part", "old"))
    with alone(target), _exchanged(target, part, old, names):
        yield part


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Hold what is beside `target` for this process, its folder made; leaves no file behind.

    Errors: OSError naming the target, where another process holds it.
    """
    lock = target.with_name(f"{target.name}.lock")
    refused = f"{target}: another process is writing it; wait for it, or name another place"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OSError(f"{target}: cannot be written ({error.strerror or error})") from error
    try:
        with contextlib.suppress(ImportError):  # a system without locks
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(refused) from None
            except OSError:
                pass  # a file system without them
        # Who held it before may have removed the file in between: then this is no lock on it.
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise OSError(refused)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def _exchanged(target: Path, part: Path, old: Path, names: Collection[str]) -> Iterator[None]:
    """Put `part`, which the block fills, in the place of `target`; see replacing."""
    try:
        _remove(part, names)
        yield
        if target.is_dir():  # a folder can only take the place of an empty one
            _remove(old, names)
            _exchange(target, part, old)
            with contextlib.suppress(OSError):  # the new one is in place
                _remove(old, names)
        else:
            part.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(part, names)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OSError(f"{target}: cannot be written ({reason}); nothing was kept") from error
        raise


def _exchange(target: Path, part: Path, old: Path) -> None:
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _remove(place: Path, names: Collection[str]) -> None:
    """Remove what bears these names; anything else in a folder makes it stay, with an OSError."""
    if place.is_dir() and not place.is_symlink():
        for file in place.iterdir():
            if file.name.removesuffix(".part") in names:
                file.unlink()
        place.rmdir()
    else:
        place.unlink(missing_ok=True)
