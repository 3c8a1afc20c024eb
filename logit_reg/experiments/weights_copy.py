"""Copy the arrays of an HDF5 file that nobody vouches for: `weights_copy.py SOURCE TARGET`.

A process of its own, because libhdf5 was not written for hostile files: one that makes it crash,
hang or swell ends this process and not the command. What it copies, it wrote itself.
"""

import resource
import signal
import sys
from pathlib import Path

import h5py

_MAX_ITEMS = 10_000
_MAX_DEPTH = 16
# Beside the arrays themselves, of which one at a time is in memory.
_FREE_BYTES = 512 * 2**20
_FREE_SECONDS = 1.0
_BYTES_PER_SECOND = 50e6


def copy_weights(source: Path, target: Path) -> None:
    """Copy groups and arrays of numbers; attributes, which are names for people, are left out.

    Args:
        source: an HDF5 file as Keras writes it: no links, every array whole and uncompressed.
        target: the file to write.

    Raises:
        ValueError: if an array lies elsewhere, is larger than the file or holds no numbers.
        Exception: whatever libhdf5 has to say of a damaged file.
    """
    with h5py.File(source, "r") as old, h5py.File(target, "w") as new:
        _copy_group(old, new, [source.stat().st_size], [_MAX_ITEMS], depth=0)


def _copy_group(old, new, bytes_left, items_left, depth):
    for name in old:
        items_left[0] -= 1
        if items_left[0] < 0 or depth > _MAX_DEPTH:
            raise ValueError("too many or too deep groups")
        if not isinstance(old.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{name} is a link")
        item = old[name]
        if isinstance(item, h5py.Group):
            _copy_group(item, new.create_group(name), bytes_left, items_left, depth + 1)
            continue
        if not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
            raise ValueError(f"{name} is no array in this file")
        if item.shape is None or item.dtype.kind not in "iufb":
            raise ValueError(f"{name} is no array of numbers")
        bytes_left[0] -= item.nbytes
        if bytes_left[0] < 0:
            raise ValueError(f"{name} is declared to be larger than the file")
        new.create_dataset(name, data=item[()])


def _limit(source: Path) -> None:
    """Let a file that swells or hangs end this process."""
    size = source.stat().st_size
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * size + _FREE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, _FREE_SECONDS + size / _BYTES_PER_SECOND)


def main() -> None:
    """Exit with 0 or one line of explanation."""
    source, target = map(Path, sys.argv[1:])
    _limit(source)
    try:
        copy_weights(source, target)
    # h5py raises nearly anything; whatever it is, these are no weights.
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
