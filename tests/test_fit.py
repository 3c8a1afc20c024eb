"""`RegularizedModel` in Keras' own hands: data, labels, losses, precision, callbacks, files."""

import functools
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_training import THREAT, small_model, small_network, some_data

from logit_reg.attacks import PGD
from logit_reg.objectives import Objective
from logit_reg.threat import ThreatModel
from logit_reg.training.adversaries.free import FreeAdversary
from logit_reg.training.adversaries.pgd import PGDAdversary
from logit_reg.training.loop import LoopSettings, train
from logit_reg.training.model import RegularizedModel
from logit_reg.training.records import LOG_COLUMNS

IMAGES, LABELS = some_data(32)
FLAT = [keras.Input((6, 6, 1)), keras.layers.Flatten()]


class Batches(keras.utils.PyDataset):
    """Batches of 8 from arrays."""

    def __init__(self, images, labels):
        super().__init__()
        self.arrays = images, labels

    def __len__(self):
        return len(self.arrays[0]) // 8

    def __getitem__(self, number):
        return tuple(array[8 * number : 8 * number + 8] for array in self.arrays)


def as_dataset(images, labels):
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(8)


def as_generator(images, labels):
    return (Batches(images, labels)[number] for number in range(len(images) // 8))


def as_dataset_of_unknown_shape(images, labels):
    return tf.data.Dataset.from_generator(
        lambda: as_generator(images, labels), output_types=(tf.float32, tf.int64)
    )


SOURCES = {
    "arrays": lambda *arrays: arrays,
    "tensors": lambda *arrays: tuple(map(tf.constant, arrays)),
    "dataset": lambda *arrays: (as_dataset(*arrays),),
    "unknown shapes": lambda *arrays: (as_dataset_of_unknown_shape(*arrays),),
    "generator": lambda *arrays: (as_generator(*arrays),),
    "PyDataset": lambda *arrays: (Batches(*arrays),),
}


def fit(model, *data, **options):
    if len(data) == 2:
        options |= {"batch_size": 8}
    options = {"shuffle": False, "verbose": 0} | options
    return model.fit(*data, **options).history


def wrapped(network, bounds=(0.0, 1.0), **settings):
    model = RegularizedModel(network, Objective(), bounds=bounds, **settings)
    model.compile("sgd")
    return model


def dense_model(bounds=(0.0, 1.0)):
    return wrapped(keras.Sequential([*FLAT, keras.layers.Dense(3)]), bounds)


# For what is refused: its steps are traced once.
shared_model = functools.cache(dense_model)


def assert_same_weights(model, other, **tolerance):
    for one, two in zip(model.network.get_weights(), other.network.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, **({"rtol": 0, "atol": 0} | tolerance))


ADVERSARIES = {
    "none": None,
    "pgd": PGDAdversary(PGD(THREAT, num_steps=2, step_size=0.1)),
    "free": FreeAdversary(THREAT, 8),
}


@pytest.mark.parametrize(("adversary", "dtype"), [("pgd", "int8"), ("free", "float32")])
def test_labels_of_shape_n_1_train_and_evaluate_as_those_of_shape_n(adversary, dtype):
    column = LABELS[:, None].astype(dtype)
    settings = {"objective": Objective("squeeze", beta=0.5), "adversary": ADVERSARIES[adversary]}
    model, other = small_model(**settings), small_model(**settings)
    assert fit(other, IMAGES, column) == fit(model, IMAGES, LABELS)
    batch = IMAGES[:8], LABELS[:8]
    assert model.train_on_batch(*batch) == other.train_on_batch(batch[0], column[:8])
    assert model.test_on_batch(IMAGES, LABELS) == other.test_on_batch(IMAGES, column)
    assert_same_weights(model, other)


def test_all_sources_of_data_train_alike():
    settings = {"sigma": 0.1, "augment": True}
    model = small_model(**settings)
    expected = fit(model, IMAGES, LABELS)
    for source in SOURCES.values():
        other = small_model(**settings)
        assert fit(other, *source(IMAGES, LABELS[:, None])) == expected
        assert_same_weights(model, other)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("arrays", 3),
        ("arrays", 1.5),
        ("tensors", 1000),
        ("dataset", 1.5),
        ("dataset", np.nan),
        ("unknown shapes", 3),
        ("PyDataset", -1),
    ],
)
def test_a_label_that_is_no_class_is_named_and_moves_no_weight(source, wrong):
    labels = LABELS.astype(np.float32 if isinstance(wrong, float) else int)
    labels[3] = wrong
    model = shared_model()
    before = model.network.get_weights()
    message = f"whole numbers from 0 to 2, for 3 logits; the first other one is {wrong:g}[.,]"
    for call, options in ((model.fit, {"shuffle": False}), (model.evaluate, {})):
        with pytest.raises(ValueError, match=message) as caught:
            call(*SOURCES[source](IMAGES, labels), verbose=0, **options)
        assert "\n" not in str(caught.value)
    for weight, other in zip(model.network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, other)


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 2}])
def test_wrong_batches_are_named_however_steps_are_executed(options):
    model = dense_model()
    model.compile("sgd", **options)
    with pytest.raises(ValueError, match=r"the first other one is 3[.,]"):
        fit(model, as_dataset(IMAGES, LABELS + 1))
    with pytest.raises(ValueError, match=r"images span 0.* to 2.* and leave the bounds"):
        fit(model, as_dataset(IMAGES * 3, LABELS))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3)[LABELS], r"got shape \(\d+, 3\): pass the argmax of one-hot labels"),
        (np.stack([LABELS] * 2, axis=1), r"got shape \(\d+, 2\)"),
        (LABELS[:, None, None], r"got shape \(\d+, 1, 1\)"),
        (None, "labels are missing"),
    ],
)
def test_labels_of_another_kind_are_refused_in_one_sentence(labels, message):
    for call in (dense_model().fit, dense_model().evaluate):
        with pytest.raises(ValueError, match=message):
            call(IMAGES, labels, verbose=0)


def test_fewer_labels_than_images_are_refused():
    pairs = tf.data.Dataset.from_tensors((IMAGES, LABELS[:1]))
    with pytest.raises(ValueError, match="one an image; got 1 for 32 images"):
        fit(shared_model(), pairs)


def test_weights_of_images_and_classes_are_refused_in_one_sentence():
    weights = np.ones(32)
    given = (
        ((IMAGES, LABELS), {"sample_weight": weights}),
        ((IMAGES, LABELS), {"class_weight": {0: 1.0, 1: 2.0, 2: 1.0}}),
        ((IMAGES, LABELS), {"validation_data": (IMAGES, LABELS, weights)}),
        ((tf.data.Dataset.from_tensor_slices((IMAGES, LABELS, weights)).batch(8),), {}),
    )
    for data, options in given:
        with pytest.raises(ValueError, match="sample_weight and class_weight are refused"):
            shared_model().fit(*data, verbose=0, **options)


@pytest.mark.parametrize("name", ["loss", "metrics", "weighted_metrics", "loss_weights"])
def test_other_losses_and_metrics_are_refused(name):
    with pytest.raises(ValueError, match=f"leave {name} out of compile: the objective is the"):
        small_model().compile("sgd", **{name: ["mse"]})


@pytest.mark.parametrize(
    ("images", "bounds", "span"),
    [
        (IMAGES * 255, (0.0, 1.0), "0.* to 2.*0 to 1;"),
        (IMAGES - 0.5, (0.0, 1.0), "-0.* to 0.*0 to 1;"),
        ((IMAGES * 255).astype(np.uint8), (0.0, 1.0), "0 to 2.*0 to 1;"),
        (IMAGES, (-0.5, 0.5), ".* to 0.*-0.5 to 0.5;"),
        (np.where(IMAGES > 0.8, np.nan, IMAGES), (0.0, 1.0), "nan"),
    ],
)
def test_images_out_of_bounds_are_an_error_of_one_line(images, bounds, span):
    message = f"images span {span}"
    model = shared_model(bounds)
    for source in ("arrays", "dataset"):
        for call in (model.fit, model.evaluate):
            with pytest.raises(ValueError, match=message) as caught:
                call(*SOURCES[source](images, LABELS), verbose=0)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        fit(model, IMAGES[:0], LABELS[:0], validation_data=(images, LABELS))


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-7])
def test_images_within_bounds_pass_silently(scale):
    whole = np.clip(IMAGES, 0, 1) / IMAGES.max() * np.float32(scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(small_model(), whole, LABELS)
        fit(small_model(bounds=(0, 255), sigma=20.0), np.uint8(255 * whole), LABELS)


def test_what_is_likely_in_other_units_is_told():
    for settings, named in (
        ({"sigma": 20.0}, "sigma 20"),
        ({"adversary": FreeAdversary(ThreatModel("linf", 8.0), 8)}, "epsilon 8"),
        ({"adversary": FreeAdversary(ThreatModel("linf", 1e-4), 8)}, "epsilon 0.0001"),
    ):
        with pytest.warns(UserWarning, match=f"{named} is in the images' pixel units, .* 0 to 1"):
            small_model(**settings)
    with pytest.warns(UserWarning, match="images span .* of the bounds of the model, 0 to 255"):
        fit(small_model(bounds=(0, 255)), IMAGES, LABELS)


def test_an_adversary_of_other_bounds_is_refused():
    for adversary in (ADVERSARIES["pgd"], ADVERSARIES["free"]):
        with pytest.raises(ValueError, match="has bounds 0 to 1, the model 0 to 255"):
            small_model(bounds=(0, 255), adversary=adversary)


class Charge(keras.layers.Layer):
    """Adds a loss of its own."""

    def call(self, x):
        self.add_loss(0.3 * keras.ops.mean(keras.ops.square(x)))
        return x


def network_with_losses(kind, dtype=None):
    """A network with losses of its own, on "weights" or "outputs", or with "none"."""
    keras.utils.set_random_seed(0)
    regularizers = keras.regularizers
    options, last, more = {}, {}, []
    if kind == "weights":
        options = {"kernel_regularizer": regularizers.L2(0.1), "bias_initializer": "ones"}
        options["bias_regularizer"] = regularizers.L1(0.01)
        last = {"kernel_regularizer": regularizers.OrthogonalRegularizer(0.1)}
    if kind == "outputs":
        options, more = {"activity_regularizer": regularizers.L2(0.1)}, [Charge()]
    hidden = keras.layers.Dense(8, activation="relu", dtype=dtype, **options)
    return keras.Sequential([*FLAT, hidden, *more, keras.layers.Dense(3, dtype="float32", **last)])


def trained_by_keras(network, optimizer, validation_data=None, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer, loss, **options)
    return fit(network, IMAGES, LABELS, epochs=3, validation_data=validation_data)


@pytest.mark.parametrize("kind", ["none", "weights", "outputs"])
def test_the_network_s_own_losses_count_as_in_keras_and_have_their_term(kind):
    plain = network_with_losses(kind)
    expected = trained_by_keras(plain, keras.optimizers.SGD(0.1), (IMAGES, LABELS))
    model = RegularizedModel(network_with_losses(kind), Objective(), bounds=(0.0, 1.0))
    model.compile(keras.optimizers.SGD(0.1))
    history = fit(model, IMAGES, LABELS, validation_data=(IMAGES, LABELS), epochs=3)
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-5)
    for one, other in zip(model.network.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert ("regularization" in history) == (kind != "none")
    if kind != "none":
        total = np.add(history["xent"], history["regularization"])
        np.testing.assert_allclose(history["total"], total, rtol=1e-5)
        assert min(history["regularization"]) > 1e-3


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_passes_of_the_attack_add_no_losses(mode):
    attack = PGD(THREAT, num_steps=3, step_size=1e-9, random_start=False)
    model = RegularizedModel(
        network_with_losses("outputs"),
        Objective(),
        bounds=(0.0, 1.0),
        adversary=PGDAdversary(attack, batch_norm=mode),
    )
    model.compile(keras.optimizers.SGD(0.0))
    term = fit(model, IMAGES, LABELS)["regularization"][0]
    clean = model.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)["regularization"]
    assert term == pytest.approx(clean, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"steps_per_execution": 3}, {}),
        ({"run_eagerly": True}, {"weight_decay": 0.1}),
        ({}, {"gradient_accumulation_steps": 2}),
        ({"steps_per_execution": 2}, {"use_ema": True, "ema_momentum": 0.5}),
        ({}, {"loss_scale_factor": 1024.0, "global_clipnorm": 0.1}),
    ],
)
def test_optimisers_and_ways_to_execute_do_what_they_do_in_keras(options, given):
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, **given)
    plain = network_with_losses("none")
    trained_by_keras(plain, keras.optimizers.SGD.from_config(optimizer.get_config()), **options)
    model = RegularizedModel(network_with_losses("none"), Objective(), bounds=(0.0, 1.0))
    model.compile(optimizer, **options)
    fit(model, IMAGES, LABELS, epochs=3)
    for one, other in zip(model.network.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_xla_is_left_out_with_a_warning():
    model = small_model()
    with pytest.warns(UserWarning, match="Proceeding with `jit_compile=False`"):
        model.compile("sgd", jit_compile=True)
    with pytest.raises(ValueError, match="first other one"):
        fit(model, as_dataset(IMAGES, LABELS + 1))


def half_model(scale=None, **settings):
    """A network whose gradients are far below what float16 holds, if they are not scaled."""
    keras.utils.set_random_seed(0)
    layers = [
        *FLAT,
        keras.layers.Dense(8, activation="relu", dtype=settings.pop("dtype", "mixed_float16")),
        keras.layers.Rescaling(1e-6, dtype="float32"),
        keras.layers.Dense(3, dtype="float32", trainable=False),
    ]
    settings = {"bounds": (0.0, 1.0)} | settings
    model = RegularizedModel(keras.Sequential(layers), Objective(), **settings)
    optimizer = keras.optimizers.SGD(1e6)
    if scale is not None:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=scale)
    model.compile(optimizer)
    return model


@pytest.mark.parametrize("adversary", ["none", "free"])
def test_float16_takes_the_steps_of_float32(adversary):
    """Unscaled, its gradients would be zero."""
    settings = {"adversary": ADVERSARIES[adversary]}
    models = [half_model(dtype=dtype, **settings) for dtype in ("mixed_float16", "float32")]
    assert isinstance(models[0].optimizer, keras.optimizers.LossScaleOptimizer)
    start = models[0].network.get_weights()[0]
    for model in models:
        fit(model, IMAGES, LABELS, epochs=2)
    moves = [model.network.get_weights()[0] - start for model in models]
    assert np.abs(moves[1]).max() > 1e-4
    np.testing.assert_allclose(moves[0], moves[1], rtol=0.05, atol=0.02 * np.abs(moves[1]).max())
    if adversary == "free":
        signs = [np.sign(model.adversary_state.numpy()) for model in models]
        assert (signs[0] == signs[1]).mean() > 0.98 and np.abs(signs[1]).mean() > 0.5


def test_a_step_that_overflows_in_float16_leaves_weights_and_perturbation_as_they_are():
    model, fresh = (half_model(scale=1e30, adversary=ADVERSARIES["free"]) for _ in range(2))
    model.train_on_batch(IMAGES[:8], LABELS[:8])
    assert_same_weights(model, fresh)
    assert not model.adversary_state.numpy().any()
    assert int(model.optimizer.iterations) == 0


def test_float16_variables_and_float16_in_the_loop_are_refused(tmp_path):
    network = keras.Sequential([*FLAT, keras.layers.Dense(3)])
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float16")
    try:
        network = keras.Sequential([*FLAT, keras.layers.Dense(3)])
        with pytest.raises(ValueError, match="float16 variables .*mixed_float16"):
            RegularizedModel(network, Objective(), bounds=(0.0, 1.0))
    finally:
        keras.config.set_dtype_policy(policy)
    images = np.uint8(255 * IMAGES / IMAGES.max())
    with pytest.raises(RuntimeError, match="float16 skips the steps that overflow"):
        train(half_model(), images, LABELS, LoopSettings(1, 8), tmp_path, show_progress=False)


def test_the_loop_takes_labels_of_shape_n_1_and_refuses_others(tmp_path):
    images = np.uint8(255 * IMAGES / IMAGES.max())
    settings = LoopSettings(4, 8, num_output_steps=1)
    for name, labels in (("vector", LABELS), ("column", LABELS[:, None].astype(np.uint8))):
        train(small_model(), images, labels, settings, tmp_path / name, show_progress=False)
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("vector", "column")]
    assert logs[0] == logs[1]
    for labels, message in (
        (LABELS + 1, "the first other one is 3"),
        (LABELS[1:], "got 31 for 32 images"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small_model(), images, labels, settings, tmp_path, show_progress=False)


def test_the_loop_logs_the_network_s_own_losses_in_a_column_and_goes_on(tmp_path):
    images = np.uint8(255 * IMAGES / IMAGES.max())

    def run(steps, kind):
        model = RegularizedModel(network_with_losses(kind), Objective(), bounds=(0.0, 1.0))
        model.compile(keras.optimizers.SGD(0.1))
        settings = LoopSettings(steps, 8, num_output_steps=1)
        folder = tmp_path / f"{kind}-{steps}"
        train(model, images, LABELS, settings, tmp_path / kind, show_progress=False)
        return (tmp_path / kind / "log.csv").read_text().splitlines(), folder

    log, _ = run(2, "weights")
    assert log[0].split(",") == [*LOG_COLUMNS, "regularization"]
    longer, _ = run(4, "weights")
    assert longer[:3] == log and len(longer) == 5
    for line in longer[1:]:
        row = dict(zip(log[0].split(","), map(float, line.split(",")), strict=True))
        assert row["total"] == pytest.approx(row["xent"] + row["regularization"], rel=1e-5)
    # A log that was begun before the column came keeps its rows.
    old = [",".join(line.split(",")[:-1]) for line in longer]
    (tmp_path / "weights" / "log.csv").write_text("\n".join(old) + "\n")
    for steps in (5, 6):
        log, _ = run(steps, "weights")
    assert [line.split(",")[-1] == "" for line in log[1:]] == [True] * 4 + [False] * 2
    assert run(2, "none")[0][0].split(",") == list(LOG_COLUMNS)


def nan_model(**settings):
    model = small_model(**settings)
    weights = [np.full_like(weight, np.nan) for weight in model.network.get_weights()]
    model.network.set_weights(weights)
    return model


def test_early_stopping_and_plateaus_watch_the_loss():
    model = small_model(keras.optimizers.SGD(0.0))
    stop = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
    slower = keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1)
    history = fit(
        model,
        IMAGES,
        LABELS,
        epochs=9,
        validation_data=(IMAGES, LABELS),
        callbacks=[stop, slower],
    )
    assert len(history["val_loss"]) == 3
    assert history["loss"] == history["total"] and history["val_loss"] == history["val_total"]


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_weights_that_are_no_numbers_stop_training_and_get_nothing_right(adversary):
    model = nan_model(adversary=ADVERSARIES[adversary])
    stop = keras.callbacks.TerminateOnNaN()
    history = fit(model, IMAGES, LABELS, epochs=9, callbacks=[stop])
    assert len(history["loss"]) == 1 and np.isnan(history["loss"][0])
    assert history["accuracy"] == [0.0]
    assert model.evaluate(IMAGES, LABELS, verbose=0, return_dict=True)["accuracy"] == 0.0


_LOADED = """
import sys, numpy as np, keras
network = keras.saving.load_model(sys.argv[1], safe_mode=True)
np.save(sys.argv[2], network.predict(np.load(sys.argv[3]), verbose=0))
assert "logit_reg" not in sys.modules
"""


def test_a_checkpoint_of_keras_is_the_bare_network_and_loads_without_this_project(tmp_path):
    model = small_model(adversary=ADVERSARIES["free"])
    path = tmp_path / "best.keras"
    keep = keras.callbacks.ModelCheckpoint(path, save_best_only=True)
    weights = keras.callbacks.ModelCheckpoint(tmp_path / "x.weights.h5", save_weights_only=True)
    fit(model, IMAGES, LABELS, validation_data=(IMAGES, LABELS), callbacks=[keep, weights])
    np.save(tmp_path / "images.npy", IMAGES)
    files = [str(path), str(tmp_path / "logits.npy"), str(tmp_path / "images.npy")]
    subprocess.run([sys.executable, "-c", _LOADED, *files], check=True, cwd=tmp_path)
    logits = model.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, atol=1e-6)

    other = small_model(adversary=ADVERSARIES["free"])
    other.load_weights(tmp_path / "x.weights.h5")
    assert_same_weights(model, other)
    np.testing.assert_array_equal(model.adversary_state.numpy(), other.adversary_state.numpy())
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(IMAGES), logits, atol=1e-6)
    with pytest.raises(NotImplementedError, match="save its network"):
        keras.saving.save_model(model, tmp_path / "whole.keras")


def test_backup_and_restore_goes_on_where_training_was_interrupted(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def model():
        adam = keras.optimizers.Adam(0.01)
        return small_model(adam, adversary=ADVERSARIES["free"], sigma=0.1)

    whole = model()
    fit(whole, IMAGES, LABELS, epochs=4)
    parts = [keras.callbacks.BackupAndRestore(tmp_path / "backup"), Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        fit(model(), IMAGES, LABELS, epochs=4, callbacks=parts)
    rest = model()
    fit(rest, IMAGES, LABELS, epochs=4, callbacks=parts[:1])
    assert_same_weights(whole, rest)


def test_predict_and_evaluate_are_those_of_the_network():
    model = small_model()
    fit(model, IMAGES[:20], LABELS[:20], validation_split=0.2)
    logits = model.network.predict(IMAGES, verbose=0)
    np.testing.assert_array_equal(model.predict(IMAGES, verbose=0), logits)
    found = model.evaluate(IMAGES, LABELS, batch_size=7, verbose=0)
    names = ["loss", "total", "xent", "penalty", "accuracy", "mean_logit_norm"]
    assert model.metrics_names == names
    xent = keras.losses.sparse_categorical_crossentropy(LABELS, logits, from_logits=True)
    assert found[0] == pytest.approx(float(np.mean(xent)), rel=1e-5)
    assert found[names.index("accuracy")] == (logits.argmax(-1) == LABELS).mean()


def test_a_network_of_own_class_is_trained_too():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = small_network()

        def call(self, images, training=None):
            return self.inner(images, training=training)

    network = Own()
    network(IMAGES[:1])
    model = RegularizedModel(network, Objective(), bounds=(0.0, 1.0))
    model.compile(keras.optimizers.SGD(0.1))
    plain = small_model()
    assert fit(model, IMAGES, LABELS) == fit(plain, IMAGES, LABELS)
    with pytest.raises(ValueError, match="the first other one is 3"):
        fit(model, as_dataset(IMAGES, LABELS + 1))


def own_class(num_classes=3):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.drop, self.dense = keras.layers.Dropout(0.5), keras.layers.Dense(num_classes)

        def call(self, images, training=None):
            flat = keras.ops.reshape(images, (-1, 36))
            return self.dense(self.drop(flat, training=training))

    return Own()


UNBUILT = {
    "own class": own_class,
    "Sequential": lambda k=3: keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(k)]),
}


@pytest.mark.parametrize("source", ["arrays", "dataset", "generator"])
@pytest.mark.parametrize("kind", UNBUILT)
def test_labels_are_checked_for_networks_that_learn_their_shapes_from_the_images(kind, source):
    with pytest.raises(ValueError, match="from 0 to 2, for 3 logits; the first other one is 3[.,]"):
        fit(wrapped(UNBUILT[kind]()), *SOURCES[source](IMAGES, LABELS + 1))
    assert np.isfinite(fit(wrapped(UNBUILT[kind]()), *SOURCES[source](IMAGES, LABELS))["loss"][0])
    with pytest.raises(ValueError, match="returns 1 logit an image, expected one for each class"):
        fit(wrapped(UNBUILT[kind](1)), *SOURCES[source](IMAGES, LABELS))


@pytest.mark.parametrize("kind", UNBUILT)
def test_where_a_shape_is_needed_before_the_images_it_is_asked_for(kind):
    message = r"does not know the shape of its images: .* keras.Model\(image, network\(image\)\)"
    with pytest.raises(ValueError, match=message):
        wrapped(UNBUILT[kind](), adversary=ADVERSARIES["free"])
    with pytest.raises(ValueError, match=message):
        fit(wrapped(UNBUILT[kind]()), as_dataset_of_unknown_shape(IMAGES, LABELS))
    image = keras.Input((6, 6, 1))
    network = keras.Model(image, UNBUILT[kind]()(image))
    fit(wrapped(network, adversary=ADVERSARIES["free"]), IMAGES, LABELS)


STRUCTURES = {
    "dictionary": (lambda x: x, lambda z: {"digits": z}),
    "lists": (lambda x: [x], lambda z: [z]),
}


@pytest.mark.parametrize(
    ("kind", "adversary"), [("dictionary", "none"), ("dictionary", "pgd"), ("lists", "free")]
)
def test_one_input_and_one_output_train_in_whatever_they_come(kind, adversary):
    given, returned = STRUCTURES[kind]
    network = small_network()
    image = keras.Input(network.input_shape[1:])
    structured = wrapped(
        keras.Model(given(image), returned(network(image))), adversary=ADVERSARIES[adversary]
    )
    plain = wrapped(keras.models.clone_model(network), adversary=ADVERSARIES[adversary])
    plain.network.set_weights(network.get_weights())
    validation = (IMAGES, LABELS)
    history = fit(plain, IMAGES, LABELS, validation_data=validation)
    found = fit(structured, given(IMAGES), {"y": LABELS}, validation_data=validation, batch_size=8)
    for name, values in history.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    with pytest.raises(ValueError, match="the first other one is 3[.,]"):
        fit(structured, IMAGES, LABELS + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: ({"a": x, "b": x}, y), "images must be one dense tensor; got 2 parts"),
        (lambda x, y: (x, {"a": y, "b": y}), "labels must be one dense tensor; got 2 parts"),
        (lambda x, y: (x, tf.RaggedTensor.from_tensor(y[:, None])), "got a RaggedTensor"),
        (lambda x, y: (x, tf.sparse.from_dense(tf.one_hot(y, 3))), "got a SparseTensor"),
        (lambda x, y: (x, tf.as_string(y)), "the first other one is a string"),
        (lambda x, y: (x[0], y[0]), r"got shape \(\): put the data set in batches"),
    ],
)
def test_batches_of_another_structure_are_refused_in_one_line(change, message):
    batches = as_dataset(IMAGES, LABELS).map(change)
    with pytest.raises(ValueError, match=message) as caught:
        fit(dense_model(), batches)
    assert "\n" not in str(caught.value)


def test_labels_that_are_strings_are_shown_as_such():
    with pytest.raises(ValueError, match=f"the first other one is '{LABELS[0]}', at place 0"):
        fit(shared_model(), IMAGES, LABELS.astype(str))


@pytest.mark.parametrize(
    ("dtype", "num_classes"), [("float32", 2), ("mixed_float16", 3), ("bfloat16", 3)]
)
def test_a_network_with_a_softmax_is_told(dtype, num_classes):
    flat = keras.layers.Flatten(dtype=dtype)
    for activation in ("softmax", None):
        last = keras.layers.Dense(num_classes, activation=activation, dtype=dtype)
        model = wrapped(keras.Sequential([keras.Input((6, 6, 1)), flat, last]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model, *SOURCES["dataset"](IMAGES, LABELS % num_classes))
        told = [str(w.message) for w in caught if "returns probabilities" in str(w.message)]
        assert len(told) == (activation == "softmax")
