"""Planted fakes: what attacks report of them, what is true, and what the audit makes of them."""

import json
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from logit_reg.attacks import PGD, AttackWarning
from logit_reg.attacks.engine.forward import clean_logits
from logit_reg.attacks.engine.repeated_passes import RepeatedPasses
from logit_reg.audit.evidence import Evidence
from logit_reg.audit.fakes import FAKES, Fake, nearest_neighbours, temperature
from logit_reg.audit.run import DIAGNOSTICS, run_test
from logit_reg.evaluation.run import evaluate
from logit_reg.experiments.audits import AuditSettings, audited_own, settings_of_fake
from logit_reg.experiments.own_models import OwnModel
from logit_reg.experiments.reports import write_verdicts
from logit_reg.messages import UsageError
from logit_reg.report.tables import replace_marked_section
from logit_reg.report.verdicts import audit_folders, verdicts_table
from logit_reg.threat import ThreatModel

ROOT = Path(__file__).resolve().parents[1]
THREAT = ThreatModel("linf", 0.22, 0.0, 1.0)
SHAPE = (8, 8, 1)
LEFT = np.where(np.arange(8) < 4, 1.0, -1.0)[None, :] * np.ones((8, 1))
PATTERNS = np.stack([LEFT, -LEFT, LEFT.T, -LEFT.T]).reshape(4, 64).astype(np.float32)


def draw(count, seed):
    """Faint patterns on grey with a little noise, and which of four each one is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=count)
    strength = rng.uniform(0.1, 0.3, (count, 1))
    flat = 0.5 + strength * PATTERNS[labels] + rng.normal(scale=0.01, size=(count, 64))
    return flat.reshape(-1, *SHAPE).astype(np.float32), labels


IMAGES, LABELS = draw(40, seed=1)
REFERENCES, _ = draw(400, seed=2)


def linear_network():
    inputs = keras.Input(SHAPE)
    network = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(inputs)))
    network.set_weights([PATTERNS.T, -0.5 * PATTERNS.sum(axis=1)])
    return network


def exactly_robust():
    """(N,) bool: where no boundary of the linear network lies within epsilon."""
    logits = (IMAGES.reshape(-1, 64) - 0.5) @ PATTERNS.T
    gaps = logits[np.arange(40), LABELS][:, None] - logits
    reach = np.abs(PATTERNS[LABELS][:, None] - PATTERNS[None]).sum(axis=-1)
    return np.all((gaps > THREAT.epsilon * reach) | (reach == 0), axis=1)


NETWORK, EXACT = linear_network(), exactly_robust()


def planted(name) -> Fake:
    given = {"bounds": (THREAT.lower, THREAT.upper), "references": REFERENCES}
    return FAKES[name].plant(NETWORK, **{key: given[key] for key in FAKES[name].takes})


def left_of(logits_fn, loss, **options):
    """(N,) bool: what PGD with 40 steps leaves."""
    attack = PGD(THREAT, loss, 40, THREAT.epsilon / 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        found = evaluate(logits_fn, {"pgd": attack}, IMAGES, LABELS, with_checks=False, **options)
    return found.robust


def outcome(number, logits_fn, **options):
    """The record of one test of the audit."""
    evidence = Evidence(logits_fn, THREAT, IMAGES, LABELS, claim=1.0, **options)
    return run_test(evidence, DIAGNOSTICS[number])[0]


# --- what is true of a fake

RANDOM = {"dropout", "random-resize"}
SAME_LOGITS = FAKES.keys() - RANDOM - {"quantised-input", "nearest-neighbours"}


def marked(names, is_slow):
    """The names as parameters, those that take long marked."""
    return [pytest.param(n, marks=[pytest.mark.slow] * is_slow(n)) for n in names]


@pytest.mark.parametrize("name", marked(FAKES, lambda name: name in RANDOM))
def test_a_fake_decides_as_its_network_and_pgd_is_blind_to_it(name):
    fake, num_passes = planted(name), 10 if name in RANDOM else 1
    assert fake.is_random == (name in RANDOM)
    tf.random.set_seed(0)
    decided = clean_logits(RepeatedPasses(fake, num_passes), IMAGES).argmax(axis=1)
    assert np.mean(decided == LABELS) >= (0.9 if fake.is_random else 1.0)
    seen_through = left_of(fake, "cw", gradient_logits_fn=fake.followed, eot=num_passes)
    if fake.is_random:
        assert seen_through.mean() <= EXACT.mean() - 0.1
        return
    flattered = left_of(fake, "xent").mean()
    assert flattered >= 0.95
    assert seen_through.mean() <= flattered - 0.15
    if name in SAME_LOGITS:
        np.testing.assert_array_equal(seen_through, EXACT)


def test_a_fake_is_known_by_its_content():
    one, same, other = (temperature(NETWORK, factor=f) for f in (10.0, 10.0, 20.0))
    assert one.sha256 == same.sha256 != other.sha256
    assert len({planted(name).sha256 for name in FAKES}) == len(FAKES)


def test_a_fake_of_other_images_keeps_their_range():
    fake = FAKES["random-resize"].plant(NETWORK, bounds=(-1.0, 1.0), smallest=0.5)
    dark = np.full((2, *SHAPE), -1.0, np.float32)
    np.testing.assert_allclose(fake(dark), NETWORK(dark), rtol=1e-5)
    quantised = FAKES["quantised-input"].plant(NETWORK, bounds=(0.0, 255.0), levels=2)
    np.testing.assert_allclose(
        quantised(np.full((1, *SHAPE), 200.0, np.float32)),
        NETWORK(np.full((1, *SHAPE), 255.0, np.float32)),
    )


def test_neighbours_need_references():
    with pytest.raises(ValueError, match="references must be at least k=5 images; got 2"):
        nearest_neighbours(NETWORK, references=REFERENCES[:2])


# --- what the audit makes of them

SEEN_BY = {
    "temperature": 3,
    "quantised-input": 3,
    "nearest-neighbours": 3,
    "softmax-output": 3,
    "noisy-gradient": 3,
    "reversed-gradient": 24,
    "shattered-gradient": 24,
}
BROKEN_ANYWAY = {"logit-jump", "dropout", "random-resize"}


@pytest.mark.parametrize("name", SEEN_BY)
def test_a_decisive_test_fails_on_a_mask(name):
    found = outcome(SEEN_BY[name], planted(name))
    assert found.status == "fail" and found.decisive, found.reason
    assert ("the backward pass is random" in found.reason) == (name == "noisy-gradient")


@pytest.mark.parametrize("name", marked(sorted(BROKEN_ANYWAY), lambda name: name in RANDOM))
def test_the_attacks_of_the_audit_break_what_no_test_has_to_see(name):
    evidence = Evidence(planted(name), THREAT, IMAGES, LABELS, claim=1.0)
    run_test(evidence, DIAGNOSTICS[14])
    # Of a random start at the far side 40 short steps miss a few.
    assert evidence.robust.mean() <= EXACT.mean() + 0.1


def test_every_fake_is_seen_or_broken():
    assert SEEN_BY.keys() | BROKEN_ANYWAY == FAKES.keys()


# --- randomised networks


def noisy(images):
    """The linear network with noise on its logits, right as often as not at the boundary only."""
    logits = NETWORK(images)
    return logits + tf.random.normal(tf.shape(logits))


@pytest.mark.slow
def test_an_honest_randomised_network_keeps_what_it_has():
    evidence = Evidence(noisy, THREAT, IMAGES, LABELS, claim=EXACT.mean())
    assert evidence.is_randomised and evidence.num_passes == 4
    run_test(evidence, DIAGNOSTICS[14])
    assert abs(evidence.robust.mean() - EXACT.mean()) <= 0.1
    assert not Evidence(NETWORK, THREAT, IMAGES, LABELS, claim=0.5).is_randomised


@pytest.mark.slow
def test_noise_is_no_dependence_on_the_batch():
    def with_batch_statistics(images):
        return noisy(images) - tf.reduce_mean(NETWORK(images), axis=0)

    assert outcome(33, noisy).status == "not_applicable"
    found = outcome(33, with_batch_statistics)
    assert found.status == "fail" and "batch statistics" in found.reason


# --- the command and the table


def test_a_fake_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match="--fake=nothing: there is no such fake; choose from temp"):
        AuditSettings(fake="nothing")


def test_own_images_have_no_references():
    own = OwnModel(NETWORK, THREAT, IMAGES, LABELS, Path("a.keras"), Path("b.npz"), "0")
    with pytest.raises(UsageError, match="needs training images, and your own data have none"):
        audited_own(own, AuditSettings(fake="nearest-neighbours"))
    audited = audited_own(own, AuditSettings(fake="temperature"))
    assert audited.network.name == "temperature" and list(audited.attacks) == ["pgd40-xent"]
    assert audited.output_dir.name.endswith("-temperature")


@pytest.mark.slow
def test_the_claim_on_a_fake_is_what_its_attack_leaves():
    own = OwnModel(NETWORK, THREAT, IMAGES, LABELS, Path("a.keras"), Path("b.npz"), "0")
    settings = AuditSettings(fake="softmax-output")
    found = settings_of_fake(audited_own(own, settings), settings)
    assert (found.claim, found.claimed_by) == (1.0, "pgd40-xent")
    assert found.known_accuracy == EXACT.mean()
    given = AuditSettings(fake="softmax-output", claim=0.7, claimed_by="us", known_accuracy=0.1)
    assert settings_of_fake(audited_own(own, given), given) == given
    plain = AuditSettings(claim=0.5)
    assert settings_of_fake(audited_own(own, plain), plain) == plain


def audit_file(folder, name, *, verdict, claim, known, **settings):
    tests = [{"number": 3, "name": "Three", "decisive": True, "status": "fail"}]
    value = {
        "claim": claim,
        "claimed_by": None,
        "verdict": verdict,
        "num_examples": 10,
        "worst_case": {"accuracy": 0.5, "strongest_attack": "apgd-t"},
        "failed": [3],
        "undecided": [7, 12],
        "tests": tests,
        "settings": settings if known is None else settings | {"known_accuracy": known},
    }
    (folder / name).mkdir()
    (folder / name / "audit.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("verdict", "claim", "known", "kind", "judged"),
    [
        ("HOLDS", 0.9, 0.0, "not robust", "wrong"),
        ("NOT REFUTED", 0.9, 0.0, "not robust", "wrong: missed"),
        ("SUSPECT", 0.9, 0.0, "not robust", "right"),
        ("REFUTED", 0.08, 0.0, "not robust", "right"),
        ("REFUTED", 0.9, 0.85, "robust", "wrong"),
        ("SUSPECT", 0.9, 0.85, "robust", "wrong: false alarm"),
        ("NOT REFUTED", 0.9, 0.8, "robust", "right"),
        ("HOLDS", 0.9, 0.9, "robust", "right"),
        ("HOLDS", 0.9, None, "–", "–"),
    ],
)
def test_a_wrong_verdict_stands_in_the_table_as_wrong(
    verdict, claim, known, kind, judged, tmp_path
):
    audit_file(tmp_path, "one", verdict=verdict, claim=claim, known=known)
    (row,) = verdicts_table([tmp_path / "one"]).rows
    assert (row[0], row[1], row[6], row[-1]) == ("one", kind, verdict, judged)
    decided = {
        "REFUTED": "the worst case, most by apgd-t",
        "SUSPECT": "3 Three",
        "NOT REFUTED": "undecided: 7, 12",
        "HOLDS": "",
    }
    assert row[7] == decided[verdict]


def test_a_mask_before_a_robust_network_is_no_fake(tmp_path):
    mask = {"fake": {"name": "dropout"}}
    audit_file(tmp_path, "b", verdict="NOT REFUTED", claim=0.8, known=0.8, **mask)
    audit_file(tmp_path, "a", verdict="REFUTED", claim=0.8, known=0.0, **mask)
    (tmp_path / "order.txt").write_text("b\n")
    table = verdicts_table(audit_folders(tmp_path))
    assert [row[:2] for row in table.rows] == [("b", "robust"), ("a", "fake")]


def test_what_is_no_audit_is_told_in_one_line(tmp_path):
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(ValueError, match="this is no audit.json of audit.py"):
        write_verdicts([str(tmp_path)], None, "verdicts")
    (tmp_path / "audit.json").unlink()
    with pytest.raises(UsageError, match="there is no audit.json at or below it"):
        write_verdicts([str(tmp_path)], None, "verdicts")


def test_the_table_of_verdicts_is_what_the_committed_audits_give():
    page = (ROOT / "results" / "README.md").read_text()
    table = verdicts_table(audit_folders(ROOT / "results" / "audit-verdicts"))
    assert replace_marked_section(page, "audit-verdicts", table.to_markdown()) == page
    kinds = [row[1] for row in table.rows]
    assert kinds.count("fake") >= 8 and {"robust", "not robust"} <= set(kinds)
    for row in table.rows:
        name, kind, *_, verdict = (*row[:2], row[6])
        assert (kind, verdict) not in (("fake", "HOLDS"), ("robust", "REFUTED")), name
