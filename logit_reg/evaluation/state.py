"""What an evaluation has finished so far, and who is at what."""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from logit_reg.files import read_arrays, write_arrays

# Of a finished batch: its adversarial images, mostly.
_MAX_STATE_BYTES = 4 * 2**30


class EvaluationState:
    """Finished batches of an evaluation, kept in a folder so that a killed one goes on.

    A batch is found again only for the same network, data, settings, seed and batch. Several
    processes may share the folder, and with it the work: each computes the batches that no other
    is at.
    """

    def __init__(self, folder: Path | str, key: str):
        """Use a folder.

        Args:
            folder: made when the first batch is saved.
            key: hash of the network, see `network_hash`.
        """
        self._folder = Path(folder)
        self.key = key

    def load(self, description: str) -> dict[str, np.ndarray] | None:
        """The arrays saved under a description, or None; a damaged file counts as none."""
        try:
            return read_arrays(self._path(description), max_bytes=_MAX_STATE_BYTES)
        except ValueError:
            return None

    def save(self, description: str, arrays: dict[str, np.ndarray]) -> None:
        """Keep arrays under a description."""
        write_arrays(self._path(description), arrays)

    @contextlib.contextmanager
    def claim(self, description: str, *, wait: bool) -> Iterator[bool]:
        """Hold a batch while it is computed; a claim ends with its process, however that ends.

        Args:
            description: of the batch, as for `save`.
            wait: until no other process holds it.

        Yields:
            False if another process holds it.
        """
        path = self._path(description).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def clear(self) -> None:
        """Remove what was kept, once the results are written."""
        for path in (*self._folder.glob("*.npz"), *self._folder.glob("*.lock")):
            path.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, description):
        digest = hashlib.sha256(f"{self.key} {description}".encode()).hexdigest()
        return self._folder / f"{digest[:32]}.npz"
