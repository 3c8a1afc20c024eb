"""Training steps of ours, and the passes that they are made of."""

from collections.abc import Callable

import numpy as np

from benchmarks.cases import Case
from benchmarks.problem import Outcome, Problem

_LEARNING_RATE = 1e-4


def step_ours(problem: Problem) -> Callable[[], Outcome]:
    """Steps of a method, as its recipe has them."""
    settings = _settings(problem)
    return steps_of_ours(problem, settings.training_adversary, settings.objective)


def parts_of_step(problem: Problem) -> Callable[[], Outcome]:
    """The forwards and backwards of that step, each alone: no random numbers, no projection, no
    pair term. Where the adversary learns, the update's backward goes on to the images.
    """
    import keras
    import tensorflow as tf

    from logit_reg.attacks.engine.gradients import logits_and_gradient
    from logit_reg.objectives import Objective
    from logit_reg.training.adversaries.attacked import attacked_network
    from logit_reg.training.loop import repeatable_steps
    from madry_compat.optimizers import TF1Adam

    case, settings = problem.case, _settings(problem)
    forwards, backwards = settings.step_cost
    pairs = int(settings.objective.wants_clean_logits)
    network = keras.saving.load_model(problem.folder / "network.keras", compile=False)
    attacked = attacked_network(network, settings.attack_batch_norm)
    optimizer = TF1Adam(_LEARNING_RATE)
    optimizer.build(network.trainable_variables)

    num_weights = len(network.trainable_variables)

    def weights_gradient(images, labels, and_of_images=False):
        with tf.GradientTape() as tape:
            tape.watch(images)
            total = Objective()(network(images, training=True), labels).total
        wanted = [variable.value for variable in network.trainable_variables]
        return tape.gradient(total, [*wanted, images] if and_of_images else wanted)

    def update(images, labels):
        gradients = weights_gradient(images, labels, settings.training_adversary.learns)
        optimizer.apply(gradients[:num_weights], network.trainable_variables)
        return gradients[num_weights:]

    def image_gradient(images, labels):
        def loss(logits):
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

        return logits_and_gradient(attacked, images, loss)[1]

    def forward(images, labels):
        del labels
        return attacked(images)

    counts = {
        update: 1,
        weights_gradient: pairs,
        image_gradient: backwards - 1 - pairs,
        forward: forwards - backwards,
    }
    images, labels = training_set(problem)
    first = images[: case.batch_size], labels[: case.batch_size]
    with repeatable_steps():
        passes = {tf.function(part, autograph=False): n for part, n in counts.items() if n}
        for part in passes:
            part(*first)

    def repetition():
        for begin in range(0, len(images), case.batch_size):
            rows = slice(begin, begin + case.batch_size)
            batch = tf.constant(images[rows]), tf.constant(labels[rows])
            for part, count in passes.items():
                for _ in range(count):
                    part(*batch)
        float(tf.reduce_sum(network.trainable_variables[-1]))
        return Outcome()

    return repetition


def _settings(problem):
    from logit_reg.experiments.defaults import resolve_settings

    case = problem.case
    dataset = "mnist" if case.upper == 1.0 else "cifar10"
    given = {"dataset": dataset, "adversary": case.adversary}
    # The network's own width is in its file.
    return resolve_settings(given | {"training_batch_size": case.batch_size})


def steps_of_ours(problem: Problem, adversary, objective=None) -> Callable[[], Outcome]:
    """Steps of `RegularizedModel` as `train.py` takes them, with Adam."""
    import keras

    from logit_reg.objectives import Objective
    from logit_reg.training.feeding import BatchOrder, traced_train_step
    from logit_reg.training.loop import repeatable_steps
    from logit_reg.training.model import RegularizedModel
    from madry_compat.optimizers import TF1Adam

    case = problem.case
    network = keras.saving.load_model(problem.folder / "network.keras", compile=False)
    model = RegularizedModel(
        network, objective or Objective(), bounds=(0.0, case.upper), adversary=adversary
    )
    model.compile(optimizer=TF1Adam(_LEARNING_RATE))
    images, labels = training_set(problem)
    pixels = np.round(images * (255 / case.upper)).astype(np.uint8)
    batches = BatchOrder(len(images), case.batch_size, case.seed).batches(0)
    # As `loop.train` does unless told otherwise.
    with repeatable_steps():
        step = traced_train_step(model, pixels, labels, case.batch_size)
        step(next(batches))

    def repetition():
        for _ in range(case.num_batches):
            measures = step(next(batches))
        # Waits for the last step.
        float(measures["total"])
        return Outcome()

    return repetition


def training_set(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """As many images as a repetition uses, repeated if there are fewer."""
    case: Case = problem.case
    arrays = problem.arrays()
    rows = np.arange(case.num_batches * case.batch_size) % len(arrays["images"])
    return arrays["images"][rows], arrays["labels"][rows]
