"""Training steps, starting up, and the machine's limit."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.problem import Outcome, Problem
from benchmarks.step_contenders import steps_of_ours, training_set

_LEARNING_RATE = 1e-4
_MATRIX_SIZE = 4096


def training_ours(problem: Problem) -> Callable[[], Outcome]:
    """Steps of `RegularizedModel` without a regulariser, as `train.py` takes them on MNIST."""
    return steps_of_ours(problem, None)


def adversarial_training_ours(problem: Problem) -> Callable[[], Outcome]:
    """The same with `PGDAdversary`."""
    from logit_reg.attacks import PGD
    from logit_reg.threat import ThreatModel
    from logit_reg.training.adversaries.pgd import PGDAdversary

    case = problem.case
    threat = ThreatModel("linf", case.epsilon, 0.0, case.upper)
    return steps_of_ours(problem, PGDAdversary(PGD(threat, "xent", case.num_steps, case.step_size)))


def training_keras(problem: Problem) -> Callable[[], Outcome]:
    """Keras' `fit` of the bare network."""
    import keras

    network = keras.saving.load_model(problem.folder / "network.keras", compile=False)
    return _fit(problem, network)


def adversarial_training_keras(problem: Problem) -> Callable[[], Outcome]:
    """`fit` with a `train_step` that runs PGD first, written out."""
    import keras
    import tensorflow as tf

    case = problem.case
    network = keras.saving.load_model(problem.folder / "network.keras", compile=False)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    class Adversarial(keras.Model):
        def call(self, images, training=None):
            return network(images, training=training)

        def train_step(self, data):
            images, labels = data
            noise = tf.random.uniform(tf.shape(images), -case.epsilon, case.epsilon)
            points = tf.clip_by_value(images + noise, 0.0, case.upper)
            for _ in range(case.num_steps):
                with tf.GradientTape() as tape:
                    tape.watch(points)
                    loss = cross_entropy(labels, network(points, training=False))
                points += case.step_size * tf.sign(tape.gradient(loss, points))
                points = tf.clip_by_value(points, images - case.epsilon, images + case.epsilon)
                points = tf.clip_by_value(points, 0.0, case.upper)
            return super().train_step((points, labels))

    return _fit(problem, Adversarial())


def startup_ours(problem: Problem) -> Callable[[], Outcome]:
    """`eval_challenge.py` from start to end, with one image and one attack step."""
    script = Path(__file__).resolve().parents[1] / "scripts" / "eval_challenge.py"

    def repetition():
        # A folder of its own, or the command would find its work done.
        with tempfile.TemporaryDirectory() as folder:
            _run(
                str(script),
                f"--model_dir={problem.folder / 'network.keras'}",
                "--dataset=mnist_5k",
                "--num_eval_examples=1",
                "--num_steps=1",
                "--noprogress",
                f"--output_dir={folder}",
            )
        return Outcome()

    repetition()
    return repetition


def startup_tensorflow(problem: Problem) -> Callable[[], Outcome]:
    """The bare import."""
    del problem

    def repetition():
        _run("-c", "import tensorflow")
        return Outcome()

    repetition()
    return repetition


def matrix_peak_tensorflow(problem: Problem) -> Callable[[], Outcome]:
    """One product of two float32 matrices."""
    del problem
    import tensorflow as tf

    factor = tf.random.normal((_MATRIX_SIZE, _MATRIX_SIZE))

    def repetition():
        tf.linalg.matmul(factor, factor)[0, 0].numpy()
        return Outcome()

    repetition()
    return repetition


def matrix_peak_pytorch(problem: Problem) -> Callable[[], Outcome]:
    """The same in the other library, so that neither one's limit is taken for the machine's."""
    import torch

    torch.set_num_threads(problem.threads)
    factor = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE)

    def repetition():
        torch.matmul(factor, factor)
        return Outcome()

    repetition()
    return repetition


def matrix_flops() -> int:
    """Floating-point operations of one repetition of `matrix_peak_*`."""
    return 2 * _MATRIX_SIZE**3


def _fit(problem, model):
    """Steps of `fit`, up to the end of the last one.

    After it `fit` now and then waits, idle, for up to as long as the steps took: that is no
    training, and would hide what a step takes.
    """
    import keras

    case = problem.case
    keras.utils.set_random_seed(case.seed)
    model.compile(
        optimizer=keras.optimizers.Adam(_LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    images, labels = training_set(problem)
    model.fit(images, labels, batch_size=case.batch_size, steps_per_epoch=1, verbose=0)

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # The metrics in `logs` are numbers: the step is over.
            del batch, logs
            self.last = time.perf_counter()

    def repetition():
        clock, started = Clock(), time.perf_counter()
        model.fit(images, labels, batch_size=case.batch_size, verbose=0, callbacks=[clock])
        return Outcome(seconds=clock.last - started)

    return repetition


def _run(*arguments):
    subprocess.run(
        [sys.executable, *arguments], check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL
    )
