"""What `run.json` says of a run besides its settings: versions, machine, commit."""

import dataclasses
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import logit_reg
from logit_reg.experiments.settings import RunSettings
from logit_reg.training.distribution import Workers


def run_record(settings: RunSettings, data_dir: str | None, executed: dict) -> dict:
    """What `run.json` says.

    Settings, seed, versions, commit, what `execution` gives, and those rules of training that an
    earlier version had otherwise.
    """
    adversary: Any = settings.training_adversary
    return {
        "schema": 1,
        "name": settings.description,
        "settings": dataclasses.asdict(settings),
        "seed": settings.random_seed,
        "data_dir": data_dir,
        "versions": versions(),
        "execution": executed,
        # With what its settings do not say, as the weight of a pair term of another method.
        "adversary": dataclasses.asdict(adversary),
        "rules": dict(adversary.rules),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Versions that a number depends on, and the machine's."""
    return {
        "logit_reg": logit_reg.__version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def execution(strategy: tf.distribute.Strategy, deterministic: bool) -> dict[str, Any]:
    """What, besides settings and versions, the last bits of a run depend on."""
    num_cores = len(os.sched_getaffinity(0))
    return {
        "num_workers": Workers(strategy).count,
        "num_replicas": strategy.num_replicas_in_sync,
        "deterministic": deterministic,
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads()
        or int(os.environ.get("TF_NUM_INTEROP_THREADS", num_cores)),
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads()
        or int(os.environ.get("TF_NUM_INTRAOP_THREADS", num_cores)),
        "processor": _processor(),
        "gpus": len(tf.config.list_logical_devices("GPU")),
    }


def _processor() -> str:
    """The model of the CPU, whose instructions decide how sums are split."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str | None:
    """The commit of the code, with "+changes" if files were edited; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
