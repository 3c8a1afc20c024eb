"""The runs of a sweep: a grid of trainings, each with evaluations, as commands to start."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from logit_reg.experiments.sweep import Job, Step, expand_grid, point_name
from logit_reg.messages import UsageError, notice
from madry_compat.challenges import EMBEDDED, challenge_for

Point = Mapping[str, str]
"""Values of flags, as a grid writes them."""

# Given beside a grid that has it too, this flag wins.
LENGTH = "max_num_training_steps"
_WIDTH, _DATASET = "width", "dataset"
_TRIAL_STEPS = 20
# What an evaluation has to know of the training's data.
_DATA_FLAGS = (_DATASET, "data_dir", "data_path", "download")


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """What is trained and evaluated.

    Attributes:
        folder: of the runs.
        grids: of trainings, see `expand_grid`; none is one run.
        given: words such as "--beta=2" for every training, by flag.
        dataset: of every training, if it was given.
        num_steps: training steps of every training, if they were given.
        evaluations: each as "NAME: flags".
        evaluation_grid: of every evaluation; "checkpoint" takes one of the run's.
        trial: a few steps of the narrowest network, a few images an evaluation.
    """

    folder: Path
    grids: tuple[str, ...] = ()
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    num_steps: int | None = None
    evaluations: tuple[str, ...] = ()
    evaluation_grid: str = ""
    trial: bool = False

    def dataset_of(self, point: Point) -> str:
        """The data set of a run, or one of its kind where the run itself decides."""
        return point.get(_DATASET) or self.dataset or EMBEDDED


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep, and what is to be checked of their evaluations.

    Attributes:
        jobs: a run each.
        datasets: of all runs.
        evaluations: the flags of each evaluation, without those of its run.
    """

    jobs: tuple[Job, ...]
    datasets: tuple[str, ...]
    evaluations: tuple[tuple[str, ...], ...]


def plan_sweep(
    settings: SweepSettings, check_point: Callable[[Point, Mapping[str, str]], None]
) -> SweepPlan:
    """The runs that settings describe.

    Args:
        settings: grids and evaluations.
        check_point: raises UsageError for a point of a grid, and what every training is given,
            that no training can have.

    Raises:
        UsageError: if settings contradict each other.
    """
    given = dict(settings.given)
    num_steps = settings.num_steps
    if settings.trial:
        num_steps = min(num_steps or _TRIAL_STEPS, _TRIAL_STEPS)
        given[LENGTH] = f"--{LENGTH}={num_steps}"
        given.pop(_WIDTH, None)
    points = [point for text in settings.grids or ("",) for point in expand_grid(text)]
    if LENGTH in given:
        points = [{k: v for k, v in point.items() if k != LENGTH} for point in points]
    names = [point_name(point) for point in points]
    if len(set(names)) < len(names):
        raise UsageError("the grids have a run in common; name each once.")
    for point in points:
        check_point(point, given)
    evaluations = _evaluations(settings, _evaluation_points(settings, num_steps))
    jobs = [
        _job(settings, name, point, given, evaluations)
        for name, point in zip(names, points, strict=True)
    ]
    return SweepPlan(
        tuple(jobs),
        tuple(sorted({settings.dataset_of(point) for point in points})),
        tuple(map(tuple, evaluations.values())),
    )


def _job(
    settings: SweepSettings,
    name: str,
    point: Point,
    given: Mapping[str, str],
    evaluations: Mapping[str, Sequence[str]],
) -> Job:
    # Relative, so that the record of a sweep that moves with its folder still holds.
    model_dir = str(settings.folder / name)
    flags = dict(given) | {flag: f"--{flag}={value}" for flag, value in point.items()}
    if settings.trial and challenge_for(settings.dataset_of(point)).paper.width:
        flags[_WIDTH] = f"--{_WIDTH}=1"
    data = [flags[flag] for flag in _DATA_FLAGS if flag in flags]
    training = (*flags.values(), f"--model_dir={model_dir}", "--noprogress")
    steps = [Step("train", ("-m", "logit_reg.commands.train", *training), "model.keras")]
    for evaluation, words in evaluations.items():
        own = [f"--model_dir={model_dir}", f"--output_dir={model_dir}/{evaluation}", *data]
        own += [word.replace("{model_dir}", model_dir) for word in words]
        command = ("-m", "logit_reg.commands.eval_challenge", *own, "--noprogress")
        steps.append(Step(evaluation, command, f"{evaluation}/result.json"))
    folder = settings.folder.expanduser().absolute() / name
    return Job(name, folder, Path.cwd(), tuple(steps))


def _evaluation_points(settings: SweepSettings, num_steps: int | None) -> list[Point]:
    """The points of the evaluations' grid, without checkpoints that the runs do not reach."""
    points: list[Point] = list(expand_grid(settings.evaluation_grid))
    if num_steps is None:
        return points
    beyond = [point for point in points if _checkpoint(point) > num_steps]
    if beyond:
        names = ", ".join(point_name(dict(point)) for point in beyond)
        notice(f"not evaluated, beyond {num_steps} steps: {names}")
    kept = [point for point in points if point not in beyond]
    # A trial tries every kind of evaluation.
    last = {"checkpoint": str(num_steps)}
    return kept or ([{**point, **last} for point in beyond[:1]] if settings.trial else [])


def _checkpoint(point: Point) -> int:
    value = point.get("checkpoint", "")
    return int(value) if value.isdecimal() else 0


def _evaluations(settings: SweepSettings, points: Sequence[Point]) -> dict[str, list[str]]:
    """The flags of each evaluation of a run, by its name."""
    found = {}
    cut = ["--trial"] if settings.trial else []
    for text in settings.evaluations:
        match = re.fullmatch(r"\s*(\w+):\s*(--.*)", text)
        if not match:
            raise UsageError(
                f'--evaluate looks like "strong: --protocol=autoattack"; got {text!r}.'
            )
        for point in points:
            name = f"{match[1]}@{point_name(dict(point))}" if point else match[1]
            if name in found:
                raise UsageError(f"--evaluate: there are two evaluations {name}; rename one.")
            flags = [_evaluation_flag(*pair) for pair in point.items()]
            found[name] = [*shlex.split(match[2]), *flags, *cut]
    return found


def _evaluation_flag(name: str, value: str) -> str:
    # A checkpoint of the run itself, kept with --keep_checkpoint_steps.
    if name == "checkpoint":
        return f"--model_dir={{model_dir}}/checkpoint-{value}"
    return f"--{name}={value}"
