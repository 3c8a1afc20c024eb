"""The objectives against closed forms and hand-computed values."""

import math

import numpy as np
import pytest
import tensorflow as tf

from logit_reg.objectives import (
    MATRIX_NORMS,
    REGULARIZERS,
    Objective,
    batch_logit_norm,
    batch_matrix_norm,
    collapse_threshold,
    example_logit_norm,
    paired_logit_distance,
    smooth_labels,
)
from logit_reg.regularizers import PAIRED

LOGITS = np.array([[3.0, 0.0, 4.0], [0.0, -12.0, 5.0]], np.float32)  # l2 norms 5 and 13
CLEAN = np.array([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.5]], np.float32)
LABELS = np.array([2, 0])


def valid_objective(reg, **changes):
    """An objective of each kind with the settings it needs."""
    needs = {
        "none": {},
        "similarity": {"beta": 2.0, "gamma": 1.0},
        "clip_xent": {"omega": 1.5},
        "clip_xent_batch": {"omega": 1.5},
    }.get(reg, {"beta": 2.0})
    return Objective(reg=reg, **(needs | changes))


def cross_entropy(logits, targets):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(targets * log_p).sum(-1)


def test_batch_norm_is_the_frobenius_norm_over_the_batch_size():
    assert float(batch_logit_norm(LOGITS)) == pytest.approx(math.sqrt(25 + 169) / 2, rel=1e-6)
    shifted = np.linalg.norm(LOGITS - 1.0) / 2
    assert float(batch_logit_norm(LOGITS, gamma=1.0)) == pytest.approx(shifted, rel=1e-6)


def test_example_norm_is_the_mean_of_the_row_norms():
    assert float(example_logit_norm(LOGITS)) == pytest.approx((5 + 13) / 2, rel=1e-6)


def test_the_two_norms_differ_by_the_root_of_the_batch_size_for_equal_rows():
    rows = np.tile(LOGITS[:1], (128, 1))
    ratio = float(example_logit_norm(rows)) / float(batch_logit_norm(rows))
    assert float(ratio) == pytest.approx(math.sqrt(128), rel=1e-5)


def test_pairing_compares_the_two_halves_of_the_batch():
    logits = np.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], np.float32)
    assert float(paired_logit_distance(logits[:2])) == pytest.approx((4 + 4) / 2)
    # The last of an odd batch is left out.
    assert float(paired_logit_distance(logits)) == pytest.approx((4 + 4) / 2)


@pytest.mark.parametrize(("smoothing", "true", "false"), [(0.95, 0.145, 0.095), (0.0, 1.0, 0.0)])
def test_smoothed_labels(smoothing, true, false):
    row = np.asarray(smooth_labels(np.array([3]), 10, smoothing))[0]
    np.testing.assert_allclose(row, [false] * 3 + [true] + [false] * 6, atol=1e-6)


def svd_case(kind, rows=128, columns=10):
    """A matrix of float32 numbers of a kind."""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(rows, columns)).astype(np.float32)
    if kind == "lost rank":
        matrix = (matrix[:, :2] @ rng.normal(size=(2, columns))).astype(np.float32)
    if kind == "one row":
        matrix = matrix[:1]
    if kind == "equal values":
        matrix = np.linalg.qr(matrix)[0].astype(np.float32)
    return 0 * matrix if kind == "zero" else matrix


@pytest.mark.parametrize("kind", ["random", "lost rank", "one row", "equal values", "zero"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_nuclear_norm_and_its_gradient_are_those_of_the_singular_values(kind, scale):
    matrix = svd_case(kind) * np.float32(scale)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    there = values > 1e-5 * values.max()
    norm = tf.function(lambda logits: batch_matrix_norm(logits, norm="nuclear"))
    variable = tf.Variable(matrix)
    with tf.GradientTape() as tape:
        found = norm(variable)
    np.testing.assert_allclose(float(found), values.sum() / len(matrix), rtol=1e-5)
    gradient = (left * there) @ right / len(matrix)
    found = tape.gradient(found, variable).numpy() * len(matrix)
    np.testing.assert_allclose(found, gradient * len(matrix), atol=1e-5)


def test_the_gradient_of_the_nuclear_norm_is_that_of_differences():
    matrix = tf.constant(svd_case("random", 6, 4), tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(matrix)
        value = batch_matrix_norm(matrix, 0.5, "nuclear")
    gradient = tape.gradient(value, matrix).numpy()
    direction = np.random.default_rng(0).normal(size=matrix.shape)
    up, down = (batch_matrix_norm(matrix + s * direction, 0.5, "nuclear") for s in (1e-5, -1e-5))
    assert float(up - down) / 2e-5 == pytest.approx(np.sum(gradient * direction), rel=1e-6)


def test_matrix_norms_are_ordered_and_of_logits_that_are_not_finite_no_number():
    for kind in ("random", "lost rank", "one row"):
        matrix = svd_case(kind)
        frobenius, nuclear = (float(batch_matrix_norm(matrix, norm=n)) for n in MATRIX_NORMS)
        assert frobenius * (1 - 1e-6) <= nuclear <= math.sqrt(10) * frobenius
    for bad in (math.nan, math.inf):
        broken = svd_case("random")
        broken[3, 4] = bad
        assert not math.isfinite(float(batch_matrix_norm(broken, norm="nuclear")))
    with pytest.raises(ValueError, match="matrix_norm must be one of frobenius, nuclear"):
        batch_matrix_norm(LOGITS, norm="l2")


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def pair_case(reg, beta=2.0, **settings):
    """Cross-entropies and terms of a pair objective."""
    hard = [cross_entropy(logits, np.eye(3)[LABELS]).mean() for logits in (LOGITS, CLEAN)]
    return hard, Objective(reg, beta=beta, **settings)(LOGITS, LABELS, CLEAN)


def test_pair_objectives_are_their_equations():
    p, q = softmax(CLEAN.astype(np.float64)), softmax(LOGITS.astype(np.float64))
    difference = LOGITS - CLEAN
    expected = {
        "nuat": np.linalg.svd(difference)[1].sum() / 2,
        "gat": np.square(q - p).sum(-1).mean(),
        "trades": (p * np.log(p / q)).sum(-1).mean(),
        "alp": np.square(difference).mean(),
    }
    for reg, penalty in expected.items():
        (attacked, clean), terms = pair_case(reg)
        xent = (attacked + clean) / 2 if reg == "alp" else clean
        assert float(terms.penalty) == pytest.approx(penalty, rel=1e-5), reg
        assert float(terms.cross_entropy) == pytest.approx(xent, rel=1e-5), reg
        assert float(terms.total) == pytest.approx(xent + 2 * penalty, rel=1e-5), reg
    assert set(expected) == set(PAIRED)


def test_squeezing_around_the_clean_logits_is_the_family_of_nuat():
    (_, clean), terms = pair_case("squeeze", centre="clean")
    assert float(terms.penalty) == pytest.approx(np.linalg.norm(LOGITS - CLEAN) / 2, rel=1e-6)
    assert float(terms.total) == pytest.approx(clean + 2 * float(terms.penalty), rel=1e-6)
    _, nuclear = pair_case("squeeze", centre="clean", matrix_norm="nuclear")
    _, nuat = pair_case("nuat")
    assert [float(term) for term in nuclear] == [float(term) for term in nuat]


@pytest.mark.parametrize("reg", PAIRED)
def test_a_pair_of_equal_logits_costs_nothing(reg):
    logits = tf.Variable(LOGITS)
    objective = Objective(reg, beta=3.0)
    with tf.GradientTape(persistent=True) as tape:
        terms = objective(logits, LABELS, tf.identity(logits))
        plain = Objective()(logits, LABELS).total
    assert float(terms.penalty) == pytest.approx(0, abs=1e-6)
    assert float(terms.total) == pytest.approx(float(plain), rel=1e-6)
    np.testing.assert_allclose(tape.gradient(terms.penalty, logits), 0, atol=1e-6)
    with pytest.raises(ValueError, match="compares the logits with those of the clean images"):
        objective(LOGITS, LABELS)


def test_a_share_of_beta_weighs_the_penalty_alone():
    whole, half = (
        Objective("squeeze", beta=2.0)(LOGITS, LABELS, beta_scale=share) for share in (1.0, 0.5)
    )
    assert float(half.penalty) == float(whole.penalty)
    halved = float(whole.total) - float(whole.penalty)
    assert float(half.total) == pytest.approx(halved, rel=1e-6)


def test_total_is_cross_entropy_plus_beta_times_penalty():
    hard = cross_entropy(LOGITS, np.eye(3)[LABELS])
    terms = Objective("squeeze", beta=2.0)(LOGITS, LABELS)
    assert float(terms.cross_entropy) == pytest.approx(hard.mean(), rel=1e-6)
    assert float(terms.penalty) == pytest.approx(math.sqrt(194) / 2, rel=1e-6)
    assert float(terms.total) == pytest.approx(hard.mean() + math.sqrt(194), rel=1e-6)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "uint16", "float32"])
def test_labels_of_shape_n_1_and_of_any_type_count_as_those_of_shape_n(dtype):
    column = LABELS[:, None].astype(dtype)
    for reg in REGULARIZERS:
        objective = valid_objective(reg, smoothing=0.2)
        expected = [float(term) for term in objective(LOGITS, LABELS, CLEAN)]
        traced = tf.function(objective)(tf.constant(LOGITS), tf.constant(column), CLEAN)
        assert [float(term) for term in objective(LOGITS, column, CLEAN)] == expected
        np.testing.assert_allclose([float(term) for term in traced], expected, rtol=1e-6)
    np.testing.assert_array_equal(smooth_labels(column, 3, 0.5), smooth_labels(LABELS, 3, 0.5))


@pytest.mark.parametrize(
    ("labels", "named"),
    [([0, 3], "3, at place 1"), ([-1, 0], "-1, at place 0"), ([0.0, 2.5], "2.5, at place 1")],
)
def test_a_label_that_is_no_class_is_named_and_is_no_number_in_a_trace(labels, named):
    message = f"from 0 to 2, for 3 logits; the first other one is {named}"
    with pytest.raises(ValueError, match=message):
        Objective()(LOGITS, np.array(labels))
    with pytest.raises(ValueError, match=message):
        smooth_labels(np.array(labels)[:, None], 3, 0.1)
    traced = tf.function(Objective("squeeze", beta=1.0))(tf.constant(LOGITS), tf.constant(labels))
    assert math.isnan(float(traced.total)) and math.isnan(float(traced.cross_entropy))


def test_labels_of_another_shape_are_refused():
    for labels, advice in (
        (np.eye(3)[LABELS], "pass the argmax of one-hot labels"),
        (LABELS[:, None, None], "pass the argmax of one-hot labels"),
        (np.array(1), "put the data set in batches"),
    ):
        with pytest.raises(ValueError, match=advice):
            Objective()(LOGITS, labels)
    with pytest.raises(ValueError, match="one an image; got 1 for 2 images"):
        Objective()(LOGITS, LABELS[:1])


def test_smoothing_changes_the_total_but_not_the_reported_cross_entropy():
    targets = np.asarray(smooth_labels(LABELS, 3, 0.5))
    terms = Objective(smoothing=0.5)(LOGITS, LABELS)
    assert float(terms.total) == pytest.approx(cross_entropy(LOGITS, targets).mean(), rel=1e-6)
    assert float(terms.cross_entropy) == pytest.approx(
        cross_entropy(LOGITS, np.eye(3)[LABELS]).mean(), rel=1e-6
    )


def test_clipping_per_example_and_per_batch():
    hard = cross_entropy(LOGITS, np.eye(3)[LABELS])  # one below, one above omega
    per_example = Objective("clip_xent", omega=1.5)(LOGITS, LABELS).total
    assert float(per_example) == pytest.approx(np.maximum(hard, 1.5).mean(), rel=1e-6)
    per_batch = Objective("clip_xent_batch", omega=9.0)(LOGITS, LABELS).total
    assert float(per_batch) == pytest.approx(9.0)


def test_sum_reduction_sums_the_cross_entropy_and_leaves_the_penalty():
    hard = cross_entropy(LOGITS, np.eye(3)[LABELS])
    terms = Objective("squeeze", beta=2.0, reduction="sum")(LOGITS, LABELS)
    assert float(terms.total) == pytest.approx(hard.sum() + math.sqrt(194), rel=1e-6)
    assert float(terms.cross_entropy) == pytest.approx(hard.mean(), rel=1e-6)


@pytest.mark.parametrize("reg", REGULARIZERS)
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_gradients_are_finite_where_the_norm_is_zero(reg, constant):
    logits = tf.Variable(tf.fill((4, 10), constant))
    with tf.GradientTape() as tape:
        total = valid_objective(reg)(logits, np.arange(4), logits).total
    assert np.isfinite(tape.gradient(total, logits).numpy()).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits = tf.cast(LOGITS, dtype)
    terms = Objective("squeeze", beta=2.0)(logits, LABELS)
    assert terms.total.dtype == (tf.float64 if dtype == "float64" else tf.float32)
    assert float(terms.penalty) == pytest.approx(math.sqrt(194) / 2, rel=1e-2)


def descend(objective, batch_size=128, num_classes=10, labels=None):
    """Minimise over free logits by gradient descent; the logits that it ends with."""
    labels = tf.constant(np.arange(batch_size) % num_classes if labels is None else labels)
    logits = tf.Variable(0.1 * tf.one_hot(labels, num_classes))

    @tf.function
    def steps(number, rate):
        for _ in tf.range(number):
            with tf.GradientTape() as tape:
                total = objective(logits, labels).total
            logits.assign_sub(rate * tape.gradient(total, logits))

    steps(tf.constant(5000), tf.constant(20.0))
    steps(tf.constant(1000), tf.constant(1.0))
    return logits.numpy(), labels.numpy()


@pytest.mark.parametrize(
    ("beta", "probability", "xent", "scale"),
    [(5.0, 0.5807, 0.5435, 2.52), (10.0, 0.1615, 1.8234, 0.550)],
)
def test_free_logits_reach_the_closed_form_below_the_threshold(beta, probability, xent, scale):
    """z_i = s (e_y - 1/K) with 1 - p_y = beta sqrt((1 - 1/K) / b)."""
    logits, labels = descend(Objective("squeeze", beta=beta))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    true = log_p[np.arange(len(labels)), labels]
    others = np.sort(logits, axis=-1)[:, :-1].mean(-1)
    assert float(np.exp(true).mean()) == pytest.approx(probability, abs=2e-4)
    assert float(-true.mean()) == pytest.approx(xent, abs=2e-3)
    assert float((logits.max(-1) - others).mean()) == pytest.approx(scale, abs=5e-3)


def test_free_logits_collapse_above_the_threshold():
    logits, _ = descend(Objective("squeeze", beta=11.0))
    assert np.abs(logits).max() < 0.05


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"reg": "squeeze"}, None),
        ({"reg": "squeeze", "smoothing": 0.5}, None),
        ({"reg": "similarity", "gamma": 1.0}, None),
        ({"reg": "squeeze"}, (40, 8) + 8 * (10,)),
    ],
)
def test_free_logits_collapse_at_the_threshold_of_the_nuclear_norm_and_not_below(settings, counts):
    names = {name: value for name, value in settings.items() if name != "gamma"}
    threshold = collapse_threshold(128, 10, matrix_norm="nuclear", class_counts=counts, **names)
    labels = None if counts is None else np.repeat(np.arange(10), counts)
    sizes = []
    for share in (1.02, 0.97):
        objective = Objective(beta=share * threshold, matrix_norm="nuclear", **settings)
        logits, _ = descend(objective, labels=labels)
        sizes.append(np.abs(logits - logits.mean()).max())
    assert sizes[0] < 0.02 < 0.04 < sizes[1], sizes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"batch_size": 50, "num_classes": 10, "matrix_norm": "nuclear"}, math.sqrt(5)),
        ({"batch_size": 128, "num_classes": 10, "matrix_norm": "nuclear"}, 3.6056),
        (
            {
                "batch_size": 128,
                "num_classes": 10,
                "matrix_norm": "nuclear",
                "class_counts": [128] + 9 * [0],
            },
            10.733,
        ),
        ({"batch_size": 128, "num_classes": 10, "centre": "clean"}, math.inf),
        ({"batch_size": 128, "num_classes": 10, "reg": "nuat"}, math.inf),
        ({"batch_size": 128, "num_classes": 10}, 10.733),
        ({"batch_size": 50, "num_classes": 10}, 6.708),
        ({"batch_size": 128, "num_classes": 100}, 11.257),
        ({"batch_size": 128, "num_classes": 10, "reg": "squeeze_example"}, math.sqrt(0.9)),
        ({"batch_size": 128, "num_classes": 10, "smoothing": 0.9}, 1.0733),
        ({"batch_size": 128, "num_classes": 10, "reduction": "sum"}, 128 * 10.733),
        ({"batch_size": 128, "num_classes": 10, "reg": "pairing"}, math.inf),
    ],
)
def test_collapse_threshold(arguments, expected):
    assert float(collapse_threshold(**arguments)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reg": "squash"}, "reg must be one of none, squeeze"),
        ({"reg": "squeeze", "beta": -1.0}, "beta must be at least 0; got -1"),
        ({"reg": "squeeze", "beta": math.nan}, "beta must be a finite number"),
        ({"beta": 2.0}, "reg 'none' has none"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\)"),
        ({"reg": "similarity", "beta": 1.0}, "gamma must be non-zero"),
        ({"reg": "squeeze", "gamma": 1.0}, "gamma must be non-zero with reg 'similarity'"),
        ({"reg": "clip_xent"}, "omega must be above 0"),
        ({"omega": 1.0}, "omega must be above 0 with reg 'clip_xent'"),
        ({"reg": "nuat", "matrix_norm": "nuclear"}, "goes with reg 'squeeze' or 'similarity'"),
        ({"reg": "similarity", "beta": 1.0, "gamma": 1.0, "centre": "clean"}, "centre 'clean'"),
        ({"reg": "squeeze", "centre": "mean"}, "centre must be one of zero, clean"),
        ({"reduction": "max"}, "reduction must be one of mean, sum"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


@pytest.mark.parametrize("reg", REGULARIZERS)
def test_valid_settings_are_accepted(reg):
    terms = valid_objective(reg, smoothing=0.2)(LOGITS, LABELS, CLEAN)
    assert all(math.isfinite(float(term)) for term in terms)
