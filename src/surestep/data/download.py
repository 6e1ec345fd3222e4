"""Downloads of the official archives: verified, and complete or not at all.

Archives go to ``$SURESTEP_DATA`` or ``~/.cache/surestep``. One put there by hand is used instead
of a download if its checksum is right. The MD5 sums are those published at
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from surestep.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_TIMEOUT = 30.0  # seconds without a byte, not for the whole download


@dataclass(frozen=True)
class Archive:
    """A tar.gz archive on the web.

    Attributes:
        url: its address.
        md5: its published checksum, 32 hexadecimal digits.
        folder: the folder it unpacks to.
    """

    url: str
    md5: str
    folder: str

    @property
    def file(self) -> str:
        """The file name of the archive."""
        return self.url.rsplit("/", 1)[-1]


_CIFAR = "https://www.cs.toronto.edu/~kriz"
CIFAR10_BINARY = Archive(
    f"{_CIFAR}/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin"
)
CIFAR10_PYTHON = Archive(
    f"{_CIFAR}/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"
)
CIFAR100_BINARY = Archive(
    f"{_CIFAR}/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary"
)
CIFAR100_PYTHON = Archive(
    f"{_CIFAR}/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"
)


def default_root() -> Path:
    """Return the folder for downloaded data: ``$SURESTEP_DATA``, else ``~/.cache/surestep``.

    Raises:
        UserError: there is no home folder.
    """
    place = os.environ.get("SURESTEP_DATA") or "~/.cache/surestep"
    try:
        return Path(place).expanduser()
    except RuntimeError as e:
        raise UserError(
            f"cannot resolve {place!r} ({e}): set SURESTEP_DATA to a folder, or give --data"
        ) from e


def fetch(archives: tuple[Archive, ...], root: Path) -> Path:
    """Ensure that the folder of one of ``archives`` exists under ``root``, and return it.

    The first archive that is already in ``root`` is unpacked; if none is, the first of all is
    downloaded. An interrupted download or extraction leaves nothing that could be mistaken for a
    complete one.

    Args:
        archives: equivalent archives, the preferred one first.
        root: the folder to put it in; created if missing.

    Raises:
        UserError: no network, a web page or a damaged file instead of the archive, a full disk,
            a folder that cannot be written.
    """
    archive = next((a for a in archives if (root / a.file).is_file()), None)
    downloaded = archive is None
    archive = archive or archives[0]
    path = root / archive.file
    # Processes of one run, or several runs, may get here at the same time.
    with _one_line(archive, root), _alone(root / f".{archive.folder}.lock"):
        if _unpacked(root / archive.folder):
            return root / archive.folder
        if downloaded:
            log.info("downloading %s to %s", archive.url, root)
            _download(archive, path)
        else:
            with path.open("rb") as file:
                digest = hashlib.md5(usedforsecurity=False)
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
            _check(archive, digest.hexdigest(), path)
        _extract(archive, path)
        if downloaded:
            path.unlink(missing_ok=True)
    return root / archive.folder


def _unpacked(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


class _Failure(Exception):
    """A failure described in words; `_one_line` adds what to do."""


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process at a time run the body; the lock file is deleted afterwards."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    with contextlib.suppress(NotImplementedError):  # a file system without locks
        held.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot delete an open file
            lock.unlink(missing_ok=True)
        held.release()


@contextmanager
def _one_line(archive: Archive, root: Path) -> Iterator[None]:
    """Turn any failure between the web and the disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            reason = f"the disk of {root} is full"
        elif isinstance(error, urllib.error.HTTPError):
            reason = f"{archive.url} answered {error.code} {error.reason}"
            error.close()  # it carries the open connection
        elif isinstance(error, (urllib.error.URLError, TimeoutError, ConnectionError)):
            reason = f"no connection to {archive.url} ({getattr(error, 'reason', error)})"
        else:
            reason = str(error)
    except http.client.HTTPException as error:
        reason = f"the connection to {archive.url} broke ({error or type(error).__name__})"
    except (tarfile.TarError, EOFError, zlib.error) as error:
        reason = f"{archive.file} cannot be unpacked ({error})"
    except _Failure as error:
        reason = str(error)
    else:
        return
    raise UserError(
        f"cannot get {archive.folder}: {reason}; put {archive.file} or the unpacked folder "
        f"{archive.folder} into {root} by hand"
    )


def _download(archive: Archive, path: Path) -> None:
    """Download to a temporary file beside ``path``; rename it once the checksum is right."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            digest = _stream(archive, file)
        _check(archive, digest, archive.url)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _stream(archive: Archive, file: BinaryIO) -> str:
    """Copy the archive from the web into ``file``; return the MD5 of what was written."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    digest = hashlib.md5(usedforsecurity=False)
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal)
    with urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as answer, bar:
        length = answer.headers.get("Content-Length")
        total = int(length) if length else None
        task = bar.add_task(archive.file, total=total)
        done = 0
        while chunk := answer.read(_CHUNK):
            if done == 0 and not chunk.startswith(_GZIP):
                page = "a web page" if chunk.lstrip().startswith(b"<") else "something else"
                raise _Failure(f"{archive.url} returned {page} instead of a gzip archive")
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            bar.update(task, completed=done)
    if total is not None and done < total:
        raise _Failure(f"{archive.url} stopped after {done} of {total} bytes")
    return digest.hexdigest()


def _check(archive: Archive, found: str, where: str | Path) -> None:
    if found != archive.md5:
        raise _Failure(f"{where} has MD5 {found}, expected {archive.md5}: it is damaged or changed")


def _extract(archive: Archive, path: Path) -> None:
    """Unpack beside ``path`` under a temporary name, so that a partial folder is never found."""
    with tempfile.TemporaryDirectory(prefix=f".{archive.folder}.", dir=path.parent) as scratch:
        with tarfile.open(path, "r:gz") as tar:
            if not hasattr(tarfile, "data_filter"):
                raise _Failure(
                    "this Python is too old to unpack it safely, use 3.10.12, 3.11.4 or newer"
                )
            tar.extractall(scratch, filter="data")
        unpacked = Path(scratch) / archive.folder
        if not unpacked.is_dir():
            raise _Failure(f"{archive.file} does not hold the folder {archive.folder}")
        target = path.parent / archive.folder
        try:
            unpacked.replace(target)
        except OSError:  # without locks, another process was faster
            if not _unpacked(target):
                raise
