"""What is left of a network's accuracy: a model on its challenge, or images of the user's own."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from logit_reg.attacks.engine.low_precision import followed_dtype
from logit_reg.evaluation.ledger import evaluation_identity, evaluation_name
from logit_reg.evaluation.run import decided_by_repeats
from logit_reg.evaluation.units import attack_notices
from logit_reg.experiments.attack_choice import Protocols, is_strong
from logit_reg.experiments.evaluations import (
    EVALUATIONS,
    TestImages,
    claim_file,
    claim_output_dir,
    compute_batches,
    evaluate_protocols,
    network_name,
    note_file,
    open_state,
    plan_evaluation,
    print_estimate,
    read_attack_dtype,
)
from logit_reg.experiments.own_models import OwnModel
from logit_reg.experiments.sources import RUNS, Model, num_examples
from logit_reg.experiments.submissions import write_adversarial
from logit_reg.experiments.workers import WorkerSettings, run_workers
from logit_reg.files import write_array
from logit_reg.messages import notice, tell
from madry_compat.challenges import challenge_for, image_set
from madry_compat.data import Dataset, to_pixels

_OWN_BATCH_SIZE = 200
# Of a robust network, AutoAttack takes seconds an image.
_MOST_AUTOATTACKED = 1000


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network, the images that it is measured on, and where the results go.

    Attributes:
        network: images in pixel units -> logits.
        test: what to attack.
        provenance: of the network and the images, for `result.json`.
        folder: gets a folder of each evaluation.
        batch_size: images at once, unless another number is asked for.
        store: writes worst-case images to a file.
        prefix: of the name of each evaluation's folder.
        run_folder: of the run that the network belongs to, if it does.
        pgd_flatters: whether the network is of the family that PGD flatters.
    """

    network: keras.Model
    test: TestImages
    provenance: dict[str, Any]
    folder: Path
    batch_size: int
    store: Callable[[Path, np.ndarray], None] = write_array
    prefix: str = ""
    run_folder: Path | None = None
    pgd_flatters: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation is made, beside its attacks.

    Attributes:
        seed: of the attacks.
        batch_size: images at once; the subject's if None.
        worst_case_only: see `logit_reg.evaluation.run.evaluate`.
        attack_dtype: what attacks follow: "auto", "float32" or "bfloat16".
        eot: see `logit_reg.evaluation.run.evaluate`.
        output_dir: of the results; a folder of the subject's, named after the evaluation, if None.
        store_adv_path: file for the worst-case images, if any.
        workers: processes that share the work, if any do.
        is_worker: compute batches for another process, and no result.
        show_progress: draw progress bars.
    """

    seed: int = 0
    batch_size: int | None = None
    worst_case_only: bool = False
    attack_dtype: str = "auto"
    eot: int = 1
    output_dir: Path | None = None
    store_adv_path: Path | None = None
    workers: WorkerSettings | None = None
    is_worker: bool = False
    show_progress: bool = True


def challenge_subject(model: Model, dataset: Dataset, count: int | None, first: int = 0) -> Subject:
    """A model on the images of a challenge; tells what makes its numbers doubtful.

    Args:
        model: the network with its run, if it has one.
        dataset: the test set.
        count: how many of its images; None for all.
        first: place of the first of them.
    """
    name = dataset.name
    challenge = challenge_for(name)
    end = first + num_examples(count, len(dataset.images), first)
    provenance = {
        "model": str(model.path),
        "canonical": dataset.canonical,
        "note": dataset.note,
        "contaminated": _is_contaminated(model, name),
        "release": model.release,
    }
    if model.training is not None:
        provenance["training"] = model.training
    if model.folder is not None:
        folder = model.folder / EVALUATIONS
    else:
        folder = RUNS / EVALUATIONS / network_name(model.path, model.network, name)
    return Subject(
        model.network,
        TestImages(
            name,
            to_pixels(dataset.images[:end], name),
            dataset.labels[:end],
            (challenge.lower, challenge.upper),
        ).without_first(first),
        provenance,
        folder,
        challenge.eval_batch_size,
        store=lambda path, images: write_adversarial(path, images, dataset, challenge),
        prefix="" if model.run is None or name == model.run.dataset else f"{name}-",
        run_folder=model.folder,
        pgd_flatters=model.is_squeezed,
    )


def own_subject(own: OwnModel) -> Subject:
    """A network on images of the user's own."""
    return Subject(
        own.network,
        TestImages(
            own.data.stem, own.images, own.labels, (own.threat.lower, own.threat.upper)
        ).without_first(own.first),
        {"model": str(own.model), "data": str(own.data)},
        RUNS / EVALUATIONS / own.name,
        _OWN_BATCH_SIZE,
    )


def measure(
    subject: Subject, protocols: Protocols, settings: EvaluationSettings
) -> tuple[Path, dict] | None:
    """Evaluate a network and write what was found.

    Args:
        subject: what is measured.
        protocols: attacks by protocol and name.
        settings: how.

    Returns:
        The folder and content of `result.json`; None in a worker, which leaves batches only.

    Raises:
        UsageError: if a folder or file to write holds something else.
    """
    network, test = subject.network, subject.test
    batch_size = settings.batch_size or subject.batch_size
    attacks = [attack for named in protocols.values() for attack in named.values()]
    lower = read_attack_dtype(
        settings.attack_dtype,
        network,
        test.upto.images,
        batch_size,
        is_repeated=decided_by_repeats(attacks, settings.eot),
    )
    what: dict[str, Any] = {
        "seed": settings.seed,
        "worst_case_only": settings.worst_case_only,
        "gradient_logits_fn": lower,
        "eot": settings.eot,
    }
    how: dict[str, Any] = {"batch_size": batch_size, "show_progress": settings.show_progress}
    tell(attack_notices(attacks, test.images.shape[1:]))
    plan = plan_evaluation(network, test, protocols, **what)
    identity = evaluation_identity(plan)
    name = evaluation_name(plan | {"settings": subject.provenance | plan["settings"]})
    output_dir = settings.output_dir or subject.folder / f"{subject.prefix}{name}"
    if settings.is_worker:
        state = open_state(output_dir, network)
        compute_batches(network, test, protocols, state, **what, **how)
        return None
    claim_output_dir(output_dir, plan)
    adv_path = settings.store_adv_path
    if adv_path is not None:
        claim_file(adv_path, identity, "--store_adv_path")
    print_estimate(network, test, protocols, batch_size=batch_size, eot=settings.eot)
    if settings.workers is not None:
        run_workers(
            settings.workers,
            output_dir,
            followed_dtype(lower),
            show_progress=settings.show_progress,
        )

    def store(images: np.ndarray) -> None:
        if adv_path is not None:
            subject.store(adv_path, images)
            print(f"adversarial images: {adv_path}")
            note_file(adv_path, identity)

    _, result = evaluate_protocols(
        network,
        test,
        protocols,
        output_dir,
        settings=subject.provenance,
        store=store,
        **what,
        **how,
    )
    return output_dir, result


def next_step(
    subject: Subject, result: Mapping[str, Any], output_dir: Path
) -> tuple[str, dict[str, Any]]:
    """What comes after an evaluation: AutoAttack on the same images or, after that, the table.

    Args:
        subject: what was measured.
        result: content of `result.json`.
        output_dir: its folder.

    Returns:
        Name of a command and the flags that it needs, beside those that name model and data.
    """
    if not any(map(is_strong, result["protocols"])) and subject.test.before is None:
        count = min(result["num_examples"], _MOST_AUTOATTACKED)
        return "eval_challenge", {"protocol": "autoattack", "num_eval_examples": count}
    above = [folder.resolve() for folder in output_dir.parents]
    if RUNS.resolve() in above:
        return "report", {}
    run = subject.run_folder
    return "report", {"runs": run if run is not None and run.resolve() in above else output_dir}


def _is_contaminated(model: Model, name: str) -> bool:
    """Whether the images are some that the run was trained on."""
    taken_from = image_set(name).taken_from
    contaminated = model.run is not None and model.run.dataset == taken_from
    if contaminated:
        notice(
            f"warning: this run was trained on {taken_from} and {name} consists of {taken_from}'s "
            "training images: the numbers are of no value and never enter a table."
        )
    return contaminated
