"""Comparing two ledgers: the arithmetic against brute force, the images against each other."""

import itertools
import math

import numpy as np
import pytest
from test_report import ATTACKS, first, save_evaluation

from logit_reg.evaluation.ledger import read_ledger
from logit_reg.evaluation.statistics import mcnemar, paired_interval
from logit_reg.files import read_json, write_json
from logit_reg.report.compare import compare, comparison_table


def evaluation(folder, counts=(7, 6, 5, 5), clean=9, num=10, **options):
    correct = {a: first(count, num) for a, count in zip(ATTACKS, counts, strict=True)}
    save_evaluation(folder, first(clean, num), correct, **options)
    return read_ledger(folder)


# McNemar


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 8), (5, 5), (0, 12), (7, 2)])
def test_mcnemar_is_the_share_of_coin_throws_at_least_as_uneven(only_a, only_b):
    num = only_a + only_b
    throws = [sum(coins) for coins in itertools.product((0, 1), repeat=num)]
    uneven = [abs(2 * heads - num) >= abs(only_a - only_b) for heads in throws]
    assert mcnemar(only_a, only_b) == pytest.approx(np.mean(uneven))


def test_mcnemar_on_a_whole_test_set():
    """2^6000 is no float; the normal approximation is close there."""
    z = (3100 - 2900) / math.sqrt(6000)
    assert mcnemar(3100, 2900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)
    assert mcnemar(6000, 0) == 0.0 or mcnemar(6000, 0) < 1e-300


# The interval


def independent_statistic(difference, only_a, only_b, num):
    """Tango's, from the likelihood itself: its maximum is searched on a fine grid."""
    share_b = np.linspace(max(0, -difference), (1 - difference) / 2, 400_001)[1:-1]
    share_a, rest = share_b + difference, 1 - 2 * share_b - difference
    agree = num - only_a - only_b
    likelihood = agree * np.log(rest) + only_a * np.log(share_a) + only_b * np.log(share_b)
    best = share_b[np.argmax(likelihood)]
    variance = num * (2 * best + difference - difference**2)
    return (only_a - only_b - num * difference) / math.sqrt(variance)


@pytest.mark.parametrize(("only_a", "only_b", "num"), [(12, 2, 50), (1, 9, 40), (80, 60, 1000)])
def test_the_ends_of_the_interval_are_where_the_score_test_rejects(only_a, only_b, num):
    low, high = paired_interval(only_a, only_b, num)
    assert low < (only_a - only_b) / num < high
    assert independent_statistic(low, only_a, only_b, num) == pytest.approx(1.96, abs=1e-3)
    assert independent_statistic(high, only_a, only_b, num) == pytest.approx(-1.96, abs=1e-3)


def test_two_equal_networks_still_have_an_interval():
    z2 = 1.959963984540054**2
    assert paired_interval(0, 0, 1000) == pytest.approx((-z2 / (1000 + z2), z2 / (1000 + z2)))


def test_the_interval_mirrors_and_stays_inside_minus_one_to_one():
    low, high = paired_interval(9, 2, 30)
    assert paired_interval(2, 9, 30) == pytest.approx((-high, -low))
    assert paired_interval(5, 0, 5)[1] == pytest.approx(1.0)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(100, [0.15, 0.05, 0.8], size=3000)
    ends = [paired_interval(int(a), int(b), 100) for a, b, _ in counts]
    assert np.mean([low <= 0.1 <= high for low, high in ends]) == pytest.approx(0.95, abs=0.015)


# Two ledgers


def test_differences_are_counted_image_by_image(tmp_path):
    a = evaluation(tmp_path / "a", (7, 6, 5, 5), clean=9)
    b = evaluation(tmp_path / "b", (3, 6, 1, 2), clean=10)

    found = compare(a, b).differences

    assert list(found) == ["clean", *ATTACKS, "worst case"]
    assert (found["clean"].only_a, found["clean"].only_b) == (0, 1)
    assert (found["fgsm-xent"].only_a, found["fgsm-xent"].value) == (4, 0.4)
    assert found["fgsm-cw"].value == 0
    assert (found["worst case"].correct_a, found["worst case"].correct_b) == (5, 1)
    # 4 pairs, all in favour of A: 2 / 2^4.
    assert found["worst case"].p_value == 0.125


def test_the_table_says_what_was_compared(tmp_path):
    a = evaluation(tmp_path / "a")
    table = comparison_table(compare(a, a), "mnist_5k")
    assert table.rows[0][:3] == ("clean", "90.0", "90.0")
    assert table.rows[0][3] == "+0.0 [−27.8, +27.8]"
    assert "same 10 images of mnist_5k" in table.caption
    assert table.notes == ()


def test_only_the_images_that_both_saw_are_compared(tmp_path):
    """Of A the first 10 images, of B the images 6 to 15: four are shared."""
    a = evaluation(tmp_path / "a", (7, 6, 5, 5), clean=9)
    b = evaluation(tmp_path / "b", (3, 6, 1, 2), clean=10, indices=np.arange(6, 16))
    b[0].label[:] = np.arange(6, 16) % 10

    comparison = compare(a, b)

    assert (comparison.num_examples, comparison.num_a, comparison.num_b) == (4, 10, 10)
    # A has images 6, 7 and 8 right, B has 6 to 9; under FGSM A has 6 alone, B 6, 7 and 8.
    found = comparison.differences["clean"]
    assert (found.correct_a, found.correct_b, found.only_b) == (3, 4, 1)
    found = comparison.differences["fgsm-xent"]
    assert (found.correct_a, found.correct_b, found.only_b) == (1, 3, 2)
    caption = comparison_table(comparison, "mnist_5k").caption
    assert "the 4 images of mnist_5k that both saw, of the 10 of A and the 10 of B" in caption


def test_notices_stand_below_the_comparison(tmp_path):
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "b")
    b[1]["notices"] = [{"name": "gradients", "message": "no gradient\nfor 3", "value": 3}, "x"]

    text = comparison_table(compare(a, b), "mnist_5k").to_text()

    assert text.endswith("\nB: no gradient for 3")


def test_attacks_with_other_settings_or_a_shared_active_set_are_not_compared(tmp_path):
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "b")
    b[1]["protocols"]["paper-mnist"]["attacks"]["pgd40-cw"]["settings"]["step_size"] = 0.1
    assert "pgd40-cw" not in compare(a, b).differences
    b[1]["settings"]["worst_case_only"] = True
    assert list(compare(a, b).differences) == ["clean", "worst case, each of its own attacks"]


def test_attacks_over_other_numbers_of_passes_are_not_compared(tmp_path):
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "b")
    b[1]["settings"]["eot"] = 4
    assert list(compare(a, b).differences) == ["clean", "worst case, each of its own attacks"]
    a[1]["settings"]["eot"] = 4
    assert "pgd40-cw" in compare(a, b).differences


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": np.arange(10, 20)}, "A has 10 images and B 10, none of them in common"),
        ({"dataset": "mnist"}, "A was evaluated on mnist_5k, B on mnist"),
    ],
)
def test_other_images_are_refused(tmp_path, options, message):
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "b", **options)
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_images_that_differ_in_labels_or_content_are_refused(tmp_path):
    a, b = evaluation(tmp_path / "a"), evaluation(tmp_path / "b")
    other = read_ledger(tmp_path / "b")
    other[0].label[3] = 7
    with pytest.raises(ValueError, match="different labels"):
        compare(a, other)
    for name, values in (("images_sha256", ("0a", "1b")), ("canonical", (True, False))):
        for (_, result), value in zip((a, b), values, strict=True):
            result["settings"] = {name: value}
        with pytest.raises(ValueError, match="on different images"):
            compare(a, b)


# The hash


def test_a_ledger_edited_by_hand_is_noticed_even_if_the_numbers_still_agree(tmp_path):
    evaluation(tmp_path)
    path = tmp_path / "ledger.csv"
    rows = path.read_text().splitlines()
    # Two images trade their verdicts: every accuracy stays what it was.
    swap = [row.split(",", 2) for row in rows]
    swap[1][2], swap[10][2] = swap[10][2], swap[1][2]
    path.write_text("\n".join(",".join(row) for row in swap) + "\n")
    with pytest.raises(ValueError, match="is not the file that result.json was made with"):
        read_ledger(tmp_path)


def test_a_ledger_without_a_hash_is_accepted(tmp_path):
    evaluation(tmp_path)
    result = read_json(tmp_path / "result.json")
    del result["ledger_sha256"]
    write_json(tmp_path / "result.json", result)
    assert read_ledger(tmp_path)[0].clean.sum() == 9
