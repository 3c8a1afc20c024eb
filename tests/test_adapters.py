"""Networks of other frameworks: their logits, gradients and verdicts; PyTorch's where it is."""

import hashlib
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from logit_reg import PGD, AttackWarning, AutoAttack, ThreatModel, evaluate
from logit_reg.adapters import ForeignNetwork, from_torch
from logit_reg.attacks.engine.forward import clean_logits, count_classes
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.losses import attack_loss
from logit_reg.audit import audit
from logit_reg.evaluation.run import known_hash, network_hash

SHAPE, NUM_CLASSES = (8, 8, 3), 4
THREAT = ThreatModel("linf", 0.05)
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(192, NUM_CLASSES)).astype(np.float32)
IMAGES = RNG.uniform(size=(6, *SHAPE)).astype(np.float32)


def linear(images):
    return (tf.reshape(images, (-1, 192)) - 0.5) @ WEIGHTS


LABELS = linear(IMAGES).numpy().argmax(axis=1)


class Numpy:
    """A network of no framework at all: linear, times a factor and plus a shift, both drawn."""

    def __init__(self, seed=None):
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.num_passes = 0

    def forward(self, images):
        self.num_passes += 1
        factor = np.float32(1.0 if self.rng is None else self.rng.uniform(1, 2))
        shift = np.float32(self.rng is not None) * np.eye(4, dtype=np.float32)[0] / 10

        def pullback(upstream):
            return (factor * upstream @ WEIGHTS.T).reshape(images.shape)

        logits = (images.reshape(len(images), 192) - 0.5) @ WEIGHTS
        return factor * logits + shift, pullback

    def random_state(self):
        return None if self.rng is None else self.rng.bit_generator.state

    def set_random_state(self, state):
        if self.rng is not None:
            self.rng.bit_generator.state = state

    @property
    def sha256(self):
        return hashlib.sha256(WEIGHTS.tobytes()).hexdigest()


def xent(logits):
    return attack_loss("xent", logits, LABELS)


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        return evaluate(*arguments, **options)


def test_logits_and_gradients_are_the_networks_own():
    network = ForeignNetwork(Numpy(), "linear")
    expected = logits_and_gradient(linear, tf.constant(IMAGES), xent)
    looks = (
        lambda images: logits_and_gradient(network, images, xent),
        tf.function(lambda images: logits_and_gradient(network, images, xent)),
    )
    for look in looks:
        for found, wanted in zip(look(tf.constant(IMAGES)), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert count_classes(network, IMAGES) == NUM_CLASSES
    assert clean_logits(network, IMAGES[:0]).shape == (0, NUM_CLASSES)


def test_a_pass_and_its_gradient_take_one_pass_of_the_network():
    numpy = Numpy()
    network = ForeignNetwork(numpy, "linear")
    network(IMAGES)
    before = numpy.num_passes
    logits_and_gradient(network, tf.constant(IMAGES), xent)
    assert numpy.num_passes == before + 1


def test_a_gradient_belongs_to_the_random_numbers_of_its_pass():
    numpy = Numpy(seed=0)
    network = ForeignNetwork(numpy, "linear")
    points = tf.constant(IMAGES)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(points)
        passes = [network(points) for _ in range(3)]
    factors = [float((logits / linear(IMAGES))[0, 1]) for logits in passes]
    assert len({round(factor, 3) for factor in factors}) == 3
    following = numpy.random_state()
    for logits, factor in zip(passes, factors, strict=True):
        for _ in range(2):
            gradient = tape.gradient(logits, points)
            wanted = factor * np.tile(WEIGHTS.sum(axis=1).reshape(SHAPE), (6, 1, 1, 1))
            np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
    # What comes next is drawn as if no gradient had been asked for.
    assert numpy.random_state() == following


def test_a_foreign_network_is_evaluated_as_the_same_network_in_tensorflow():
    threat = ThreatModel("linf", 0.01)
    light = {"num_steps": 5, "num_targets": 2, "num_queries": 20}
    attacks = {"pgd": PGD(threat, "cw", 3, 0.003), "autoattack": AutoAttack(threat, **light)}
    foreign = quietly(ForeignNetwork(Numpy(), "linear"), attacks, IMAGES, LABELS)
    own = quietly(linear, attacks, IMAGES, LABELS)
    assert foreign.broken_by == own.broken_by and 0 < own.robust.sum() < 6
    assert (foreign.forwards, foreign.backwards) == (own.forwards, own.backwards)


def test_an_evaluation_of_a_random_foreign_network_averages_its_passes():
    network = ForeignNetwork(Numpy(seed=1), "linear")
    found = quietly(network, {"pgd": PGD(THREAT, num_steps=2)}, IMAGES, LABELS, eot=3)
    assert found.clean.all() and "not_randomised" not in {f.name for f in found.findings}


def test_a_foreign_network_is_known_by_its_content():
    network = ForeignNetwork(Numpy(), "linear")
    assert network_hash(network) == known_hash(network) == Numpy().sha256
    assert known_hash(linear) is None


def wrong_shape(images):
    return images.mean(axis=(1, 2, 3)), None


def no_such_images(images):
    raise RuntimeError("expected 1 channel\n  but got 3")


@pytest.mark.parametrize(
    ("forward", "words"),
    [(wrong_shape, r"shape \(2,\)"), (no_such_images, "expected 1 channel but got 3")],
)
def test_what_a_foreign_network_does_not_take_or_give_is_told_in_one_line(forward, words):
    numpy = Numpy()
    numpy.forward = forward
    with pytest.raises(ValueError, match=words) as caught:
        evaluate(ForeignNetwork(numpy, "Net"), {"pgd": PGD(THREAT)}, IMAGES, LABELS)
    assert "\n" not in str(caught.value) and "Net" in str(caught.value)


def test_a_module_that_is_not_adapted_is_told_how():
    module = types.new_class(
        "Net", (type("Module", (), {"__module__": "torch.nn.modules.module"}),)
    )
    module.__call__ = lambda self, images: images
    with pytest.raises(ValueError, match=r"Net is a PyTorch module: pass .*from_torch\(module\)"):
        evaluate(module(), {"pgd": PGD(THREAT)}, IMAGES, LABELS)


def twins(torch):
    """The same network in PyTorch and in Keras."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.5),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(80, NUM_CLASSES),
    )
    layers = keras.layers
    network = keras.Sequential([keras.Input(SHAPE), layers.Conv2D(5, 3, padding="same")])
    for layer in (layers.ReLU(), layers.MaxPooling2D(), layers.Permute((3, 1, 2))):
        network.add(layer)
    network.add(layers.Flatten())
    network.add(layers.Dense(NUM_CLASSES))
    kernel, bias, dense, dense_bias = (p.detach().numpy() for p in module.parameters())
    network.set_weights([kernel.transpose(2, 3, 1, 0), bias, dense.T, dense_bias])
    return module, network


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_a_module_has_the_logits_gradients_and_verdicts_of_its_twin(torch):
    module, network = twins(torch)
    foreign = from_torch(module.eval())
    labels = network(IMAGES).numpy().argmax(axis=1)
    for look in (
        lambda f: logits_and_gradient(f, tf.constant(IMAGES), xent),
        lambda f: tf.function(lambda images: logits_and_gradient(f, images, xent))(IMAGES),
    ):
        for found, wanted in zip(look(foreign), look(network), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)
    attacks = {"pgd": PGD(THREAT, "cw", 8, 0.01)}
    assert quietly(foreign, attacks, IMAGES, labels).broken_by == (
        quietly(network, attacks, IMAGES, labels).broken_by
    )


def test_a_module_is_put_in_evaluation_mode_and_kept_there(torch):
    module, _ = twins(torch)
    with pytest.warns(UserWarning, match="Sequential was in training mode"):
        foreign = from_torch(module)
    first = foreign(IMAGES)
    module.train()
    np.testing.assert_array_equal(foreign(IMAGES), first)
    assert not module.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(module)
        random = from_torch(module.train(), eval_mode=False)
    assert np.abs(random(IMAGES) - random(IMAGES)).max() > 0
    assert module.training


def test_the_gradient_of_a_random_module_is_that_of_its_own_pass(torch):
    module, _ = twins(torch)
    foreign = from_torch(module.train(), eval_mode=False)
    points = tf.constant(IMAGES)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(points)
        passes = [foreign(points) for _ in range(2)]
    gradients = [tape.gradient(logits, points).numpy() for logits in passes]
    torch_network = foreign._network
    for state, logits, gradient in zip(
        list(foreign._states.values())[-2:], passes, gradients, strict=True
    ):
        torch_network.set_random_state(state)
        # Within so small a step the network of one mask is all but linear.
        moved, _ = torch_network.forward(IMAGES + np.float32(1e-4) * np.sign(gradient))
        gained = (moved - logits.numpy()).sum()
        assert gained == pytest.approx(1e-4 * np.abs(gradient).sum(), rel=0.05)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_module_computes_in_its_own_precision(torch, dtype):
    module, network = twins(torch)
    foreign = from_torch(module.eval().to(getattr(torch, dtype)))
    logits, gradient = logits_and_gradient(foreign, tf.constant(IMAGES), xent)
    assert logits.dtype == gradient.dtype == tf.float32
    np.testing.assert_allclose(logits, network(IMAGES), atol=1e-5 if dtype == "float64" else 0.05)


def test_a_module_without_gradient_counts_as_one_whose_gradient_vanishes(torch):
    class Cut(torch.nn.Module):
        def forward(self, images):
            return images.detach().flatten(1)[:, :NUM_CLASSES]

    logits, gradient = logits_and_gradient(from_torch(Cut().eval()), tf.constant(IMAGES), xent)
    np.testing.assert_allclose(logits, IMAGES.transpose(0, 3, 1, 2).reshape(6, -1)[:, :4])
    assert not np.any(gradient)


def test_the_hash_of_a_module_is_that_of_its_layers_and_weights(torch):
    (module, _), (other, _) = twins(torch), twins(torch)
    first = network_hash(from_torch(module.eval()))
    assert first == network_hash(from_torch(other.eval()))
    with torch.no_grad():
        other[0].bias[0] += 1e-3
    assert first != network_hash(from_torch(other))
    module[3] = torch.nn.AvgPool2d(2)
    assert first != network_hash(from_torch(module))


def test_what_is_no_module_of_logits_is_told_in_one_line(torch):
    class Several(torch.nn.Module):
        def forward(self, images):
            return images, images

    for thing, words in (
        (torch.nn.ReLU, "got a class"),
        (lambda x: x, "got function"),
        (torch.nn.Conv2d(1, 2, 3).eval(), "fails on images"),
        (torch.nn.Flatten(0).eval(), "must return"),
        (Several().eval(), "one tensor; it returns tuple"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            evaluate(from_torch(thing), {"pgd": PGD(THREAT)}, IMAGES, LABELS)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_module_is_audited(torch):
    module, network = twins(torch)
    labels = network(IMAGES).numpy().argmax(axis=1)
    foreign = from_torch(module.eval())
    threat = ThreatModel("linf", 0.5)
    found = audit(foreign, threat, IMAGES, labels, claim=100.0, budget="quick")
    assert found.verdict == "REFUTED" and found.worst_case < 100
