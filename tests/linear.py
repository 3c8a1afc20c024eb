"""Linear classifiers, whose distance to the decision boundary is known exactly."""

import numpy as np
import tensorflow as tf

SHAPE = (4, 4, 1)


class Linear:
    """z = W x + b on flattened images, with the exact distance to the nearest boundary."""

    def __init__(self, num_classes=3, seed=0):
        rng = np.random.default_rng(seed)
        self.weights = rng.normal(size=(16, num_classes)).astype(np.float32)
        self.bias = rng.normal(size=num_classes).astype(np.float32)
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        return tf.reshape(images, (-1, 16)) @ self.weights + self.bias

    def images(self, count, seed=1):
        """Images well inside [0, 1] and the classes that the classifier gives them."""
        rng = np.random.default_rng(seed)
        images = rng.uniform(0.45, 0.55, (count, *SHAPE)).astype(np.float32)
        return images, np.argmax(images.reshape(count, 16) @ self.weights + self.bias, -1)

    def distance(self, images, labels, norm):
        """(N,) exact distance to the nearest decision boundary, without the box."""
        logits = images.reshape(len(images), 16).astype(np.float64) @ self.weights + self.bias
        rows = np.arange(len(labels))
        gaps = logits[rows, labels][:, None] - logits
        normals = self.weights[:, labels].T[:, None, :] - self.weights.T[None]
        dual = np.abs(normals).sum(-1) if norm == "linf" else np.linalg.norm(normals, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distances = gaps / dual
        distances[rows, labels] = np.inf
        return distances.min(-1)
