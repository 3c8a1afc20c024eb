"""Attacks, by us and by the peers, each as its library's users run it.

All follow the gradient of the cross-entropy and go through the images in batches of one size. PGD's
peers begin where ours does, by way of a hook or, where there is none, an override; other attacks
draw from the case's seed, each with its own generator. The peers judge the last iterate, so
`Outcome.correct` of our PGD does, too; where we stop early or a cascade runs, any iterate counts.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.problem import Outcome, Problem

# Logits of the same weights in two libraries, relative to the largest logit.
_LOGITS_TOLERANCE = 1e-5


def pgd_ours(problem: Problem, attack_dtype: str = "auto") -> Callable[[], Outcome]:
    """`PGD` in `evaluate`."""
    from logit_reg.attacks import PGD

    case = problem.case
    return _ours(
        problem,
        lambda threat: PGD(threat, "xent", case.num_steps, case.step_size),
        attack_dtype,
        last=True,
    )


def restarts_ours(problem: Problem, attack_dtype: str = "auto") -> Callable[[], Outcome]:
    """`Restarts` of a `PGD` that leaves an image once it is fooled."""
    from logit_reg.attacks import PGD, Restarts

    case = problem.case
    return _ours(
        problem,
        lambda threat: Restarts(
            PGD(threat, "xent", case.num_steps, case.step_size, early_stop=True),
            case.num_restarts,
        ),
        attack_dtype,
    )


def autoattack_ours(problem: Problem, attack_dtype: str = "auto") -> Callable[[], Outcome]:
    """`AutoAttack`, the standard version."""
    from logit_reg.attacks import AutoAttack

    return _ours(problem, AutoAttack, attack_dtype)


def spsa_ours(problem: Problem, attack_dtype: str = "auto") -> Callable[[], Outcome]:
    """`SPSA`; all other settings are its own, which are cleverhans' too."""
    from logit_reg.attacks import SPSA

    case = problem.case
    return _ours(
        problem,
        lambda threat: SPSA(threat, num_steps=case.num_steps, num_samples=case.num_samples),
        attack_dtype,
    )


def in_float32(contender: Callable) -> Callable[[Problem], Callable[[], Outcome]]:
    """One of ours without bfloat16, where "auto" has it."""

    def ready(problem):
        from logit_reg.attacks.engine.low_precision import NO_BFLOAT16, has_bfloat16

        if not has_bfloat16():
            raise ImportError(f"{NO_BFLOAT16}: ours is float32")
        return contender(problem, "float32")

    return ready


def pgd_pytorch(problem: Problem) -> Callable[[], Outcome]:
    """Eager PyTorch, written out; a restart attacks only what is still robust."""
    import torch
    from torch.nn import functional

    network, images, labels = _torch_problem(problem)
    case = problem.case

    def ascend(images, labels, points):
        lower = (images - case.epsilon).clamp_min(0)
        upper = (images + case.epsilon).clamp_max(case.upper)
        for _ in range(case.num_steps):
            points.requires_grad_()
            loss = functional.cross_entropy(network(points), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, points)
            with torch.no_grad():
                stepped = points + case.step_size * gradient.sign()
                points = torch.clamp(stepped, lower, upper)
        return points

    def attack(images, labels, starts):
        robust = torch.arange(len(images))
        for points in starts.unbind(1):
            adversarial = ascend(images[robust], labels[robust], points[robust])
            robust = robust[_torch_correct(network, adversarial, labels[robust])]
            if not len(robust):
                break
        correct = np.zeros(len(images), bool)
        correct[robust.numpy()] = True
        return correct

    return _in_batches(case, attack, images, labels, _torch_starts(problem))


def pgd_foolbox(problem: Problem, num_repeats: int = 1) -> Callable[[], Outcome]:
    """Foolbox' `LinfPGD` on PyTorch."""
    import eagerpy
    import foolbox

    class FromStarts(foolbox.attacks.LinfPGD):
        starts: Iterator = iter(())

        def get_random_start(self, x0, epsilon):
            return eagerpy.astensor(next(self.starts))

    network, images, labels = _torch_problem(problem)
    case = problem.case
    model = foolbox.PyTorchModel(network, bounds=(0, case.upper))
    pgd = FromStarts(abs_stepsize=case.step_size, steps=case.num_steps)
    chosen = pgd.repeat(num_repeats) if num_repeats > 1 else pgd

    def attack(images, labels, starts):
        pgd.starts = iter(starts.unbind(1))
        _, _, fooled = chosen(model, images, labels, epsilons=case.epsilon)
        return ~fooled.numpy()

    return _in_batches(case, attack, images, labels, _torch_starts(problem))


def restarts_foolbox(problem: Problem) -> Callable[[], Outcome]:
    """Foolbox' `repeat`, which attacks every image every time."""
    return pgd_foolbox(problem, problem.case.num_restarts)


def pgd_art(problem: Problem) -> Callable[[], Outcome]:
    """ART's PGD on PyTorch; every image is attacked from every start."""
    import torch
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    class FromStarts(ProjectedGradientDescentPyTorch):
        starts: Iterator = iter(())

        # Its arguments: x, x_init, y, mask, eps, eps_step, random_init, momentum.
        def _compute_pytorch(self, x, *arguments):
            is_start = arguments[5]
            arguments = (*arguments[:5], False, *arguments[6:])
            return super()._compute_pytorch(next(self.starts) if is_start else x, *arguments)

    network, images, labels = _torch_problem(problem)
    case = problem.case
    classifier = PyTorchClassifier(
        network,
        loss=torch.nn.CrossEntropyLoss(reduction="sum"),
        input_shape=tuple(images.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, case.upper),
        device_type="cpu",
    )
    chosen = FromStarts(
        classifier,
        eps=case.epsilon,
        eps_step=case.step_size,
        max_iter=case.num_steps,
        num_random_init=case.num_restarts,
        batch_size=case.batch_size,
        verbose=False,
    )

    def attack(images, labels, starts):
        chosen.starts = iter(starts.unbind(1))
        adversarial = chosen.generate(images.numpy(), labels.numpy())
        return _torch_correct(network, torch.from_numpy(adversarial), labels).numpy()

    return _in_batches(case, attack, images, labels, _torch_starts(problem))


def pgd_cleverhans(problem: Problem) -> Callable[[], Outcome]:
    """Cleverhans' PGD on TensorFlow 2."""
    import importlib

    import keras
    import tensorflow as tf

    # Any: a name of it is replaced below.
    pgd: Any = importlib.import_module("cleverhans.tf2.attacks.projected_gradient_descent")
    network = keras.saving.load_model(problem.folder / "network.keras", compile=False)
    arrays, case = problem.arrays(), problem.case

    def logits_fn(images):
        return network(images, training=False)

    def attack(images, labels, starts):
        # It has no hook for the start, only this name.
        pgd.random_lp_vector = lambda *_, **__: tf.constant(starts[:, 0] - images)
        adversarial = pgd.projected_gradient_descent(
            logits_fn,
            tf.constant(images),
            case.epsilon,
            case.step_size,
            case.num_steps,
            np.inf,
            clip_min=0.0,
            clip_max=case.upper,
            y=tf.constant(labels),
            rand_init=True,
        )
        return logits_fn(adversarial).numpy().argmax(axis=1) == labels

    return _in_batches(case, attack, arrays["images"], arrays["labels"], problem.starts())


def spsa_cleverhans(problem: Problem) -> Callable[[], Outcome]:
    """Cleverhans' SPSA on PyTorch, image by image; that on TensorFlow 2 needs Keras 2."""
    import torch
    from cleverhans.torch.attacks.spsa import spsa

    network, images, labels = _torch_problem(problem)
    case = problem.case

    def attack(images, labels):
        torch.manual_seed(case.seed)
        adversarial = spsa(
            network,
            images,
            case.epsilon,
            case.num_steps,
            clip_min=0.0,
            clip_max=case.upper,
            y=labels,
            early_stop_loss_threshold=0.0,
            spsa_samples=case.num_samples,
        )
        return _torch_correct(network, adversarial, labels).numpy()

    return _in_batches(case, attack, images, labels)


def autoattack_reference(problem: Problem) -> Callable[[], Outcome]:
    """The authors' code on PyTorch."""
    if problem.autoattack_dir is None:
        raise ImportError("its code is in no package index; name its folder by --autoattack_dir")
    sys.path.insert(0, problem.autoattack_dir)
    from autoattack import AutoAttack

    network, images, labels = _torch_problem(problem)
    case = problem.case
    chosen = AutoAttack(
        network, norm="Linf", eps=case.epsilon, seed=case.seed, verbose=False, device="cpu"
    )

    def repetition():
        adversarial = chosen.run_standard_evaluation(images, labels, bs=case.batch_size)
        return Outcome(_torch_correct(network, adversarial, labels).numpy())

    _torch_correct(network, images[: case.batch_size], labels[: case.batch_size])
    return repetition


def _ours(problem, make_attack, attack_dtype, *, last=False):
    """An attack of ours in `evaluate`, checks and confirmation included."""
    import keras

    from logit_reg.attacks.engine.low_precision import lower_precision
    from logit_reg.evaluation.run import evaluate
    from logit_reg.threat import ThreatModel

    network = keras.saving.load_model(problem.folder / "network.keras", compile=False)
    arrays, case = problem.arrays(), problem.case
    attack = make_attack(ThreatModel("linf", case.epsilon, 0.0, case.upper))
    lower, _ = lower_precision(attack_dtype, network, arrays["images"][: case.batch_size])

    def run(images, labels):
        found = evaluate(
            network,
            {"attack": attack},
            images,
            labels,
            batch_size=case.batch_size,
            seed=case.seed,
            gradient_logits_fn=lower,
        )
        record = found.records["attack"]
        return Outcome(record.correct_last_iterate if last else record.correct, record.correct)

    images, labels = arrays["images"], arrays["labels"]
    run(images[: case.batch_size], labels[: case.batch_size])
    return lambda: run(images, labels)


def _in_batches(case, attack, *arrays):
    """A repetition of an attack (images, labels, ...) -> (N,) bool still right, after one batch."""

    def run(begins):
        parts = [[array[i : i + case.batch_size] for array in arrays] for i in begins]
        return Outcome(np.concatenate([attack(*part) for part in parts]))

    run([0])
    return lambda: run(range(0, len(arrays[0]), case.batch_size))


def _torch_problem(problem):
    """Network, images (N, C, H, W) and labels for PyTorch, with the problem's threads."""
    import torch

    from benchmarks.torch_networks import build

    torch.set_num_threads(problem.threads)
    with np.load(problem.folder / "weights.npz", allow_pickle=False) as weights:
        network = build(dict(weights))
    arrays = problem.arrays()
    images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
    expected = arrays["logits"]
    with torch.no_grad():
        logits = network(images[: len(expected)]).numpy()
    error = np.abs(logits - expected).max() / max(1.0, np.abs(expected).max())
    if not error <= _LOGITS_TOLERANCE:
        raise ValueError(
            f"PyTorch's logits differ from Keras' by {error:.2g} of the largest one, "
            f"{_LOGITS_TOLERANCE:g} is allowed: not the same network."
        )
    return network, images, torch.from_numpy(arrays["labels"])


def _torch_starts(problem):
    import torch

    return torch.from_numpy(problem.starts()).permute(0, 1, 4, 2, 3).contiguous()


def _torch_correct(network, images, labels):
    import torch

    with torch.no_grad():
        return network(images).argmax(dim=1) == labels
