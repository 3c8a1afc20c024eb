"""Released challenge models: download, sha256, safe unpacking.

An archive is untrusted until its hash is checked, and two of the published models have no known
hash, so unpacking trusts nothing: every entry is judged before the first byte is written.
"""

import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import stat
import struct
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from madry_compat.files import default_cache_dir

MAX_ARCHIVE_BYTES = 2 * 2**30
MAX_UNPACKED_BYTES = 4 * 2**30
MAX_ENTRIES = 1000
# Checkpoints hardly compress; their graph files do, up to some 30 times.
MAX_RATIO = 100

_RATIO_FREE_BYTES = 2**20
_CHUNK = 2**20
_TIMEOUT_SECONDS = 30
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
    """A model that could not be fetched; the message says what to do by hand."""


@dataclass(frozen=True)
class Release:
    """Where a released model is published.

    Attributes:
        url: http or https address of the zip archive.
        sha256: hex digest of the archive, or None where none was published.
    """

    url: str
    sha256: str | None = None


_MNIST_MODELS = "https://github.com/MadryLab/mnist_challenge_models/raw/master"
_CIFAR10_MODELS = "https://www.dropbox.com/s"

RELEASES: dict[str, Release] = {
    "mnist/natural": Release(
        f"{_MNIST_MODELS}/natural.zip",
        "3e4856e447628207f75034a6e5d425dcb2eadca221253818f7cce3c9def296e9",
    ),
    "mnist/adv_trained": Release(
        f"{_MNIST_MODELS}/adv_trained.zip",
        "c0b4d9a7083643c6fbbcb66a60985caf3969a8b152d3c6876ff498864ec555bb",
    ),
    "mnist/secret": Release(
        f"{_MNIST_MODELS}/secret.zip",
        "14eea09c72092db5c2eb5e34cd105974f42569281d2f34826316e356d057f96d",
    ),
    "cifar10/natural": Release(f"{_CIFAR10_MODELS}/cgzd5odqoojvxzk/natural.zip?dl=1"),
    "cifar10/adv_trained": Release(f"{_CIFAR10_MODELS}/g4b6ntrp8zrudbz/adv_trained.zip?dl=1"),
    "cifar10/secret": Release(
        f"{_CIFAR10_MODELS}/ywc0hg8lr5ba8zd/secret.zip?dl=1",
        "555be6e892372599380c9da5d5f9802f9cbd098be8a47d24d96937a002305fd4",
    ),
}


def fetch(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    releases: Mapping[str, Release] = RELEASES,
    progress: Callable[[int, int | None], None] | None = None,
    notice: Callable[[str], None] = print,
) -> Path:
    """Download a released model, verify it and unpack it; what is already there is reused.

    The archive is kept as `cache_dir/NAME.zip` and unpacked into `cache_dir/NAME/`. An archive
    put there by hand is used without a network. An interrupted download goes on at the next call.

    Args:
        name: a key of `releases`, such as "mnist/secret".
        cache_dir: where archives and models are kept; `default_cache_dir()` if None.
        releases: the known models.
        progress: called with the bytes that have arrived and the total, None if unknown.
        notice: called with a line of text when the archive's hash cannot be verified.

    Returns:
        The folder that holds the checkpoint; the unpacked folder itself if it holds none.

    Raises:
        ValueError: if `name` is not a known model.
        FetchError: if the archive cannot be downloaded, has the wrong hash or is not safe.
    """
    if name not in releases:
        options = ", ".join(repr(known) for known in releases)
        raise ValueError(f"model must be one of {options}; got {name!r}.")
    release = releases[name]
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    archive = cache / f"{name}.zip"
    directory = cache / name

    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            _download(release, archive, progress)
        if not archive.is_file():
            raise FetchError(f"{archive} is not a regular file. {_by_hand(release, archive)}")
        digest = sha256_of(archive)
    except OSError as error:
        raise FetchError(
            f"{name}: the cache folder {cache} cannot be used ({_reason(error)}). "
            f"Make room or choose another one, for example with $LOGIT_REG_CACHE."
        ) from error
    if release.sha256 is None:
        notice(f"{archive}: sha256 {digest} is unverified: no published hash to compare it with.")
    elif digest != release.sha256:
        raise _reject(archive, digest, release)

    if not directory.exists():
        unpack(archive, directory)
    elif not _is_unpacked(archive, directory):
        raise FetchError(
            f"{directory} differs from {archive}, expected its contents unpacked. "
            f"Move the folder away and fetch again."
        )
    return _checkpoint_folder(directory)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The hex sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(zip_path: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
    """Unpack an untrusted zip archive, whole or not at all.

    Args:
        zip_path: the archive; its entries must be plain stored or deflated files and folders.
        directory: the folder to make; it must not exist, or be empty.

    Raises:
        FetchError: if the archive is damaged, encrypted, too large or too compressible, or has an
            entry that is a link or another special file, leads outside, or stands twice.
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
            problem = "stands twice"
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


def _is_unpacked(archive: Path, directory: Path) -> bool:
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


def _checkpoint_folder(directory: Path) -> Path:
    """The folder below `directory` with a checkpoint; the topmost and first by name, if several."""
    found = [path.parent for path in directory.rglob("checkpoint") if path.is_file()]
    found += [path.parent for path in directory.rglob("*.index")]
    return min(found, key=lambda path: (len(path.parts), path.name), default=directory)


def _download(
    release: Release,
    archive: Path,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Download to `archive`.part, going on where an earlier call stopped, and rename it."""
    if urlsplit(release.url).scheme not in ("http", "https"):
        raise FetchError(f"{release.url} is not an http or https address. Correct the release.")
    part = archive.with_name(f"{archive.name}.part")
    validator = archive.with_name(f"{archive.name}.part.validator")
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(
                f"{part} is being written by another process. Wait for it and fetch again."
            ) from error
        try:
            _transfer(release.url, file, validator, progress)
        except FetchError as error:
            raise FetchError(f"{error} {_by_hand(release, archive)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # A full disk is not the network's fault.
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise FetchError(
                f"{release.url}: download failed ({_reason(error)}). {_by_hand(release, archive)}"
            ) from error
        file.flush()
        os.fsync(file.fileno())
        validator.unlink(missing_ok=True)
        part.rename(archive)


def _transfer(
    url: str,
    file: IO[bytes],
    validator: Path,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    """Bring `file`, opened for appending, to the full length of what the server has."""
    offset = file.seek(0, os.SEEK_END)
    if offset:
        with _open(url, offset, _read_validator(validator)) as response:
            if response.status == 206 and _continues(response, offset, validator):
                total = _total_of(response)
                _copy(response, file, total, progress)
                return
            if response.status == 416 and _total_of(response) == offset:
                return
            if response.status == 200:
                _start_afresh(response, file, validator, progress)
                return
    # Nothing to go on from, or a server that answered with another part than asked for.
    with _open(url) as response:
        if response.status != 200:
            raise FetchError(f"{url}: the server answered {response.status}, expected 200.")
        _start_afresh(response, file, validator, progress)


def _open(url: str, offset: int = 0, validator: str | None = None) -> Any:
    """The server's response, whatever its status below 500; asks for the rest from `offset`."""
    request = urllib.request.Request(url, headers={"User-Agent": "logit-reg"})
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        with error:
            raise FetchError(
                f"{url}: the server answered {error.code}, expected the archive."
            ) from error
    if urlsplit(url).scheme == "https" and urlsplit(response.url).scheme != "https":
        response.close()
        raise FetchError(f"{url}: redirected away from https, which is not safe.")
    return response


def _continues(response: Any, offset: int, validator: Path) -> bool:
    """Whether a partial response is the rest of the very file that was begun."""
    match = re.fullmatch(
        r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", response.headers.get("Content-Range", "")
    )
    if match is None or int(match[1]) != offset or int(match[2]) < offset:
        return False
    begun, offered = _read_validator(validator), _validator_of(response)
    return begun is None or offered is None or begun == offered


def _total_of(response: Any) -> int | None:
    """The full length of the file that a response is about, if it says so."""
    content_range = response.headers.get("Content-Range", "")
    if match := re.fullmatch(r"bytes (?:\*|\d+-\d+)/(\d{1,18})", content_range):
        return int(match[1])
    length = response.headers.get("Content-Length", "")
    return int(length) if response.status == 200 and re.fullmatch(r"\d{1,18}", length) else None


def _start_afresh(
    response: Any,
    file: IO[bytes],
    validator: Path,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    file.truncate(0)
    # What the next call needs to ask for the rest of this very file.
    validator.write_text(_validator_of(response) or "")
    _copy(response, file, _total_of(response), progress)


def _copy(
    response: Any,
    file: IO[bytes],
    total: int | None,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    done = file.seek(0, os.SEEK_END)
    if total is not None and total > MAX_ARCHIVE_BYTES:
        raise FetchError(f"the archive has {total} bytes, allowed {MAX_ARCHIVE_BYTES}.")
    while chunk := response.read1(_CHUNK):
        done += len(chunk)
        if done > MAX_ARCHIVE_BYTES:
            file.truncate(0)
            raise FetchError(f"the archive has more than {MAX_ARCHIVE_BYTES} bytes allowed.")
        file.write(chunk)
        if progress is not None:
            progress(done, total)
    if total is not None and done != total:
        file.flush()
        raise FetchError(
            f"the download stopped at {done} of {total} bytes. Fetch again to go on from there."
        )


def _validator_of(response: Any) -> str | None:
    """What identifies the server's version of a file: a strong ETag, else its date."""
    etag = response.headers.get("ETag", "")
    if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag):
        return etag
    date = response.headers.get("Last-Modified", "")
    return date if re.fullmatch(r"[\x20-\x7e]{1,100}", date) else None


def _read_validator(path: Path) -> str | None:
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[\x20-\x7e]{1,202}", text) else None


def _by_hand(release: Release, archive: Path) -> str:
    return f"Without a network, put {release.url} at {archive} by hand and fetch again."


def _reject(archive: Path, digest: str, release: Release) -> FetchError:
    """Move an archive with the wrong hash aside, so that it is never used; returns the error."""
    rejected = archive.with_name(f"{archive.name}.rejected")
    archive.replace(rejected)
    return FetchError(
        f"{archive.name}: sha256 {digest}, expected {release.sha256}. It was moved to {rejected}; "
        f"fetch again, or put {release.url} at {archive} by hand."
    )


def _unreadable(zip_path: Path, error: BaseException) -> FetchError:
    return FetchError(
        f"{zip_path}: cannot be unpacked ({_reason(error)}), expected a sound zip archive. "
        f"Remove it and fetch it again."
    )


def _reason(error: BaseException) -> str:
    """What an error says, on one line and without what a server or an archive may smuggle in."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if text.isprintable() else ascii(text))[:200]


def _refusal(zip_path: Path, problem: str) -> FetchError:
    return FetchError(
        f"{zip_path}: {problem}; nothing was unpacked. Do not use this archive; get another copy."
    )


def _show(entry: zipfile.ZipInfo) -> str:
    return f"entry {ascii(entry.orig_filename[:100])}"
