"""Train and evaluate a grid of runs, each in a process of its own.

Takes all flags of train.py, for every run, and a --grid of flags that differ, as
--grid="beta=0.5,1,2;sigma=0,0.3"; several grids add up. Each --evaluate names an evaluation and
gives the flags of eval_challenge.py, as --evaluate="strong: --protocol=autoattack"; report.py
takes its columns from the protocols, whatever the names. A file of flags, one a line, is given
with --flagfile.

Stop it with Ctrl-C or kill it; the same command goes on: what is done is not done again.

--trial tries any sweep out: 20 steps of the narrowest network and 10 images an evaluation, in a
folder of its own. --max_num_training_steps=200 cuts the training short and nothing else: it wins
over the grids', and checkpoints beyond it are not evaluated.
"""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, train
from logit_reg.commands.command_line import FLAGS, UsageError
from logit_reg.experiments import flag_effects

flags.DEFINE_string("sweep_dir", None, "folder of the runs")
flags.DEFINE_multi_string("grid", [], "flags of train.py and their values, as beta=0.5,1;sigma=0,1")
flags.DEFINE_multi_string("evaluate", [], "NAME: flags of eval_challenge.py")
flags.DEFINE_string(
    "evaluation_grid",
    "",
    "every --evaluate at each value of a flag of eval_challenge.py, as num_steps=1,10,100, or of "
    "checkpoint, as checkpoint=1000,2000",
)
flags.DEFINE_bool(
    "trial",
    False,
    "to try the command out: 20 steps, the narrowest network, 10 images; --sweep_dir gets -trial",
)
flags.DEFINE_enum("runner", "local", ["local", "ray"], "this machine, or a Ray cluster")
flags.DEFINE_integer("num_parallel", 1, "--runner=local: runs at a time", lower_bound=1)
flags.DEFINE_float("num_cpus", 1, "--runner=ray: cores that a run reserves", lower_bound=0)
flags.DEFINE_float("num_gpus", 0, "--runner=ray: GPUs that a run reserves", lower_bound=0)
flags.DEFINE_integer("retries", 2, "how often a run that failed is tried again", lower_bound=0)

# Given beside a grid that has it too, this flag wins.
_LENGTH = "max_num_training_steps"
_WIDTH = "width"
_TRIAL_STEPS = 20
# What an evaluation has to know of the training's data.
_DATA_FLAGS = ("dataset", "data_dir", "data_path", "download")

# Flags of another command cannot be checked in this process, and not after hours of training.
_CHECK = """
import json, sys
from logit_reg.commands import command_line, eval_challenge
def main(words):
    from logit_reg.evaluation.protocols import protocol_attacks
    from madry_compat.challenges import challenge_for
    datasets, *lines = json.loads(words[0])
    for line in lines:
        for name in command_line.FLAGS:
            command_line.FLAGS[name].unparse()
        rest = command_line.FLAGS(["", *line])[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; flags look like --name=value.")
        command_line.check_values()
        eval_challenge.check_flags()
        for name in command_line.FLAGS.protocol or ():
            for dataset in datasets:
                protocol_attacks(name, challenge_for(dataset))
command_line.run(main, "", takes_arguments=True)
"""


def check_flags() -> None:
    """Refuse flags that have no effect on how the runs are run; `sweep_jobs` judges the rest."""
    flag_effects.refuse_without_effect(flag_effects.SWEEP)


def main() -> None:
    """Run the sweep that the flags describe."""
    from logit_reg.experiments.sweep import (
        last_words,
        run_local,
        run_on_ray,
        run_sweep,
        sweep_lines,
    )

    jobs = sweep_jobs()
    if FLAGS.runner == "ray":
        runner = functools.partial(run_on_ray, num_cpus=FLAGS.num_cpus, num_gpus=FLAGS.num_gpus)
    else:
        runner = functools.partial(run_local, num_parallel=FLAGS.num_parallel)
    _print_estimate(jobs)
    table = _LiveTable(jobs)
    statuses = run_sweep(jobs, runner, retries=FLAGS.retries, show=table.show)
    if not table.is_live:
        print("\n".join(sweep_lines(jobs, statuses, len(jobs) + 2)))
    failed = [job for job in jobs if statuses[job.name]]
    for job in failed:
        command_line.notice(
            f"{job.name}: {last_words(job)} (all of it: {job.folder / 'sweep.log'})"
        )
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed; the same command goes on.")
    command_line.print_next("report", {"runs": _sweep_dir()})


def sweep_jobs() -> list:
    """The runs that the flags describe.

    Returns:
        A `logit_reg.experiments.sweep.Job` for each point of the grids.

    Raises:
        UsageError: if flags contradict each other, or are none of train.py or eval_challenge.py.
    """
    from logit_reg.experiments.sweep import Job, Step, expand_grid, point_name

    if not FLAGS.sweep_dir:
        raise UsageError("--sweep_dir is missing; name a folder for the runs.")
    if FLAGS.model_dir:
        raise UsageError("--model_dir names one run; --sweep_dir is the folder of a sweep's.")
    given = _given_flags()
    points = [point for text in FLAGS.grid or [""] for point in expand_grid(text)]
    num_steps = FLAGS[_LENGTH].value
    if FLAGS.trial:
        num_steps = min(num_steps or _TRIAL_STEPS, _TRIAL_STEPS)
        given[_LENGTH] = f"--{_LENGTH}={num_steps}"
        given.pop(_WIDTH, None)
    if _LENGTH in given:
        points = [{k: v for k, v in point.items() if k != _LENGTH} for point in points]
    names = [point_name(point) for point in points]
    if len(set(names)) < len(names):
        raise UsageError("the grids have a run in common; name each once.")
    for point in points:
        _check_point(point, given)
    evaluations = _evaluations(_evaluation_points(num_steps), point_name)
    _check_evaluations(points, given, [words for _, words in evaluations])
    jobs = []
    here = Path.cwd()
    for name, point in zip(names, points, strict=True):
        folder = _sweep_dir().expanduser().absolute() / name
        # Relative, so that the record of a sweep that moves with its folder still holds.
        model_dir = str(_sweep_dir() / name)
        all_flags = given | {flag: f"--{flag}={value}" for flag, value in point.items()}
        if FLAGS.trial and (point.get("dataset") or FLAGS.dataset or "").startswith("cifar"):
            all_flags[_WIDTH] = f"--{_WIDTH}=1"
        data = [all_flags[flag] for flag in _DATA_FLAGS if flag in all_flags]
        training = [*all_flags.values(), f"--model_dir={model_dir}", "--noprogress"]
        steps = [Step("train", ("-m", "logit_reg.commands.train", *training), "model.keras")]
        for evaluation, words in evaluations:
            own = [f"--model_dir={model_dir}", f"--output_dir={model_dir}/{evaluation}", *data]
            own += [word.replace("{model_dir}", model_dir) for word in words]
            command = ("-m", "logit_reg.commands.eval_challenge", *own, "--noprogress")
            steps.append(Step(evaluation, command, f"{evaluation}/result.json"))
        jobs.append(Job(name, folder, here, tuple(steps)))
    return jobs


def _sweep_dir() -> Path:
    return Path(f"{FLAGS.sweep_dir.rstrip('/')}-trial" if FLAGS.trial else FLAGS.sweep_dir)


def _print_estimate(jobs) -> None:
    """How long what is left takes; another process measures, which has TensorFlow."""
    from logit_reg.durations import in_words
    from logit_reg.experiments.sweep import pending_steps

    asked: dict[str, list] = {"trainings": [], "evaluations": []}
    pending = {job.name: pending_steps(job) for job in jobs}
    for job in jobs:
        settings = _training_of(job)
        for step in pending[job.name]:
            if step is job.steps[0]:
                asked["trainings"].append(settings)
            else:
                asked["evaluations"].append((settings, step.arguments[2:]))
    num_runs = sum(map(bool, pending.values()))
    if not num_runs:
        return
    command = [sys.executable, "-m", "logit_reg.experiments.sweep_estimate"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if done.returncode:
        raise UsageError(_last_line(done.stderr))
    training, evaluations = json.loads(done.stdout.splitlines()[-1])
    print(
        f"estimate: about {in_words(training + evaluations)} for {num_runs} runs, one after the "
        f"other: training {in_words(training)}, evaluations at most {in_words(evaluations)}",
        flush=True,
    )


def _training_of(job) -> dict:
    """The values of the flags that a job's training is called with."""
    values = {}
    for word in job.steps[0].arguments[2:]:
        name, is_given, value = word.removeprefix("--").partition("=")
        if not is_given:
            value = str(name in FLAGS)
            name = name if name in FLAGS else name.removeprefix("no")
        values[name] = FLAGS[name].parser.parse(value)
    values["step_size_schedule"] = train.schedule(values.get("step_size_schedule"))
    values["keep_checkpoint_steps"] = train.steps(values.get("keep_checkpoint_steps"))
    return values


def _last_line(text):
    return (text.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")


def _given_flags() -> dict[str, str]:
    """The flags of train.py on the command line, as they are passed on."""
    own = FLAGS.flags_by_module_dict()[train.__name__]
    return {flag.name: flag.serialize() for flag in own if flag.present and flag.name != "progress"}


def _check_point(point, given):
    own = {flag.name for flag in FLAGS.flags_by_module_dict()[train.__name__]} - {"model_dir"}
    for name in point:
        if name not in own:
            raise UsageError(f"--grid: {name} is no flag of train.py.")
        if name in given:
            raise UsageError(f"--{name} is given for all runs and in --grid; leave one out.")
    values = {name: FLAGS[name].value for name in own}
    try:
        values |= {name: FLAGS[name].parser.parse(value) for name, value in point.items()}
    except ValueError as error:
        raise UsageError(f"--grid: {_named(point)}: {error}.") from error
    try:
        flag_effects.check_effects(flag_effects.TRAINING, values, {*given, *point})
    except UsageError as error:
        raise UsageError(f"--grid: {_named(point)}: {error}") from error


def _named(point):
    return ";".join(f"{name}={value}" for name, value in point.items())


def _evaluation_points(num_training_steps):
    """The points of --evaluation_grid, without checkpoints that the runs do not reach."""
    from logit_reg.experiments.sweep import expand_grid, point_name

    points = expand_grid(FLAGS.evaluation_grid)
    if num_training_steps is None:
        return points
    beyond = [point for point in points if _checkpoint(point) > num_training_steps]
    if beyond:
        names = ", ".join(map(point_name, beyond))
        command_line.notice(f"not evaluated, beyond {num_training_steps} steps: {names}")
    kept = [point for point in points if point not in beyond]
    # A trial tries every kind of evaluation.
    last = {"checkpoint": str(num_training_steps)}
    return kept or ([point | last for point in beyond[:1]] if FLAGS.trial else [])


def _checkpoint(point):
    value = point.get("checkpoint", "")
    return int(value) if value.isdecimal() else 0


def _evaluations(points, point_name):
    """Name and flags of each evaluation of a run."""
    found = {}
    cut = ["--trial"] if FLAGS.trial else []
    for text in FLAGS.evaluate:
        match = re.fullmatch(r"\s*(\w+):\s*(--.*)", text)
        if not match:
            raise UsageError(
                f'--evaluate looks like "strong: --protocol=autoattack"; got {text!r}.'
            )
        for point in points:
            name = f"{match[1]}@{point_name(point)}" if point else match[1]
            if name in found:
                raise UsageError(f"--evaluate: there are two evaluations {name}; rename one.")
            found[name] = [
                *shlex.split(match[2]),
                *(_evaluation_flag(*pair) for pair in point.items()),
                *cut,
            ]
    return list(found.items())


def _evaluation_flag(name, value):
    # A checkpoint of the run itself, kept with --keep_checkpoint_steps.
    if name == "checkpoint":
        return f"--model_dir={{model_dir}}/checkpoint-{value}"
    return f"--{name}={value}"


def _check_evaluations(points, given, lines):
    if not lines:
        return
    from madry_compat.challenges import EMBEDDED

    datasets = {point.get("dataset", FLAGS.dataset or EMBEDDED) for point in points}
    words = json.dumps([sorted(datasets), *lines])
    found = subprocess.run([sys.executable, "-c", _CHECK, words], capture_output=True, text=True)
    if found.returncode:
        raise UsageError(f"--evaluate: {_last_line(found.stderr)}")


class _LiveTable:
    """The state of the sweep: redrawn on a terminal, else a line for each run that ends."""

    def __init__(self, jobs):
        self.is_live = FLAGS.progress and sys.stdout.isatty()
        self._jobs = jobs
        self._height = 0
        self._known = {}

    def show(self, statuses):
        from logit_reg.experiments.sweep import sweep_lines

        if not self.is_live:
            for name, status in statuses.items():
                if self._known.get(name) != status:
                    print(f"{name}: {f'failed ({status})' if status else 'done'}", flush=True)
            self._known = dict(statuses)
            return
        size = shutil.get_terminal_size()
        lines = sweep_lines(self._jobs, statuses, max(size.lines - 1, 4))
        # Back to the first line, each line cleared to its end, then everything below.
        up = f"\x1b[{self._height}A" if self._height else ""
        drawn = "".join(f"{line[: size.columns - 1]}\x1b[K\n" for line in lines)
        print(f"{up}{drawn}\x1b[J", end="", flush=True)
        self._height = len(lines)


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags, needs_tensorflow=False)


if __name__ == "__main__":
    run()
