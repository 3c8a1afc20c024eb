"""Attacks that need no gradient of the attacked network: noise, transfer, replay."""

import io
import json
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from exact_margins import (
    SHAPE,
    LinearClassifier,
    check_is_traced_once,
    curved,
    curved_examples,
)

from logit_reg.attacks import PGD, AutoAttack, RandomNoise, Replay, Restarts, Square, Transfer
from logit_reg.evaluation.ledger import attack_settings
from logit_reg.evaluation.run import check_threat, evaluate
from logit_reg.threat import ThreatModel

LINF = ThreatModel("linf", 0.05)
L2 = ThreatModel("l2", 0.3)


def recording(seen):
    """A network that is never fooled and keeps what it is shown."""

    def model(images):
        tf.py_function(lambda x: seen.append(x.numpy()), [images], [])
        return tf.stack([images[:, 0, 0, 0] * 0 + 1, images[:, 0, 0, 0] * 0], axis=1)

    return model


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_uniform_noise_fills_the_ball(norm):
    threat, seen = ThreatModel(norm, 0.2), []
    images = np.full((4, 2, 1, 1), 0.5, np.float32)
    RandomNoise(threat, "uniform", 500).run(recording(seen), images, np.zeros(4, int), seed=0)
    points = (np.stack(seen[1:]) - images).reshape(2000, 2) / 0.2
    radius = np.abs(points).max(axis=1) if norm == "linf" else np.linalg.norm(points, axis=1)
    assert radius.max() <= 1 + 1e-5
    # Two dimensions: a quarter of the ball lies within half of the radius.
    assert np.mean(radius < 0.5) == pytest.approx(0.25, abs=0.04)
    assert np.mean(points, axis=0) == pytest.approx([0, 0], abs=0.05)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sign_noise_goes_as_far_as_it_can_in_every_value(norm):
    threat, seen = ThreatModel(norm, 0.2), []
    images = np.full((4, 5, 5, 1), 0.5, np.float32)
    RandomNoise(threat, "sign", 50).run(recording(seen), images, np.zeros(4, int), seed=0)
    delta = np.stack(seen[1:]) - images
    expected = 0.2 if norm == "linf" else 0.2 / 5
    np.testing.assert_allclose(np.abs(delta), expected, atol=1e-6)
    signs = np.sign(delta).reshape(200, 25)
    assert len(np.unique(signs, axis=0)) == 200
    assert np.mean(signs) == pytest.approx(0.0, abs=0.07)


@pytest.mark.parametrize("distribution", ["uniform", "sign"])
@pytest.mark.parametrize("threat", [LINF, L2])
def test_fewer_draws_are_the_first_of_more(threat, distribution):
    images, labels = curved_examples(60)
    runs = [
        RandomNoise(threat, distribution, count).run(curved, images, labels, seed=0)
        for count in (3, 20, 70)
    ]
    for fewer, more in zip(runs, runs[1:], strict=False):
        assert np.all(more.fooled[fewer.fooled])
        np.testing.assert_array_equal(
            more.adversarial[fewer.fooled], fewer.adversarial[fewer.fooled]
        )
    assert runs[0].fooled.sum() < runs[-1].fooled.sum() < 60
    check_threat("noise", runs[-1].adversarial, images, np.arange(60), threat)
    fools = np.argmax(curved(runs[-1].adversarial).numpy(), axis=-1) != labels
    np.testing.assert_array_equal(fools, runs[-1].fooled)


def test_noise_never_breaks_below_the_exact_margin_and_does_far_beyond():
    classifier = LinearClassifier(2)
    images, labels = classifier.examples(20, box_is_active=False)
    margins = classifier.margins(images, labels, "linf")
    threat = ThreatModel("linf", float(np.median(margins)))
    result = RandomNoise(threat, "sign", 200).run(classifier, images, labels, seed=0)
    assert not result.fooled[margins > threat.epsilon].any()
    assert result.fooled[margins < 0.3 * threat.epsilon].all()


def test_noise_depends_on_seed_and_image_and_not_on_the_batch():
    images, labels = curved_examples(20)
    attack = RandomNoise(L2, "uniform", 5)
    whole = attack.run(curved, images, labels, seed=3)
    order = np.random.default_rng(0).permutation(20)
    for part in (order[:7], order[7:]):
        found = attack.run(curved, images[part], labels[part], seed=3, indices=part)
        np.testing.assert_array_equal(found.fooled, whole.fooled[part])
        np.testing.assert_allclose(found.adversarial, whole.adversarial[part], atol=1e-6)
    for other in ({"seed": 4}, {"seed": 3, "restart": 1}):
        found = attack.run(curved, images, labels, **other)
        assert not np.array_equal(whole.adversarial, found.adversarial)


def test_noise_counts_forwards_only_and_is_traced_once():
    images, labels = curved_examples(4)
    labels[0] = (labels[0] + 1) % 5
    attack = RandomNoise(ThreatModel("linf", 1e-6), num_draws=30)
    result = attack.run(curved, images, labels, seed=0)
    assert (result.forwards, result.backwards) == (4 + 3 * 30, 0)
    assert attack.cost() == (31, 0)
    check_is_traced_once(RandomNoise(L2, num_draws=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "normal"}, "distribution must be one of uniform, sign; got 'normal'"),
        ({"num_draws": 0}, "num_draws must be at least 1; got 0"),
    ],
)
def test_bad_settings_of_noise_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomNoise(LINF, **settings)


def copy_of_curved(images):
    return curved(images)


def relative(images):
    """A network that resembles `curved`."""
    return curved(images) + 0.4 * tf.cos(curved(images[:, ::-1]))


def transfer_case():
    images, labels = curved_examples(40)
    labels[:2] = (labels[:2] + 1) % 5
    return PGD(LINF, "xent", 10, 0.01), images, labels


@pytest.mark.parametrize("every_iterate", [False, True])
def test_transfer_from_a_copy_is_the_white_box_attack(every_iterate):
    attack, images, labels = transfer_case()
    direct = attack.run(curved, images, labels, seed=0)
    transfer = Transfer(attack, copy_of_curved, "copy", every_iterate)
    result = transfer.run(curved, images, labels, seed=0)
    np.testing.assert_array_equal(result.fooled, direct.fooled)
    np.testing.assert_allclose(result.adversarial[2:], direct.adversarial[2:], atol=1e-6)
    # Who is misclassified clean is not attacked.
    np.testing.assert_array_equal(result.adversarial[:2], images[:2])
    assert 0 < direct.fooled[2:].mean() < 1


def test_transfer_returns_the_sources_images_and_judges_them_on_the_attacked_network():
    attack, images, labels = transfer_case()
    on_source = attack.run(relative, images, labels, seed=0)
    final = Transfer(attack, relative, "relative").run(curved, images, labels, seed=0)
    np.testing.assert_allclose(final.adversarial[2:], on_source.adversarial[2:], atol=1e-6)
    fools = np.argmax(curved(final.adversarial).numpy(), axis=-1) != labels
    np.testing.assert_array_equal(final.fooled, fools)
    assert final.fooled.sum() < on_source.fooled.sum()
    check_threat("transfer", final.adversarial, images, np.arange(40), LINF)

    iterates = Transfer(attack, relative, "relative", every_iterate=True)
    iterates = iterates.run(curved, images, labels, seed=0)
    assert np.all(iterates.fooled[final.fooled])
    assert iterates.fooled.sum() > final.fooled.sum()


def test_transfer_counts_the_passes_of_both_networks():
    attack, images, labels = transfer_case()
    transfer = Transfer(attack, relative, "relative")
    result = transfer.run(curved, images, labels, seed=0)
    # Clean, 11 iterates of the source, and one image judged.
    assert (result.forwards, result.backwards) == (40 + 38 * (11 + 1), 38 * 10)
    assert transfer.cost() == (13, 10)


def test_transfer_passes_through_an_evaluation_with_its_provenance():
    attack, images, labels = transfer_case()
    transfer = Transfer(attack, relative, "abc123")
    found = evaluate(curved, {"transfer": transfer, "again": transfer}, images, labels)
    direct = transfer.run(curved, images, labels, seed=0)
    np.testing.assert_array_equal(found.robust, ~direct.fooled)
    settings = attack_settings(transfer)
    assert set(settings) == {"wrapper", "attack", "source_hash", "every_iterate"}
    assert (settings["wrapper"], settings["attack"]["attack"]) == ("Transfer", "PGD")
    assert settings["source_hash"] == "abc123"
    assert settings["attack"]["loss"] == "xent"
    assert json.loads(json.dumps(settings)) == settings
    assert "abc123" in repr(transfer)
    assert transfer == Transfer(attack, copy_of_curved, "abc123")
    assert len({transfer, Transfer(attack, relative, "other")}) == 2


@pytest.mark.parametrize(
    "attack", [Square(LINF), RandomNoise(LINF), AutoAttack(LINF), Restarts(Square(LINF), 2)]
)
def test_searches_do_not_transfer_iterate_by_iterate(attack):
    with pytest.raises(ValueError, match="every_iterate needs an attack that only follows"):
        Transfer(attack, curved, "source", every_iterate=True)
    Transfer(Restarts(PGD(LINF), 2), curved, "source", every_iterate=True)


def test_a_source_without_a_hash_is_refused():
    with pytest.raises(ValueError, match="source_hash must identify the source network"):
        Transfer(PGD(LINF), curved, "")


def saved(path, array, **options):
    with path.open("wb") as file:
        if path.suffix == ".npz":
            np.savez(file, adversarial=array, labels=np.zeros(3), **options)
        else:
            np.save(file, array, **options)
    return path


def replay_case(threat=LINF):
    images, labels = curved_examples(20)
    found = PGD(threat, "cw", 10, threat.epsilon / 4).run(curved, images, labels, seed=0)
    return images, labels, found


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("name", ["attack.npy", "examples.npz"])
def test_replay_from_a_file_repeats_the_attack(tmp_path, name, threat):
    images, labels, found = replay_case(threat)
    replay = Replay.from_file(threat, saved(tmp_path / name, found.adversarial))
    result = replay.run(curved, images, labels, seed=0)
    np.testing.assert_array_equal(result.fooled, found.fooled)
    np.testing.assert_allclose(result.adversarial, found.adversarial, atol=1e-6)
    assert (result.forwards, result.backwards, replay.cost()) == (2 * 20, 0, (2, 0))
    # In any order, and from a flattened file as the MNIST challenge has it.
    flat = Replay(threat, found.adversarial.reshape(20, -1).astype(np.float64))
    part = np.array([7, 3, 19])
    again = flat.run(curved, images[part], labels[part], seed=5, indices=part)
    np.testing.assert_array_equal(again.fooled, found.fooled[part])
    evaluation = evaluate(curved, {"replay": replay}, images, labels, batch_size=7)
    np.testing.assert_array_equal(~evaluation.robust, found.fooled)


def test_replay_is_known_by_its_content(tmp_path):
    _, _, found = replay_case()
    one = Replay.from_file(LINF, saved(tmp_path / "a.npy", found.adversarial))
    same = Replay.from_file(LINF, saved(tmp_path / "b.npz", found.adversarial))
    other = Replay(LINF, found.adversarial[::-1])
    assert one == same != other
    assert len({one, same, other}) == 2
    assert one.content in repr(one)
    settings = attack_settings(one)
    assert settings["content"] == one.content
    assert set(settings) == {"attack", "threat", "content"}


def test_replay_projects_rounding_and_nothing_more():
    images, labels, found = replay_case()
    outward = np.float32(9e-5) * np.sign(found.adversarial - images)
    result = Replay(LINF, found.adversarial + outward).run(curved, images, labels, seed=0)
    check_threat("replay", result.adversarial, images, np.arange(20), LINF)
    with pytest.raises(ValueError, match="replayed image 0 is farther than 0.05 in linf"):
        Replay(LINF, np.abs(images - 0.0502)).run(curved, images, labels, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :5], r"have shape \(5, 6, 1\), expected \(6, 6, 1\) or \(36,\)"),
        (lambda x: x[:12], "number 12, but image 12 of the data set is attacked"),
        (lambda x: x * np.nan, "image 0 is not finite .20 such images."),
        (lambda x: 255 * x, r"image 0 leaves the pixel range \[0, 1\]"),
        (lambda x: x[::-1], "image 0 is farther than 0.05 in linf from the original"),
        (lambda x: (255 * x).astype(np.uint8), "images must be float .* got uint8"),
        (lambda x: x[0], r"images must be float \(M, H, W, C\) .* got float32 \(6, 6, 1\)"),
    ],
)
def test_replay_refuses_what_is_not_of_its_threat_model(change, message):
    images, labels, found = replay_case()
    with pytest.raises(ValueError, match=message) as error:
        Replay(LINF, change(found.adversarial)).run(curved, images, labels, seed=0)
    assert "\n" not in str(error.value)


def npy_bytes(shape, dtype="<f4", values=b""):
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + values


def zipped(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an .npy of numbers"),
        (b"not an array", "not an .npy of numbers"),
        (npy_bytes((2, 6, 6, 1)), "0 bytes of values, its header promises 288"),
        (npy_bytes((10**9, 28, 28, 1)), "0 bytes of values, its header promises 3136000000000"),
        (npy_bytes((2, 6, 6, 1), "|O", b"x" * 72), "objects are never loaded"),
        (zipped("images.npy", b"x"), "has no array 'adversarial', only 'images'"),
        (zipped("adversarial.npy", npy_bytes((10**9, 28, 28, 1))), "not an .npz of plain arrays"),
        (zipped("adversarial.npy", b"not an array"), "not an .npz of plain arrays"),
        (npy_bytes((5,), values=b"x" * 20), r"images must be float .* got float32 \(5,\)"),
    ],
)
def test_damaged_and_malicious_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "attack.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        Replay.from_file(LINF, path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_pickles_and_missing_files_are_refused(tmp_path):
    path = saved(tmp_path / "attack.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="objects are never loaded"):
        Replay.from_file(LINF, path)
    with pytest.raises(ValueError, match="absent.npy: no such file"):
        Replay.from_file(LINF, tmp_path / "absent.npy")


def test_black_box_attacks_are_callables_that_return_images():
    images, labels = curved_examples(3)
    for attack in (
        RandomNoise(LINF, num_draws=2),
        Transfer(PGD(LINF, num_steps=2), relative, "relative"),
        Replay(LINF, images),
    ):
        assert attack(curved, images, labels, seed=0).shape == (3, *SHAPE)
        assert attack.threat == LINF
