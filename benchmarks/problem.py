"""What a contender is given and what it gives back."""

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.cases import Case


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with its network and images, in files that every library can read."""

    case: Case
    folder: Path
    """Holds `network.keras`, `weights.npz` (see `networks.export`), `data.npz` and, for PGD,
    `starts.npz`."""
    threads: int
    """Processors to use."""
    autoattack_dir: str | None = None
    """Folder that holds the reference's package `autoattack`."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of `data.npz`: images (N, H, W, C) in pixel units, labels and logits."""
        with np.load(self.folder / "data.npz", allow_pickle=False) as file:
            return dict(file)

    def starts(self) -> np.ndarray:
        """Where each restart begins: (N, num_restarts, H, W, C) in pixel units."""
        with np.load(self.folder / "starts.npz", allow_pickle=False) as file:
            return file["starts"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one repetition found, if the case finds anything."""

    correct: np.ndarray | None = None
    """(N,) bool: classified right clean and attacked, judged where the peers judge (see
    `attack_contenders`)."""
    correct_any_iterate: np.ndarray | None = None
    """(N,) bool: the same, where any iterate that fools counts."""
    seconds: float | None = None
    """How long the work itself took, where something else comes after it; None: all of it."""
