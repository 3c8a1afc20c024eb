"""The method from end to end: a network, Eq. 5, PGD, and the attack that tells the truth.

Takes a few minutes on two cores, on 5,000 digits that come with a Python package.
"""

import keras

from logit_reg import FGSM, PGD, AutoAttack, Objective, RegularizedModel, ThreatModel, evaluate
from madry_compat.data import load, to_pixels
from madry_compat.networks import mnist_cnn

# MNIST in the challenge's units: pixels in [0, 1], at most 0.3 away in any of them.
THREAT = ThreatModel("linf", epsilon=0.3, lower=0.0, upper=1.0)


def train(objective: Objective, *, epochs: int, noise: float) -> keras.Model:
    """MadryLab's MNIST network, trained to minimise an objective on noisy images."""
    digits = load("mnist_5k", "train")
    images = to_pixels(digits.images, "mnist_5k")
    keras.utils.set_random_seed(0)
    network = mnist_cnn()
    model = RegularizedModel(network, objective, sigma=noise, bounds=(0.0, 1.0))
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    model.fit(images, digits.labels, batch_size=128, epochs=epochs, verbose=2)
    return network


def attack(network: keras.Model, *, num_images: int) -> dict[str, float]:
    """Accuracy on test images: clean, and under three attacks, the strongest last."""
    digits = load("mnist_5k", "test")
    images = to_pixels(digits.images[:num_images], "mnist_5k")
    attacks = {
        "FGSM": FGSM(THREAT),
        "PGD-40": PGD(THREAT, loss="cw", num_steps=40, step_size=0.01),
        "AutoAttack": AutoAttack(THREAT),
    }
    found = evaluate(network, attacks, images, digits.labels[:num_images])
    return {"clean": found.clean.mean()} | {
        name: correct.mean() for name, correct in found.correct.items()
    }


def main(epochs: int = 20, num_images: int = 100) -> None:
    """Compare plain training with squeezed logits: Eq. 5 with beta = 2, noise of 0.5."""
    objectives = {
        "natural": (Objective(), 0.0),
        "squeezed": (Objective("squeeze", beta=2.0), 0.5),
    }
    for name, (objective, noise) in objectives.items():
        accuracies = attack(train(objective, epochs=epochs, noise=noise), num_images=num_images)
        print(name, *(f"{attack} {100 * share:.0f} %" for attack, share in accuracies.items()))


if __name__ == "__main__":
    main()
