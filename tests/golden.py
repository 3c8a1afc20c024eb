"""The published TRADES MNIST network and what the official AutoAttack makes of it."""

import keras

from benchmarks import networks

# Of the first 500 canonical test images, those that the official AutoAttack (standard, linf .3,
# seed 0) breaks in the end, the misclassified ones included.
GOLDEN500_BROKEN = (
    *(8, 18, 20, 33, 62, 63, 73, 92, 104, 115, 149, 151, 158, 160, 175, 184, 193, 199, 217, 241),
    *(247, 250, 259, 266, 282, 290, 320, 321, 340, 358, 359, 376, 381, 412, 417, 431, 435, 444),
    *(445, 447, 448, 449, 460, 468, 471, 495, 497),
)
GOLDEN500_CLEAN = 99.6
# Per cent still robust after each attack of its cascade.
GOLDEN500_ROBUST = {"apgd-ce": 91.6, "apgd-t": 91.0, "fab-t": 91.0, "square": 90.6}


def trades_network(shared) -> keras.Model:
    """The network of `trades_mnist_smallcnn.npz` in stock layers: [0, 1] pixels to logits."""
    return networks.trades_network(shared / "reference" / "trades_mnist_smallcnn.npz")
