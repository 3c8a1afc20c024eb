"""The registry of adversaries, their protocol, and one that is added by a file and a line."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import flags_of
from test_training import THREAT, model_that_remembers, small_model, some_data

from logit_reg.experiments.defaults import resolve_settings
from logit_reg.objectives import LossTerms, Objective
from logit_reg.training import FreeAdversary, replayed
from logit_reg.training import adversaries as registry
from logit_reg.training.adversaries.protocol import Adversary
from logit_reg.training.random_numbers import START

ROOT = Path(__file__).resolve().parents[1]
NAMES = tuple(registry.ADVERSARIES)


class Reads:
    """Settings of a run that note which of them are read."""

    def __init__(self, settings):
        self.settings = settings
        self.read = set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.settings, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_lists_the_settings_that_its_adversary_reads(name):
    settings = Reads(resolve_settings({"dataset": "mnist_5k", "adversary": name}))
    adversary = registry.adversary_class(name).from_settings(settings)
    # The threat model is made of epsilon.
    read = settings.read | ({"epsilon"} if "threat" in settings.read else set())
    assert read & set(registry.FLAGS) == set(registry.ADVERSARIES[name].flags)
    assert set(registry.FLAGS) <= flags_of("train")
    hash(adversary)
    assert (adversary.threat is None) == (name == "none")


@pytest.mark.parametrize("path", ["training/model.py", "training/loop.py", "commands/train.py"])
def test_nothing_around_the_adversaries_knows_one_by_name(path):
    text = (ROOT / "logit_reg" / path).read_text()
    known = [name for name in NAMES if name != "none"]
    assert not re.findall(rf"""["']({"|".join(known)})["']|isinstance\([^)]*adversar""", text)


@dataclasses.dataclass(frozen=True)
class Toy(Adversary):
    """Adds random signs of epsilon, counts its steps, and wants the clean logits."""

    threat = THREAT
    learns = True
    wants_clean_logits = True
    step_size: float = 0.25

    @property
    def description(self):
        return "toy"

    @classmethod
    def defaults(cls, challenge, given, *, is_challenge_config):
        return {"step_size": challenge.epsilon / 2}

    @classmethod
    def from_settings(cls, settings):
        return cls(settings.step_size)

    def create_state(self, model):
        return model.add_weight(name="count", shape=(2,), initializer="zeros", trainable=False)

    def variables(self, state):
        return (state,)

    def find(self, batch):
        signs = tf.sign(batch.numbers.uniform(START, batch.images.shape[1:]))
        return self.step_size * signs

    def images(self, batch, found):
        return tf.clip_by_value(batch.images + found, 0.0, 1.0)

    def learn(self, batch, found, gradient):
        batch.state.assign_add([1.0, tf.norm(gradient)])


@pytest.fixture
def toy(monkeypatch):
    """What a file adversaries/toy.py and its line in the registry would do."""
    module = types.ModuleType(f"{registry.__name__}.toy")
    module.Toy = Toy
    monkeypatch.setitem(sys.modules, module.__name__, module)
    entry = registry.Entry("toy.Toy", ("step_size",))
    monkeypatch.setitem(registry.ADVERSARIES, "toy", entry)


def test_an_adversary_is_added_by_its_file_and_its_line(toy):
    settings = resolve_settings({"dataset": "mnist_5k", "adversary": "toy"})
    assert settings.step_size == 0.15
    assert settings.training_adversary == Toy(0.15)
    assert settings.description == "toy" and settings.name.startswith("mnist_5k-toy-")
    given = {"dataset": "mnist_5k", "adversary": "toy"}
    assert resolve_settings(given | {"step_size": 0.1}).training_adversary == Toy(0.1)
    with pytest.raises(ValueError, match="--epsilon has an effect only with --adversary=pgd or"):
        resolve_settings(given | {"epsilon": 0.1})


def test_a_step_asks_an_adversary_for_all_that_the_protocol_says():
    asked = []

    def objective(logits, labels, clean_logits):
        asked.append(clean_logits.shape)
        terms = Objective()(logits, labels)
        pair = tf.reduce_mean(tf.square(logits - clean_logits))
        return LossTerms(terms.total + pair, terms.cross_entropy, pair)

    objective.wants_clean_logits = True
    model, seen = model_that_remembers(8, adversary=Toy(), objective=objective)
    images, labels = some_data(8)
    measures = model.update(images, labels)
    assert asked == [(8, 3)]
    # What was trained on last are the adversarial images; the clean ones went before.
    moved = np.abs(seen.images.numpy() - images)
    assert moved.max() == pytest.approx(0.25, rel=1e-5) and (moved > 0.01).mean() > 0.9
    logits = [model.network(x) for x in (seen.images, images)]
    pair = tf.reduce_mean(tf.square(logits[0] - logits[1]))
    np.testing.assert_allclose(float(measures["penalty"]), float(pair), rtol=1e-5)
    (count,) = model.adversary_variables
    assert count.numpy()[0] == 1 and count.numpy()[1] > 0


def test_replays_of_a_data_set_in_fit_train_as_the_steps_of_the_published_rule():
    images, labels = some_data(16)
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).batch(8)
    assert len(replayed(batches, 3)) == 6
    model = small_model(adversary=FreeAdversary(THREAT, 8, replays=3))
    model.fit(replayed(batches, 3), verbose=0)
    other = small_model(adversary=FreeAdversary(THREAT, 8, replays=3))
    for begin in (0, 8):
        for _ in range(3):
            other.update(images[begin : begin + 8], labels[begin : begin + 8])
    for one, two in zip(model.network.get_weights(), other.network.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    perturbations = [m.adversary_state.numpy() for m in (model, other)]
    np.testing.assert_array_equal(*perturbations)
    with pytest.raises(ValueError, match="replays must be at least 1; got 0"):
        replayed(batches, 0)


@pytest.mark.parametrize(
    ("dataset", "gradient"),
    [("mnist", "image"), ("fashion_mnist", "image"), ("cifar10", "perturbation")],
)
def test_free_training_moves_black_pixels_on_mnist_and_follows_its_authors_on_cifar(
    dataset, gradient
):
    found = resolve_settings({"dataset": dataset, "adversary": "free"})
    assert found.free_gradient == found.training_adversary.gradient == gradient
    assert found.training_adversary.rules == {"free gradient": f"with respect to the {gradient}"}
    given = {"dataset": dataset, "adversary": "free", "free_gradient": "perturbation"}
    assert resolve_settings(given).training_adversary.gradient == "perturbation"
