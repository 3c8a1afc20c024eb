"""Decoded arrays kept on disk and mapped into memory; never a reason to fail."""

import hashlib
import json
from pathlib import Path

import numpy as np

from madry_compat.data.checksums import content_hash
from madry_compat.data.sources import Arrays, DataError, Source
from madry_compat.files import default_cache_dir, one_line, write_atomically

# Part of every entry's name: raise it when a reader's result changes.
_FORMAT = 1


def cache_entry(cache_dir: str | Path | None, source: Source) -> Path:
    """Where the arrays of a source are kept: the start of the paths of an entry's files.

    The name changes with the source's files and with the checksums that the proof rests on.

    Args:
        cache_dir: `default_cache_dir()` if None.
        source: what will be read.

    Raises:
        DataError: if a file of the source is unreadable.
    """
    name = source.image_set.name
    files = []
    for path in source.files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"{path}: unreadable ({one_line(error)}); copy or download {name} again."
            ) from error
        files.append([path.name, status.st_size, status.st_mtime_ns])
    checksums = source.image_set.files
    place = str(source.folder.resolve())
    key = json.dumps([_FORMAT, name, source.split, place, files, checksums])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    return folder / f"{name}-{source.split}-{fingerprint}"


def read_cache(entry: Path) -> Arrays | None:
    """Maps an entry's arrays, read-only; None if there is no sound one."""
    images_file, labels_file, record_file = _files(entry)
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        images, labels = (
            # A plain view, which keeps the mapping: np.memmap surprises with its own subclass.
            np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for path in (images_file, labels_file)
        )
        if record["sha256"] != content_hash(images, labels):
            return None
        return Arrays(images, labels, record["note"])
    except Exception:  # an entry that cannot be read is built again
        return None


def write_cache(entry: Path, arrays: Arrays) -> None:
    """Writes an entry; an unwritable cache costs time, nothing else."""
    images_file, labels_file, record_file = _files(entry)
    record = {"note": arrays.note, "sha256": content_hash(arrays.images, arrays.labels)}
    text = json.dumps(record, indent=1).encode()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(images_file, lambda file: np.save(file, arrays.images))
        write_atomically(labels_file, lambda file: np.save(file, arrays.labels))
        write_atomically(record_file, lambda file: file.write(text))
    except OSError:
        return


def _files(entry: Path) -> tuple[Path, Path, Path]:
    return (
        entry.with_name(f"{entry.name}.images.npy"),
        entry.with_name(f"{entry.name}.labels.npy"),
        entry.with_name(f"{entry.name}.json"),
    )
