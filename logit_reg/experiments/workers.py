"""Worker processes that share an evaluation: each computes batches that no other is at."""

import functools
import shutil
import sys
from pathlib import Path

from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS
from logit_reg.experiments.evaluations import state_folder
from logit_reg.experiments.sweep import Job, Step, last_words, run_local, run_on_ray, run_sweep
from logit_reg.progress import Progress

_RETRIES = 2


def run_workers(output_dir: Path, attack_dtype: str) -> None:
    """Compute the batches of this command's evaluation in --num_workers processes.

    What a worker leaves undone, because it died too often, is left to the caller.

    Args:
        output_dir: of the evaluation, seen by all workers; keeps their logs until they are through.
        attack_dtype: what "auto" came to here; another machine's own answer would be other batches.
    """
    folder = (output_dir / ".workers").absolute()
    jobs = [
        _job(folder / f"worker-{i}", output_dir, attack_dtype) for i in range(FLAGS.num_workers)
    ]
    if FLAGS.runner == "ray":
        runner = functools.partial(run_on_ray, num_cpus=FLAGS.num_cpus, num_gpus=FLAGS.num_gpus)
    else:
        runner = functools.partial(run_local, num_parallel=len(jobs))
    print(f"workers: {len(jobs)}, their logs in {folder}", flush=True)
    with Progress(desc="finished", unit="batch", disable=not FLAGS.progress) as bar:

        def show(statuses):
            bar.update(sum(1 for _ in state_folder(output_dir).glob("*.npz")) - bar.n)

        statuses = run_sweep(jobs, runner, retries=_RETRIES, show=show)
    for job in jobs:
        if statuses[job.name]:
            command_line.notice(
                f"{job.name} failed and its part is done here: {last_words(job)} "
                f"(all of it: {job.folder / 'sweep.log'})"
            )
    if not any(statuses.values()):
        shutil.rmtree(folder)


def _job(folder: Path, output_dir: Path, attack_dtype: str) -> Job:
    # A flag given twice counts as given last.
    own = (
        f"--output_dir={output_dir}",
        f"--attack_dtype={attack_dtype}",
        "--num_workers=1",
        "--worker",
        "--noprogress",
    )
    command = ("-m", "logit_reg.commands.eval_challenge", *sys.argv[1:], *own)
    # The record itself is the product: what a worker makes are batches.
    return Job(folder.name, folder, Path.cwd(), (Step("evaluate", command, "sweep.json"),))
