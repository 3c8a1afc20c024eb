"""Evaluation: worst case per example, threat models, resume."""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from linear import SHAPE, Linear

from logit_reg.attacks import PGD, AttackResult, AutoAttack, MultiTargeted, Restarts
from logit_reg.evaluation.ledger import (
    attack_settings,
    build_result,
    is_same_attack,
    read_ledger,
    write_ledger,
)
from logit_reg.evaluation.protocols import PROTOCOLS, protocol_attacks
from logit_reg.evaluation.run import (
    ThreatModelError,
    check_threat,
    content_hash,
    estimate,
    evaluate,
)
from logit_reg.evaluation.state import EvaluationState
from logit_reg.evaluation.statistics import wilson_interval
from logit_reg.files import write_json
from logit_reg.threat import ThreatModel
from madry_compat.challenges import CIFAR10, MNIST

THREAT = ThreatModel("linf", 0.1, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """Returns fixed images for chosen indices; counts how often each index is attacked."""

    threat: ThreatModel
    name: str
    targets: tuple = ()
    shift: float = 0.0
    claims: tuple = ()
    log: list = dataclasses.field(default_factory=list, compare=False, repr=False)

    def run(self, logits_fn, images, labels, *, seed, indices=None, **options):
        self.log.append(list(indices))
        hit = np.isin(indices, self.targets)
        adversarial = images.copy()
        adversarial[hit, 0, 0, 0] = np.where(labels[hit] == 0, 1.0, 0.0)
        adversarial += np.float32(self.shift)
        claimed = hit | np.isin(indices, self.claims)
        return AttackResult(adversarial, claimed, claimed, len(images), 0)

    def cost(self):
        return 1, 0


class Minimal(Scripted):
    """Knows none of the arguments that are optional."""

    def run(self, logits_fn, images, labels, *, seed, indices):
        return super().run(logits_fn, images, labels, seed=seed, indices=indices)


def first_pixel_classifier(images):
    """Class 1 where the first pixel is bright."""
    bright = 10.0 * (images[:, 0, 0, 0] - 0.5)
    return tf.stack([-bright, bright], axis=-1)


def digits(count=10):
    """First pixel 0.35 or 0.65, so that 0.2 of linf decides; example 9 is misclassified."""
    labels = np.arange(count) % 2
    images = np.full((count, *SHAPE), 0.5, np.float32)
    images[:, 0, 0, 0] = np.where(labels == 1, 0.65, 0.35)
    labels = labels.copy()
    labels[9] = 0
    return images, labels


WIDE = ThreatModel("linf", 1.0, 0.0, 1.0)


def test_worst_case_is_per_example_and_credits_the_first_attack():
    images, labels = digits()
    attacks = {"one": Scripted(WIDE, "one", (1, 2)), "two": Scripted(WIDE, "two", (2, 3))}
    found = evaluate(first_pixel_classifier, attacks, images, labels, batch_size=4)
    assert list(np.flatnonzero(~found.clean)) == [9]
    assert list(np.flatnonzero(~found.robust)) == [1, 2, 3, 9]
    assert found.broken_by == ["", "one", "one", "two", "", "", "", "", "", "clean"]
    assert list(np.flatnonzero(~found.correct["two"])) == [2, 3, 9]
    wrong = np.argmax(first_pixel_classifier(found.adversarial).numpy(), -1) != labels
    np.testing.assert_array_equal(wrong, ~found.robust)
    np.testing.assert_allclose(found.distance[[1, 2, 3]], 0.65, atol=1e-6)


def test_separate_attacks_see_all_correct_examples_and_the_active_set_only_the_robust():
    images, labels = digits()
    for shared, expected in ((False, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (True, [0, 3, 4, 5, 6, 7, 8])):
        two = Scripted(WIDE, "two", (3,))
        attacks = {"one": Scripted(WIDE, "one", (1, 2)), "two": two}
        evaluate(first_pixel_classifier, attacks, images, labels, worst_case_only=shared)
        assert sum(two.log, []) == expected


def test_equal_attacks_of_two_protocols_run_once():
    images, labels = digits()
    attack = Scripted(WIDE, "same", (1,))
    found = evaluate(first_pixel_classifier, {"a": attack, "b": attack}, images, labels)
    assert len(attack.log) == 1
    np.testing.assert_array_equal(found.correct["a"], found.correct["b"])


def test_a_claim_that_the_returned_image_does_not_bear_out_is_not_counted():
    images, labels = digits()
    attack = Scripted(WIDE, "liar", (1,), claims=(4, 5))
    found = evaluate(first_pixel_classifier, {"liar": attack}, images, labels)
    assert list(np.flatnonzero(~found.robust)) == [1, 9]
    assert found.records["liar"].unconfirmed == 2


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Scripted(THREAT, "far", (1,)), r"far left its threat model: image 1 is at distance 0.65"),
        (Scripted(WIDE, "out", (), shift=0.7), "out left its threat model: .* the pixel range"),
        (Scripted(WIDE, "nan", (), shift=math.nan), "nan left its threat model: .* not finite"),
    ],
)
def test_the_gate_refuses_what_leaves_the_threat_model(attack, message):
    images, labels = digits()
    with pytest.raises(ThreatModelError, match=message):
        evaluate(first_pixel_classifier, {attack.name: attack}, images, labels)


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8.0), ("l2", 100.0)])
def test_the_gate_allows_rounding_and_no_more(norm, epsilon):
    threat = ThreatModel(norm, epsilon, 0.0, 255.0)
    images = np.full((1, 4, 4, 1), 100.0, np.float32)
    step = epsilon if norm == "linf" else epsilon / 4
    check_threat("a", images + np.float32(step * (1 + 5e-7)), images, [0], threat)
    with pytest.raises(ThreatModelError):
        check_threat("a", images + np.float32(step * (1 + 2e-5)), images, [0], threat)


def linear_case(count=40):
    model = Linear(3)
    images, labels = model.images(count)
    # About half of the images can be broken.
    threat = ThreatModel("linf", float(np.median(model.distance(images, labels, "linf"))))
    step_size = threat.epsilon / 3
    attacks = {
        "xent": PGD(threat, "xent", 4, step_size),
        "cw": PGD(threat, "cw", 4, step_size),
        "more": Restarts(PGD(threat, "cw", 8, step_size, early_stop=True), 2),
    }
    return model, attacks, images, labels


def test_robust_is_at_most_each_attack_is_at_most_clean():
    model, attacks, images, labels = linear_case()
    labels = labels.copy()
    labels[:3] = (labels[:3] + 1) % 3
    found = evaluate(model, attacks, images, labels, batch_size=16)
    for name in attacks:
        assert not (found.robust & ~found.correct[name]).any()
        assert not (found.correct[name] & ~found.clean).any()
    np.testing.assert_array_equal(
        found.robust, np.logical_and.reduce([found.correct[name] for name in attacks])
    )
    assert 0 < found.robust.sum() < found.clean.sum() == 37


def test_batch_size_and_order_do_not_change_the_verdict():
    model, attacks, images, labels = linear_case()
    one = evaluate(model, attacks, images, labels, batch_size=40)
    order = np.random.default_rng(0).permutation(40)
    other = evaluate(model, attacks, images[order], labels[order], batch_size=7, indices=order)
    np.testing.assert_array_equal(one.robust[order], other.robust)


def test_an_interrupted_evaluation_goes_on_and_ends_alike(tmp_path):
    model, attacks, images, labels = linear_case()
    whole = evaluate(model, attacks, images, labels, batch_size=16)

    class Killed(Exception):
        pass

    class Fragile(EvaluationState):
        saves = 0

        def save(self, description, arrays):
            super().save(description, arrays)
            Fragile.saves += 1
            if Fragile.saves in (2, 4):
                raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            evaluate(model, attacks, images, labels, batch_size=16, state=Fragile(tmp_path, "key"))
    state = Fragile(tmp_path, "key")
    again = evaluate(model, attacks, images, labels, batch_size=16, state=state)
    # Three attacks of three batches, none done twice.
    assert Fragile.saves == 9
    np.testing.assert_array_equal(whole.adversarial, again.adversarial)
    np.testing.assert_array_equal(whole.robust, again.robust)
    assert (whole.forwards, whole.backwards) == (again.forwards, again.backwards)
    state.clear()
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


def test_workers_that_share_a_folder_compute_each_batch_once_and_agree(tmp_path):
    model, attacks, images, labels = linear_case()
    whole = evaluate(model, attacks, images, labels, batch_size=4)
    saved = []

    class Counting(EvaluationState):
        def save(self, description, arrays):
            super().save(description, arrays)
            saved.append(description)

    def work(_):
        state = Counting(tmp_path, "key")
        return evaluate(model, attacks, images, labels, batch_size=4, state=state)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        shared = list(pool.map(work, range(4)))

    assert len(saved) == len(set(saved)) == len(attacks) * 10
    for one in shared:
        np.testing.assert_array_equal(whole.adversarial, one.adversarial)
        np.testing.assert_array_equal(whole.robust, one.robust)
        assert (whole.forwards, whole.backwards) == (one.forwards, one.backwards)


def test_the_claim_of_a_process_that_was_killed_ends(tmp_path):
    code = (
        "import sys, time\nfrom logit_reg.evaluation.state import EvaluationState\n"
        "with EvaluationState(sys.argv[1], 'key').claim('batch', wait=False) as is_mine:\n"
        "    print(is_mine, flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    state = EvaluationState(tmp_path, "key")
    with state.claim("batch", wait=False) as is_mine:
        assert not is_mine
    process.kill()
    process.wait()
    with state.claim("batch", wait=True) as is_mine:
        assert is_mine


def test_kept_batches_of_other_data_seed_or_network_are_not_taken(tmp_path):
    images, labels = digits()
    attack = Scripted(WIDE, "one", (1,))
    state = EvaluationState(tmp_path, "network")
    evaluate(first_pixel_classifier, {"one": attack}, images, labels, state=state)
    evaluate(first_pixel_classifier, {"one": attack}, images, labels, state=state)
    assert len(attack.log) == 1
    evaluate(first_pixel_classifier, {"one": attack}, images, labels, state=state, seed=1)
    evaluate(first_pixel_classifier, {"one": attack}, images * 0.999, labels, state=state)
    other = EvaluationState(tmp_path, "another network")
    evaluate(first_pixel_classifier, {"one": attack}, images, labels, state=other)
    assert len(attack.log) == 4


def test_a_damaged_kept_batch_is_done_again(tmp_path):
    images, labels = digits()
    attack = Scripted(WIDE, "one", (1,))
    state = EvaluationState(tmp_path, "network")
    evaluate(first_pixel_classifier, {"one": attack}, images, labels, state=state)
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    found = evaluate(first_pixel_classifier, {"one": attack}, images, labels, state=state)
    assert len(attack.log) == 2 and not found.robust[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": {}}, "at least one attack"),
        ({"images": np.zeros((0, *SHAPE), np.float32), "labels": np.zeros(0, int)}, "one image"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"images": np.full((10, *SHAPE), 200.0, np.float32)}, r"span \[200, 200\].*pixel units"),
    ],
)
def test_wrong_input_is_refused(changes, message):
    images, labels = digits()
    attacks = {"one": PGD(THREAT)}
    arguments = {"attacks": attacks, "images": images, "labels": labels} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(first_pixel_classifier, **arguments)


def test_wilson_interval_against_published_values():
    """Newcombe 1998, Table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert all(
        wilson_interval(0, n)[0] == 0.0 and wilson_interval(n, n)[1] == 1.0 for n in (1, 7, 999)
    )


@pytest.mark.parametrize("total", [1, 7, 40, 100, 1000, 10_000])
def test_a_wilson_interval_ends_exactly_where_nothing_is_beyond(total):
    assert wilson_interval(0, total)[0] == 0.0
    assert wilson_interval(total, total)[1] == 1.0


def test_content_hash_sees_values_types_and_shapes():
    a = np.arange(4, dtype=np.float32)
    hashes = {content_hash(x) for x in (a, a + 1, a.astype(np.float64), a.reshape(2, 2))}
    assert len(hashes) == 4


def test_an_estimate_grows_with_the_work():
    model, attacks, images, labels = linear_case()
    little = estimate(model, {"cw": attacks["cw"]}, images[:10], labels[:10]).seconds
    much = estimate(model, {"x": PGD(THREAT, num_steps=4000)}, images, labels).seconds
    assert 0 < little < much


@pytest.mark.parametrize("epsilon", [1e-6, 1.0])
def test_the_estimate_of_a_cascade_is_a_range_that_the_first_batch_narrows(epsilon):
    model, _, images, labels = linear_case()
    cascade = {"a": AutoAttack(ThreatModel("linf", epsilon, 0.0, 1.0))}
    found = estimate(model, cascade, images, labels)
    assert found.right == 1 and 0 < found.early < 0.1
    assert found.left == (epsilon < 1)
    assert found.most == pytest.approx(found.seconds if epsilon < 1 else found.least)


def test_a_ledger_reads_back_as_it_was_written(tmp_path):
    model, attacks, images, labels = linear_case()
    found = evaluate(model, attacks, images, labels, batch_size=16)
    result = build_result(found, {"flags": attacks}, dataset="made-up", settings={}, seed=0)
    write_ledger(tmp_path, found, result, np.arange(40) + 100)
    ledger, again = read_ledger(tmp_path)
    digest = hashlib.sha256((tmp_path / "ledger.csv").read_bytes()).hexdigest()
    assert again == result | {"ledger_sha256": digest}
    np.testing.assert_array_equal(ledger.index, np.arange(40) + 100)
    np.testing.assert_array_equal(ledger.robust, found.robust)
    np.testing.assert_array_equal(ledger.clean, found.clean)
    np.testing.assert_allclose(ledger.distance, found.distance, rtol=1e-8)
    for name in attacks:
        np.testing.assert_array_equal(ledger.correct[name], found.correct[name])
        stated = result["protocols"]["flags"]["attacks"][name]
        assert stated["accuracy"] == found.correct[name].mean()
        assert stated["accuracy_last_iterate"] >= stated["accuracy"]
        settings = stated["settings"]
        assert settings.get("wrapper", settings["attack"]) == type(attacks[name]).__name__


def test_an_attack_needs_to_know_only_the_arguments_that_are_set():
    attack = Minimal(WIDE, "minimal", targets=(2, 4))
    attacks = {"alone": attack, "once": Restarts(attack, 1)}
    found = evaluate(first_pixel_classifier, attacks, *digits(), with_checks=False)
    for correct in found.correct.values():
        np.testing.assert_array_equal(np.flatnonzero(found.clean & ~correct), [2, 4])


def test_settings_name_a_wrapper_and_what_it_wraps():
    restarts = Restarts(PGD(THREAT, "cw", 100), 3)
    settings = attack_settings(Restarts(restarts, 2))
    assert (settings["wrapper"], settings["num_restarts"]) == ("Restarts", 2)
    inner = settings["attack"]
    assert (inner["wrapper"], inner["attack"]["attack"]) == ("Restarts", "PGD")
    assert inner["attack"]["threat"] == dataclasses.asdict(THREAT)
    assert not is_same_attack(settings, inner)
    # As results had it before there were names.
    older = json.loads(json.dumps(dataclasses.asdict(restarts)))
    assert is_same_attack(older, inner)
    assert not is_same_attack(older | {"num_restarts": 4}, inner)
    other = attack_settings(Restarts(MultiTargeted(THREAT, 100), 3))
    assert not is_same_attack(other, inner)


def test_a_ledger_edited_by_hand_is_noticed(tmp_path):
    model, attacks, images, labels = linear_case()
    found = evaluate(model, attacks, images, labels)
    result = build_result(found, {"flags": attacks}, dataset="made-up", settings={}, seed=0)
    write_ledger(tmp_path, found, result, np.arange(40))
    path = tmp_path / "ledger.csv"
    lines = path.read_text().splitlines()
    broken = next(i for i, line in enumerate(lines) if ",xent," in line)
    lines[broken] = lines[broken].replace(",0,xent,", ",1,,")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="is not the file that result.json was made with"):
        read_ledger(tmp_path)
    # A ledger from before there were hashes is held against its accuracies.
    write_json(tmp_path / "result.json", result)
    with pytest.raises(ValueError, match="one of the two was changed by hand"):
        read_ledger(tmp_path)


@pytest.mark.parametrize("challenge", [MNIST, CIFAR10], ids=["mnist", "cifar"])
def test_every_protocol_is_frozen_named_once_and_within_its_challenge(challenge):
    names = {}
    for protocol in PROTOCOLS:
        try:
            attacks = protocol_attacks(protocol, challenge)
        except ValueError as error:
            assert f"use {'paper' if 'paper' in protocol else 'madry'}" in str(error)
            continue
        for name, attack in attacks.items():
            assert names.setdefault(name, attack) == attack
            assert attack.threat.upper == challenge.upper
    assert len(names) >= 7


def test_the_protocols_of_the_reference_table():
    madry = protocol_attacks("madry-cifar10", CIFAR10)["madry-pgd20-cw"]
    assert madry == PGD(ThreatModel("linf", 8, 0, 255), "cw", 20, 1.0, confidence=50.0)
    paper = protocol_attacks("paper-mnist", MNIST)["pgd40-cw"]
    assert paper == PGD(ThreatModel("linf", 0.3, 0, 1), "cw", 40, 0.01, early_stop=True)
    restarts = protocol_attacks("paper-l2", CIFAR10)["l2-pgd100-cw-x10"]
    assert (restarts.num_restarts, restarts.threat.epsilon) == (10, 382.5)
    assert restarts.attack.step_size == pytest.approx(9.5625)
    with pytest.raises(ValueError, match="paper-20 is defined on cifar only; use paper-mnist"):
        protocol_attacks("paper-20", MNIST)
    with pytest.raises(ValueError, match="protocol must be one of madry-mnist"):
        protocol_attacks("paper-99", MNIST)


def test_of_all_images_evaluate_keeps_one_copy():
    """The worst case; whatever else it needs grows with the batch, not with the data set."""
    images = np.random.default_rng(0).uniform(0.2, 0.8, (4000, 28, 28, 1)).astype(np.float32)
    labels = (images[:, 0, 0, 0] > 0.5).astype(np.int64)
    attacks = {"first": PGD(THREAT, num_steps=1), "second": PGD(THREAT, "cw", num_steps=1)}
    evaluate(first_pixel_classifier, attacks, images[:100], labels[:100], batch_size=100)

    tracemalloc.start()
    found = evaluate(first_pixel_classifier, attacks, images, labels, batch_size=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert found.adversarial.nbytes == images.nbytes
    assert peak < 1.5 * images.nbytes
