"""The single-step adversaries and TRADES: their images, the steps that they make, their recipes."""

import dataclasses
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import command, fork_command
from test_training import THREAT, model_that_remembers, small_model, some_data

from logit_reg.experiments.defaults import resolve_settings
from logit_reg.messages import UsageError
from logit_reg.objectives import Objective
from logit_reg.training.adversaries import ADVERSARIES, adversary_class, reg_of
from logit_reg.training.adversaries.fgsm_rs import FGSMRSAdversary
from logit_reg.training.adversaries.gat import GATAdversary
from logit_reg.training.adversaries.n_fgsm import NFGSMAdversary
from logit_reg.training.adversaries.nuat import NuATAdversary
from logit_reg.training.adversaries.trades import TRADESAdversary
from logit_reg.training.beta_schedule import BetaSchedule
from logit_reg.training.feeding import traced_train_step

NAMES = ("fgsm_rs", "n_fgsm", "gat", "nuat", "trades")
EPSILON = THREAT.epsilon
# A range so wide that nothing is clipped to it, around images that a step may move either way.
WIDE = dataclasses.replace(THREAT, lower=-5.0, upper=5.0)


def adversary_of(name, threat=THREAT, **changes):
    """With the lengths that its authors give it."""
    given = {"dataset": "mnist_5k", "adversary": name, "ramp_steps": 0}
    settings = resolve_settings(given | ({"num_steps": 3} if name == "trades" else {}))
    return dataclasses.replace(settings.training_adversary, threat=threat, **changes)


def trained_on(adversary, *, steps=1, objective=None, seed=0, **settings):
    """Images before and after an adversary of some steps of a network that does not learn."""
    objective = objective or Objective()
    bounds = (adversary.threat.lower, adversary.threat.upper)
    keras.utils.set_random_seed(0)
    model, seen = model_that_remembers(
        32, adversary=adversary, objective=objective, bounds=bounds, seed=seed, **settings
    )
    images, labels = some_data(32)
    shown = []
    for _ in range(steps):
        model.update(images, labels)
        shown.append(seen.images.numpy())
    return model, images, labels, np.stack(shown)


@pytest.mark.parametrize("name", NAMES)
def test_images_stay_in_the_pixel_range_and_only_n_fgsm_leaves_the_ball(name):
    _, images, _, shown = trained_on(adversary_of(name), steps=3)
    assert shown.min() >= 0 and shown.max() <= 1
    moved = np.abs(shown - images).max()
    if name == "n_fgsm":
        assert 1.5 * EPSILON < moved <= 3 * EPSILON + 1e-6
    else:
        assert 0.9 * EPSILON < moved <= EPSILON + 1e-6


@pytest.mark.parametrize(
    ("name", "noise", "step"),
    [("fgsm_rs", 1.0, 1.25), ("n_fgsm", 2.0, 1.0), ("gat", 1.0, 1.0), ("nuat", 1.0, 1.0)],
)
def test_the_start_and_the_step_have_the_published_size(name, noise, step):
    """Nothing is clipped: a huge ball, a huge range."""
    published = adversary_of(name)
    wide = dataclasses.replace(WIDE, epsilon=4.0)
    still = dataclasses.replace(published, threat=wide, step_size=0.0)
    _, images, labels, shown = trained_on(still)
    start, size = shown[0] - images, noise * EPSILON
    if name in ("gat", "nuat"):
        np.testing.assert_allclose(np.abs(start), size, atol=1e-6)
        assert np.mean(start > 0) == pytest.approx(0.5, abs=0.06)
    else:
        assert 0.95 * size < np.abs(start).max() <= size + 1e-6
        assert np.std(start) == pytest.approx(size / np.sqrt(3), rel=0.06)
    # The term of GAT and NuAT is at its least at the images themselves.
    quiet = dataclasses.replace(published, threat=wide, start_noise=0.0)
    model, images, labels, shown = trained_on(quiet)
    points = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(points)
        total = Objective()(model.network(points), labels).total
    expected = step * EPSILON * np.sign(tape.gradient(total, points).numpy())
    np.testing.assert_allclose(shown[0] - images, expected, atol=1e-6)


def test_nuat_ascends_its_term_in_every_second_step_and_gat_in_each():
    """With a huge weight the term alone decides; around logits that it does not leave, it is 0."""
    for kind, is_used in ((NuATAdversary, [False, True]), (GATAdversary, [True, True])):
        shown = []
        for weight in (0.0, 1e4):
            adversary = kind(WIDE, EPSILON, EPSILON, weight=weight)
            shown.append(trained_on(adversary, steps=2)[3])
        differs = [bool((a != b).any()) for a, b in zip(*shown, strict=True)]
        assert differs == is_used, kind


@pytest.mark.parametrize("kind", [NuATAdversary, GATAdversary, TRADESAdversary])
def test_guided_images_raise_their_pair_term_above_that_of_random_ones(kind):
    steps = {"num_steps": 3} if kind is TRADESAdversary else {"weight": 1e4}
    reg = {NuATAdversary: "nuat", GATAdversary: "gat", TRADESAdversary: "trades"}[kind]
    objective = Objective(reg, beta=1.0)
    guided = kind(THREAT, EPSILON, 0.5 * EPSILON, **steps)
    model, images, labels, shown = trained_on(guided, steps=2, objective=objective)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], images.shape)
    random = np.clip(images + EPSILON * signs, 0, 1).astype(np.float32)
    clean = model.network(images)
    terms = [float(objective(model.network(x), labels, clean).penalty) for x in (shown[1], random)]
    assert terms[0] > 1.5 * terms[1]


@pytest.mark.parametrize("name", NAMES)
def test_images_are_the_same_with_the_same_seed_alone(name):
    first, again, other = (
        trained_on(adversary_of(name), steps=2, seed=seed)[3] for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first[0] != first[1]).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_ramp_shortens_start_and_step(name):
    _, images, _, shown = trained_on(adversary_of(name, ramp_steps=10), steps=2)
    reach = 3 if name == "n_fgsm" else 1
    for number, step in enumerate(shown, start=1):
        assert np.abs(step - images).max() <= reach * EPSILON * number / 10 + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_traced_once_and_trains_with_noise_and_smoothing(name):
    reg = reg_of(name)
    beta = 1.0 if reg != "none" else 0.0
    model = small_model(
        objective=Objective(reg, beta=beta, smoothing=0.2),
        sigma=0.1,
        adversary=adversary_of(name, batch_norm="training"),
        beta_schedule=BetaSchedule(((0, 1.0), (2, 3.0)), ramp_steps=2),
    )
    images, labels = some_data(40)
    model.optimizer.build(model.network.trainable_variables)
    step = traced_train_step(model, (images * 255).astype(np.uint8), labels, 16)
    for number in range(4):
        measures = step(np.arange(16) + number)
        assert all(np.isfinite(float(value)) for value in measures.values())
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("adversary", [name for name in ADVERSARIES if name != "none"])
def test_every_adversary_combines_with_every_pair_term(adversary):
    images, labels = some_data(32)
    for settings in (
        {"reg": "nuat", "beta": 1.0},
        {"reg": "gat", "beta": 1.0},
        {"reg": "trades", "beta": 1.0},
        {"reg": "alp", "beta": 1.0},
        {"reg": "squeeze", "beta": 1.0, "centre": "clean"},
    ):
        fewer = {"num_steps": 1} if "num_steps" in ADVERSARIES[adversary].flags else {}
        given = {"dataset": "mnist_5k", "adversary": adversary, "ramp_steps": 0}
        given |= settings | fewer
        if adversary == "free" and settings["reg"] != "alp":
            # Its perturbation starts at 0, where these terms have no gradient.
            with pytest.raises(ValueError, match="would stay where it starts.*--reg=alp"):
                resolve_settings(given)
            continue
        found = resolve_settings(given)
        moves = dataclasses.replace(found, training_batch_size=32).training_adversary
        model = small_model(objective=found.objective, adversary=moves)
        # Free training's perturbation is 0 in its first step.
        for _ in range(2):
            terms = {name: float(value) for name, value in model.update(images, labels).items()}
        assert 0 < terms["penalty"] < 100
        assert terms["total"] == pytest.approx(terms["xent"] + terms["penalty"], rel=1e-5)


def test_the_schedule_of_beta_weighs_the_penalty_by_the_step():
    schedule = BetaSchedule(((0, 1.0), (3, 4.0)), ramp_steps=2)
    shares = [float(schedule(tf.constant(step, tf.int64))) for step in range(5)]
    assert shares == [0.5, 1.0, 1.0, 4.0, 4.0]
    model = small_model(objective=Objective("squeeze", beta=2.0), beta_schedule=schedule)
    images, labels = some_data()
    for share in shares:
        terms = model.update(images, labels)
        total = float(terms["xent"]) + 2 * share * float(terms["penalty"])
        assert float(terms["total"]) == pytest.approx(total, rel=1e-5)
    for wrong in (((1, 1.0),), ((0, 1.0), (0, 2.0)), ((0, -1.0),), ()):
        with pytest.raises(ValueError, match="beta_schedule"):
            BetaSchedule(wrong)


def resolved(**given):
    return resolve_settings({"dataset": "mnist", **given})


def test_an_adversary_alone_means_its_whole_method_and_flags_win():
    nuat = resolved(adversary="nuat", max_num_training_steps=1000)
    assert (nuat.reg, nuat.beta, nuat.beta_ramp_steps) == ("nuat", 4.5, 900)
    assert nuat.description == "NuAT beta=4.5" and nuat.sigma == 0
    assert nuat.training_adversary.weight == 4.5
    other = resolved(adversary="nuat", beta=2.0, smoothing=0.4, sigma=0.1, step_size=0.2)
    assert (other.beta, other.training_adversary.weight) == (2.0, 2.0)
    assert other.training_adversary.step_size == 0.2 and other.sigma == 0.1
    mixed = resolved(adversary="nuat", reg="trades", beta=1.0)
    assert mixed.training_adversary.weight == 4.5 and mixed.description == "trades beta=1 NuAT"
    family = {"reg": "squeeze", "matrix_norm": "nuclear", "centre": "clean", "beta": 2.0}
    member, own = resolved(adversary="nuat", **family), resolved(adversary="nuat", beta=2.0)
    for part in ("training_adversary", "beta_ramp_steps", "step_size_schedule", "loop"):
        assert getattr(member, part) == getattr(own, part)
    one_rate = resolved(adversary="nuat", step_size_schedule=((0, 1e-4),))
    assert one_rate.learning_rate_schedule == "cosine"
    two_rates = resolved(adversary="nuat", step_size_schedule=((0, 1e-4), (9, 1e-5)))
    assert two_rates.learning_rate_schedule == "steps"
    assert resolved(adversary="n_fgsm", smoothing=0.4).sigma == 0
    gat = resolved(adversary="gat", max_num_training_steps=4000)
    assert gat.beta_schedule == ((0, 1.0), (1000, 3.0), (2000, 9.0), (3000, 27.0))
    assert [step for step, _ in gat.step_size_schedule] == [0, 1000, 2000, 3000]
    plain = resolved(adversary="n_fgsm")
    assert plain.reg == "none" and plain.training_adversary.start_noise == 0.6
    narrow = resolve_settings({"dataset": "cifar10", "adversary": "trades", "width": 1})
    assert (narrow.num_steps, narrow.step_size, narrow.beta) == (10, 2.0, 6.0)
    assert resolved(adversary="trades", num_steps=2).step_size == pytest.approx(0.375)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reg": "nuat"}, "compares the logits of adversarial images.*give an --adversary"),
        ({"reg": "squeeze", "beta": 1.0, "centre": "clean"}, "centre clean compares"),
        ({"adversary": "fgsm_rs", "beta": 1.0}, "--beta has an effect only with --reg"),
        ({"adversary": "fgsm_rs", "num_steps": 3}, "--num_steps has an effect only"),
        ({"adversary": "pgd", "start_noise": 0.1}, "--start_noise has an effect only"),
        ({"adversary": "gat", "matrix_norm": "nuclear"}, "--matrix_norm has an effect only"),
        ({"beta_ramp_steps": 10}, "--beta_ramp_steps has an effect only"),
        ({"adversary": "nuat", "start_noise": -1.0}, "start_noise must be at least 0"),
    ],
)
def test_what_makes_no_sense_together_is_refused_in_one_sentence(given, message):
    with pytest.raises((ValueError, UsageError), match=message) as caught:
        resolved(**given)
    assert "\n" not in str(caught.value)


def test_l2_is_refused():
    for name in NAMES:
        with pytest.raises(ValueError, match="defined in linf"):
            adversary_of(name, dataclasses.replace(THREAT, norm="l2"))


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_without_a_number_of_steps_ends_with_its_own(name, dataset):
    settings = resolve_settings({"dataset": dataset, "adversary": name})
    steps = settings.max_num_training_steps
    assert settings.ramp_steps == (steps // 10 if dataset == "mnist" else 0)
    assert settings.beta_ramp_steps == (round(0.9 * steps) if name == "nuat" else 0)
    for pairs in (settings.beta_schedule, settings.step_size_schedule):
        assert all(step < 0.91 * steps for step, _ in pairs)
    drops = {"mnist": [0.25, 0.5, 0.75], "cifar10": [0.7, 0.85]}[dataset]
    if name == "gat":
        expected = [int(share * steps) for share in drops]
        assert [step for step, _ in settings.step_size_schedule[1:]] == expected
    with pytest.raises(ValueError, match="comes with a training of its own"):
        resolve_settings({"dataset": dataset, "adversary": name}, is_challenge_config=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_float64_stays_in_it(name):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        beta = 1.0 if reg_of(name) != "none" else 0.0
        objective = Objective(reg_of(name), beta=beta)
        model = small_model(objective=objective, adversary=adversary_of(name))
        assert model.update(*some_data(16))["total"].dtype == tf.float64
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def test_a_summed_cross_entropy_is_weighed_alike_in_training_and_attack():
    settings = {"adversary": "gat", "loss_reduction": "sum", "training_batch_size": 50}
    assert resolved(**settings, beta=10.0).training_adversary.weight == pytest.approx(0.2)


def test_every_recipe_names_what_it_costs():
    for name in NAMES:
        settings = resolved(adversary=name)
        forwards, backwards = settings.step_cost
        steps = settings.num_steps
        expected = {"fgsm_rs": (2, 2), "n_fgsm": (2, 2), "gat": (3, 3), "nuat": (3, 3)}
        assert (forwards, backwards) == expected.get(name, (steps + 3, steps + 2))
        assert adversary_class(name).__doc__.count("Source:") == 1
    assert isinstance(adversary_of("fgsm_rs"), FGSMRSAdversary)
    assert isinstance(adversary_of("n_fgsm"), NFGSMAdversary)


@pytest.mark.slow
def test_a_killed_run_of_nuat_with_averaged_weights_goes_on_bit_for_bit(tmp_path):
    flags = ["--dataset=mnist_5k", "--adversary=nuat", "--ema", "--max_num_training_steps=24"]
    flags += ["--training_batch_size=16", "--num_output_steps=1", "--num_checkpoint_steps=8"]
    whole = command("train", *flags, "--model_dir=whole", "--noprogress", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    flags += ["--model_dir=killed", "--noprogress"]
    killed = tmp_path / "killed"
    process = fork_command("train", *flags, cwd=tmp_path)
    while not list(killed.glob("state-*.npz")) and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "state-24.npz").exists()
    assert command("train", *flags, cwd=tmp_path).returncode == 0
    logs = [(folder / "log.csv").read_bytes() for folder in (tmp_path / "whole", killed)]
    assert logs[0] == logs[1]
    states = [np.load(folder / "state-24.npz") for folder in (tmp_path / "whole", killed)]
    for name in states[0].files:
        if name != "meta":
            np.testing.assert_array_equal(states[0][name], states[1][name])
