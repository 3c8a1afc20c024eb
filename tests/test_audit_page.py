"""The page of an audit and the figures of audits and landscapes: what they say, and legibly."""

import dataclasses
import functools
import html
import re

import numpy as np
import pytest
from readable import assert_readable, check_html, labelled_axes, visible_texts

from logit_reg.analysis.curves import RestartLosses, StepGrid
from logit_reg.analysis.landscape import Comparison, Landscape
from logit_reg.audit import records
from logit_reg.audit.records import Audit, Cost, Curve, SqueezeDiagnostics, WorstCase
from logit_reg.report import audit_figures as figures
from logit_reg.report.audit_page import write_audit_page
from logit_reg.report.style import DARK, LIGHT, narrow, to_svg
from logit_reg.threat import ThreatModel

THREAT = ThreatModel("linf", 0.3, 0.0, 1.0)
GROUP_OF = {1: "preconditions", 7: "preconditions", 13: "attack strength", 23: "sanity"}


def record(number, status="pass", **fields):
    values = {
        "name": f"Test number {number}",
        "group": GROUP_OF.get(number, "geometry"),
        "figure": {"gap": 0.03},
        "criterion": "The gap is at most 5 points.",
        "threshold_origin": "prop",
        "status": status,
        "reason": "apgd-ce leaves 46.0 %, apgd-t 43.0 %",
        "decisive": number in (7, 13, 23),
        "cost": Cost(400, 400, 12.5),
    }
    return records.TestRecord(number, **values | fields)


def surface_record(num_points=7):
    a = np.linspace(-1, 1, num_points)
    loss = (np.abs(a)[:, None] + np.maximum(a, 0)[None]) ** 2
    figure = {"epsilons": a.tolist(), "cross_entropy": loss.tolist(), "margin": (1 - loss).tolist()}
    return record(31, "report", figure=figure, reason="mean over 50 images")


CURVES = (
    Curve("steps", "steps of PGD", (10.0, 40.0, 100.0, 400.0), (0.8, 0.62, 0.6, 0.6)),
    Curve("step_size", "step size of PGD (pixel units)", (0.01, 0.1, 0.6), (0.8, 0.4, 0.5), 0.01),
    Curve("epsilon", "epsilon (pixel units)", (0.1, 0.2, 0.3, 0.5), (0.9, 0.7, 0.5, 0.0), 0.3),
)


def audit_of(num_robust=46, claim=0.5, tests=None, **fields):
    """An audit of 100 images."""
    values = {
        "claimed_by": "paper-mnist",
        "num_classes": 10,
        "clean_accuracy": 0.99,
        "worst_case": WorstCase(np.arange(100) < num_robust),
        "accuracy_by_attack": {"pgd40-xent": 0.62, "apgd-t": 0.47, "square": 0.58},
        "tests": tests or (record(1), record(7), record(13), record(23)),
        "squeeze": SqueezeDiagnostics(3.2, 1.5, 0.46, float(np.log(10)), 2.0, 10.73),
        "curves": (),
        "budget": "full",
        "seed": 7,
        "settings": {"model": "runs/squeeze", "threat": dataclasses.asdict(THREAT)},
    }
    return Audit(claim, **values | fields)


def full_audit():
    """An audit with every figure."""
    tests = (record(1), record(7), record(13), record(23), surface_record())
    return audit_of(tests=tests, curves=CURVES)


def text_of(path):
    """What a reader sees: no tags, no pictures, white space as it is drawn."""
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", path.read_text(), flags=re.S)
    return " ".join(html.unescape(page).split())


def written(audit, folder):
    write_audit_page(audit, folder / "audit.html")
    return folder / "audit.html"


# What it says


def test_the_verdict_comes_first_with_both_numbers_and_the_strongest_attack(tmp_path):
    text = text_of(written(audit_of(), tmp_path))

    assert "Robustness audit of squeeze HOLDS Every decisive test ran" in text
    # 46 of 100, Wilson's formula by hand.
    assert (
        "Claimed robust accuracy (by paper-mnist): 50.0 %. Of 100 images 46.0 % [36.6, 55.7] "
        "withstand every attack of this audit. The attack that broke most is apgd-t, which alone "
        "leaves 47.0 %." in text
    )


def test_a_run_is_called_by_its_method(tmp_path):
    settings = audit_of().settings | {"method": "squeeze beta=2, noise"}

    text = text_of(written(audit_of(settings=settings), tmp_path))

    assert text.startswith("Robustness audit of squeeze beta=2, noise")


@pytest.mark.parametrize(
    ("verdict", "audit"),
    [
        ("REFUTED", audit_of(num_robust=2)),
        ("SUSPECT", audit_of(tests=(record(7, "fail"), record(13)))),
        ("NOT REFUTED", audit_of(tests=(record(7), record(13, "skipped")))),
        ("HOLDS", audit_of()),
    ],
)
def test_each_verdict_is_said_in_plain_words(tmp_path, verdict, audit):
    page = written(audit, tmp_path)

    assert audit.verdict == verdict
    assert f'<p class="word">{verdict}</p>' in page.read_text()
    assert ("Decisive tests that failed: 7 (Test number 7)" in text_of(page)) is (
        verdict == "SUSPECT"
    )


def test_decisive_tests_that_did_not_run_stand_above_the_verdict(tmp_path):
    tests = (
        record(1, "skipped", reason="no reason to worry"),
        record(7, "skipped", reason="needs the standard budget"),
        record(13, "not_applicable", reason="two classes"),
        record(23),
    )

    text = text_of(written(audit_of(tests=tests), tmp_path))

    above, _, below = text.partition(" NOT REFUTED ")
    assert "1 decisive test did not come to a decision." in above
    assert "7 Test number 7: needs the standard budget" in above
    assert "Test number 13" not in above and "no reason to worry" not in above
    assert below


def test_the_table_has_every_test_with_status_reason_criterion_and_cost(tmp_path):
    tests = (record(1), record(7, "fail"), record(13, "skipped", cost=Cost()), record(31, "report"))

    page = written(audit_of(tests=tests), tmp_path)
    rows = re.findall(r"<tr><th scope=\"row\">(\d+) .*?</tr>", page.read_text())

    assert rows == ["1", "7", "13", "31"]
    text = text_of(page)
    assert (
        "Preconditions 1 Test number 1 pass apgd-ce leaves 46.0 %, apgd-t 43.0 % The gap is at "
        "most 5 points. threshold proposed by this project 12 s 7 Test number 7 decisive fail"
    ) in text
    assert "4 tests: 1 pass, 1 fail, 1 report, 1 skipped." in text


def test_what_is_not_decided_is_said_in_the_table_and_above_the_verdict(tmp_path):
    reason = "7.5 points [−1.9, 19.9], at most 3 allowed; about 87 images would decide"
    audit = audit_of(tests=(record(7), record(13, "not_decided", reason=reason), record(23)))

    text = text_of(written(audit, tmp_path))

    above, _, below = text.partition(" NOT REFUTED ")
    assert f"13 Test number 13: {reason}" in above
    assert f"decisive not decided {reason}" in below
    assert "3 tests: 2 pass, 1 not decided." in below


def test_the_claim_is_compared_on_the_images_of_the_audit_or_not_at_all(tmp_path):
    audit = audit_of(claimed_robust=np.arange(100) < 48)

    assert "On the same images" not in text_of(written(audit_of(), tmp_path))
    assert "claim on these images –" in text_of(written(audit_of(), tmp_path))
    # Tango's interval of 2 of 100.
    assert (
        "On the same images the claim's own attacks leave 48.0 %: 2.0 points [−1.8, 7.0] more."
        in text_of(written(audit, tmp_path))
    )
    gap = audit.to_json()["claimed_attacks"]["gap"]
    assert gap["value"] == 0.02 and gap["low"] < 0 < gap["high"]


def test_the_scale_of_the_logits_stands_beside_its_limits(tmp_path):
    text = text_of(written(audit_of(), tmp_path))

    assert "Clean cross-entropy 0.46, ln 10 = 2.3 " in text
    assert "beta 2, collapse threshold 10.7 " in text


def test_an_audit_without_attacks_curves_or_surface_has_a_page(tmp_path):
    bare = audit_of(
        tests=(record(7, "skipped"),),
        accuracy_by_attack={},
        claimed_by=None,
        settings={},
        squeeze=SqueezeDiagnostics(0.0, 0.0, 2.3, 2.3),
    )

    page = written(bare, tmp_path)

    assert check_html(page).tags.count("img") == 1
    assert "Claimed robust accuracy: 50.0 %." in text_of(page)


# What it is


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return written(full_audit(), tmp_path_factory.mktemp("page"))


def test_the_page_is_well_formed_and_needs_nothing_else(page):
    checker = check_html(page)

    # Attacks, curves and two surfaces, each for light and for dark, wide and narrow.
    assert checker.tags.count("img") == 4
    assert len(checker.references) == 16
    assert all(r.startswith("data:image/svg+xml;base64,") for r in checker.references)
    assert "script" not in checker.tags and "link" not in checker.tags
    assert not re.search(r"https?:|@import|url\(", re.sub(r"data:[^\"]*", "", page.read_text()))
    assert [path.name for path in page.parent.iterdir()] == ["audit.html"]


def test_the_same_audit_gives_the_same_page(page, tmp_path):
    assert written(full_audit(), tmp_path).read_bytes() == page.read_bytes()


def test_names_from_elsewhere_are_escaped(tmp_path):
    hostile = '"><script>alert(1)</script>'
    audit = audit_of(
        claimed_by=hostile,
        tests=(
            record(7, "skipped", name=hostile, reason=hostile, criterion=hostile),
            record(13, "fail", name=hostile, figure={hostile: hostile}),
        ),
        accuracy_by_attack={hostile: 0.1, "$\\frac{1}$": 0.2},
        settings={"model": hostile, "threat": {"norm": hostile, "epsilon": 1.0}},
    )

    page = written(audit, tmp_path)

    assert "script" not in check_html(page).tags
    assert "<script" not in page.read_text()
    assert text_of(page).count(hostile) >= 6


# Figures


def comparison_of(num_models=2, norm="linf", scale=1.0, num_points=9):
    """Bowls of different steepness, with one chosen example."""
    a = np.linspace(-2, 2, num_points, dtype=np.float32)
    bowl = a[:, None] ** 2 + np.maximum(a, 0)[None] ** 2
    loss = np.stack([scale * (model + 1) * bowl for model in range(num_models)])
    threat = dataclasses.replace(THREAT, norm=norm)
    return Comparison(
        coordinates=a,
        mean_cross_entropy=loss,
        mean_margin=2 - loss,
        cross_entropy=loss[:, None],
        margin=2 - loss[:, None],
        chosen=np.array([3]),
        settings={
            "models": [f"model {i}" for i in range(num_models)],
            "landscape": dataclasses.asdict(Landscape(threat, num_points=num_points)),
            "num_examples": 20,
            "num_classes": 10,
        },
    )


def restarts_of(num_survivors, num_restarts=30):
    losses = np.random.default_rng(0).gamma(2, 0.3, (num_restarts, num_survivors))
    correct = np.ones((num_restarts, num_survivors + 2), bool)
    return RestartLosses(correct, np.arange(num_survivors) * 7, losses.astype(np.float32))


GRID = StepGrid(
    np.array([0.012, 0.03, 0.15, 0.6]),
    np.array([10, 40, 100]),
    np.arange(50) < np.array([[48, 40, 33], [44, 38, 30], [25, 12, 0], [50, 45, 45]])[..., None],
)

DRAWN = {
    "attacks": functools.partial(figures.attack_bars, audit_of()),
    "many attacks": functools.partial(
        figures.attack_bars,
        audit_of(accuracy_by_attack={f"attack with a long name {i}": i / 40 for i in range(40)}),
    ),
    "curves": functools.partial(figures.accuracy_curves, CURVES, 0.5),
    "one curve": functools.partial(figures.accuracy_curves, CURVES[:1]),
    "steps": functools.partial(figures.step_map, GRID, 0.3),
    "restarts": functools.partial(figures.restart_histograms, restarts_of(9), 10),
    "four restarts": functools.partial(figures.restart_histograms, restarts_of(4), 100),
    "one restart": functools.partial(figures.restart_histograms, restarts_of(1), 10),
    **{
        f"{draw.__name__} {quantity} of {count}": functools.partial(
            draw, comparison_of(count), quantity
        )
        for draw in (figures.loss_maps, figures.loss_surfaces)
        for quantity, count in (("cross_entropy", 1), ("margin", 2), ("cross_entropy", 5))
    },
    "steep map": functools.partial(figures.loss_maps, comparison_of(2, "l2", 40.0)),
    "steep margin": functools.partial(figures.loss_maps, comparison_of(2, "l2", 40.0), "margin"),
    "flat map": functools.partial(figures.loss_maps, comparison_of(1, "l2", 0.0)),
    "example": functools.partial(figures.loss_maps, comparison_of(), "margin", 0),
}


@pytest.mark.parametrize("theme", [LIGHT, narrow(LIGHT)], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", DRAWN)
def test_every_axis_has_a_label_and_no_text_overlaps_or_is_cut_off(name, theme):
    figure = DRAWN[name](theme=theme)

    assert_readable(figure)
    assert labelled_axes(figure)


def test_hostile_names_are_drawn_as_they_are():
    comparison = comparison_of()
    names = [r"$\frac{1}$ and <b>", "a very long name of a run that nobody would want to read " * 3]
    comparison = dataclasses.replace(comparison, settings=comparison.settings | {"models": names})
    attacks = {"$x^2$": 0.3, "a_{b}$": 0.2, "long " * 30: 0.1}

    for figure in (
        figures.loss_maps(comparison),
        figures.loss_surfaces(comparison),
        figures.attack_bars(audit_of(accuracy_by_attack=attacks)),
    ):
        assert_readable(figure)
        assert any(r"\$" in text.get_text() for text in visible_texts(figure))


@pytest.mark.parametrize("quantity", ["cross_entropy", "margin"])
def test_models_side_by_side_share_one_scale(quantity):
    comparison = comparison_of(3)

    maps = figures.loss_maps(comparison, quantity)
    surfaces = figures.loss_surfaces(comparison, quantity)

    images = [axes.images[0] for axes in maps.axes[:3]]
    assert len({image.get_clim() for image in images}) == 1
    # The colour bar belongs to that scale.
    assert images[0].colorbar or images[-1].colorbar
    for image, values in zip(images, getattr(comparison, f"mean_{quantity}"), strict=True):
        np.testing.assert_allclose(image.get_array(), values)
    limits = {tuple(axes.get_zlim()) for axes in surfaces.axes}
    assert limits == {tuple(map(float, images[0].get_clim()))}


def test_ln_k_stands_in_the_colour_bar_and_steep_models_do_not_hide_the_others():
    figure = figures.loss_maps(comparison_of(2, scale=40.0))

    *_, bar = figure.axes
    ticks = dict(zip([t.get_text() for t in bar.get_yticklabels()], bar.get_yticks(), strict=True))
    assert ticks["ln 10"] == pytest.approx(2.302585)
    # Three times ln 10, though the losses reach 640.
    assert figure.axes[0].images[0].get_clim() == pytest.approx((0, 6.907755))


@pytest.mark.parametrize(("norm", "at_45_degrees"), [("linf", 0.5), ("l2", np.sqrt(0.5))])
def test_the_edge_of_the_ball_is_where_the_farthest_pixel_is_at_epsilon(norm, at_45_degrees):
    axes = figures.loss_maps(comparison_of(1, norm)).axes[0]

    edge = next(line for line in axes.lines if len(line.get_xdata()) > 2).get_xydata()
    assert np.abs(edge).max() == pytest.approx(1)
    length = np.abs(edge).sum(1) if norm == "linf" else np.linalg.norm(edge, axis=1)
    np.testing.assert_allclose(length, 1)
    on_diagonal = at_45_degrees * np.ones(2)
    length = np.abs(on_diagonal).sum() if norm == "linf" else np.linalg.norm(on_diagonal)
    assert length == pytest.approx(1)


def test_bars_curves_and_cells_are_the_numbers_of_the_records():
    bars = figures.attack_bars(audit_of()).axes[0]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([99, 50, 62, 58, 47, 46])

    panels = figures.accuracy_curves(CURVES, 0.5).axes
    np.testing.assert_allclose(panels[0].lines[0].get_xydata()[:, 1], [80, 62, 60, 60])
    assert panels[1].get_xscale() == "log" and panels[2].get_xscale() == "linear"

    cells = " ".join(text.get_text() for text in figures.step_map(GRID, 0.3).axes[0].texts)
    assert cells == "96.0 80.0 66.0 88.0 76.0 60.0 50.0 24.0 0.0 100.0 90.0 90.0"


def test_histograms_show_the_survivors_whose_losses_vary_most():
    restarts = restarts_of(9)
    spread = np.ptp(restarts.cross_entropy, axis=0)

    panels = figures.restart_histograms(restarts, 10).axes

    expected = [f"image {7 * place}" for place in np.argsort(-spread)[:6]]
    assert [axes.get_title() for axes in panels] == expected
    assert all(sum(bar.get_height() for bar in axes.patches) == 30 for axes in panels)
    with pytest.raises(ValueError, match="no example survives all restarts"):
        figures.restart_histograms(restarts_of(0), 10)


def test_dark_figures_differ_in_ink_and_are_the_same_each_time():
    drawings = [to_svg(figures.loss_maps(comparison_of(), theme=DARK)) for _ in range(2)]

    assert drawings[0] == drawings[1]
    assert DARK.paper.encode() in drawings[0]


def test_captions_give_n_the_units_and_what_a_healthy_model_shows():
    comparison = comparison_of()

    for caption, n in (
        (figures.landscape_caption(comparison), "n = 20"),
        (figures.landscape_caption(comparison, "margin", 0), "image 3, n = 1"),
        (figures.attack_bars_caption(audit_of()), "n = 100"),
        (figures.accuracy_curves_caption(100), "n = 100"),
        (figures.step_map_caption(GRID), "n = 50"),
        (figures.restart_histograms_caption(restarts_of(3)), "the 3 among n = 5"),
    ):
        assert n in caption
        assert "healthy model" in caption
    assert "in multiples of ε = 0.3 (linf)" in figures.landscape_caption(comparison)
