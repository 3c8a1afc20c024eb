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
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from logit_reg.commands import command_line, flag_effects, train
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError, notice

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


def check_flags() -> None:
    """Refuse flags that have no effect on how the runs are run; `planned_sweep` judges the rest."""
    flag_effects.refuse_without_effect(flag_effects.SWEEP)


def main() -> None:
    """Run the sweep that the flags describe."""
    from logit_reg.experiments.sweep import (
        LiveTable,
        last_words,
        run_local,
        run_on_ray,
        run_sweep,
        sweep_lines,
    )

    plan = planned_sweep()
    jobs = plan.jobs
    if FLAGS.runner == "ray":
        runner = functools.partial(run_on_ray, num_cpus=FLAGS.num_cpus, num_gpus=FLAGS.num_gpus)
    else:
        runner = functools.partial(run_local, num_parallel=FLAGS.num_parallel)
    _check_and_estimate(plan)
    table = LiveTable(jobs, may_redraw=FLAGS.progress)
    statuses = run_sweep(jobs, runner, retries=FLAGS.retries, show=table.show)
    if not table.is_live:
        print("\n".join(sweep_lines(jobs, statuses, len(jobs) + 2)))
    failed = [job for job in jobs if statuses[job.name]]
    for job in failed:
        notice(f"{job.name}: {last_words(job)} (all of it: {job.folder / 'sweep.log'})")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed; the same command goes on.")
    command_line.print_next("report", {"runs": _sweep_dir()})


def planned_sweep():
    """The `logit_reg.experiments.sweep_plan.SweepPlan` that the flags describe.

    Raises:
        UsageError: if flags contradict each other, or are none of train.py.
    """
    from logit_reg.experiments.sweep_plan import LENGTH, SweepSettings, plan_sweep

    if not FLAGS.sweep_dir:
        raise UsageError("--sweep_dir is missing; name a folder for the runs.")
    if FLAGS.model_dir:
        raise UsageError("--model_dir names one run; --sweep_dir is the folder of a sweep's.")
    settings = SweepSettings(
        _sweep_dir(),
        tuple(FLAGS.grid),
        _given_flags(),
        FLAGS.dataset,
        FLAGS[LENGTH].value,
        tuple(FLAGS.evaluate),
        FLAGS.evaluation_grid,
        FLAGS.trial,
    )
    return plan_sweep(settings, _check_point)


def _sweep_dir() -> Path:
    return Path(f"{FLAGS.sweep_dir.rstrip('/')}-trial" if FLAGS.trial else FLAGS.sweep_dir)


def _check_and_estimate(plan) -> None:
    """Refuse flags of evaluations that are none, and say how long what is left takes.

    Another process does it, which has TensorFlow and the flags of eval_challenge.py: they cannot
    be checked in this one, and not after hours of training.
    """
    from logit_reg.durations import in_words
    from logit_reg.experiments.sweep import pending_steps

    pending = {job.name: pending_steps(job) for job in plan.jobs}
    num_runs = sum(map(bool, pending.values()))
    if not num_runs:
        return
    asked: dict[str, Any] = {
        "datasets": plan.datasets,
        "lines": plan.evaluations,
        "trainings": [],
        "evaluations": [],
    }
    for job in plan.jobs:
        training = _training_of(job)
        for step in pending[job.name]:
            if step is job.steps[0]:
                asked["trainings"].append((job.name, training))
            else:
                asked["evaluations"].append((training, step.arguments[2:]))
    command = [sys.executable, "-m", "logit_reg.commands.sweep_checks"]
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
    for name in ("step_size_schedule", "beta_schedule"):
        values[name] = train.schedule(values.get(name), name)
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


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags, needs_tensorflow=False)


if __name__ == "__main__":
    run()
