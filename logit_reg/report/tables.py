"""Tables made from the per-example ledgers of runs, and their place in a Markdown file."""

import dataclasses
import functools
import html
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

from logit_reg.evaluation.statistics import Proportion
from logit_reg.report.published import Published, published_for
from logit_reg.report.runs import Run as Run
from logit_reg.report.runs import StoredEvaluation
from logit_reg.report.runs import load_run as load_run
from logit_reg.text_columns import aligned

FGSM_ATTACKS = ("fgsm-xent", "fgsm-cw")
"""What `paper-fgsm` is the worst of."""

# What the field calls strong, the strongest last; by the names of their attacks.
_STRONG = (r"autoattack\b.*|apgd-t\b.*", r"adaptive\b.*")
_PGD = r"(?P<who>madry-)?pgd(?P<steps>\d{1,5})-(?P<loss>xent|cw)"

NOT_MEASURED = "–"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of strings; the first column names the rows, a header may have several lines."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    notes: tuple[str, ...] = ()
    """Lines that stand below the caption: what may mislead about single numbers."""

    def to_text(self) -> str:
        """Aligned for a terminal, the caption below, wrapped to the table's width."""
        headers = [column.split("\n") for column in self.columns]
        depth = max(map(len, headers))
        # Headers are flush with the rule below them.
        lines = [[""] * (depth - len(header)) + header for header in headers]
        drawn = aligned([*zip(*lines, strict=True), *self.rows])
        rule = "-" * max(map(len, drawn))
        header, body = drawn[:depth], drawn[depth:]
        below = [textwrap.fill(text, len(rule)) for text in (self.caption, *self.notes)]
        return "\n".join([*header, rule, *body, rule, *below])

    def to_markdown(self) -> str:
        """A GitHub table, the caption in the paragraph below."""

        def line(cells):
            escaped = (html.escape(cell, quote=False).replace("|", r"\|") for cell in cells)
            return "| " + " | ".join(cell.replace("\n", "<br>") for cell in escaped) + " |"

        marks = "|---|" + "---:|" * (len(self.columns) - 1)
        below = [html.escape(self.caption, quote=False)]
        if self.notes:
            below += ["", *(f"- {html.escape(note, quote=False)}" for note in self.notes)]
        return "\n".join([line(self.columns), marks, *map(line, self.rows), "", *below])

    def to_html(self) -> str:
        """A `<table>` that fits a screen; each cell carries its column's name for narrow ones.

        Where the columns need more than a page has, rows and columns change places; where that
        does not help, each row becomes a list.
        """
        table, kind = self, "table"
        if self._html_width() > _PAGE_WIDTH:
            table = self._transposed()
            if table._html_width() > _PAGE_WIDTH:
                table, kind = self, "table long"
        names = [html.escape(column.replace("\n", " ")) for column in table.columns]
        head = "".join(
            f'<th scope="col">{_text_html(column).replace(chr(10), "<br>")}</th>'
            for column in table.columns
        )
        body = "\n".join(
            f'<tr><th scope="row">{_text_html(row[0])}</th>'
            + "".join(
                f'<td data-label="{name}">{_cell_html(cell)}</td>'
                for name, cell in zip(names[1:], row[1:], strict=True)
            )
            + "</tr>"
            for row in table.rows
        )
        below = "<br>\n".join(html.escape(text) for text in (self.caption, *self.notes))
        return (
            f'<div class="{kind}"><table>\n<caption>{below}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
        )

    def _transposed(self):
        first, *others = self.columns
        return Table(
            columns=(first, *(row[0] for row in self.rows)),
            rows=tuple(
                (column.replace("\n", " "), *(row[i] for row in self.rows))
                for i, column in enumerate(others, start=1)
            ),
            caption=self.caption,
            notes=self.notes,
        )

    def _html_width(self):
        """About the least width in pixels: cells break before a bracket, names between words."""
        width = 0.0
        for i, column in enumerate(self.columns):
            cells = [column.replace("\n", " ").replace(" = ", "="), *(row[i] for row in self.rows)]
            pieces = [piece for cell in cells for piece in _pieces(cell, is_name=i == 0)]
            width += 16 + 8 * max(map(len, pieces), default=0)
        return width


# Of a page that is 64rem wide, its margins taken off.
_PAGE_WIDTH = 980


def _pieces(cell, *, is_name):
    """The parts of a cell that stay on one line: words of a name, a bracket as a whole."""
    return re.findall(r"\[[^\]]*\]|[^\s\[]+", cell) if not is_name else [*cell.split(), "x" * 20]


def _text_html(text):
    """Plain text as HTML, "n = 5" on one line."""
    return html.escape(text).replace(" = ", "&nbsp;=&nbsp;")


def _cell_html(cell):
    """A cell's text; a bracket is kept on one line."""
    text, count = re.subn(r"\[[^\]]*\]", r'<span class="part">\g<0></span>', _text_html(cell))
    return f"<span>{text}</span>" if count else text


def accuracy_under(run: Run, attacks: Sequence[str]) -> Proportion | None:
    """Accuracy under the worst of some attacks, per example.

    Args:
        run: the run.
        attacks: names of attacks of protocols; none for the clean accuracy.

    Returns:
        The accuracy, see `evaluation_under`; None if there is none.
    """
    found = evaluation_under(run, attacks)
    return None if found is None else Proportion.of(found.ledger.right_under(attacks))


def evaluation_under(run: Run, attacks: Sequence[str]) -> StoredEvaluation | None:
    """The evaluation of some attacks that counts.

    Args:
        run: the run.
        attacks: names of attacks of protocols; none for the clean accuracy.

    Returns:
        That over the most passes, as one pass flatters a randomised network; then that of the most
        images. None unless an evaluation ran every attack on all examples that are right clean.
    """
    found = [
        evaluation
        for evaluation in shown_evaluations(run).values()
        if set(attacks) <= evaluation.ledger.correct.keys()
        # A part of the images would stand beside the whole of other runs.
        and not evaluation.is_slice
        # An attack of the flags may share its name with a protocol's, and not its settings.
        and not (attacks and (evaluation.shares_active_set or evaluation.is_of_flags))
    ]
    return max(found, key=lambda e: (e.eot, len(e.ledger.label)), default=None)


def accuracy_under_pgd(run: Run, num_steps: int) -> Proportion | None:
    """Accuracy under the worst of the paper's, else the challenge's PGD of so many steps."""
    names = pgd_attacks(num_steps)
    found = accuracy_under(run, names)
    return found or accuracy_under(run, [f"madry-{name}" for name in names])


def shown_evaluations(run: Run) -> dict[str, StoredEvaluation]:
    """The evaluations of a run's last network, by folder.

    Those of a grid belong to figures, and slices to what they were joined to.
    """
    steps = run.evaluated_steps
    joined = set().union(*(evaluation.parts for evaluation in run.evaluations.values()))
    return {
        folder: evaluation
        for folder, evaluation in run.evaluations.items()
        if "@" not in folder
        and evaluation.finished_steps in (None, steps)
        and evaluation.result.get("ledger_sha256") not in joined
    }


def strongest(run: Run) -> StoredEvaluation | None:
    """The evaluation under the strongest cascade that was run; None if none was.

    AutoAttack, or better the adaptive attack; in linf before other norms; over the most passes; on
    the most images, no slice.
    """
    found = [e for e in shown_evaluations(run).values() if _strength(e) and not e.is_slice]
    return max(found, key=lambda e: (_rank(e), e.eot, len(e.ledger.label)), default=None)


def strong_accuracy(run: Run) -> Proportion | None:
    """Accuracy under the strongest cascade that was run; None if none was."""
    found = strongest(run)
    return None if found is None else Proportion.of(found.ledger.robust)


def pgd_attacks(num_steps: int) -> tuple[str, ...]:
    """The attacks that a paper's PGD of so many steps is the worst of."""
    return (f"pgd{num_steps}-xent", f"pgd{num_steps}-cw")


def pgd_lengths(runs: Sequence[Run]) -> list[int]:
    """Numbers of PGD steps that protocols were run with; 40, MNIST's, if there are none."""
    matches = (re.fullmatch(_PGD, name) for name in _attacks_of_protocols(runs))
    return sorted({int(match["steps"]) for match in matches if match}) or [40]


def comparable(runs: Sequence[Run]) -> list[Run]:
    """The runs whose numbers may stand side by side, in order.

    Contaminated runs are left out.

    Raises:
        ValueError: if there are no runs, or they were evaluated on different data sets.
    """
    if not runs:
        raise ValueError("a report needs at least one run; got none.")
    kept = [run for run in runs if not run.is_contaminated]
    names = {e.dataset: run.name for run in kept for e in run.evaluations.values()}
    if len(names) > 1:
        found = ", ".join(f"{dataset} ({name})" for dataset, name in sorted(names.items()))
        raise ValueError(
            f"runs were evaluated on different data sets: {found}; make a report for each."
        )
    return kept


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings of training that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]


def results_table(runs: Sequence[Run]) -> Table:
    """Accuracy of each run under each attack, counted from the per-example ledgers.

    Runs of the same name are told apart by the settings that differ. What was published of the
    same training stands in a column of its own, where anything was.

    Args:
        runs: in the order of the rows.

    Returns:
        The table, in per cent; what was not measured is an en dash.

    Raises:
        ValueError: if there are no runs, or they were evaluated on different data sets.
    """
    kept = comparable(runs)
    labels = _labels(kept)
    columns = [
        _Column("run", lambda run: labels[id(run)]),
        _column_under("clean", kept, ()),
        *_attack_columns(kept),
        *_evaluation_columns(kept),
        *_published_columns(kept),
    ]
    # Nothing is known of the training of networks from elsewhere.
    if any(run.settings or run.evaluated_steps for run in kept):
        columns += [
            _Column("training\nsteps", _show_steps),
            _Column("training\nminutes", lambda run: _show(run.minutes, ".1f")),
        ]
    return Table(
        columns=tuple(column.header for column in columns),
        rows=tuple(tuple(column.cell(run) for column in columns) for run in kept),
        caption=_caption(kept, [run for run in runs if run.is_contaminated]),
        notes=notices(kept),
    )


def split_by_dataset(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups of runs whose numbers may stand side by side, one for each data set.

    A run stands in the group of every data set that it was evaluated on, with the evaluations on
    that one; without any, in that of its own data set.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        names = {evaluation.dataset for evaluation in run.evaluations.values()}
        for name in sorted(names) or [str(run.settings.get("dataset"))]:
            found = {k: e for k, e in run.evaluations.items() if e.dataset == name}
            groups.setdefault(name, []).append(dataclasses.replace(run, evaluations=found))
    return list(groups.values())


def notices(runs: Sequence[Run]) -> tuple[str, ...]:
    """What the evaluations of some runs say of their own numbers, a line each."""
    labels = _labels(runs)
    return tuple(
        f"{labels[id(run)]}, {folder}: {notice}"
        for run in runs
        for folder, evaluation in shown_evaluations(run).items()
        for notice in notices_of(evaluation.result)
    )


def notices_of(result: Mapping) -> list[str]:
    """The notices of a `result.json`, one line each; older ones have none."""
    found = result.get("notices")
    entries = found if isinstance(found, list) else []
    return [
        " ".join(str(entry["message"]).split())
        for entry in entries
        if isinstance(entry, dict) and "message" in entry
    ]


def replace_marked_section(text: str, name: str, content: str) -> str:
    """Put generated content between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Args:
        text: a Markdown file.
        name: of the section.
        content: what is to stand there; white space around it does not count.

    Returns:
        The text with its section replaced; a second time changes nothing.

    Raises:
        ValueError: unless each marker occurs once, in order, and the content holds neither.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin in content or end in content:
        raise ValueError(f"the content of section {name!r} holds the section's own markers.")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"expected {begin} and, after it, {end}, once each; found {text.count(begin)} and "
            f"{text.count(end)}. Put them where the section belongs."
        )
    before, after = text[: text.index(begin)], text[text.index(end) :]
    return f"{before}{begin}\n\n{content.strip()}\n\n{after}"


@dataclasses.dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[Run], str]


def _accuracy_column(title, runs, measure, *, with_interval=False, describe=None) -> _Column:
    """A column of accuracies; what all cells share stands in the header, else in each cell."""
    describe = describe or (lambda run, found: f"n = {found.num_examples:,}")
    found_by_run = [(run, found) for run in runs if (found := measure(run))]
    notes = {describe(run, found) for run, found in found_by_run}
    shared = notes.pop() if len(notes) == 1 else ""

    def cell(run):
        found = measure(run)
        if found is None:
            return NOT_MEASURED
        low, high = found.percent_interval
        interval = f" [{low:.1f}, {high:.1f}]" if with_interval else ""
        note = "" if shared else f" ({describe(run, found)})".replace("\n", ", ")
        return f"{found.percent:.1f}{interval}{note}"

    return _Column("\n".join(filter(None, (title, shared))), cell)


def _column_under(title, runs, attacks) -> _Column:
    """A column of accuracies under the worst of some attacks; passes above one are told."""

    def describe(run, found):
        evaluation = evaluation_under(run, attacks)
        passes = f"\neot {evaluation.eot}" if evaluation and evaluation.eot > 1 else ""
        return f"n = {found.num_examples:,}{passes}"

    measure = functools.partial(accuracy_under, attacks=attacks)
    return _accuracy_column(title, runs, measure, describe=describe)


def _labels(runs):
    """What to call each run, by its identity: runs of a sweep may share their name."""
    shared = [run for run in runs if sum(other.name == run.name for other in runs) > 1]
    labels = {}
    for run in runs:
        twins = [other for other in shared if other.name == run.name]
        words = [_setting_words(name, run.settings.get(name)) for name in differing_settings(twins)]
        labels[id(run)] = ", ".join([run.name, *words])
    return labels


def _setting_words(name, value):
    return f"no {name}" if value in ("", None) else f"{name} {value}"


def _strength(evaluation):
    """Place of its strongest attack in `_STRONG`, from 1; 0 if there is none."""
    return max(
        (
            place
            for place, pattern in enumerate(_STRONG, start=1)
            for name in evaluation.ledger.correct
            if re.fullmatch(pattern, name)
        ),
        default=0,
    )


def _rank(evaluation):
    """What makes one strong attack stronger than another: its kind, and that it is in linf."""
    return _strength(evaluation), not {"l2", "l1"} & set(re.split(r"\W+", evaluation.label))


def _attacks_of_protocols(runs):
    """Names of the attacks that stand beside others in an evaluation under protocols."""
    return dict.fromkeys(
        name
        for run in runs
        for evaluation in shown_evaluations(run).values()
        if not (evaluation.is_of_flags or evaluation.is_slice)
        and not (evaluation.shares_active_set and _strength(evaluation))
        and len(evaluation.ledger.correct) > 1
        for name in evaluation.ledger.correct
    )


def _attack_columns(runs):
    """FGSM, the worst of both losses; then PGD, shorter before longer; then all others."""
    names = _attacks_of_protocols(runs)
    columns: list[tuple[str, tuple[str, ...]]] = []
    if names.keys() & set(FGSM_ATTACKS):
        columns.append(("FGSM", FGSM_ATTACKS))
    matches = {name: match for name in names if (match := re.fullmatch(_PGD, name))}
    for name, match in sorted(matches.items(), key=lambda pair: int(pair[1]["steps"])):
        title = f"{match['who'] or ''}PGD-{match['steps']}"
        columns.append((f"{title}\n{match['loss'].replace('cw', 'CW')}", (name,)))
    others = [name for name in names if name not in matches and name not in FGSM_ATTACKS]
    columns += [(name, (name,)) for name in others]
    return [_column_under(title, runs, attacks) for title, attacks in columns]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Evaluations of several runs that share a column, at most one of each run."""

    title: str
    members: dict[int, StoredEvaluation]
    """By the identity of the run."""

    @property
    def is_slice(self):
        return any(e.is_slice for e in self.members.values())

    @property
    def is_strong(self):
        return not self.is_slice and any(map(_strength, self.members.values()))

    @property
    def has_several_attacks(self):
        return not self.is_slice and any(len(e.ledger.correct) > 1 for e in self.members.values())

    def count(self, run):
        evaluation = self.members.get(id(run))
        return None if evaluation is None else Proportion.of(evaluation.ledger.robust)


def _groups(runs) -> list[_Group]:
    """The evaluations of the same protocols together, by title.

    Where a run has several of the same protocols, as with other seeds, each stands by itself
    under the name of its folder. Whoever named the folders gave the title, too.
    """
    found: dict[str, list[tuple[Run, str, StoredEvaluation]]] = {}
    for run in runs:
        for folder, evaluation in shown_evaluations(run).items():
            # FGSM has a column of its own.
            if evaluation.is_slice or not set(evaluation.ledger.correct) <= set(FGSM_ATTACKS):
                name = evaluation.derived_name if folder == "." else folder.rpartition("/")[2]
                # A name of somebody's own need not tell the passes.
                passes = "" if evaluation.eot_suffix in name else evaluation.eot_suffix
                entry = (run, name + passes + evaluation.named_images, evaluation)
                found.setdefault(evaluation.label, []).append(entry)
    groups = []
    for label, entries in found.items():
        names = {name for _, name, _ in entries}
        if len({id(run) for run, *_ in entries}) < len(entries):
            parts = {name: [entry for entry in entries if entry[1] == name] for name in names}
        else:
            is_named = len(names) == 1 and entries[0][1] != entries[0][2].derived_name
            parts = {names.pop() if is_named else label: entries}
        groups += [
            _Group(title, {id(run): evaluation for run, _, evaluation in part})
            for title, part in parts.items()
        ]
    return sorted(groups, key=lambda group: group.title)


def _main_groups(groups):
    return [group for group in groups if group.has_several_attacks and not group.is_strong]


def _strong_groups(groups):
    """The weaker first."""
    strong = [group for group in groups if group.is_strong]
    return sorted(strong, key=lambda group: max(map(_rank, group.members.values())))


def _name_of_strong(evaluation):
    """The attacks and passes, and the threat model where it is not the protocol's own."""
    name, own = evaluation.attack_name, evaluation.attack_name.removesuffix(evaluation.eot_suffix)
    return evaluation.label if evaluation.label.startswith(own) else name


def _evaluation_columns(runs):
    """Worst cases of several attacks, then single attacks, then strong ones, the strongest last."""
    groups = _groups(runs)
    main, strong = _main_groups(groups), _strong_groups(groups)
    titles = [("worst case" if len(main) == 1 else f"worst case\n{g.title}", g) for g in main]
    titles += [(group.title, group) for group in groups if group not in main + strong]
    titles += [(group.title, group) for group in strong[:-1]]
    columns = [
        _accuracy_column(f"{title}\n[95 %]", runs, group.count, with_interval=True)
        for title, group in titles
    ]
    if strong:
        members = strong[-1].members
        columns.append(
            _accuracy_column(
                "strong attack\n[95 %]",
                runs,
                strong[-1].count,
                with_interval=True,
                describe=lambda run, found: (
                    f"{_name_of_strong(members[id(run)])}\nn = {found.num_examples:,}"
                ),
            )
        )
    return columns


def _published_columns(runs):
    found = [published_for(run.settings) for run in runs]
    if not any(found):
        return []

    def cell(run):
        entry = published_for(run.settings)
        if entry is None:
            return NOT_MEASURED
        return ", ".join(f"{name} {value:.2f}" for name, value in entry.accuracy.items())

    return [_Column("published", cell)]


def _caption(runs, left_out):
    datasets = {e.dataset for run in runs for e in run.evaluations.values()}
    groups = _groups(runs)
    mains = _main_groups(groups)
    main = {i: e.ledger for group in mains[:1] for i, e in group.members.items()}
    strong = {
        i: e.ledger for group in _strong_groups(groups)[-1:] for i, e in group.members.items()
    }
    parts = [
        f"Accuracy in per cent{''.join(f' on {name}' for name in datasets)}, counted from the "
        f"per-example ledgers; brackets are 95 % Wilson intervals."
    ]
    attacks = {tuple(ledger.correct) for ledger in main.values()}
    if len(attacks) == 1 and len(mains) == 1:
        parts.append(f"Worst case: right under all of {', '.join(attacks.pop())}.")
    elif attacks:
        parts.append("Worst case: right under all attacks of these protocols.")
    for what, ledgers in (("", main), (" of the strong attack", strong)):
        if len({tuple(ledger.index) for ledger in ledgers.values()}) > 1:
            parts.append(f"The images{what} differ between runs.")
    pairs = [(strong[i], main[i]) for i in strong.keys() & main.keys()]
    if pairs and all(set(a.index) < set(b.index) for a, b in pairs):
        parts.append("The strong attack's images are among those of the other columns.")
    for run in runs:
        known = {e.finished_steps for e in run.evaluations.values()} - {None}
        for steps in sorted(known - {run.evaluated_steps}):
            parts.append(f"Left out: evaluations of {run.name} at step {steps} of its training.")
    published: list[Published] = [e for run in runs if (e := published_for(run.settings))]
    if published:
        sources = "; ".join(dict.fromkeys(entry.source for entry in published))
        parts.append(f"Published, on the whole original test set: {sources}.")
    if left_out:
        names = ", ".join(run.name for run in left_out)
        parts.append(f"Left out: {names} (measured on images of the training).")
    return " ".join(parts)


def _show_steps(run):
    """Steps of the network that the numbers are of, marked if more were planned."""
    steps, planned = run.evaluated_steps, run.planned_steps
    if steps is None or planned is None or steps >= planned:
        return _show(steps, ",d")
    return f"{steps:,} of {planned:,} ({'unfinished' if run.stop is None else 'stopped'})"


def _show(value, form):
    return NOT_MEASURED if value is None else format(value, form)
