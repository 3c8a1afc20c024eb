"""An audit as one HTML page that needs no other file: verdict, table of tests, figures."""

import dataclasses
import functools
import html
from pathlib import Path

import numpy as np

from logit_reg.analysis.landscape import Comparison, Landscape
from logit_reg.audit.decisions import percent, with_interval
from logit_reg.audit.records import DECISIVE, GROUPS, OF_THE_EVALUATION, Audit, TestRecord
from logit_reg.durations import in_words
from logit_reg.files import write_text
from logit_reg.report import audit_figures
from logit_reg.report import html as html_page
from logit_reg.threat import ThreatModel

_STYLE = Path(__file__).with_name("audit_page.css").read_text()

_TONES = {"HOLDS": "good", "NOT REFUTED": "plain", "SUSPECT": "doubt", "REFUTED": "bad"}
_STATUS_TONES = {
    "pass": "good",
    "fail": "bad",
    "not_decided": "doubt",
    "report": "plain",
    "skipped": "doubt",
    "not_applicable": "plain",
}
_ORIGINS = {
    "src": "published threshold",
    "ctl": "threshold relative to a control model",
    "prop": "threshold proposed by this project",
}
_LOSS_SURFACE = 31

_RULE = (
    "REFUTED: the claim lies more than 10 points above the worst case and above its 95 % "
    "interval, or the worst case is below half the claim and their 95 % intervals do not overlap. "
    "SUSPECT: not refuted, but a decisive test of the model fails. HOLDS: every decisive test ran "
    "and passed, and the claim lies at most 10 points above the worst case. NOT REFUTED: anything "
    f"else. Decisive are the tests {', '.join(map(str, DECISIVE))}; "
    f"{' and '.join(map(str, OF_THE_EVALUATION))} judges the attacks and not the model: if it "
    "fails, the claim is not shown, and that is all. The worst case is an upper bound: a "
    "stronger attack can lower it, none can raise it."
)


def write_audit_page(audit: Audit, path: Path | str) -> None:
    """Write an audit as one HTML page, whole or not at all.

    Args:
        audit: the claim, the evidence and the verdict.
        path: the file; needs nothing beside it, no network and no script.
    """
    write_text(path, _page(audit))


def _page(audit):
    title = "Robustness audit"
    # A run's folder may be named after its twenty settings; the page lists them further down.
    method, model = audit.settings.get("method"), audit.settings.get("model")
    if isinstance(method, str):
        title += f" of {method}"
    elif isinstance(model, str):
        title += f" of {Path(model).name or model}"
    return html_page.document(
        title,
        f"<h1>{_text(title)}</h1>",
        _undecided(audit),
        _verdict(audit),
        _facts(audit),
        html_page.section("Tests", _tests_table(audit)),
        html_page.section("Accuracy under each attack", _attacks(audit)),
        *_curves(audit),
        *_loss_surface(audit),
        html_page.section("Scale of the logits", _squeeze(audit)),
        html_page.section("How the verdict is reached", f"<p>{_text(_RULE)}</p>"),
        html_page.section("Provenance", _provenance(audit)),
        style=_STYLE,
    )


def _undecided(audit):
    """The decisive tests without a decision, shown above the verdict."""
    missing = [test for test in audit.tests if test.number in audit.undecided]
    if not missing:
        return ""
    items = "\n".join(
        f"<li>{test.number} {_text(test.name)}: {_text(test.reason)}</li>" for test in missing
    )
    count = "1 decisive test" if len(missing) == 1 else f"{len(missing)} decisive tests"
    return (
        f'<aside class="undecided"><strong>{count} did not come to a decision.</strong>\n'
        f"<ul>\n{items}\n</ul></aside>"
    )


def _verdict(audit):
    worst, strongest = audit.worst_case, audit.strongest_attack
    low, high = worst.interval
    by = f" (by {audit.claimed_by})" if audit.claimed_by else ""
    numbers = (
        f"Claimed robust accuracy{by}: {percent(audit.claim)}. Of {audit.num_examples} images "
        f"{percent(worst.accuracy)} [{100 * low:.1f}, {100 * high:.1f}] withstand every attack "
        "of this audit."
    )
    gap = audit.claimed_gap
    if gap is not None:
        numbers += (
            f" On the same images the claim's own attacks leave "
            f"{percent(gap.correct_a / gap.num_examples)}: {with_interval(gap, ' points')} more."
        )
    if strongest:
        numbers += (
            f" The attack that broke most is {strongest}, which alone leaves "
            f"{percent(audit.accuracy_by_attack[strongest])}."
        )
    decisive = [test for test in audit.tests if test.decisive and test.status == "fail"]
    failed = ", ".join(f"{test.number} ({test.name})" for test in decisive)
    meaning = {
        "HOLDS": "Every decisive test ran, and none of them speaks against the claim.",
        "NOT REFUTED": "No attack contradicts the claim and no decisive test of the model failed, "
        "but not all of them came to a decision: this is no confirmation.",
        "SUSPECT": "The attacks do not contradict the claim, but they may have been blind.",
        "REFUTED": "The claim does not hold: attacks within its own threat model leave far less.",
    }[audit.verdict]
    if failed and audit.verdict == "NOT REFUTED":
        meaning = (
            "No attack contradicts the claim and no decisive test of the model failed, but the "
            "attacks that it rests on miss adversarial examples that are known to exist: it is "
            "not shown."
        )
    if failed:
        meaning += f" Decisive tests that failed: {failed}."
    return (
        f'<div class="verdict {_TONES[audit.verdict]}">\n<p class="word">{audit.verdict}</p>\n'
        f'<p class="lead">{_text(meaning)}</p>\n<p>{_text(numbers)}</p>\n</div>'
    )


def _facts(audit):
    threat, cost = audit.settings.get("threat"), audit.cost
    gap = audit.claimed_gap
    facts = {
        "clean accuracy": percent(audit.clean_accuracy),
        "claimed": percent(audit.claim),
        "claim on these images": "–" if gap is None else percent(gap.correct_a / gap.num_examples),
        "worst case": percent(audit.worst_case.accuracy),
        "images": str(audit.num_examples),
        "budget": audit.budget,
        "seed": str(audit.seed),
        "took": in_words(cost.seconds),
        "gradients": f"{cost.backwards:,}",
    }
    if isinstance(threat, dict) and {"norm", "epsilon"} <= threat.keys():
        facts["threat model"] = f"{threat['norm']}, ε = {threat['epsilon']:g}"
    items = "\n".join(
        f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items()
    )
    return f'<dl class="facts">\n{items}\n</dl>'


def _tests_table(audit):
    columns = ("test", "status", "found", "passes when", "cost")
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    bodies = []
    for group in GROUPS:
        rows = [_row(test) for test in audit.tests if test.group == group]
        if rows:
            heading = (
                f'<tr class="group"><th colspan="{len(columns)}">{group.capitalize()}</th></tr>'
            )
            bodies.append("\n".join(["<tbody>", heading, *rows, "</tbody>"]))
    counts = {
        name: [test.status_in_words for test in audit.tests if test.status == name]
        for name in _STATUS_TONES
    }
    found = ", ".join(f"{len(words)} {words[0]}" for words in counts.values() if words)
    caption = (
        f"{len(audit.tests)} tests: {found}. Brackets are 95 % intervals: Wilson's of a share, "
        "Tango's of a difference on the same images. A test passes if its whole interval keeps to "
        "the threshold, fails if none of it does, and is not decided otherwise. “Report” has no "
        "threshold."
    )
    return (
        f'<div class="table"><table class="tests">\n<caption>{caption}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n" + "\n".join(bodies) + "\n</table></div>"
    )


def _row(test: TestRecord):
    decisive = '<span class="note">decisive</span>' if test.decisive else ""
    tone = _STATUS_TONES.get(test.status, "plain")
    origin = _ORIGINS[test.threshold_origin]
    seconds = in_words(test.cost.seconds) if test.cost.seconds else "–"
    return (
        f'<tr><th scope="row">{test.number} {_text(test.name)}{decisive}</th>'
        f'<td class="status {tone}" data-label="status">{test.status_in_words}</td>'
        f'<td data-label="found"><span>{_text(test.reason)}</span></td>'
        f'<td data-label="passes when"><span>{_text(test.criterion)}'
        f'<span class="note">{origin}</span></span></td>'
        f'<td class="cost" data-label="cost">{seconds}</td></tr>'
    )


def _attacks(audit):
    return html_page.figure(
        functools.partial(audit_figures.attack_bars, audit),
        "Bars: accuracy clean, as claimed, under each attack and under all of them together.",
        audit_figures.attack_bars_caption(audit),
    )


def _curves(audit):
    if not audit.curves:
        return []
    drawn = html_page.figure(
        functools.partial(audit_figures.accuracy_curves, audit.curves, audit.claim),
        "Curves: accuracy against each knob of the attack.",
        audit_figures.accuracy_curves_caption(audit.num_examples),
    )
    return [html_page.section("Accuracy against the knobs of the attack", drawn)]


def _loss_surface(audit):
    """The surface that test 31 reports, if it ran."""
    test = next((test for test in audit.tests if test.number == _LOSS_SURFACE), None)
    if test is None or "cross_entropy" not in test.figure:
        return []
    coordinates = np.asarray(test.figure["epsilons"], np.float32)
    threat = ThreatModel(**audit.settings["threat"])
    landscape = Landscape(threat, None, float(coordinates[-1]), len(coordinates))
    surface = {
        quantity: np.asarray(test.figure[quantity], np.float32)[None]
        for quantity in ("cross_entropy", "margin")
    }
    comparison = Comparison(
        coordinates=coordinates,
        mean_cross_entropy=surface["cross_entropy"],
        mean_margin=surface["margin"],
        cross_entropy=surface["cross_entropy"][:, None],
        margin=surface["margin"][:, None],
        chosen=np.zeros(0, np.int64),
        settings={
            "models": ["this model"],
            "landscape": dataclasses.asdict(landscape),
            "num_classes": audit.num_classes,
        },
    )
    figures = [
        html_page.figure(
            functools.partial(audit_figures.loss_maps, comparison, quantity),
            f"Heat map: {name} over the plane of the FGSM and a random direction.",
            f"{name.capitalize()}: {test.reason}. "
            f"{audit_figures.landscape_reading(comparison, quantity)}",
        )
        for quantity, name in (("cross_entropy", "cross-entropy"), ("margin", "margin"))
    ]
    return [html_page.section("Loss around the images", "\n".join(figures))]


def _squeeze(audit):
    squeeze = audit.squeeze
    ceiling = squeeze.log_num_classes
    terms = {
        f"Clean cross-entropy {_number(squeeze.clean_cross_entropy)}, "
        f"ln {audit.num_classes} = {ceiling:.3g}": (
            "A healthy model is far below ln K. From 0.9 ln K on, its logits have all but "
            "collapsed to one value and no attack on the cross-entropy sees much."
        ),
        f"Median margin {_number(squeeze.median_margin)}, mean norm of the logits "
        f"{_number(squeeze.mean_logit_norm)}": (
            "Scale alone is neither good nor bad; tests 7 and 12 tell whether it blinds attacks."
        ),
    }
    if squeeze.beta is not None and squeeze.collapse_threshold is not None:
        terms[f"beta {squeeze.beta:g}, collapse threshold {squeeze.collapse_threshold:.3g}"] = (
            "From the threshold on, logits that are all equal minimise the training objective."
        )
    items = "\n".join(
        f"<dt>{_text(term)}</dt>\n<dd>{_text(text)}</dd>" for term, text in terms.items()
    )
    return f"<dl>\n{items}\n</dl>"


def _number(value):
    """Logits that are not finite have no scale to show."""
    return "not finite" if value is None else f"{value:.3g}"


def _provenance(audit):
    measured = {
        f"{test.number} {test.name}": dict(test.figure)
        for test in audit.tests
        if test.figure and test.number != _LOSS_SURFACE
    }
    return "\n".join(
        [
            html_page.details("Settings", html_page.json_block(dict(audit.settings))),
            html_page.details("What each test measured", html_page.json_block(measured)),
        ]
    )


def _text(value):
    """Plain text as HTML, a number and its per cent sign on one line."""
    return html.escape(value).replace(" %", "&nbsp;%")
