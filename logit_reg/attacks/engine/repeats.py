"""Iterates that return bit for bit: an image that walks in a circle finds nothing new there."""

import hashlib
import re
from typing import Any

import numpy as np

# Operations that may give something else for the same input.
_CHANGES = re.compile("Random|Normal|Multinomial|Rng|PyFunc|Assign|Dequeue|Iterator")


class Repeats:
    """Who walks in a circle, and until when nothing has to be computed for them.

    For steps that are all the same function of the iterate: once an iterate returns, so do all
    that follow it. Those in between were judged before, and fooled nobody.
    """

    def __init__(self, num_images: int):
        """At first nobody of so many images does."""
        self._wakes = np.zeros(num_images, np.int64)
        self._seen: list[dict[bytes, int]] = [{} for _ in range(num_images)]
        self._is_sound: bool | None = None

    def awake(self, rows: np.ndarray, step: int) -> np.ndarray:
        """Those of some rows, (M,) int, for whom this step has to be computed."""
        return rows[self._wakes[rows] <= step]

    def look(self, step_fn: Any, rows, iterates, step: int, last: int) -> np.ndarray:
        """Let those sleep whose iterate was seen before, for as many circles as there is time.

        Args:
            step_fn: the compiled steps, of which the graph tells whether they can be relied on.
            rows: (M,) int who is awake.
            iterates: (M, H, W, C) float32 iterates before the step.
            step: its number.
            last: number of steps in all, when everybody's iterate has to be the right one.

        Returns:
            (L,) int: who of them is awake still.
        """
        for row, iterate in zip(rows, iterates, strict=True):
            digest = hashlib.blake2b(iterate.tobytes(), digest_size=16).digest()
            before = self._seen[row].setdefault(digest, step)
            if before < step:
                if self._is_sound is None:
                    self._is_sound = is_repeatable(step_fn)
                if self._is_sound:
                    length = step - before
                    self._wakes[row] = step + (last - step) // length * length
        return self.awake(rows, step)


def is_repeatable(function: Any) -> bool:
    """Whether a compiled function gives the same for the same input, so far as its graph tells.

    Args:
        function: from `compiled`.

    Returns:
        False if it draws random numbers other than from a seed, writes variables, or calls Python,
        at any depth.
    """
    definition = function.get_concrete_function().graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    names = {node.op for node in nodes}
    return not any(_CHANGES.search(name) and not name.startswith("Stateless") for name in names)
