"""The checks and the scoring of the challenges' submissions.

A submission is the file `attack.npy`: a perturbed copy of the whole test set, in its original
order. It comes from strangers, so its header is checked before a byte of it is loaded.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from madry_compat.challenges import Challenge
from madry_compat.files import write_atomically

# Slack of the challenges' run_attack.py, on pixel values and on the perturbation, in pixel units.
TOLERANCE = 1e-4

_CHUNK = 500


class SubmissionError(ValueError):
    """A submission that the challenge does not accept; the message says why and what to do."""


def require_canonical(dataset_note: str, canonical: bool) -> None:
    """Refuse to score or write a submission against anything but the original test set.

    Args:
        dataset_note: what the test set is and why it is not canonical, for the message.
        canonical: whether images and order were proved to be the original ones.

    Raises:
        SubmissionError: if it is not canonical.
    """
    if not canonical:
        raise SubmissionError(
            f"a submission perturbs the original test set in its original order, which this is "
            f"not: {dataset_note}. Point --data_dir or --data_path at the original files."
        )


def load_submission(path: str | os.PathLike[str], challenge: Challenge) -> np.ndarray:
    """Read and validate an `attack.npy`.

    Args:
        path: a .npy file of float16, float32 or float64 values in `challenge.submission_shape`.
        challenge: decides the shape and the pixel range.

    Returns:
        (10000, H, W, C) float32 in the challenge's pixel units.

    Raises:
        SubmissionError: if the file is missing, damaged, not a plain array of floats, has another
            shape, a NaN or an infinity, or leaves the pixel range by more than 1e-4.

    Source:
        `run_attack.py` of both challenges. Deviations: the CIFAR-10 script has no NaN check, and
        both read pickles and integer arrays, which wrap around when subtracted.
    """
    path = Path(path)
    try:
        if not path.is_file():
            state = "is not a regular file" if path.exists() else "does not exist"
            raise SubmissionError(f"{path}: {state}, expected a .npy file. Check the path.")
        with path.open("rb") as file:
            submission = _read_floats(file, path.name, challenge)
    except (OSError, EOFError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise SubmissionError(
            f"{path}: cannot be read ({reason}), expected a .npy file. Check the file."
        ) from error

    images = submission.reshape(-1, *challenge.image_shape)
    _check_pixels(images, path.name, challenge)
    return np.ascontiguousarray(images, dtype=np.float32)


def check_submission(
    adversarial: np.ndarray,
    natural: np.ndarray,
    challenge: Challenge,
    *,
    epsilon: float | None = None,
    name: str = "submission",
) -> np.ndarray:
    """Check that every adversarial image lies within epsilon of its natural one.

    Args:
        adversarial: (N, H, W, C) in the challenge's pixel units.
        natural: (N, H, W, C) in the same units, in the same order.
        challenge: gives the default epsilon.
        epsilon: allowed l-infinity distance in pixel units, if not the challenge's.
        name: what to call the submission in a message, such as its file name.

    Returns:
        (N,) float64 l-infinity distances in pixel units.

    Raises:
        SubmissionError: if a distance exceeds epsilon by more than 1e-4 or is not a number.
        ValueError: if the shapes differ, or `natural` is not in the challenge's pixel units.
    """
    epsilon = challenge.epsilon if epsilon is None else epsilon
    if not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon must be finite and at least 0, in pixel units; got {epsilon}.")
    if adversarial.shape != natural.shape or natural.shape[1:] != challenge.image_shape:
        raise ValueError(
            f"adversarial and natural must both be (N, {', '.join(map(str, challenge.image_shape))}"
            f"); got {adversarial.shape} and {natural.shape}."
        )
    if natural.size and not challenge.lower <= natural.min() <= natural.max() <= challenge.upper:
        raise ValueError(
            f"natural images must lie in [{challenge.lower:g}, {challenge.upper:g}]; got "
            f"[{natural.min():g}, {natural.max():g}]. Convert them to pixel units first."
        )

    distances = np.empty(len(natural))
    for start in range(0, len(natural), _CHUNK):
        rows = slice(start, start + _CHUNK)
        # Cast before subtracting: unsigned integers wrap around.
        difference = adversarial[rows].astype(np.float64) - natural[rows].astype(np.float64)
        distances[rows] = np.abs(difference).max(axis=(1, 2, 3))

    # Written so that a NaN counts as outside.
    outside = ~(distances <= epsilon + TOLERANCE)
    if outside.any():
        # argmax takes a NaN for the largest, which is what we want named.
        worst = int(np.argmax(distances))
        raise SubmissionError(
            f"{name}: maximum perturbation found: {distances[worst]:.6g} (image {worst}; "
            f"{int(outside.sum())} of {len(distances)} images are outside), maximum perturbation "
            f"allowed: {epsilon:g} in linf. Clip each image to within epsilon of the original."
        )
    return distances


def score_submission(
    predict: Callable[[np.ndarray], Any],
    adversarial: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
) -> tuple[float, np.ndarray]:
    """Classify a submission as the challenge's `run_attack.py` does.

    Args:
        predict: from (B, H, W, C) float32 in pixel units to (B,) predicted classes.
        adversarial: (N, H, W, C) in pixel units.
        labels: (N,) true classes.
        batch_size: images per call of `predict`; the last batch may be smaller.

    Returns:
        The accuracy as a fraction, and the (N,) int64 predictions.

    Raises:
        ValueError: if the lengths differ, `batch_size` is not positive, or `predict` gives
            something else than one class for each image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if not len(adversarial) or labels.shape != (len(adversarial),):
        raise ValueError(
            f"labels must be ({len(adversarial)},), one for each of at least one image; "
            f"got {labels.shape}."
        )
    batches = []
    for start in range(0, len(adversarial), batch_size):
        images = adversarial[start : start + batch_size].astype(np.float32, copy=False)
        batch = np.asarray(predict(images))
        if batch.shape != (len(images),) or batch.dtype.kind not in "iu":
            raise ValueError(
                f"predict must give ({len(images)},) integer classes; got {batch.shape} of "
                f"{batch.dtype}. Take the argmax of the logits over their last axis."
            )
        batches.append(batch.astype(np.int64))
    predictions = np.concatenate(batches)
    return int((predictions == labels).sum()) / len(labels), predictions


def worst_case(predictions: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Per example, whether it is classified correctly under every submission.

    Args:
        predictions: at least one (N,) array, one for each submission.
        labels: (N,) true classes.

    Returns:
        (N,) bool; its mean is the worst-case accuracy.

    Raises:
        ValueError: if there are no predictions or their shape is not that of the labels.
    """
    if not predictions or any(array.shape != labels.shape for array in predictions):
        shapes = ", ".join(str(array.shape) for array in predictions) or "none"
        raise ValueError(f"predictions must be arrays of shape {labels.shape}; got {shapes}.")
    return np.logical_and.reduce([array == labels for array in predictions])


def format_score(accuracy: float, path: str | os.PathLike[str] = "pred.npy") -> str:
    """The two lines that the challenges' `run_attack.py` ends with.

    Args:
        accuracy: as a fraction.
        path: the file of predictions that was written.
    """
    return f"Accuracy: {100.0 * accuracy:.2f}%\nOutput saved at {os.fspath(path)}"


def write_submission(
    path: str | os.PathLike[str], adversarial: np.ndarray, challenge: Challenge
) -> None:
    """Write a valid `attack.npy`: float32, flattened for MNIST, whole or not at all.

    The distance to the natural images is not checked here; call `check_submission` first.

    Args:
        path: the file to write, under exactly this name.
        adversarial: (10000, H, W, C) float in the challenge's pixel units, in test-set order.
        challenge: decides the shape and the pixel range.

    Raises:
        SubmissionError: if the challenge would refuse the array.
    """
    name = Path(path).name
    _check_dtype(adversarial.dtype, name)
    expected = (challenge.num_test_examples, *challenge.image_shape)
    if adversarial.shape != expected:
        raise SubmissionError(
            f"{name}: shape {adversarial.shape}, expected {expected}. "
            f"A submission holds the whole test set; attack all of it."
        )
    _check_pixels(adversarial, name, challenge)
    submission = adversarial.reshape(challenge.submission_shape).astype(np.float32)
    write_atomically(path, lambda file: np.save(file, submission, allow_pickle=False))


def write_predictions(path: str | os.PathLike[str], predictions: np.ndarray) -> None:
    """Write `pred.npy`, int64 as the challenges' own, whole or not at all.

    Args:
        path: the file to write, under exactly this name.
        predictions: (N,) integer classes.

    Raises:
        ValueError: if the predictions are not a vector of integers.
    """
    if predictions.ndim != 1 or predictions.dtype.kind not in "iu":
        raise ValueError(
            f"predictions must be (N,) integer classes; got {predictions.shape} of "
            f"{predictions.dtype}."
        )
    classes = predictions.astype(np.int64)
    write_atomically(path, lambda file: np.save(file, classes, allow_pickle=False))


def _read_floats(file: IO[bytes], name: str, challenge: Challenge) -> np.ndarray:
    """The array in an open .npy file, once its header promises what the challenge expects."""
    size = os.fstat(file.fileno()).st_size
    shape, dtype = _read_header(file, name)
    _check_dtype(dtype, name)
    if shape != challenge.submission_shape:
        raise SubmissionError(
            f"{name}: shape {_show_shape(shape)}, expected {challenge.submission_shape}. "
            f"{_shape_remedy(shape, challenge)}"
        )
    needed = file.tell() + int(np.prod(shape)) * dtype.itemsize
    if size < needed:
        raise SubmissionError(
            f"{name}: truncated, {size} bytes where its header promises {needed}. "
            f"Write or copy the file again."
        )
    file.seek(0)
    try:
        return np.load(file, allow_pickle=False)
    except ValueError as error:
        raise SubmissionError(
            f"{name}: cannot be read ({error}). Write or copy the file again."
        ) from error


def _read_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        with warnings.catch_warnings():
            # Headers written under Python 2, as most old submissions are, are only slow to read.
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(file)
            shape, _, dtype = readers[version](file)
    # Beside ValueError, a mutated header makes numpy's parser raise tokenizer, recursion,
    # memory and type errors; every one of them means the same.
    except Exception as error:
        raise SubmissionError(
            f"{name}: not a .npy array of version 1.0 or 2.0, expected what numpy.save writes. "
            f"Save one float32 array with numpy.save."
        ) from error
    return shape, dtype


def _check_dtype(dtype: np.dtype, name: str) -> None:
    if dtype.hasobject:
        raise SubmissionError(
            f"{name}: holds pickled objects, expected float32. Pickles can run code and are "
            f"never loaded; save images.astype(numpy.float32)."
        )
    if dtype.kind in "iu":
        raise SubmissionError(
            f"{name}: dtype {dtype}, expected float32. Integers wrap around when the original "
            f"images are subtracted; save images.astype(numpy.float32) in pixel units."
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        # A structured dtype prints as long as its author likes.
        shown = str(dtype) if len(str(dtype)) <= 40 else f"{str(dtype)[:40]}..."
        raise SubmissionError(
            f"{name}: dtype {shown!r}, expected float32. Save images.astype(numpy.float32)."
        )


def _show_shape(shape: tuple[int, ...]) -> str:
    # A header may hold thousands of dimensions, or one too long for Python to print.
    if len(shape) > 8 or any(abs(size) > 2**63 for size in shape):
        return f"with {len(shape)} dimensions of absurd size or number"
    return str(shape)


def _shape_remedy(shape: tuple[int, ...], challenge: Challenge) -> str:
    count, height, width, channels = challenge.num_test_examples, *challenge.image_shape
    expected = challenge.submission_shape
    if shape[:1] != (count,) and shape[1:] == expected[1:]:
        return f"A submission holds all {count} test images, in the original order."
    if len(expected) == 2 and shape[1:3] == (height, width):
        return f"MNIST submissions are flattened; use images.reshape(-1, {expected[1]})."
    if len(expected) == 4 and shape == (count, height * width * channels):
        return f"CIFAR submissions are not flattened; use images.reshape{(-1, *expected[1:])}."
    if len(expected) == 4 and shape == (count, channels, height, width):
        return "Channels come last; use images.transpose(0, 2, 3, 1)."
    return f"Save the perturbed {challenge.name} test set as one array."


def _check_pixels(images: np.ndarray, name: str, challenge: Challenge) -> None:
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    if not finite.all():
        raise SubmissionError(
            f"{name}: image {int(np.argmin(finite))} has a NaN or infinite pixel ("
            f"{int((~finite).sum())} images do), expected numbers in "
            f"[{challenge.lower:g}, {challenge.upper:g}]. Repair the attack that made it."
        )
    low, high = float(images.min()), float(images.max())
    if low < challenge.lower - TOLERANCE or high > challenge.upper + TOLERANCE:
        raise SubmissionError(
            f"{name}: Invalid pixel range. Expected [{challenge.lower:g}, {challenge.upper:g}], "
            f"found [{low:.6g}, {high:.6g}]. Clip the images to the range of the challenge."
        )
