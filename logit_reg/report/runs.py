"""A training run and its evaluations, read back from the folder that they were written to."""

import csv
import dataclasses
import io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from logit_reg.array_files import check_axes
from logit_reg.evaluation.ledger import (
    FLAGS_PROTOCOL,
    Ledger,
    evaluation_identity,
    evaluation_label,
    evaluation_name,
    mapping,
    read_ledger,
)
from logit_reg.files import (
    atomic_path,
    one_line,
    read_arrays,
    read_bytes,
    read_json,
    write_json,
)
from logit_reg.training.folder import Stop
from logit_reg.training.overfitting import ROBUSTNESS_COLUMNS
from logit_reg.training.records import LOG_COLUMNS, TIMING_COLUMNS
from logit_reg.training.state import saved_steps

_MAX_LOG_BYTES = 16 * 2**20
# Ten images; an ImageNet one has 600 KB.
_MAX_EXAMPLE_BYTES = 64 * 2**20
_EVALUATION_FILES = ("ledger.csv", "result.json", "examples.npz")
_EXAMPLE_AXES = {
    "images": "NHWC",
    "adversarial": "NHWC",
    "labels": "N",
    "predictions": "N",
    "bounds": "2",
}


@dataclasses.dataclass(frozen=True)
class Examples:
    """N images of an evaluation beside the worst that the attacks made of them."""

    images: np.ndarray
    """(N, H, W, C) float, pixel units."""
    adversarial: np.ndarray
    """(N, H, W, C) float, pixel units."""
    labels: np.ndarray
    """(N,) int: true classes."""
    predictions: np.ndarray
    """(N,) int: classes predicted for `adversarial`."""
    bounds: np.ndarray
    """(2,) float: least and greatest pixel value."""


@dataclasses.dataclass(frozen=True)
class StoredEvaluation:
    """One evaluation folder of a run."""

    ledger: Ledger
    """The verdict on each example."""
    result: dict
    """Content of `result.json`: provenance only, no number of a table comes from it."""
    examples: Examples | None = None
    """From `examples.npz`, if there is one."""

    @property
    def dataset(self) -> str:
        """Name of the data set it was made on."""
        return str(self.result.get("dataset", "an unnamed data set"))

    @property
    def settings(self) -> Mapping:
        """The settings in `result.json`; empty if it has none."""
        return mapping(self.result.get("settings"))

    @property
    def shares_active_set(self) -> bool:
        """Whether each attack saw only what the ones before had left."""
        return bool(self.settings.get("worst_case_only"))

    @property
    def is_of_flags(self) -> bool:
        """Whether the attack was described by flags, not by a protocol."""
        return FLAGS_PROTOCOL in mapping(self.result.get("protocols"))

    @property
    def is_slice(self) -> bool:
        """Whether it is of a part that does not start at the first image of its data set."""
        return bool(self.result.get("first_example"))

    @property
    def eot(self) -> int:
        """Passes over which gradients and verdicts were averaged; 1 for a plain evaluation."""
        eot = self.settings.get("eot", 1)
        return eot if isinstance(eot, int) else 1

    @property
    def eot_suffix(self) -> str:
        """The number of passes in a name, as "-eot20"; empty for a plain evaluation."""
        return "" if self.eot == 1 else f"-eot{self.eot}"

    @property
    def parts(self) -> set[str]:
        """Hashes of the ledgers that it was joined from; none of one that was made in one run."""
        slices = self.result.get("slices")
        entries = slices if isinstance(slices, list) else []
        return {str(mapping(entry).get("ledger_sha256")) for entry in entries}

    @property
    def attack_name(self) -> str:
        """The attacks, joined by " + ", with the number of passes."""
        return " + ".join(self.ledger.correct) + self.eot_suffix

    @property
    def label(self) -> str:
        """Protocols, on own data with the threat model, passes, and the images of a slice.

        See `evaluation_label`.
        """
        return evaluation_label(self.result) + self.eot_suffix + self.named_images

    @property
    def named_images(self) -> str:
        """The places of the images of a slice, a line of their own; empty for anything else."""
        first, last = self.ledger.index[[0, -1]]
        return f"\nimages {first} to {last}" if self.is_slice else ""

    @property
    def derived_name(self) -> str:
        """What its folder is called unless somebody gave it a name; see `evaluation_name`."""
        return evaluation_name(self.result)

    @property
    def finished_steps(self) -> int | None:
        """Training steps of the network when it was evaluated; None if that was not recorded."""
        steps = mapping(self.settings.get("training")).get("steps_done")
        return steps if isinstance(steps, int) else None


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run and its evaluations left in a folder."""

    name: str
    """Short and for people."""
    settings: dict
    """Flags of the training."""
    seed: int | None
    """Of the training."""
    versions: dict
    """Versions of the packages used."""
    commit: str
    """Of this project."""
    log: dict[str, np.ndarray]
    """(R,) float for each of `LOG_COLUMNS`; empty if there is no log."""
    minutes: float | None
    """Wall-clock minutes of training so far; None if there is no `timing.csv`."""
    evaluations: dict[str, StoredEvaluation]
    """Finished evaluations by their folder inside the run's, as "evaluations/autoattack-n200"."""
    saved_step: int | None = None
    """Training steps of the newest checkpoint; None if there is none, as in an export."""
    robustness: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """(R,) float for each of `ROBUSTNESS_COLUMNS`; empty if it was not watched."""
    stop: Stop | None = None
    """Where training was stopped because robustness had fallen to nothing."""

    @property
    def has_averaged_weights(self) -> bool:
        """Whether its networks have averages of the weights over training (`--ema`)."""
        return bool(self.settings.get("ema"))

    @property
    def steps(self) -> int | None:
        """Training steps of the newest checkpoint, else those in the log; None without either."""
        if self.stop is not None:
            return self.stop.result_step
        if self.saved_step is not None:
            return self.saved_step
        return int(self.log["step"][-1]) if self.log else None

    @property
    def evaluated_steps(self) -> int | None:
        """Training steps of the network whose evaluations count, else `steps`.

        Evaluations that were made earlier in training are of another network.
        """
        if self.stop is not None:
            return self.stop.result_step
        known = [e.finished_steps for e in self.evaluations.values()]
        return max((steps for steps in known if steps is not None), default=self.steps)

    @property
    def planned_steps(self) -> int | None:
        """Training steps that were asked for; None where that is not known."""
        steps = self.settings.get("max_num_training_steps")
        return steps if isinstance(steps, int) else None

    @property
    def is_contaminated(self) -> bool:
        """Whether an evaluation of it says that it used images of the training."""
        return any(e.settings.get("contaminated") for e in self.evaluations.values())


def load_run(folder: Path | str) -> Run:
    """Read a run and its evaluations back.

    Args:
        folder: holds `run.json` and, as far as they exist, the tables of training and one
            folder for each evaluation with `result.json`, `ledger.csv` and `examples.npz`, in
            the folder itself or in `evaluations`. Without `run.json` it is that of a network
            that was not trained here, and holds evaluations only.

    Returns:
        The run; an evaluation without `result.json`, which is written last, is not finished
        and left out.

    Raises:
        ValueError: if there is neither `run.json` nor an evaluation, or a file is not what this
            project writes.
    """
    folder = Path(folder)
    evaluations = evaluation_folders(folder)
    if not (folder / "run.json").is_file():
        if not evaluations:
            raise ValueError(f"{folder}: holds no run.json; give the model_dir of a training run.")
        record: dict = {}
    else:
        record = read_json(folder / "run.json")
    for name, kind in (("settings", dict), ("versions", dict), ("name", str)):
        if not isinstance(record.get(name, kind()), kind):
            raise ValueError(
                f"{folder / 'run.json'}: {name} is {record[name]!r}, expected a {kind.__name__}."
            )
    timing = _read_columns(folder / "timing.csv", TIMING_COLUMNS)
    seed = record.get("seed")
    loaded = {path.relative_to(folder).as_posix(): _load_evaluation(path) for path in evaluations}
    networks = {str(evaluation_identity(e.result).get("network")) for e in loaded.values()}
    if not record and len(networks) > 1:
        raise ValueError(
            f"{folder}: holds evaluations of {len(networks)} networks and no run.json; compare "
            f"two of them instead."
        )
    return Run(
        name=record.get("name") or folder.resolve().name,
        settings=record.get("settings", {}),
        seed=seed if isinstance(seed, int) else None,
        versions=record.get("versions", {}),
        commit=str(record.get("commit") or "unknown"),
        log=_read_columns(folder / "log.csv", LOG_COLUMNS),
        minutes=float(timing["seconds"][-1]) / 60 if timing else None,
        evaluations=loaded,
        saved_step=max(saved_steps(folder), default=None),
        robustness=_read_columns(folder / "robustness.csv", ROBUSTNESS_COLUMNS),
        stop=Stop.of_record(record),
    )


def evaluation_folders(folder: Path | str) -> list[Path]:
    """The folders of the finished evaluations of a run: its own subfolders, and `evaluations/*`.

    Without a run, the folder may be that of an evaluation itself.
    """
    folder = Path(folder)
    is_run = (folder / "run.json").is_file()
    found = [
        *folder.glob("*/result.json"),
        *folder.glob("evaluations/*/result.json" if is_run else "result.json"),
    ]
    return sorted(path.parent for path in found)


def run_folders(folder: Path | str) -> list[Path]:
    """All folders at or below one that hold a run, or evaluations of a network from elsewhere.

    Args:
        folder: such as `runs`.

    Returns:
        Those of `order.txt`, if there is one; else by number, then by name.
    """
    folder = Path(folder)
    # Earlier versions put the evaluations of all networks from elsewhere into one folder.
    is_network = folder.name != "evaluations" and evaluation_folders(folder)
    if (folder / "run.json").is_file() or is_network:
        return [folder]
    order = folder / "order.txt"
    if order.exists():
        return [folder / name for name in order.read_text().split()]
    folders = sorted((path for path in folder.iterdir() if path.is_dir()), key=_by_number)
    return [run for path in folders if path.name[0] != "." for run in run_folders(path)]


def _by_number(path):
    words = re.split(r"(\d+(?:\.\d+)?)", path.name)
    return [(0.0, word) if i % 2 == 0 else (float(word), "") for i, word in enumerate(words)]


def export_run(folder: Path | str, destination: Path | str) -> None:
    """Copy what tables and figures derive from: settings, logs, ledgers, example images.

    Weights, states and the place that the data came from stay behind.

    Args:
        folder: a run.
        destination: folder to make; what is there is replaced file by file.

    Raises:
        ValueError: if the run cannot be read.
    """
    folder, destination = Path(folder), Path(destination)
    run = load_run(folder)
    if (folder / "run.json").exists():
        record = read_json(folder / "run.json")
        record.pop("data_dir", None)
        write_json(destination / "run.json", record)
    names = ["log.csv", "timing.csv", "robustness.csv"]
    for evaluation in run.evaluations:
        names += [f"{evaluation}/{name}" for name in _EVALUATION_FILES]
    for name in names:
        if (folder / name).exists():
            with atomic_path(destination / name) as temporary:
                shutil.copyfile(folder / name, temporary)


def _load_evaluation(directory):
    ledger, result = read_ledger(directory)
    if (ledger.robust != ledger.right_under(ledger.correct)).any():
        raise ValueError(
            f"{directory / 'ledger.csv'}: robust is not what clean and the correct_ columns give; "
            f"evaluate again."
        )
    path = directory / "examples.npz"
    return StoredEvaluation(ledger, result, _read_examples(path) if path.exists() else None)


def _read_columns(path, columns):
    if not path.exists():
        return {}
    try:
        text = read_bytes(path, _MAX_LOG_BYTES).decode()
        # A row without its line end is one that a killed process did not finish.
        whole = io.StringIO(text[: text.rfind("\n") + 1])
        rows = [
            [float(row[name]) for name in columns] for row in csv.DictReader(whole, strict=True)
        ]
        if not np.isfinite(rows).all():
            raise ValueError("a value is not finite")
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a log with columns {', '.join(columns)} ({one_line(error)})."
        ) from error
    return dict(zip(columns, np.array(rows).T, strict=True)) if rows else {}


def _read_examples(path):
    try:
        arrays = read_arrays(path, names=list(_EXAMPLE_AXES), max_bytes=_MAX_EXAMPLE_BYTES)
        check_axes(path, arrays, _EXAMPLE_AXES, {"2": 2})
        for name, array in arrays.items():
            if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
                raise ValueError(f"{path}: {name} are not finite numbers.")
        if arrays["images"].shape[-1] not in (1, 3) or not np.diff(arrays["bounds"])[0] > 0:
            raise ValueError(
                f"{path}: images with {arrays['images'].shape[-1]} channels, bounds "
                f"{arrays['bounds']}; expected 1 or 3 channels and bounds (lower, upper)."
            )
    except ValueError as error:
        raise ValueError(
            f"{error} These are not the examples of an evaluation; evaluate again."
        ) from error
    return Examples(**arrays)
