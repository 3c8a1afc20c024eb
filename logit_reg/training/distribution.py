"""One training step on several devices or machines: who computes what, and what they exchange.

Every replica (a device of some process) knows the whole batch and computes its own slice of it.
Logits are gathered before the loss, so that each replica evaluates the very objective that one
process would; its gradient flows into its own logits only, and the sum of the gradients over the
replicas is the gradient of that objective. Nothing here knows what is minimised.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

STRATEGIES = ("none", "mirrored", "multi_worker")

_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
)


class WorkerLost(RuntimeError):
    """Another worker is gone: this process cannot go on, but a new one can in its place."""


def make_strategy(name: str) -> tf.distribute.Strategy:
    """The `tf.distribute` strategy of a name.

    "multi_worker" has to come before anything else that starts TensorFlow, and waits for the
    other workers.

    Args:
        name: "none", "mirrored" for all devices of this machine, or "multi_worker" for the
            cluster of $TF_CONFIG.

    Raises:
        ValueError: if the name is unknown or $TF_CONFIG does not describe a cluster.
        WorkerLost: if the cluster does not come together.
    """
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name != "multi_worker":
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}.")
    check_cluster()
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        raise WorkerLost(f"the workers did not come together ({error.message[:200]}).") from error


def check_cluster() -> None:
    """Check that $TF_CONFIG names workers, and which of them this process is.

    Raises:
        ValueError: if it does not.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        config = json.loads(text)
        jobs, task = config["cluster"], config["task"]
        is_right = (
            {"worker"} <= set(jobs) <= {"chief", "worker"}
            and isinstance(task["index"], int)
            and 0 <= task["index"] < len(jobs[task["type"]])
        )
    except (ValueError, KeyError, TypeError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"--strategy=multi_worker needs $TF_CONFIG, such as "
            f'{{"cluster": {{"worker": ["host0:2222", "host1:2222"]}}, '
            f'"task": {{"type": "worker", "index": 0}}}}; got {text!r}.'
        )


class Workers:
    """The processes that train together, seen from one of them. One process is its own chief."""

    def __init__(self, strategy: tf.distribute.Strategy):
        """See the processes of a strategy."""
        self._strategy = strategy
        self._traced_sum = tf.function(self._sum_over_replicas, autograph=False)
        self.number, self.count = 0, 1
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            resolver: Any = strategy.cluster_resolver
            jobs = resolver.cluster_spec().as_dict()
            self.count = sum(map(len, jobs.values()))
            is_below_chief = "chief" in jobs and resolver.task_type == "worker"
            self.number = resolver.task_id + is_below_chief

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files."""
        return self.number == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes; all have to ask."""
        if self.count == 1:
            return flag
        return bool(self._sum([tf.constant(float(flag), tf.float64)])[0] > 0)

    def number_of_chief(self, number: int) -> int:
        """The chief's number, a whole one below 2**53; all have to ask."""
        if self.count == 1:
            return number
        # float64 holds it exactly.
        own = tf.constant(float(number if self.is_chief else 0), tf.float64)
        return int(self._sum([own])[0])

    def copy_from_chief(self, variables: Sequence) -> None:
        """Give variables the chief's values; only the chief needs its files."""
        if self.count == 1:
            return
        # float64 holds every float32 and every count exactly.
        values = [tf.cast(variable.value, tf.float64) for variable in variables]
        if not self.is_chief:
            values = [tf.zeros_like(value) for value in values]
        for variable, value in zip(variables, self._sum(values), strict=True):
            variable.assign(tf.cast(value, variable.dtype))

    def check_same(self, *parts) -> None:
        """Check that all processes train the same thing on the same data.

        Args:
            parts: arrays, and values that have a JSON form.

        Raises:
            ValueError: if this process has something else than the chief.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for part in parts:
            is_array = hasattr(part, "tobytes")
            digest.update(part.tobytes() if is_array else json.dumps(part).encode())
        own = int.from_bytes(digest.digest()[:6], "big")
        if own != self.number_of_chief(own):
            raise ValueError(
                f"worker {self.number} has other settings or data than the chief; start all "
                f"workers with the same command and the same data."
            )

    def _sum(self, values):
        """The sum over the processes of each of some float64 tensors."""
        with lost_workers(self):
            return self._traced_sum(values)

    def _sum_over_replicas(self, values):
        each = self._strategy.num_replicas_in_sync // self.count

        def on_replica(values):
            context = tf.distribute.get_replica_context()
            # Of a process's several replicas the first one speaks.
            is_first = tf.equal(context.replica_id_in_sync_group, self.number * each)
            own = [tf.where(is_first, value, tf.zeros_like(value)) for value in values]
            return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

        summed = self._strategy.run(on_replica, (values,))
        return [self._strategy.experimental_local_results(value)[0] for value in summed]


@contextlib.contextmanager
def lost_workers(workers: Workers) -> Iterator[None]:
    """Turn the errors by which TensorFlow says that another process is gone into `WorkerLost`."""
    try:
        yield
    except _LOST as error:
        if workers.count == 1:
            raise
        raise WorkerLost(f"worker {workers.number} lost another one.") from error


def num_replicas() -> int:
    """How many replicas share a batch; to be asked inside a step."""
    return tf.distribute.get_replica_context().num_replicas_in_sync


def own_slice(batch):
    """The part of this replica of a batch that every replica knows whole."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return batch
    size = tf.shape(batch)[0] // context.num_replicas_in_sync
    begin = context.replica_id_in_sync_group * size
    return batch[begin : begin + size]


def whole_batch(part):
    """The batch of which every replica has an equal part.

    Args:
        part: (b, ...) tensor, of the same b on all replicas.

    Returns:
        (number of replicas * b, ...) tensor, the same on all replicas. Its gradient flows into
        this replica's own part: summed over the replicas, gradients are those of one process.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return part
    parts = tf.stop_gradient(context.all_gather(tf.stop_gradient(part), axis=0))
    size = tf.shape(part)[0]
    is_even = tf.debugging.assert_equal(
        tf.shape(parts)[0],
        size * context.num_replicas_in_sync,
        "every replica needs an equal part of the batch",
    )
    with tf.control_dependencies([is_even]):
        begin = context.replica_id_in_sync_group * size
    return tf.concat([parts[:begin], part, parts[begin + size :]], axis=0)


def average(values: Sequence):
    """The mean over the replicas of each of some tensors."""
    context = tf.distribute.get_replica_context()
    # Read here: a variable itself would be taken for its copies on all devices.
    values = [tf.identity(value) for value in values]
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values) if values else []
