"""One worker of test_distribution.py, in a process of its own: trains a tiny network.

    python distributed_worker.py FOLDER STEPS KIND...

with $TF_CONFIG. A first argument `supervised` puts a supervisor above it.
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

from logit_reg.training import supervisor

KINDS = (
    "squeeze",
    "pairing",
    "batch floor",
    "pgd",
    "free",
    "nuat",
    "gat",
    "trades",
    "decay",
    "own losses",
    "average",
    "batch norm",
)
BATCH_SIZE = 8


def tiny_model(kind, dtype="float64"):
    """A model that differs between the kinds in one thing, noise in all of them."""
    import keras

    from logit_reg.attacks import PGD
    from logit_reg.objectives import Objective
    from logit_reg.threat import ThreatModel
    from logit_reg.training.adversaries.free import FreeAdversary
    from logit_reg.training.adversaries.gat import GATAdversary
    from logit_reg.training.adversaries.nuat import NuATAdversary
    from logit_reg.training.adversaries.pgd import PGDAdversary
    from logit_reg.training.adversaries.trades import TRADESAdversary
    from logit_reg.training.beta_schedule import BetaSchedule
    from logit_reg.training.model import RegularizedModel

    keras.utils.set_random_seed(0)
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    inputs = keras.Input((6, 6, 1))
    own = {"kernel_regularizer": "l2", "activity_regularizer": "l2"} if kind == "own losses" else {}
    x = keras.layers.Conv2D(4, 3, name="conv", **own)(inputs)
    if kind == "batch norm":
        x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Flatten()(keras.layers.ReLU()(x))
    network = keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))
    threat = ThreatModel("linf", 0.3, 0.0, 1.0)
    objective = {
        "pairing": Objective("pairing", beta=0.5),
        "nuat": Objective("nuat", beta=2.0),
        "gat": Objective("gat", beta=2.0),
        "trades": Objective("trades", beta=2.0),
        "batch floor": Objective("clip_xent_batch", omega=1.0, reduction="sum"),
    }.get(kind, Objective("squeeze", beta=1.0))
    adversary = None
    if kind == "pgd":
        adversary = PGDAdversary(PGD(threat, num_steps=3, step_size=0.1), ramp_steps=10)
    elif kind == "free":
        adversary = FreeAdversary(threat, BATCH_SIZE, replays=4)
    elif kind in ("nuat", "gat"):
        single_step = {"nuat": NuATAdversary, "gat": GATAdversary}[kind]
        adversary = single_step(threat, 0.3, 0.3, ramp_steps=10, weight=2.0)
    elif kind == "trades":
        adversary = TRADESAdversary(threat, 0.1, 0.01, ramp_steps=10, num_steps=3)
    model = RegularizedModel(
        network,
        objective,
        sigma=0.1,
        bounds=(0.0, 1.0),
        adversary=adversary,
        augment=kind == "decay",
        weight_decay=0.01 if kind == "decay" else 0.0,
        beta_schedule=BetaSchedule(((0, 1.0), (20, 3.0)), ramp_steps=10),
        seed=3,
    )
    model.compile(optimizer=keras.optimizers.Adam(0.01))
    return model


def tiny_data():
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (50, 6, 6, 1), np.uint8), rng.integers(0, 3, 50)


def train_kinds(folder, steps, kinds, strategy, dtype="float64"):
    """Train each kind in a folder of its own."""
    from logit_reg.training.loop import LoopSettings, train

    for kind in kinds:
        with strategy.scope():
            model = tiny_model(kind, dtype)
        settings = LoopSettings(
            max_num_training_steps=steps,
            training_batch_size=BATCH_SIZE,
            num_output_steps=1,
            num_checkpoint_steps=20,
            ema=kind == "average",
            # Its stop is agreed upon, though it does not come.
            num_robustness_steps=10 if kind == "pgd" else 0,
            stop_on_overfitting=kind == "pgd",
        )
        own = Path(folder) / kind
        own.mkdir(parents=True, exist_ok=True)
        train(model, *tiny_data(), settings, own, show_progress=False)


def work_on_devices(number, folder, steps, kinds):
    """Train each kind on so many devices of this process, which has used none yet."""
    import tensorflow as tf

    device = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration()] * number
    tf.config.set_logical_device_configuration(device, parts)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(number)])
    train_kinds(folder, steps, kinds, strategy)


def main(arguments):
    if arguments[0] == "supervised":
        arguments = arguments[1:]
        if not supervisor.is_supervised():
            sys.exit(supervisor.supervise([sys.executable, *sys.argv]))
        supervisor.follow_supervisor()
    folder, steps, kinds = Path(arguments[0]), int(arguments[1]), arguments[2:]
    from logit_reg.training.distribution import WorkerLost, make_strategy

    try:
        strategy = make_strategy("multi_worker")
        number = strategy.cluster_resolver.task_id
        (folder / f"pid-{number}").write_text(str(os.getpid()))
        train_kinds(folder, steps, kinds, strategy)
    except WorkerLost:
        os._exit(supervisor.RESTART)


if __name__ == "__main__":
    main(sys.argv[1:])
