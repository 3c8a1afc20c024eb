"""Released challenge models: download, proof by sha256, packing of one's own in the same form.

Two of the released archives have no known hash. Of the weights themselves no hash is known: a
checkpoint is taken for a release where its files are those of an archive with a published hash,
or where its index, which holds the checksum of every value, is that of a release.

TensorFlow is imported where a checkpoint is looked for only: fetching needs none.
"""

import errno
import fcntl
import functools
import glob
import io
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pooch

from madry_compat.archives import (
    FetchError,
    is_unpacked,
    matches_archive,
    unpack,
)
from madry_compat.files import default_cache_dir, one_line, write_atomically

MAX_ARCHIVE_BYTES = 2 * 2**30

_CHUNK = 2**20
_DOWNLOAD_CHUNK = 2**14
_TIMEOUT_SECONDS = 30

# sha256 of the released models' index files, as far as they are known.
_INDEXES = {
    "a4b36ffe36f31cb87b850fc8b0f7d588caeaa5231354bf1979ee9439c621a656": "mnist/secret",
}

# A checkpoint lies at NAME/models/NAME/checkpoint-N of the cache, below the archive NAME.zip.
_ARCHIVE_DEPTH = 4

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# The earliest that a zip archive knows.
_DATE = (1980, 1, 1, 0, 0, 0)
_UNIX = 3


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
    progress: Any = False,
    notice: Callable[[str], None] = print,
) -> Path:
    """Download a released model, verify it and unpack it; what is already there is reused.

    The archive is kept as `cache_dir/NAME.zip` and unpacked into `cache_dir/NAME/`. An archive
    put there by hand is used without a network. An interrupted download goes on at the next call.

    Args:
        name: a key of `releases`, such as "mnist/secret".
        cache_dir: where archives and models are kept; `default_cache_dir()` if None.
        releases: the known models.
        progress: a `tqdm` bar of bytes that follows the download, or False.
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
    by_hand = f"Without a network, put {release.url} at {archive} by hand and fetch again."

    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            _download(release.url, archive, progress, by_hand)
        if not archive.is_file():
            raise FetchError(f"{archive} is not a regular file. {by_hand}")
        digest = sha256_of(archive)
    except OSError as error:
        raise FetchError(
            f"{name}: the cache folder {cache} cannot be used ({one_line(error)}). "
            f"Make room or choose another one, for example with $LOGIT_REG_CACHE."
        ) from error
    if release.sha256 is None:
        notice(f"{archive}: sha256 {digest} is unverified: no published hash to compare it with.")
    elif digest != release.sha256:
        raise _reject(archive, digest, release)

    if not directory.exists():
        unpack(archive, directory)
    elif not is_unpacked(archive, directory):
        raise FetchError(
            f"{directory} differs from {archive}, expected its contents unpacked. "
            f"Move the folder away and fetch again."
        )
    return _checkpoint_folder(directory)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The hex sha256 of a file."""
    return pooch.file_hash(os.fspath(path), alg="sha256")


def identify_release(
    path: str | os.PathLike[str], releases: Mapping[str, Release] = RELEASES
) -> str | None:
    """The released model that a checkpoint is, proved by a hash.

    Proof is either the index file, whose checksums of the values are verified when these are
    read, or an archive with a published hash that the checkpoint's files are in. Such an archive
    is looked for as NAME.zip beside the folders above the checkpoint: in the cache of `fetch`,
    and where the challenges' own scripts put it.

    Args:
        path: as for `madry_compat.tf1_checkpoints.load_network`.
        releases: the known models.

    Returns:
        A key of `releases`, such as "mnist/secret"; None where nothing proves one.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    from madry_compat.bundle_index import find_prefix

    prefix = find_prefix(path).absolute()
    index = prefix.with_name(f"{prefix.name}.index")
    if (name := _INDEXES.get(sha256_of(index))) is not None:
        return name
    files = [index, *_data_files(prefix)]
    names = {release.sha256: name for name, release in releases.items() if release.sha256}
    folders = index.parents[:_ARCHIVE_DEPTH]
    archives = [folder / f"{index.parent.name}.zip" for folder in folders]
    archives += [folder.parent / f"{folder.name}.zip" for folder in folders if folder.name]
    for archive in dict.fromkeys(archives):
        name = names.get(_sha256_if_readable(archive) or "")
        if name and any(matches_archive(archive, folder, files) for folder in folders):
            return name
    return None


def pack_release(
    zip_path: str | os.PathLike[str], folder: str | os.PathLike[str], name: str
) -> str:
    """Packs a checkpoint as the challenges' released archives are, the same bytes every time.

    The archive holds `models/NAME/checkpoint-N.*`, `models/NAME/checkpoint` and
    `models/NAME/config.json`, sorted, with one fixed date and not compressed: weights hardly
    compress, and two versions of zlib compress differently.

    Args:
        zip_path: the archive to write, whole or not at all.
        folder: holds the checkpoint, its `checkpoint` file and its `config.json`.
        name: of the model; letters, digits and . _ -

    Returns:
        The archive's sha256, which the challenges' `fetch_model.py` prints.

    Raises:
        ValueError: if the name is not a plain one, or a file is missing.
        OSError: if the archive cannot be written.
    """
    from madry_compat.bundle_index import STATE_FILE, find_prefix

    check_model_name(name)
    prefix = find_prefix(folder)
    files = [prefix.with_name(f"{prefix.name}.index"), *_data_files(prefix)]
    files += [prefix.with_name(STATE_FILE), prefix.with_name("config.json")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{prefix.parent}: no {', '.join(missing)}; export the checkpoint anew.")

    def write(target: IO[bytes]) -> None:
        with zipfile.ZipFile(target, "w") as archive:
            for file in sorted(files):
                entry = zipfile.ZipInfo(f"models/{name}/{file.name}", _DATE)
                entry.create_system = _UNIX
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                entry.file_size = file.stat().st_size
                with file.open("rb") as source, archive.open(entry, "w") as packed:
                    shutil.copyfileobj(source, packed, _CHUNK)

    write_atomically(zip_path, write)
    return sha256_of(zip_path)


def _download(url: str, archive: Path, progress: Any, by_hand: str) -> None:
    """Lets pooch bring an archive into its place, going on where an earlier call stopped."""
    part = archive.with_name(f"{archive.name}.part")
    pooch.get_logger().setLevel("WARNING")

    def download(url: str, output_file: str, _: object) -> None:
        with _Part(part) as file:
            file.fetch(url, progress)
            os.fsync(file)
        part.replace(output_file)
        file.validator.unlink(missing_ok=True)

    try:
        pooch.retrieve(url, None, archive.name, archive.parent, downloader=download)
    except FetchError as error:
        raise FetchError(f"{error} {by_hand}") from error
    except (OSError, ValueError) as error:
        # A full disk is not the network's fault.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = one_line(error)
        raise FetchError(f"{url}: download failed ({reason}). {by_hand}") from error


class _NotTheRest(Exception):
    """The server has no rest of the file that was begun."""


class _Part(io.FileIO):
    """An archive that arrives; pooch alone would begin it anew at each call."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "ab")
        # Holds what the server calls this version of the file, to ask for the rest of it.
        self.validator = path.with_name(f"{path.name}.validator")

    def fetch(self, url: str, progress: Any) -> None:
        """Brings the file to the full length of what the server has."""
        try:
            fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(
                f"{self.name} is being written by another process. Wait for it and fetch again."
            ) from error
        try:
            self._request(url, progress)
        except _NotTheRest:
            self.truncate(0)
            self._request(url, progress)

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > MAX_ARCHIVE_BYTES:
            self.truncate(0)
            raise FetchError(f"the archive has more than {MAX_ARCHIVE_BYTES} bytes allowed.")
        return super().write(data)

    def _request(self, url: str, progress: Any) -> None:
        headers = {"User-Agent": "logit-reg", "Accept-Encoding": "identity"}
        if offset := self.seek(0, os.SEEK_END):
            headers["Range"] = f"bytes={offset}-"
            if known := _read_validator(self.validator):
                headers["If-Range"] = known
        if progress is not False:
            # Pooch asks whether there is a bar, and tqdm has no answer without a total.
            progress.total = progress.total or 1
        download = pooch.HTTPDownloader(
            progressbar=progress,
            chunk_size=_DOWNLOAD_CHUNK,
            headers=headers,
            hooks={"response": functools.partial(self._begin, url, offset)},
            timeout=_TIMEOUT_SECONDS,
        )
        try:
            download(url, self, None)
        except OSError as error:
            # An error of requests, not of the disk.
            if error.errno is None and self.tell():
                raise FetchError(
                    f"{url}: the download stopped at {self.tell()} bytes "
                    f"({one_line(error)}). Fetch again to go on from there."
                ) from error
            raise

    def _begin(self, url: str, offset: int, response: Any, **_: object) -> None:
        """Judges a response before its body is read."""
        if response.is_redirect:
            return
        status, headers = response.status_code, response.headers
        if urlsplit(url).scheme == "https" and urlsplit(response.url).scheme != "https":
            raise FetchError(f"{url}: redirected away from https, which is not safe.")
        is_rest = headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        if offset and (status == 416 or (status == 206 and not is_rest)):
            raise _NotTheRest
        if status not in ((200, 206) if offset else (200,)):
            raise FetchError(f"{url}: the server answered {status}, expected the archive.")
        length = headers.get("Content-Length", "")
        if re.fullmatch(r"\d{1,18}", length) and int(length) > MAX_ARCHIVE_BYTES:
            raise FetchError(f"the archive has {length} bytes, allowed {MAX_ARCHIVE_BYTES}.")
        if status == 200:
            self.truncate(0)
            self.validator.write_text(_validator(headers))


def _validator(headers: Mapping[str, str]) -> str:
    """What identifies the server's version of a file: a strong ETag, else its date."""
    etag, date = headers.get("ETag", ""), headers.get("Last-Modified", "")
    if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag):
        return etag
    return date if re.fullmatch(r"[\x20-\x7e]{1,100}", date) else ""


def _read_validator(path: Path) -> str:
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch(r"[\x20-\x7e]{1,202}", text) else ""


def _reject(archive: Path, digest: str, release: Release) -> FetchError:
    """Moves an archive with the wrong hash aside, so that it is never used; returns the error."""
    rejected = archive.with_name(f"{archive.name}.rejected")
    archive.replace(rejected)
    return FetchError(
        f"{archive.name}: sha256 {digest}, expected {release.sha256}. It was moved to {rejected}; "
        f"fetch again, or put {release.url} at {archive} by hand."
    )


def _checkpoint_folder(directory: Path) -> Path:
    """The folder below `directory` with a checkpoint; the topmost and first by name, if several."""
    found = [path.parent for path in directory.rglob("checkpoint") if path.is_file()]
    found += [path.parent for path in directory.rglob("*.index")]
    return min(found, key=lambda path: (len(path.parts), path.name), default=directory)


def check_model_name(name: str) -> None:
    """See that a model's name is a plain one.

    Raises:
        ValueError: if it is not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a model's name consists of letters, digits, '.', '_' and '-'; got {name!r}."
        )


def _data_files(prefix: Path) -> list[Path]:
    return sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.data-*"))


def _sha256_if_readable(path: Path) -> str | None:
    """None for a file that is not there: whatever lies in the folders above is not our concern."""
    try:
        return sha256_of(path) if path.is_file() else None
    except OSError:
        return None
