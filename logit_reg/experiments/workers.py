"""Worker processes that share an evaluation: each computes batches that no other is at."""

import dataclasses
import functools
import shutil
from pathlib import Path

from logit_reg.experiments.evaluations import state_folder
from logit_reg.experiments.sweep import Job, Step, last_words, run_local, run_on_ray, run_sweep
from logit_reg.messages import notice
from logit_reg.progress import Progress

_RETRIES = 2


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """How an evaluation is shared among processes.

    Attributes:
        command: arguments of the Python interpreter that start the same evaluation again.
        count: number of processes.
        on_ray: whether they run on a Ray cluster and not here.
        num_cpus: cores that Ray reserves for each.
        num_gpus: GPUs that Ray reserves for each.
    """

    command: tuple[str, ...]
    count: int
    on_ray: bool = False
    num_cpus: float = 1
    num_gpus: float = 0


def run_workers(
    settings: WorkerSettings, output_dir: Path, attack_dtype: str, *, show_progress: bool
) -> None:
    """Compute the batches of an evaluation.

    What a worker leaves undone, because it died too often, is left to the caller.

    Args:
        settings: how many processes, and where.
        output_dir: of the evaluation, seen by all workers; keeps their logs until they are through.
        attack_dtype: what "auto" came to here; another machine's own answer would be other batches.
        show_progress: draw a progress bar.
    """
    folder = (output_dir / ".workers").absolute()
    # A flag given twice counts as given last.
    own = (
        f"--output_dir={output_dir}",
        f"--attack_dtype={attack_dtype}",
        "--num_workers=1",
        "--worker",
        "--noprogress",
    )
    # The record itself is the product: what a worker makes are batches.
    step = Step("evaluate", (*settings.command, *own), "sweep.json")
    names = [f"worker-{i}" for i in range(settings.count)]
    jobs = [Job(name, folder / name, Path.cwd(), (step,)) for name in names]
    if settings.on_ray:
        runner = functools.partial(
            run_on_ray, num_cpus=settings.num_cpus, num_gpus=settings.num_gpus
        )
    else:
        runner = functools.partial(run_local, num_parallel=len(jobs))
    print(f"workers: {len(jobs)}, their logs in {folder}", flush=True)
    with Progress(desc="finished", unit="batch", disable=not show_progress) as bar:

        def show(statuses):
            bar.update(sum(1 for _ in state_folder(output_dir).glob("*.npz")) - bar.n)

        statuses = run_sweep(jobs, runner, retries=_RETRIES, show=show)
    for job in jobs:
        if statuses[job.name]:
            notice(
                f"{job.name} failed and its part is done here: {last_words(job)} "
                f"(all of it: {job.folder / 'sweep.log'})"
            )
    if not any(statuses.values()):
        shutil.rmtree(folder)
