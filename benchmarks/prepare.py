"""Makes the files of a `Problem`, in a process of its own so that no contender pays for it."""

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from benchmarks.cases import Case
from benchmarks.networks import export, forward_flops, is_fresh, load_network
from logit_reg.attacks.engine.forward import call_logits
from logit_reg.attacks.engine.random_numbers import random_stream, uniform_in_ball
from logit_reg.evaluation.run import network_hash
from logit_reg.files import write_arrays
from logit_reg.threat import ThreatModel
from madry_compat.challenges import IMAGE_SETS
from madry_compat.data import is_available, load, to_pixels

# Images whose logits every PyTorch contender has to reproduce.
_NUM_LOGITS = 8
_OWN_LABELS = "; labels are the network's own"


def prepare(request: dict) -> dict:
    """Train or load a network, and write it and the images to a folder.

    Args:
        request: case, data_dir, networks_dir and folder.

    Returns:
        forward_flops, network_sha256 and data, a sentence on the images.
    """
    case = Case(**request["case"])
    network = load_network(case.network, Path(request["networks_dir"]))
    images, labels, sentence = _examples(network, case, request["data_dir"])
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    network.save(folder / "network.keras")
    write_arrays(folder / "weights.npz", export(network))
    logits = np.asarray(call_logits(network, images[:_NUM_LOGITS]))
    write_arrays(folder / "data.npz", {"images": images, "labels": labels, "logits": logits})
    if case.kind in ("pgd", "restarts"):
        write_arrays(folder / "starts.npz", {"starts": starts(case, images)})
    return {
        "forward_flops": forward_flops(network),
        "network_sha256": network_hash(network),
        "data": sentence,
    }


def starts(case: Case, images: np.ndarray) -> np.ndarray:
    """Where our PGD starts: (N, num_restarts, H, W, C), for the peers to start there, too.

    Starts of their own would leave other images robust, by chance, and more of them than the
    accuracies may differ by.
    """
    threat = ThreatModel("linf", case.epsilon, 0.0, case.upper)
    stream = random_stream(case.seed, "PGD", "xent")

    @tf.function
    def draw(restart):
        indices = tf.range(len(images), dtype=tf.int64)
        return uniform_in_ball(threat, images, stream=stream, indices=indices, restart=restart)

    restarts = range(case.num_restarts)
    return np.stack([draw(tf.constant(number, tf.int64)).numpy() for number in restarts], axis=1)


def _examples(network, case, data_dir):
    """Images in pixel units, labels, and a sentence on where they come from."""
    count, shape = case.num_images, network.input_shape[1:]
    # A challenge's own set first, then one that is taken from it.
    fitting = sorted(
        (
            record
            for record in IMAGE_SETS.values()
            if (record.challenge.image_shape, record.challenge.upper) == (shape, case.upper)
            and record.challenge.num_classes == network.output_shape[-1]
            and record.challenge.name in (record.name, record.taken_from)
            and is_available(record.name, data_dir)
        ),
        key=lambda record: record.name != record.challenge.name,
    )
    if not fitting:
        images = np.random.default_rng(0).uniform(0, case.upper, (count, *shape))
        return *_own_labels(network, images.astype(np.float32)), "uniform noise" + _OWN_LABELS
    dataset = load(fitting[0].name, "test", data_dir)
    images = to_pixels(dataset.images[:count], dataset.name)
    labels = dataset.labels[:count]
    # Where the folder lies on this machine is nobody's business.
    around = f"{Path(data_dir).parent}/" if data_dir else ""
    sentence = dataset.source.replace(around, "")
    if is_fresh(case.network) and not case.num_batches:
        # Only what fresh weights themselves say can be attacked.
        return *_own_labels(network, images), sentence + _OWN_LABELS
    if len(images) < count:
        sentence += f"; the {len(images)} images are repeated"
        rows = np.arange(count) % len(images)
        images, labels = images[rows], labels[rows]
    return images, labels, sentence


def _own_labels(network, images):
    return images, np.asarray(call_logits(network, images)).argmax(axis=1)


if __name__ == "__main__":
    # Libraries and trainings print what they like; only the answer goes to standard output.
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    keras.config.disable_interactive_logging()
    json.dump(prepare(json.loads(sys.argv[1])), answer_file)
