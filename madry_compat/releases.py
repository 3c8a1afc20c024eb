"""Released models as checkpoints: which one a checkpoint is, what was published of it, packing.

Only the sha256 of the released archives is known, not that of the weights. A checkpoint is taken
for a release where its files are those of such an archive, or where its index, which holds the
checksum of every value, is that of a release.
"""

import glob
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from madry_compat.bundle_index import STATE_FILE, find_prefix
from madry_compat.challenges import challenge_for, published_results
from madry_compat.fetch import RELEASES, Release, matches_archive, sha256_of
from madry_compat.files import write_atomically

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
_CHUNK = 2**20


def identify_release(
    path: str | os.PathLike[str], releases: Mapping[str, Release] = RELEASES
) -> str | None:
    """The released model that a checkpoint is, proved by a hash.

    Proof is either the index file, whose checksums of the values are verified when these are
    read, or an archive with a published hash that the checkpoint's files are in. Such an archive
    is looked for as NAME.zip beside the folders above the checkpoint: in the cache of
    `madry_compat.fetch`, and where the challenges' own scripts put it.

    Args:
        path: as for `madry_compat.tf1_checkpoints.load_network`.
        releases: the known models.

    Returns:
        A key of `releases`, such as "mnist/secret"; None where nothing proves one.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
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


def published_accuracies(release: str) -> Mapping[str, float]:
    """Published accuracies of a released model, see `challenges.published_results`.

    Args:
        release: a key of `fetch.RELEASES`, such as "mnist/secret".
    """
    challenge, _, model = release.partition("/")
    return published_results(challenge_for(challenge), model)


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
