"""Who takes part in which kind of case."""

import os
from collections.abc import Callable

from benchmarks import attack_contenders, other_contenders, step_contenders
from benchmarks.problem import Outcome, Problem

Contender = Callable[[Problem], Callable[[], Outcome]]
"""Gets ready, warm-up included, and returns what does one repetition. It imports its own library
and no other, so that its process holds nothing else."""


def as_installed(contender: Contender) -> Contender:
    """A contender on TensorFlow with TensorFlow's own choice of oneDNN, as its users run it.

    All others get what our commands set: oneDNN, which TensorFlow leaves off on processors
    without AVX-512.
    """

    def ready(problem: Problem) -> Callable[[], Outcome]:
        # TensorFlow reads it when it is imported, which the contender does.
        os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)
        return contender(problem)

    return ready


CONTENDERS: dict[str, dict[str, Contender]] = {
    "pgd": {
        "ours": attack_contenders.pgd_ours,
        "ours float32": attack_contenders.in_float32(attack_contenders.pgd_ours),
        "foolbox": attack_contenders.pgd_foolbox,
        "art": attack_contenders.pgd_art,
        "pytorch": attack_contenders.pgd_pytorch,
        "cleverhans": attack_contenders.pgd_cleverhans,
        "cleverhans as installed": as_installed(attack_contenders.pgd_cleverhans),
    },
    "restarts": {
        "ours": attack_contenders.restarts_ours,
        "ours float32": attack_contenders.in_float32(attack_contenders.restarts_ours),
        "foolbox": attack_contenders.restarts_foolbox,
        "art": attack_contenders.pgd_art,
        "pytorch": attack_contenders.pgd_pytorch,
    },
    "autoattack": {
        "ours": attack_contenders.autoattack_ours,
        "ours float32": attack_contenders.in_float32(attack_contenders.autoattack_ours),
        "reference": attack_contenders.autoattack_reference,
    },
    "spsa": {
        "ours": attack_contenders.spsa_ours,
        "cleverhans": attack_contenders.spsa_cleverhans,
    },
    "training": {
        "ours": other_contenders.training_ours,
        "keras": other_contenders.training_keras,
        "keras as installed": as_installed(other_contenders.training_keras),
    },
    "adversarial_training": {
        "ours": other_contenders.adversarial_training_ours,
        "keras": other_contenders.adversarial_training_keras,
        "plain step": other_contenders.training_ours,
    },
    "method_step": {
        "ours": step_contenders.step_ours,
        "parts": step_contenders.parts_of_step,
    },
    "startup": {
        "ours": other_contenders.startup_ours,
        "tensorflow": other_contenders.startup_tensorflow,
    },
    "matrix_peak": {
        "tensorflow": other_contenders.matrix_peak_tensorflow,
        "pytorch": other_contenders.matrix_peak_pytorch,
    },
}


def names(kind: str) -> tuple[str, ...]:
    """Who takes part in a kind of case; "ours", the measure of the others, first."""
    return tuple(CONTENDERS[kind])
