"""An evaluation from start to ledger: hash, estimate, attack, write, show."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from logit_reg.attacks import Attack, AttackWarning
from logit_reg.attacks.engine import low_precision as precision
from logit_reg.attacks.engine.forward import count_classes
from logit_reg.attacks.engine.low_precision import LowPrecision
from logit_reg.durations import in_words
from logit_reg.evaluation.ledger import (
    build_result,
    evaluation_identity,
    planned_result,
    told_differences,
    write_ledger,
)
from logit_reg.evaluation.protocols import left_out
from logit_reg.evaluation.run import (
    Evaluation,
    content_hash,
    estimate,
    evaluate,
    network_hash,
    predict,
)
from logit_reg.evaluation.slices import BEFORE, SLICE_NOTICE, UPTO
from logit_reg.evaluation.state import EvaluationState
from logit_reg.evaluation.units import attack_notices
from logit_reg.experiments.provenance import commit, versions
from logit_reg.files import read_json, write_arrays, write_json
from logit_reg.messages import UsageError
from logit_reg.report.published import published_accuracies
from logit_reg.text_columns import aligned
from madry_compat.data import Dataset

# Images kept with the ledger, for people to look at.
_EXAMPLES = 10

NAME_DIGITS = 6
"""Digits of a hash that tell networks, or data, of the same name apart."""

EXAMPLES_FILE = "examples.npz"

EVALUATIONS = "evaluations"
"""Folder, in a run's or in `runs`, of its evaluations."""


@dataclasses.dataclass(frozen=True)
class TestImages:
    """What a network is evaluated on."""

    dataset: str
    """Name of the data set, or of the user's file."""
    images: np.ndarray
    """(N, H, W, C) float32, pixel units."""
    labels: np.ndarray
    """(N,) int64."""
    bounds: tuple[float, float]
    """Lowest and highest pixel value."""
    first_index: int = 0
    """Place in the data set of the first of them; those before are at hand, see `upto`."""
    before: tuple[np.ndarray, np.ndarray] | None = None
    """Images and labels of the data set before these, where there are any."""

    def first(self, num_examples: int) -> "TestImages":
        """The first examples."""
        part = slice(num_examples)
        return dataclasses.replace(self, images=self.images[part], labels=self.labels[part])

    def without_first(self, num_examples: int) -> "TestImages":
        """The slice of a data set that begins after so many of its examples."""
        if not num_examples:
            return self
        images, labels = self.images, self.labels
        return dataclasses.replace(
            self,
            images=images[num_examples:],
            labels=labels[num_examples:],
            first_index=num_examples,
            before=(images[:num_examples], labels[:num_examples]),
        )

    @functools.cached_property
    def upto(self) -> "TestImages":
        """The data set from its first example to the last of these."""
        if self.before is None:
            return self
        images, labels = (
            np.concatenate(pair)
            for pair in zip(self.before, (self.images, self.labels), strict=True)
        )
        return TestImages(self.dataset, images, labels, self.bounds)

    @property
    def indices(self) -> np.ndarray:
        """(N,) int places in the data set."""
        return self.first_index + np.arange(len(self.images))


def evaluate_protocols(
    network: keras.Model,
    test: TestImages,
    protocols: Mapping[str, Mapping[str, Attack]],
    output_dir: Path,
    *,
    batch_size: int,
    seed: int,
    settings: dict,
    worst_case_only: bool = False,
    show_progress: bool = True,
    gradient_logits_fn: LowPrecision | None = None,
    eot: int = 1,
    store: Callable[[np.ndarray], None] | None = None,
) -> tuple[Evaluation, dict]:
    """Evaluate a network, write `result.json`, `ledger.csv` and `examples.npz`.

    A folder with a result of other settings is refused. Finished batches are kept in
    `output_dir/.state` until the results are written, so that the same call goes on after a kill.

    Args:
        network: images in pixel units -> logits.
        test: what to attack.
        protocols: attacks by protocol and name.
        output_dir: made if need be.
        batch_size: most images sent through the network at once.
        seed: of the attacks.
        settings: provenance of the network, for `result.json`.
        worst_case_only: see `logit_reg.evaluation.run.evaluate`.
        show_progress: draw progress bars.
        gradient_logits_fn: what the attacks follow, see `read_attack_dtype`.
        eot: see `logit_reg.evaluation.run.evaluate`.
        store: gets the worst-case images, before the finished batches are removed.

    Returns:
        The evaluation and the content of `result.json`.

    Raises:
        UsageError: if the folder holds another evaluation.
    """
    plan = plan_evaluation(
        network,
        test,
        protocols,
        seed=seed,
        worst_case_only=worst_case_only,
        gradient_logits_fn=gradient_logits_fn,
        eot=eot,
    )
    claim_output_dir(output_dir, plan)
    state = open_state(output_dir, network)
    evaluation = compute_batches(
        network,
        test,
        protocols,
        state,
        batch_size=batch_size,
        seed=seed,
        worst_case_only=worst_case_only,
        show_progress=show_progress,
        gradient_logits_fn=gradient_logits_fn,
        eot=eot,
    )
    num_classes = count_classes(network, test.images)
    omissions = [
        finding
        for name, attacks in protocols.items()
        for finding in left_out(name, next(iter(attacks.values())).threat, num_classes)
    ]
    evaluation = dataclasses.replace(
        evaluation, findings=tuple(dict.fromkeys([*omissions, *evaluation.findings]))
    )
    result = build_result(
        evaluation,
        protocols,
        dataset=test.dataset,
        settings={
            **settings,
            **plan["settings"],
            "eval_batch_size": batch_size,
            "versions": versions(),
            "commit": commit(),
        },
        seed=seed,
        first_example=test.first_index,
    )
    every = [attack for attacks in protocols.values() for attack in attacks.values()]
    units = attack_notices(every, test.images.shape[1:])
    result["notices"] += [dataclasses.asdict(found) for found in units]
    result["notices"] += training_notices(settings.get("training"))
    result["notices"] += slice_notices(result)
    _write_examples(output_dir, network, evaluation, test, batch_size)
    write_ledger(output_dir, evaluation, result, test.indices)
    if store is not None:
        store(evaluation.adversarial)
    release_output_dir(output_dir)
    return evaluation, result


def training_notices(training: Mapping[str, int] | None) -> list[dict]:
    """What to say of a network whose training was to go on.

    Args:
        training: "steps_done" and "steps_planned", and "stopped_at" where robustness had fallen to
            nothing; None for a network from elsewhere.

    Returns:
        Notices for `result.json`: name, message and value.
    """
    if not training or training["steps_done"] >= training["steps_planned"]:
        return []
    done, planned = training["steps_done"], training["steps_planned"]
    if "stopped_at" in training:
        message = (
            f"this run overfitted catastrophically at step {training['stopped_at']:,} of "
            f"{planned:,} and was stopped; this is its network of step {done:,}."
        )
        return [{"name": "stopped_run", "message": message, "value": done}]
    message = (
        f"this run is unfinished: its network has {done:,} of {planned:,} training steps; "
        f"the command that began it goes on."
    )
    return [{"name": "unfinished_run", "message": message, "value": done}]


def slice_notices(result: Mapping) -> list[dict]:
    """What to say of an evaluation that does not begin with the first image of its data set.

    Args:
        result: content of `result.json`.

    Returns:
        Notices for `result.json`: name, message and value.
    """
    first = result.get("first_example", 0)
    if not first:
        return []
    message = (
        f"these are images {first} to {first + result['num_examples'] - 1} of the data set alone, "
        f"a slice: eval_challenge.py --merge joins slices from the first image on."
    )
    return [{"name": SLICE_NOTICE, "message": message, "value": first}]


def plan_evaluation(
    network: keras.Model,
    test: TestImages,
    protocols: Mapping[str, Mapping[str, Attack]],
    *,
    seed: int,
    worst_case_only: bool = False,
    gradient_logits_fn: LowPrecision | None = None,
    eot: int = 1,
) -> dict:
    """What an evaluation is, before it is made; see `logit_reg.evaluation.ledger.planned_result`.

    Args:
        network: images in pixel units -> logits.
        test: what to attack.
        protocols: attacks by protocol and name.
        seed: of the attacks.
        worst_case_only: see `logit_reg.evaluation.run.evaluate`.
        gradient_logits_fn: what the attacks follow, see `read_attack_dtype`.
        eot: see `logit_reg.evaluation.run.evaluate`.
    """
    settings: dict[str, Any] = {
        "network_sha256": network_hash(network),
        **_data_hashes(test.images, test.labels),
        "worst_case_only": worst_case_only,
        "attack_dtype": precision.followed_dtype(gradient_logits_fn),
        **({"eot": eot} if eot > 1 else {}),
    }
    if test.before is not None:
        # They tell whether two slices are of the same data set.
        settings[BEFORE] = _data_hashes(*test.before)
        settings[UPTO] = _data_hashes(test.upto.images, test.upto.labels)
    return planned_result(
        protocols,
        dataset=test.dataset,
        num_examples=len(test.images),
        settings=settings,
        seed=seed,
        first_example=test.first_index,
    )


def _data_hashes(images, labels):
    return {"images_sha256": content_hash(images), "labels_sha256": content_hash(labels)}


def network_name(path: Path, network: keras.Model, data: str) -> str:
    """Name of the folder of what was made of a network from elsewhere on some data.

    Args:
        path: where the network came from.
        network: its content tells networks of the same name apart.
        data: name of the data.
    """
    return f"{path.stem or 'model'}-{network_hash(network)[:NAME_DIGITS]}-{data}"


def claim_output_dir(output_dir: Path, plan: dict) -> None:
    """Note in a folder which evaluation is made there.

    Args:
        output_dir: made if need be.
        plan: of `plan_evaluation`.

    Raises:
        UsageError: if the folder holds the result, or finished batches, of another evaluation.
    """
    wanted = evaluation_identity(plan)
    claim = _claim_file(output_dir)
    if (output_dir / "result.json").exists():
        held = evaluation_identity(read_json(output_dir / "result.json"))
        refuse_other_settings(output_dir, held, wanted, "--output_dir")
    if claim.exists():
        refuse_other_settings(output_dir, read_json(claim), wanted, "--output_dir")
    write_json(claim, wanted)


def release_output_dir(output_dir: Path) -> None:
    """Remove the note of `claim_output_dir` and finished batches, once the results are written."""
    _claim_file(output_dir).unlink(missing_ok=True)
    EvaluationState(state_folder(output_dir), "").clear()


def refuse_other_settings(place: Path, held: Mapping, wanted: Mapping, flag: str) -> None:
    """Refuse to write over what was made with other settings.

    Args:
        place: the folder or file to write.
        held: settings of what is there, by name; what is unknown of it is left out.
        wanted: settings of what is to be written.
        flag: with which another place is chosen.

    Raises:
        UsageError: if a setting differs, with what and what to do.
    """
    if differences := told_differences(held, wanted):
        raise UsageError(
            f"{place} holds what was made with other settings ({differences}); choose another "
            f"{flag}, or remove it to start anew."
        )


def claim_file(path: Path, wanted: Mapping, flag: str) -> None:
    """Refuse to write over a file without a record of its settings that fits, see `note_file`.

    Args:
        path: the file to write.
        wanted: settings of what is to be written.
        flag: with which another file is chosen.

    Raises:
        UsageError: if the file is there and was made with other settings, or does not say how.
    """
    record = _record_beside(path)
    if not path.exists():
        return
    if not record.exists():
        raise UsageError(
            f"{path} is there already and does not say how it was made; choose another {flag}, or "
            f"remove it."
        )
    refuse_other_settings(path, read_json(record), wanted, flag)


def note_file(path: Path, settings: Mapping) -> None:
    """Write beside a file, as `FILE.json`, the settings that it was made with."""
    write_json(_record_beside(path), settings)


def _record_beside(path):
    return path.with_name(f"{path.name}.json")


def _claim_file(output_dir):
    return state_folder(output_dir) / "evaluation.json"


def compute_batches(
    network: keras.Model,
    test: TestImages,
    protocols: Mapping[str, Mapping[str, Attack]],
    state: EvaluationState,
    *,
    batch_size: int,
    seed: int,
    worst_case_only: bool = False,
    show_progress: bool = True,
    gradient_logits_fn: LowPrecision | None = None,
    eot: int = 1,
) -> Evaluation:
    """Attack all batches that are not in the state yet, and keep them there.

    Processes that do so at the same time share the work.

    Args:
        network: images in pixel units -> logits.
        test: what to attack.
        protocols: attacks by protocol and name.
        state: of `open_state`.
        batch_size: most images sent through the network at once.
        seed: of the attacks.
        worst_case_only: see `logit_reg.evaluation.run.evaluate`.
        show_progress: draw progress bars.
        gradient_logits_fn: what the attacks follow, see `read_attack_dtype`.
        eot: see `logit_reg.evaluation.run.evaluate`.
    """
    with warnings.catch_warnings():
        # They are printed with the table, see `print_notices`.
        warnings.simplefilter("ignore", AttackWarning)
        return evaluate(
            network,
            _attacks(protocols),
            test.images,
            test.labels,
            batch_size=batch_size,
            seed=seed,
            worst_case_only=worst_case_only,
            indices=test.indices,
            sample=(test.upto.images, test.upto.labels),
            state=state,
            show_progress=show_progress,
            gradient_logits_fn=gradient_logits_fn,
            eot=eot,
        )


def read_attack_dtype(
    attack_dtype: str,
    network: keras.Model,
    images: np.ndarray,
    batch_size: int,
    *,
    is_repeated: bool = False,
) -> LowPrecision | None:
    """What the attacks follow; says so unless that is the network itself for want of a choice.

    Args:
        attack_dtype: value of --attack_dtype.
        network: images in pixel units -> logits.
        images: (N, H, W, C) float32, pixel units; a batch of them shows whether it bears bfloat16.
        batch_size: images sent through the network at once.
        is_repeated: whether repeated passes decide, which leaves float32 only.

    Raises:
        UsageError: if bfloat16 is asked for and the network does not bear it.
    """
    if is_repeated:
        if attack_dtype == "bfloat16":
            print(
                "attacks follow float32: a randomised network's logits differ from pass to pass, "
                "so that bfloat16 cannot be checked against them (--attack_dtype)"
            )
        return None
    try:
        lower, reason = precision.lower_precision(attack_dtype, network, images[:batch_size])
    except precision.PrecisionError as error:
        raise UsageError(f"--attack_dtype={attack_dtype}: {error}; take float32.") from None
    if lower is not None:
        print("attacks follow bfloat16, float32 decides (--attack_dtype)")
    elif attack_dtype == "auto" and reason != precision.NO_BFLOAT16:
        print(f"attacks follow float32: {reason} (--attack_dtype)")
    return lower


def print_estimate(
    network: keras.Model,
    test: TestImages,
    protocols: Mapping[str, Mapping[str, Attack]],
    *,
    batch_size: int,
    eot: int = 1,
) -> None:
    """Print how long one process takes: at most, or for cascades a range.

    A cascade takes the longest on images that stay robust; those of the first batch that PGD
    leaves say how many these may be.

    Args:
        network: images in pixel units -> logits.
        test: what to attack.
        protocols: attacks by protocol and name.
        batch_size: most images sent through the network at once.
        eot: see `logit_reg.evaluation.run.evaluate`.
    """
    attacks = _attacks(protocols)
    how = {"batch_size": batch_size, "eot": eot}
    found = estimate(network, attacks, test.images, test.labels, **how)
    least, most = in_words(found.least), in_words(found.most)
    told, why = f"at most {most}", ""
    if least != most:
        told = f"{least} to {most}"
        why = (
            f"the latter if the {100 * found.left:.0f} % that withstand two steps of PGD withstand "
            f"all; "
        )
    print(
        f"estimate: {told} for {len(attacks)} attack{'s' if len(attacks) > 1 else ''} on "
        f"{len(test.images):,} images ({why}kept batch by batch; the same command goes on)",
        flush=True,
    )


def open_state(output_dir: Path, network: keras.Model) -> EvaluationState:
    """The finished batches of a network's evaluation, in `output_dir/.state`."""
    return EvaluationState(state_folder(output_dir), network_hash(network))


def state_folder(output_dir: Path) -> Path:
    """Where an evaluation keeps its finished batches until its results are written."""
    return output_dir / ".state"


def published_beside(release: str | None, dataset: Dataset) -> Mapping[str, float]:
    """What was published of a released model on these images; says which model it is.

    Args:
        release: such as "mnist/secret"; None for any other model.
        dataset: what it is evaluated on; only the canonical test set compares.

    Returns:
        What `print_result` takes; empty if nothing compares.
    """
    if release is None:
        return {}
    print(f"\nmodel: the released {release}, proved by a hash")
    if dataset.canonical and dataset.name == release.partition("/")[0]:
        return published_accuracies(release)
    print("       its published numbers are for the original test set, which this is not")
    return {}


def print_result(result: dict, published: Mapping[str, float] | None = None) -> None:
    """Print an evaluation as a table, accuracies in per cent.

    Args:
        result: content of `result.json`.
        published: accuracies of this released model by "clean", "protocol/loss" or "protocol",
            see `published_accuracies`; they get a column of their own.
    """
    published = published or {}
    count = result["num_examples"]
    rows = [("clean", "", result["clean_accuracy"], None, published.get("clean"))]
    for protocol, content in result["protocols"].items():
        attacks = content["attacks"]
        for name, attack in attacks.items():
            # A protocol of one attack is published under its own name.
            key = protocol if len(attacks) == 1 else f"{protocol}/{name.rpartition('-')[2]}"
            last, known = attack["accuracy_last_iterate"], published.get(key)
            rows.append((name, protocol, attack["accuracy"], last, known))
        if len(attacks) > 1:
            rows.append(("worst case", protocol, content["robust_accuracy"], None, None))
    header = ("attack", "protocol", "accuracy", "last iterate", "published" if published else "")
    cells = [(name, label, *map(_percent, numbers)) for name, label, *numbers in rows]
    print("", *aligned([header, *cells], num_left=2), sep="\n")
    if published:
        print("published: on the whole test set; the leaderboard's PGD counts the last iterate")
    interval = result["interval"]
    # A file of the user's own is called by its name.
    own = result["settings"].get("data")
    print(
        f"\nrobust accuracy {100 * result['robust_accuracy']:.2f}% on {count} images of "
        f"{Path(own).name if own else result['dataset']}, worst case of all attacks "
        f"(95% interval {100 * interval['low']:.2f} to {100 * interval['high']:.2f}; "
        f"seed {result['seed']}, {result['forwards']} forwards, {result['backwards']} gradients, "
        f"{in_words(result['seconds'])})"
    )
    print_notices(result.get("notices", ()))


def print_notices(notices: Iterable[Mapping]) -> None:
    """Print what makes the numbers above doubtful.

    Args:
        notices: "notices" of `result.json`.
    """
    for entry in notices:
        print(f"notice: {entry['message']}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}%"


def _attacks(protocols) -> dict[str, Attack]:
    return {name: attack for attacks in protocols.values() for name, attack in attacks.items()}


def _write_examples(output_dir, network, evaluation, test, batch_size):
    """The first images of each class, the same for every network, and what became of them."""
    order = shown_rows(test.labels)
    adversarial = evaluation.adversarial[order]
    examples = {
        "images": test.images[order],
        "adversarial": adversarial,
        "labels": test.labels[order],
        "predictions": predict(network, adversarial, batch_size=batch_size),
        "bounds": np.array(test.bounds, np.float32),
    }
    write_arrays(output_dir / EXAMPLES_FILE, examples)


def shown_rows(labels: np.ndarray) -> np.ndarray:
    """The rows of labels (N,) that an evaluation keeps images of: the first of each class."""
    rank = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        mine = labels == label
        rank[mine] = np.arange(mine.sum())
    return np.lexsort((labels, rank))[:_EXAMPLES]
