"""The optimizers against TF1's own and against their formulas."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from madry_compat.optimizers import TF1Adam, TF1Momentum, piecewise_constant

tf1 = tf.compat.v1

GRADIENTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
START = np.array([1.0, -2.0, 0.5], np.float32)


def run_keras(optimizer, gradients=GRADIENTS, *, graph_mode=False):
    variable = keras.Variable(START)
    optimizer.build([variable])

    def step(gradient):
        optimizer.apply([gradient], [variable])

    step = tf.function(step) if graph_mode else step
    history = []
    for gradient in gradients:
        step(tf.constant(gradient))
        history.append(variable.value.numpy())
    return np.stack(history)


def run_tf1(make_optimizer, gradients=GRADIENTS):
    """The same gradients through TF1; `make_optimizer` takes the global step."""
    with tf.Graph().as_default(), tf1.Session() as session:
        variable = tf1.get_variable("w", initializer=START, use_resource=False)
        gradient = tf1.placeholder(tf.float32, (3,))
        global_step = tf1.train.get_or_create_global_step()
        update = make_optimizer(global_step).apply_gradients([(gradient, variable)], global_step)
        session.run(tf1.global_variables_initializer())
        history = []
        for value in gradients:
            session.run(update, {gradient: value})
            history.append(session.run(variable))
    return np.stack(history)


def test_momentum_accumulates_gradients_without_the_rate():
    rate = piecewise_constant([[0, 0.5], [1, 0.25]])
    ones = np.ones((4, 3), np.float32)

    history = run_keras(TF1Momentum(rate, momentum=0.5), ones)

    # Accumulators 1, 1.5, 1.75, 1.875; rates .5, .5 (the boundary belongs to it), .25, .25.
    steps = np.cumsum([0.5 * 1, 0.5 * 1.5, 0.25 * 1.75, 0.25 * 1.875])
    np.testing.assert_allclose(history, START - steps[:, None], rtol=1e-6)


@pytest.mark.parametrize("graph_mode", [False, True])
def test_momentum_is_tf1s_across_a_drop_of_the_rate(graph_mode):
    schedule = [[0, 0.1], [2, 0.01], [4, 0.001]]

    ours = run_keras(TF1Momentum(piecewise_constant(schedule)), graph_mode=graph_mode)
    theirs = run_tf1(
        lambda step: tf1.train.MomentumOptimizer(
            tf1.train.piecewise_constant(tf.cast(step, tf.int32), [2, 4], [0.1, 0.01, 0.001]), 0.9
        )
    )

    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_keras_sgd_parts_from_tf1_at_the_drop():
    """Why TF1Momentum exists: equal up to the drop of the rate, different after it."""
    schedule = piecewise_constant([[0, 0.1], [2, 0.01]])

    ours = run_keras(TF1Momentum(schedule))
    sgd = run_keras(keras.optimizers.SGD(schedule, momentum=0.9))

    np.testing.assert_allclose(ours[:3], sgd[:3], rtol=1e-5)
    assert np.abs(ours[3:] - sgd[3:]).max() > 0.05


@pytest.mark.parametrize("graph_mode", [False, True])
def test_adam_is_tf1s(graph_mode):
    gradients = GRADIENTS * np.float32(1e-7)  # small enough for epsilon to matter

    ours = run_keras(TF1Adam(0.01), gradients, graph_mode=graph_mode)
    theirs = run_tf1(lambda _: tf1.train.AdamOptimizer(0.01), gradients)
    other_epsilon = run_keras(keras.optimizers.Adam(0.01), gradients)

    np.testing.assert_allclose(ours - START, theirs - START, rtol=1e-4)
    assert np.abs(other_epsilon - theirs).max() > 1e-3


def test_adam_formula():
    """Two updates by hand, with an epsilon as large as the gradients."""
    rate, beta_1, beta_2, epsilon = 0.1, 0.8, 0.9, 0.5
    m = v = 0.0
    weight, expected = START.astype(np.float64), []
    for t, gradient in enumerate(GRADIENTS[:2].astype(np.float64), start=1):
        m = beta_1 * m + (1 - beta_1) * gradient
        v = beta_2 * v + (1 - beta_2) * gradient**2
        corrected = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        weight = weight - corrected * m / (np.sqrt(v) + epsilon)
        expected.append(weight)

    optimizer = TF1Adam(rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)

    np.testing.assert_allclose(run_keras(optimizer, GRADIENTS[:2]), expected, rtol=1e-5)


def test_adam_on_the_mean_is_adam_on_the_sum_with_epsilon_divided():
    gradients = GRADIENTS * np.float32(1e-7)

    summed = run_keras(TF1Adam(0.01), gradients)
    mean = run_keras(TF1Adam(0.01, epsilon=1e-8 / 50), gradients / 50)

    np.testing.assert_allclose(mean - START, summed - START, rtol=1e-4)


def test_momentum_trains_under_compile_and_survives_its_config():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    optimizer = TF1Momentum(piecewise_constant([[0, 0.1], [10, 0.01]]), momentum=0.8)
    model.compile(optimizer, loss="mse")
    images, targets = np.eye(2, dtype=np.float32), np.ones((2, 1), np.float32)

    losses = model.fit(images, targets, epochs=20, verbose=0).history["loss"]
    copy = TF1Momentum.from_config(optimizer.get_config())

    assert losses[-1] < 0.1 * losses[0]
    assert copy.get_config() == optimizer.get_config()
    assert float(copy._learning_rate(11)) == pytest.approx(0.01)
    assert TF1Momentum.from_config(TF1Momentum(0.5).get_config()).get_config()[
        "learning_rate"
    ] == pytest.approx(0.5)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_outside_its_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        TF1Momentum(0.1, momentum=momentum)


def test_piecewise_constant_gives_tf1s_rate_at_every_step():
    steps = range(12)
    rate = piecewise_constant([[0, 0.1], [4, 0.01], [8, 0.001]])

    with tf.Graph().as_default(), tf1.Session() as session:
        step = tf1.placeholder(tf.int32, ())
        theirs = tf1.train.piecewise_constant(step, [4, 8], [0.1, 0.01, 0.001])
        expected = [session.run(theirs, {step: value}) for value in steps]

    assert [float(rate(value)) for value in steps] == expected
    assert float(rate(4)) == np.float32(0.1)
    assert float(rate(5)) == np.float32(0.01)


def test_piecewise_constant_with_a_single_rate():
    rate = piecewise_constant([[0, 1e-4]])

    assert [float(rate(step)) for step in (0, 1, 100_000)] == [np.float32(1e-4)] * 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "must list pairs"),
        ([0, 0.1], "must list pairs"),
        ([[0, 0.1, 3]], "must list pairs"),
        ([[0, "0.1"]], "must list pairs"),
        ([[0, 0.1], [2.5, 0.01]], "must list pairs"),
        ([[0, float("nan")]], "must list pairs"),
        ([[1, 0.1]], "start at step 0"),
        ([[0, 0.1], [4, 0.01], [4, 0.001]], "increase"),
        ([[0, 0.1], [4, 0.0]], "positive"),
        ([[0, -0.1]], "positive"),
    ],
)
def test_malformed_schedules_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        piecewise_constant(schedule)


def test_adam_is_keras_adam_in_one_pass():
    """The kernel and Keras' ten operations take the same steps, in a graph and outside."""
    ours = run_keras(TF1Adam(0.01), graph_mode=True)

    np.testing.assert_allclose(ours, run_keras(TF1Adam(0.01)), rtol=1e-6)
    keras_own = run_keras(keras.optimizers.Adam(0.01, epsilon=1e-8))
    np.testing.assert_allclose(ours, keras_own, rtol=1e-6)


def test_adam_takes_gradients_of_single_rows():
    variable, optimizer = keras.Variable(START[:, None]), TF1Adam(0.01)
    rows = tf.IndexedSlices(tf.ones((1, 1)), tf.constant([1]), tf.constant([3, 1]))
    optimizer.apply([rows], [variable])

    moved = variable.value.numpy()[:, 0] - START
    np.testing.assert_allclose(moved, [0, -0.01, 0], atol=1e-6)


def test_adam_survives_its_config():
    optimizer = TF1Adam(piecewise_constant([[0, 0.1], [10, 0.01]]), beta_1=0.8, epsilon=1e-9)

    copy = TF1Adam.from_config(optimizer.get_config())

    assert copy.get_config() == optimizer.get_config()
    assert (copy.beta_1, copy.epsilon) == (0.8, 1e-9)
