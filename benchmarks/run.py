"""Measure ourselves beside the peers.

    python -m benchmarks.run --cases=pgd40 --num_images=1000 --repeats=5

Every contender has a process of its own; they take turns, one repetition each, on a machine that
nobody else keeps busy. Writes results.json and figures.
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.cases import CASES, DEFAULT, MATRIX_PEAK, TRAINED, Case, choose
from benchmarks.contenders import names
from benchmarks.machine import BusyError, provenance, wait_until_idle
from benchmarks.other_contenders import matrix_flops
from benchmarks.processes import ContenderError, Worker, prepare
from benchmarks.summary import (
    Measurement,
    collect,
    disagreements,
    num_different,
    ratio,
    share_of_peak,
)
from benchmarks.table import case_table
from logit_reg.files import atomic_path, write_json
from logit_reg.report.style import to_svg


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for.

    Returns:
        The exit status: 0, 1 if accuracies disagree or a contender failed, 2 for wrong usage.
    """
    options = _parser().parse_args(arguments)
    try:
        cases = [_adapted(case, options) for case in choose(options.cases.split(","))]
        return _measure_all(cases, options)
    except (ValueError, BusyError, ContenderError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def measure(
    case: Case, folder: Path, options: argparse.Namespace
) -> tuple[list[Measurement], dict[str, str], float]:
    """Let all contenders take turns.

    Args:
        case: what they do.
        folder: holds the files of the `Problem`.
        options: of the command line.

    Returns:
        What was measured, ours first; reasons of those that are not here; and the most processors
        that other work kept busy before a repetition.

    Raises:
        BusyError: if the machine does not become idle.
        ContenderError: if one of them fails once it is ready, or we cannot take part.
    """
    missing: dict[str, str] = {}
    ready: dict[str, dict] = {}
    workers: dict[str, Worker] = {}
    busy = 0.0
    with contextlib.ExitStack() as stack:
        for name in case.contenders or names(case.kind):
            request = {
                "case": dataclasses.asdict(case),
                "contender": name,
                "folder": str(folder),
                "threads": options.threads,
                "autoattack_dir": options.autoattack_dir,
            }
            log = folder / f"{name.replace(' ', '-')}.log"
            worker = stack.enter_context(Worker(request, log))
            try:
                answer = worker.answer()
            except ContenderError as error:
                answer = {"missing": str(error)}
            if "missing" in answer:
                missing[name] = answer["missing"]
            else:
                workers[name], ready[name] = worker, answer
        if not workers or "ours" in missing:
            raise ContenderError(f"{case.name}: we cannot take part: {missing}.")
        turns: dict[str, list[dict]] = {name: [] for name in workers}
        for repetition in range(case.repeats):
            for name in _rotated(list(workers), repetition):
                busy = max(busy, wait_until_idle(options.max_busy, options.idle_timeout))
                turns[name].append(workers[name].repeat())
                print(f"  {case.name} {name}: {turns[name][-1]['seconds']:.3g} s", flush=True)
    return [collect(name, ready[name], turns[name]) for name in workers], missing, busy


def case_result(
    case: Case,
    measurements: Sequence[Measurement],
    missing: dict[str, str],
    prepared: dict,
    peak: float,
    busy: float,
) -> dict:
    """A case as it stands in results.json: settings, numbers and what follows from them.

    Args:
        case: what was done.
        measurements: ours first.
        missing: reasons of those that are not here.
        prepared: what `processes.prepare` answered.
        peak: the machine's operations a second.
        busy: processors that other work kept busy.
    """
    ours = measurements[0]
    return {
        "case": _without_folders(dataclasses.asdict(case)),
        "work": case.work,
        "unit": case.unit,
        "busy_processors": busy,
        **prepared,
        "contenders": [
            {
                "name": one.contender,
                "seconds": one.seconds,
                "first_seconds": one.first_seconds,
                "median": one.median,
                "spread": one.spread,
                "rate": case.work / one.median,
                "ratio": ratio(one, ours),
                "share_of_peak": share_of_peak(case, one, prepared["forward_flops"], peak),
                "peak_bytes": one.peak_bytes,
                "accuracy": one.accuracy,
                "num_different": num_different(one, ours),
                "correct": _digits(one.correct),
                "correct_any_iterate": _digits(one.correct_any_iterate),
            }
            for one in measurements
        ],
        "missing": missing,
        "disagreements": disagreements(measurements),
    }


def _measure_all(cases, options):
    output_dir = Path(options.output_dir)
    problems = output_dir.resolve() / "problems"
    products = MATRIX_PEAK.quick() if options.quick else MATRIX_PEAK
    rounds, _, busy = measure(products, problems / products.name, options)
    peak = matrix_flops() / min(one.spread[0] for one in rounds)
    print(f"matrix peak: {peak / 1e9:.0f} GFLOP/s, best of {products.repeats} float32 products")
    record: dict[str, Any] = {
        "schema": 2,
        "provenance": provenance(),
        "settings": _without_folders(vars(options)),
        "matrix_peak": {
            "flops_per_second": peak,
            "busy_processors": busy,
            "seconds": {one.contender: one.seconds for one in rounds},
        },
        "cases": [],
    }
    for case in cases:
        folder = problems / case.name
        note = " (the first time it is trained, for minutes)" if case.network in TRAINED else ""
        print(f"{case.name}: getting network {case.network} ready{note}", flush=True)
        prepared = prepare(_request(case, folder, options), options.threads, folder / "prepare.log")
        measurements, missing, busy = measure(case, folder, options)
        result = case_result(case, measurements, missing, prepared, peak, busy)
        record["cases"].append(result)
        # After each case: a run of hours that is stopped keeps what it has.
        write_json(output_dir / "results.json", record)
        _draw(record["cases"], output_dir)
        print(case_table(result), flush=True)
    print(f"results: {output_dir / 'results.json'}")
    return 1 if any(result["disagreements"] for result in record["cases"]) else 0


def _adapted(case: Case, options) -> Case:
    """A case with what the command line changes."""
    given = {
        name: value
        for name in ("num_images", "batch_size", "repeats")
        if (value := getattr(options, name)) is not None
    }
    if options.model and case.network in TRAINED:
        given["network"] = options.model
    if options.contenders:
        chosen = {"ours", *options.contenders.split(",")}
        everybody = case.contenders or names(case.kind)
        given["contenders"] = tuple(name for name in everybody if name in chosen)
    return dataclasses.replace(case.quick() if options.quick else case, **given)


def _request(case: Case, folder: Path, options) -> dict:
    """What `prepare.prepare` is asked; its process has another working folder."""
    return {
        "case": dataclasses.asdict(case),
        "data_dir": options.data_dir,
        "networks_dir": str(Path(options.networks_dir).resolve()),
        "folder": str(folder),
    }


def _without_folders(settings: dict) -> dict:
    """Files by their names: results are passed on, and folders are this machine's own."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in settings.items()
    }


def _digits(verdicts) -> str | None:
    """Verdicts on images as one digit each, 1 for right."""
    return None if verdicts is None else "".join(str(int(verdict)) for verdict in verdicts)


def _rotated(items: list, by: int) -> list:
    """So that nobody always comes after the same one."""
    by %= len(items)
    return items[by:] + items[:by]


def _draw(results, output_dir):
    _write_figure(figures.times(results), output_dir / "times.svg")
    for quantity in ("images", "width"):
        chosen = [one for one in results if one["case"]["name"].startswith(f"{quantity}-")]
        sizes = [_size(one["case"], quantity) for one in chosen]
        if len(set(sizes)) > 1:
            figure = figures.growth(chosen, quantity, sizes)
            _write_figure(figure, output_dir / f"growth-{quantity}.svg")


def _size(case, quantity):
    return case["num_images"] if quantity == "images" else int(case["name"].rpartition("-")[2])


def _write_figure(figure, path):
    with atomic_path(path) as temporary:
        temporary.write_bytes(to_svg(figure))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure ourselves beside the peers; a case that a peer is not installed for "
        "goes on without it.",
    )
    known = ", ".join(case.name for case in CASES)
    parser.add_argument(
        "--cases",
        default=",".join(DEFAULT),
        help=f"what to measure, from {known}; what several begin with names them all, as does "
        "'all' (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does it all run?")
    parser.add_argument("--contenders", help="peers to measure, as foolbox,pytorch (all)")
    parser.add_argument("--num_images", type=_positive, help="images of every case")
    parser.add_argument("--batch_size", type=_positive, help="images at once in every case")
    parser.add_argument("--repeats", type=_positive, help="repetitions of every case")
    parser.add_argument(
        "--model",
        type=_path,
        help="a .keras or TRADES .npz file in place of the networks that are trained here",
    )
    parser.add_argument("--data_dir", type=_path, help="folder of MNIST; else embedded digits")
    parser.add_argument(
        "--autoattack_dir", type=_path, help="folder that holds the reference's `autoattack`"
    )
    parser.add_argument("--threads", type=_positive, default=2, help="of each process (2)")
    parser.add_argument(
        "--max_busy", type=float, default=0.2, help="processors others may keep busy (0.2)"
    )
    parser.add_argument(
        "--idle_timeout", type=float, default=600.0, help="seconds to wait for an idle machine"
    )
    parser.add_argument("--output_dir", default="runs/benchmarks", help="(%(default)s)")
    parser.add_argument(
        "--networks_dir",
        default="runs/benchmarks/networks",
        help="where trained networks are kept (%(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _path(text: str) -> str:
    path = Path(text).expanduser()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return str(path.resolve())


if __name__ == "__main__":
    sys.exit(main())
