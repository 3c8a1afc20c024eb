"""An evaluation from start to ledger: hash, estimate, attack, write, show."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import keras
import numpy as np

from logit_reg.attacks import Attack, AttackWarning, precision
from logit_reg.attacks.precision import LowPrecision
from logit_reg.attacks.standing import count_classes
from logit_reg.durations import in_words
from logit_reg.evaluation import (
    Evaluation,
    content_hash,
    estimate_seconds,
    evaluate,
    network_hash,
    predict,
)
from logit_reg.evaluation_state import EvaluationState
from logit_reg.files import write_arrays
from logit_reg.ledger import build_result, write_ledger
from logit_reg.protocols import left_out
from logit_reg_scripts.command_line import UsageError
from logit_reg_scripts.runs import commit, versions
from madry_compat.data import Dataset
from madry_compat.releases import published_accuracies

# Images kept with the ledger, for people to look at.
_EXAMPLES = 10


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

    def first(self, num_examples: int) -> "TestImages":
        """The first examples."""
        part = slice(num_examples)
        return dataclasses.replace(self, images=self.images[part], labels=self.labels[part])


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
    store: Callable[[np.ndarray], None] | None = None,
) -> tuple[Evaluation, dict]:
    """Evaluate a network, write `result.json`, `ledger.csv` and `examples.npz`.

    Finished batches are kept in `output_dir/.state` until the results are written, so that the
    same call goes on after a kill.

    Args:
        network: images in pixel units -> logits.
        test: what to attack.
        protocols: attacks by protocol and name.
        output_dir: made if need be.
        batch_size: most images sent through the network at once.
        seed: of the attacks.
        settings: provenance of the network, for `result.json`.
        worst_case_only: see `logit_reg.evaluation.evaluate`.
        show_progress: draw progress bars.
        gradient_logits_fn: what the attacks follow, see `read_attack_dtype`.
        store: gets the worst-case images, before the finished batches are removed.

    Returns:
        The evaluation and the content of `result.json`.
    """
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
            "network_sha256": state.key,
            "images_sha256": content_hash(test.images),
            "eval_batch_size": batch_size,
            "worst_case_only": worst_case_only,
            "attack_dtype": precision.followed_dtype(gradient_logits_fn),
            "versions": versions(),
            "commit": commit(),
        },
        seed=seed,
    )
    _write_examples(output_dir, network, evaluation, test, batch_size)
    write_ledger(output_dir, evaluation, result, np.arange(len(test.images)))
    if store is not None:
        store(evaluation.adversarial)
    state.clear()
    return evaluation, result


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
        worst_case_only: see `logit_reg.evaluation.evaluate`.
        show_progress: draw progress bars.
        gradient_logits_fn: what the attacks follow, see `read_attack_dtype`.
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
            state=state,
            show_progress=show_progress,
            gradient_logits_fn=gradient_logits_fn,
        )


def read_attack_dtype(
    attack_dtype: str, network: keras.Model, images: np.ndarray, batch_size: int
) -> LowPrecision | None:
    """What the attacks follow; says so unless that is the network itself for want of a choice.

    Args:
        attack_dtype: value of --attack_dtype.
        network: images in pixel units -> logits.
        images: (N, H, W, C) float32, pixel units; a batch of them shows whether it bears bfloat16.
        batch_size: images sent through the network at once.

    Raises:
        UsageError: if bfloat16 is asked for and the network does not bear it.
    """
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
) -> None:
    """Print how long one process takes at most.

    Args:
        network: images in pixel units -> logits.
        test: what to attack.
        protocols: attacks by protocol and name.
        batch_size: most images sent through the network at once.
    """
    attacks = _attacks(protocols)
    seconds = estimate_seconds(network, attacks, test.images, test.labels, batch_size=batch_size)
    print(
        f"estimate: at most {in_words(seconds)} for {len(attacks)} attacks on "
        f"{len(test.images)} images (kept batch by batch; the same command goes on)",
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
            see `madry_compat.challenges.published_results`; they get a column of their own.
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
    names = max(len(row[0]) for row in rows)
    labels = max(len(row[1]) for row in rows + [("", "protocol", 0, 0, 0)])
    title = "  published" if published else ""
    print(f"\n{'attack':{names}}  {'protocol':{labels}}  accuracy  last iterate{title}")
    for name, protocol, accuracy, last, known in rows:
        shown = " " * 12 if last is None else f"{100 * last:11.2f}%"
        beside = "" if known is None else f"  {100 * known:8.2f}%"
        line = f"{name:{names}}  {protocol:{labels}}  {100 * accuracy:7.2f}%  {shown}{beside}"
        print(line.rstrip())
    if published:
        print("published: on the whole test set; the leaderboard's PGD counts the last iterate")
    interval = result["interval"]
    print(
        f"\nrobust accuracy {100 * result['robust_accuracy']:.2f}% on {count} images of "
        f"{result['dataset']}, worst case of all attacks "
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


def _attacks(protocols) -> dict[str, Attack]:
    return {name: attack for attacks in protocols.values() for name, attack in attacks.items()}


def _write_examples(output_dir, network, evaluation, test, batch_size):
    """The first images of each class, the same for every network, and what became of them."""
    rank = np.zeros(len(test.labels), np.int64)
    for label in np.unique(test.labels):
        mine = test.labels == label
        rank[mine] = np.arange(mine.sum())
    order = np.lexsort((test.labels, rank))[:_EXAMPLES]
    adversarial = evaluation.adversarial[order]
    examples = {
        "images": test.images[order],
        "adversarial": adversarial,
        "labels": test.labels[order],
        "predictions": predict(network, adversarial, batch_size=batch_size),
        "bounds": np.array(test.bounds, np.float32),
    }
    write_arrays(output_dir / "examples.npz", examples)
