"""Zip archives of strangers, unpacked with care.

An archive is untrusted, hash or not: every entry is judged before the first byte is written.
"""

import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from io import BufferedReader, FileIO
from pathlib import Path

from madry_compat.files import one_line

MAX_UNPACKED_BYTES = 4 * 2**30
MAX_ENTRIES = 1000
# Checkpoints hardly compress; their graph files do, up to some 30 times.
MAX_RATIO = 100

_RATIO_FREE_BYTES = 2**20
_CHUNK = 2**20
_MAX_DIRECTORY_BYTES = 8 * 2**20
_UNREADABLE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    OverflowError,
    LookupError,
    MemoryError,
)


class FetchError(RuntimeError):
    """A model that could not be fetched or unpacked; the message says what to do by hand."""


def unpack(zip_path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Unpack an untrusted zip archive, whole or not at all.

    Args:
        zip_path: the archive; its entries must be plain stored or deflated files and folders.
        directory: the folder to make; it must not exist, or be empty.

    Raises:
        FetchError: if the archive is damaged, encrypted, too large or too compressible, or has an
            entry that is a link or another special file, leads outside, or is there twice.
    """
    zip_path, directory = Path(zip_path), Path(directory)
    # A pipe would be waited for.
    if not zip_path.is_file():
        raise FetchError(f"{zip_path}: expected a zip archive; there is no such file.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FetchError(f"{directory} is in the way of {zip_path}. Move it away first.")
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".part", dir=directory.parent)
        )
        with _BoundedFile(zip_path) as file, zipfile.ZipFile(file) as archive:
            _extract(archive, temporary, zip_path)
        temporary.chmod(0o755)
        temporary.rename(directory)
    except _UNREADABLE as error:
        raise _unreadable(zip_path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


class _BoundedFile(BufferedReader):
    """A file that refuses to be read in one huge piece.

    zipfile reads the central directory at once and at the size the archive claims.
    """

    def __init__(self, path: Path):
        super().__init__(FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = _MAX_DIRECTORY_BYTES + 1
        if size > _MAX_DIRECTORY_BYTES + 1:
            raise zipfile.BadZipFile("its list of files is too large")
        return super().read(size)


def _extract(archive: zipfile.ZipFile, directory: Path, zip_path: Path) -> None:
    """Judge every entry, then write them all below `directory`."""
    entries = _safe_entries(archive, zip_path)
    total = 0
    for parts, entry in entries:
        target = directory.joinpath(*parts)
        if entry.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        # "x": an entry never replaces or follows what is there.
        with archive.open(entry) as source, target.open("xb") as file:
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                total += len(chunk)
                # The sizes in the header are only a claim.
                if written > entry.file_size or total > MAX_UNPACKED_BYTES:
                    raise zipfile.BadZipFile(f"{_show(entry)} is larger than it claims")
                file.write(chunk)
            if written != entry.file_size:
                raise zipfile.BadZipFile(f"{_show(entry)} is smaller than it claims")
            file.flush()
            os.fsync(file.fileno())


def _safe_entries(
    archive: zipfile.ZipFile, zip_path: Path
) -> list[tuple[tuple[str, ...], zipfile.ZipInfo]]:
    """The entries with the parts of their paths; raises FetchError at the first unsafe one."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise _refusal(zip_path, f"has {len(entries)} entries, allowed {MAX_ENTRIES}")
    size = sum(entry.file_size for entry in entries)
    if size > MAX_UNPACKED_BYTES:
        raise _refusal(zip_path, f"unpacks to {size} bytes, allowed {MAX_UNPACKED_BYTES}")
    packed = zip_path.stat().st_size
    if size > max(_RATIO_FREE_BYTES, MAX_RATIO * packed):
        raise _refusal(zip_path, f"unpacks to {size} bytes from {packed}: a zip bomb")

    paths: dict[tuple[str, ...], zipfile.ZipInfo] = {}
    for entry in entries:
        parts = _safe_parts(entry)
        problem = _problem(entry)
        if parts is None:
            problem = "has a path that leads outside or is not portable"
        elif parts in paths:
            problem = "is there twice"
        if parts is None or problem:
            raise _refusal(zip_path, f"{_show(entry)} {problem}")
        paths[parts] = entry
    for parts, entry in paths.items():
        above = (paths.get(parts[:depth]) for depth in range(1, len(parts)))
        if any(parent is not None and not parent.is_dir() for parent in above):
            raise _refusal(zip_path, f"{_show(entry)} lies below a file")
    return list(paths.items())


def _problem(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with an entry, its path apart."""
    kind = stat.S_IFMT(entry.external_attr >> 16)
    allowed = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
    if kind not in (0, allowed):
        return "is a link or special file"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is neither stored nor deflated"
    if entry.file_size > max(_RATIO_FREE_BYTES, MAX_RATIO * entry.compress_size):
        return f"unpacks to {entry.file_size} bytes from {entry.compress_size}: a zip bomb"
    return None


def _safe_parts(entry: zipfile.ZipInfo) -> tuple[str, ...] | None:
    """The parts of an entry's path below the folder of unpacking, or None if it is not safe."""
    # zipfile cuts a name at a NUL; the name behind it may be anything.
    if "\0" in entry.orig_filename or not entry.filename.isprintable():
        return None
    name = entry.filename.removesuffix("/")
    if "\\" in name or re.match(r"[A-Za-z]:", name) or len(name) > 1000:
        return None
    parts = tuple(name.split("/"))
    if any(part in ("", ".", "..") or len(part.encode()) > 200 for part in parts):
        return None
    return parts


def matches_archive(
    archive: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    paths: Iterable[str | os.PathLike[str]],
) -> bool:
    """Whether files are those of an archive unpacked into a folder, by their size and CRC.

    Args:
        archive: a zip archive.
        directory: the folder that it was unpacked into.
        paths: files below the folder.

    Raises:
        FetchError: if the archive cannot be read or is not safe.
    """
    entries = _unpacked_entries(Path(archive), Path(directory))
    return all(path in entries and _is_entry(path, entries[path]) for path in map(Path, paths))


def is_unpacked(archive: Path, directory: Path) -> bool:
    """Whether every file of the archive lies below the folder, by its size and CRC."""
    entries = _unpacked_entries(archive, directory)
    return all(_is_entry(path, entry) for path, entry in entries.items())


def _unpacked_entries(archive: Path, directory: Path) -> dict[Path, zipfile.ZipInfo]:
    """The files that an archive makes below the folder that it is unpacked into."""
    try:
        with _BoundedFile(archive) as file, zipfile.ZipFile(file) as opened:
            return {
                directory.joinpath(*parts): entry
                for parts, entry in _safe_entries(opened, archive)
                if not entry.is_dir()
            }
    except _UNREADABLE as error:
        raise _unreadable(archive, error) from error


def _is_entry(path: Path, entry: zipfile.ZipInfo) -> bool:
    """Whether a file has the size and CRC of an entry; an unreadable one has neither."""
    try:
        is_as_long = path.is_file() and path.stat().st_size == entry.file_size
        return is_as_long and _crc_of(path) == entry.CRC
    except OSError:
        return False


def _crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _unreadable(zip_path: Path, error: BaseException) -> FetchError:
    return FetchError(
        f"{zip_path}: cannot be unpacked ({one_line(error)}), expected a sound zip archive. "
        f"Remove it and fetch it again."
    )


def _refusal(zip_path: Path, problem: str) -> FetchError:
    return FetchError(
        f"{zip_path}: {problem}; nothing was unpacked. Do not use this archive; get another copy."
    )


def _show(entry: zipfile.ZipInfo) -> str:
    return f"entry {ascii(entry.orig_filename[:100])}"
