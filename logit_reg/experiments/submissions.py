"""Making, scoring and writing `attack.npy` files, with the challenge's own checks."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from logit_reg.evaluation.ledger import FLAGS_PROTOCOL, evaluation_identity
from logit_reg.evaluation.run import evaluate, network_hash, predict
from logit_reg.evaluation.state import EvaluationState
from logit_reg.evaluation.units import attack_notices
from logit_reg.experiments.attack_choice import AttackChoice
from logit_reg.experiments.evaluations import (
    TestImages,
    claim_file,
    note_file,
    plan_evaluation,
    read_attack_dtype,
)
from logit_reg.experiments.sources import Model, num_examples
from logit_reg.files import write_array
from logit_reg.messages import tell
from madry_compat.challenges import Challenge, challenge_for
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


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """How adversarial images are made, and where they go."""

    path: Path
    """The `.npy` file; how it was made is noted beside it."""
    attack: AttackChoice
    """One attack, by its settings, and the threat model."""
    seed: int = 0
    """Of the attack."""
    num_examples: int | None = None
    """How many test images, from the first; all if None."""
    batch_size: int | None = None
    """Images at once; the challenge's if None."""
    attack_dtype: str = "auto"
    """What the attack follows, see `read_attack_dtype`."""
    show_progress: bool = True
    """Draw a progress bar."""


def attack_and_score(
    model: Model, target: Model | None, test: Dataset, settings: AttackSettings
) -> None:
    """Write adversarial images of one network; print what they leave of its accuracy.

    Finished batches are kept beside the file, so that the same call goes on after a kill.

    Args:
        model: what to attack.
        target: another network to score the images on, for a transfer attack.
        test: the test set of the data set.
        settings: the attack and the file.

    Raises:
        UsageError: if the file is there and was made with other settings.
    """
    name, challenge = test.name, challenge_for(test.name)
    batch_size = settings.batch_size or challenge.eval_batch_size
    count = num_examples(settings.num_examples, len(test.images))
    images, labels = to_pixels(test.images[:count], name), test.labels[:count]
    attacks = settings.attack.attack(settings.attack.threat(challenge), challenge)
    tell(attack_notices(attacks.values(), images.shape[1:]))
    lower = read_attack_dtype(settings.attack_dtype, model.network, images, batch_size)
    plan = plan_evaluation(
        model.network,
        TestImages(name, images, labels, (challenge.lower, challenge.upper)),
        {FLAGS_PROTOCOL: attacks},
        seed=settings.seed,
        gradient_logits_fn=lower,
    )
    path = settings.path
    claim_file(path, evaluation_identity(plan), "--store_adv_path")
    state = EvaluationState(path.parent / f".{path.stem}.state", network_hash(model.network))
    found = evaluate(
        model.network,
        attacks,
        images,
        labels,
        batch_size=batch_size,
        seed=settings.seed,
        state=state,
        show_progress=settings.show_progress,
        gradient_logits_fn=lower,
    )
    write_adversarial(path, found.adversarial, test, challenge)
    note_file(path, evaluation_identity(plan))
    state.clear()
    for role, scored in {"attacked": model, "target": target}.items():
        if scored is None:
            continue
        clean, robust = (
            np.mean(predict(scored.network, given, batch_size=batch_size) == labels)
            for given in (images, found.adversarial)
        )
        print(
            f"{role} {scored.path}: clean {100 * clean:.2f}%, on these images "
            f"{100 * robust:.2f}% ({count} of {name}, {next(iter(attacks))}, seed {settings.seed})"
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
