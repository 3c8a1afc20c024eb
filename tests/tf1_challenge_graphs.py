"""The challenges' graphs in TF1, written anew from their description: the tests' reference.

Nothing here comes from `madry_compat.networks`: names, layers, losses and optimizers are TF1's
own (`tf.compat.v1`), so that a bundle of `tf.train.Saver` is what the challenge's code writes.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow.compat.v1 as tf1

WEIGHT_DECAY = 2e-4
BATCH_NORM_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class ChallengeGraph:
    """A graph and the tensors that the challenge's scripts use."""

    graph: tf.Graph
    images: tf.Tensor
    labels: tf.Tensor
    logits: tf.Tensor
    train_step: tf.Operation | None
    saver: tf1.train.Saver

    def session(self) -> tf1.Session:
        config = tf1.ConfigProto()
        # Rewriting these graphs takes longer than the few steps that tests run.
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        return tf1.Session(graph=self.graph, config=config)

    def initialised(self) -> tf1.Session:
        session = self.session()
        with self.graph.as_default():
            session.run(tf1.global_variables_initializer())
        return session

    def restored(self, prefix: str | Path) -> tf1.Session:
        session = self.session()
        with self.graph.as_default():
            self.saver.restore(session, str(prefix))
        return session

    def predict(self, session: tf1.Session, images: np.ndarray) -> np.ndarray:
        return session.run(self.logits, {self.images: images})

    def train(self, session: tf1.Session, batches: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for images, labels in batches:
            session.run(self.train_step, {self.images: images, self.labels: labels})

    def save(self, session: tf1.Session, folder: Path) -> str:
        """As the challenge does: the step is in the name and in the bundle."""
        with self.graph.as_default():
            step = tf1.train.global_step(session, tf1.train.get_global_step())
            return self.saver.save(
                session, str(folder / "checkpoint"), global_step=step, write_meta_graph=False
            )


def mnist_graph(*, num_classes: int = 10, seed: int = 0) -> ChallengeGraph:
    """The MNIST challenge: flat images in [0, 1], summed cross-entropy, Adam with rate 1e-4."""
    graph = tf.Graph()
    with graph.as_default():
        tf1.set_random_seed(seed)
        global_step = tf1.train.get_or_create_global_step()
        flat = tf1.placeholder(tf.float32, [None, 784])
        labels = tf1.placeholder(tf.int64, [None])

        x = tf.reshape(flat, [-1, 28, 28, 1])
        for channels in (32, 64):
            kernel = _weight([5, 5, int(x.shape[-1]), channels])
            bias = _bias([channels])
            x = tf.nn.relu(tf1.nn.conv2d(x, kernel, [1, 1, 1, 1], "SAME") + bias)
            x = tf1.nn.max_pool(x, [1, 2, 2, 1], [1, 2, 2, 1], "SAME")
        x = tf.reshape(x, [-1, 7 * 7 * 64])
        kernel, bias = _weight([7 * 7 * 64, 1024]), _bias([1024])
        x = tf.nn.relu(tf.matmul(x, kernel) + bias)
        kernel, bias = _weight([1024, num_classes]), _bias([num_classes])
        logits = tf.matmul(x, kernel) + bias

        loss = tf.reduce_sum(_cross_entropy(logits, labels))
        train_step = tf1.train.AdamOptimizer(1e-4).minimize(loss, global_step=global_step)
        return ChallengeGraph(graph, flat, labels, logits, train_step, tf1.train.Saver())


def _weight(shape):
    return tf1.Variable(tf.random.truncated_normal(shape, stddev=0.1))


def _bias(shape):
    return tf1.Variable(tf.constant(0.1, shape=shape))


def cifar10_graph(
    width: int,
    *,
    training: bool,
    boundaries: tuple[int, ...] = (40_000, 60_000),
    rates: tuple[float, ...] = (0.1, 0.01, 0.001),
    num_classes: int = 10,
    seed: int = 0,
) -> ChallengeGraph:
    """The CIFAR-10 challenge: images in [0, 255]; weight decay and Momentum while training."""
    widths = (16 * width, 32 * width, 64 * width)
    graph = tf.Graph()
    with graph.as_default():
        tf1.set_random_seed(seed)
        global_step = tf1.train.get_or_create_global_step()
        with tf1.variable_scope("input"):
            images = tf1.placeholder(tf.float32, [None, 32, 32, 3])
            labels = tf1.placeholder(tf.int64, [None])
            x = _conv(tf.image.per_image_standardization(images), "init_conv", 3, 16, 1)
        for group, channels in enumerate(widths, start=1):
            for unit in range(5):
                stride = 2 if group > 1 and unit == 0 else 1
                with tf1.variable_scope(f"unit_{group}_{unit}"):
                    shared = group == 1 and unit == 0
                    x = _residual(x, channels, stride, shared=shared, training=training)
        with tf1.variable_scope("unit_last"):
            x = _leaky_relu(_batch_norm(x, training))
            x = tf.reduce_mean(x, [1, 2])
        with tf1.variable_scope("logit"):
            kernel = tf1.get_variable(
                "DW",
                [x.shape[-1], num_classes],
                initializer=tf1.uniform_unit_scaling_initializer(factor=1.0),
            )
            biases = tf1.get_variable("biases", [num_classes], initializer=tf1.zeros_initializer())
            logits = tf.matmul(x, kernel) + biases

        train_step = None
        if training:
            decayed = [v for v in tf1.trainable_variables() if "DW" in v.op.name]
            loss = tf.reduce_mean(_cross_entropy(logits, labels))
            loss += WEIGHT_DECAY * tf.add_n([tf.nn.l2_loss(v) for v in decayed])
            rate = tf1.train.piecewise_constant(
                tf.cast(global_step, tf.int32), list(boundaries), list(rates)
            )
            optimizer = tf1.train.MomentumOptimizer(rate, 0.9)
            train_step = optimizer.minimize(loss, global_step=global_step)
        return ChallengeGraph(graph, images, labels, logits, train_step, tf1.train.Saver())


def _cross_entropy(logits, labels):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


def _residual(x, channels, stride, *, shared, training):
    in_channels = int(x.shape[-1])
    with tf1.variable_scope("shared_activation" if shared else "residual_only_activation"):
        activated = _leaky_relu(_batch_norm(x, training))
    shortcut = activated if shared else x
    with tf1.variable_scope("sub1"):
        x = _conv(activated, "conv1", 3, channels, stride)
    with tf1.variable_scope("sub2"):
        x = _leaky_relu(_batch_norm(x, training))
        x = _conv(x, "conv2", 3, channels, 1)
    if in_channels != channels:
        window = [1, stride, stride, 1]
        shortcut = tf1.nn.avg_pool(shortcut, window, window, "VALID")
        side = (channels - in_channels) // 2
        shortcut = tf.pad(shortcut, [[0, 0], [0, 0], [0, 0], [side, side]])
    return x + shortcut


def _conv(x, name, size, channels, stride):
    with tf1.variable_scope(name):
        kernel = tf1.get_variable(
            "DW",
            [size, size, x.shape[-1], channels],
            initializer=tf1.random_normal_initializer(
                stddev=np.sqrt(2.0 / (size * size * channels))
            ),
        )
        return tf1.nn.conv2d(x, kernel, [1, stride, stride, 1], "SAME")


def _batch_norm(x, training):
    """tf.contrib.layers.batch_norm: the fused kernel, and averages updated in place."""
    channels = [x.shape[-1]]
    ones, zeros = tf1.ones_initializer(), tf1.zeros_initializer()
    with tf1.variable_scope("BatchNorm"):
        beta = tf1.get_variable("beta", channels, initializer=zeros)
        gamma = tf1.get_variable("gamma", channels, initializer=ones)
        mean = tf1.get_variable("moving_mean", channels, initializer=zeros, trainable=False)
        variance = tf1.get_variable("moving_variance", channels, initializer=ones, trainable=False)
    if not training:
        return tf1.nn.fused_batch_norm(
            x, gamma, beta, mean, variance, epsilon=1e-3, is_training=False
        )[0]
    x, batch_mean, batch_variance = tf1.nn.fused_batch_norm(
        x, gamma, beta, epsilon=1e-3, is_training=True
    )
    updates = [
        tf1.assign_sub(average, (average - value) * (1 - BATCH_NORM_DECAY))
        for average, value in ((mean, batch_mean), (variance, batch_variance))
    ]
    with tf.control_dependencies(updates):
        return tf.identity(x)


def _leaky_relu(x):
    return tf.where(tf.less(x, 0.0), 0.1 * x, x)
