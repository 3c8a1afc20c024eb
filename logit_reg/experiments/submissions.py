"""Scoring and writing `attack.npy` files, with the challenge's own checks."""

import tempfile
from pathlib import Path

import numpy as np

from logit_reg.evaluation.run import predict
from logit_reg.files import write_array
from madry_compat.challenges import Challenge
from madry_compat.data import Dataset, to_pixels
from madry_compat.submissions import (
    check_submission,
    format_score,
    load_submission,
    require_canonical,
    score_submission,
    worst_case,
    write_predictions,
    write_submission,
)


def score_files(
    network,
    paths: list[Path],
    test: Dataset,
    challenge: Challenge,
    *,
    epsilon: float | None,
    batch_size: int,
    pred_path: Path,
) -> float:
    """Score submissions as the challenge's `run_attack.py` does; write the predictions.

    Args:
        network: images in pixel units -> logits.
        paths: `attack.npy` files; several give the per-example worst case, and the predictions
            written are then, for each example, those of the first file that fools.
        test: the canonical test set.
        challenge: decides shapes, bounds and epsilon.
        epsilon: another budget, pixel units; the challenge's if None.
        batch_size: images sent through the network at once.
        pred_path: where the predictions go, once all files have passed all checks.

    Returns:
        The accuracy.

    Raises:
        SubmissionError: if a file would not be accepted.
    """
    prepare_output(pred_path)
    require_canonical(f"{test.name} {test.split} ({test.note or test.source})", test.canonical)
    natural = to_pixels(np.asarray(test.images), test.name)
    predictions = []
    for path in paths:
        adversarial = load_submission(path, challenge)
        check_submission(adversarial, natural, challenge, epsilon=epsilon, name=path.name)
        accuracy, predicted = score_submission(
            lambda images: predict(network, images, batch_size=batch_size),
            adversarial,
            test.labels,
            batch_size,
        )
        predictions.append(predicted)
        if len(paths) > 1:
            print(f"{path}: {100 * accuracy:.2f}%")
    correct = worst_case(predictions, test.labels)
    combined = predictions[0].copy()
    for predicted in predictions[1:]:
        still_correct = combined == test.labels
        combined[still_correct] = predicted[still_correct]
    write_predictions(pred_path, combined)
    print(format_score(float(correct.mean()), pred_path))
    return float(correct.mean())


def prepare_output(path: Path) -> None:
    """Make the folder of a file, and see that one can be written there before hours of work.

    Raises:
        OSError: if not, with the file's name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"{path}: cannot be written ({error.strerror}); choose another folder."
        ) from error


def write_adversarial(path: Path, adversarial, test: Dataset, challenge: Challenge) -> None:
    """Write worst-case images: a submission where they are one, else a plain array.

    Args:
        path: the `.npy` file.
        adversarial: (N, H, W, C) float32, pixel units.
        test: the data set they come from.
        challenge: decides the shape of a submission.
    """
    if test.canonical and len(adversarial) == challenge.num_test_examples:
        natural = to_pixels(np.asarray(test.images), test.name)
        check_submission(adversarial, natural, challenge, name=path.name)
        write_submission(path, adversarial, challenge)
        print(f"submission: {path}, accepted by the {challenge.name} challenge's checks")
        return
    write_array(path, adversarial)
    reason = test.note if not test.canonical else f"{len(adversarial)} images, not the whole set"
    print(f"adversarial images: {path} (not a submission: {reason})")
