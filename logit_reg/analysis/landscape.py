"""The loss over the plane of an adversarial and a random direction, section 4 of the paper."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from logit_reg.array_files import check_axes, read_record, write_record
from logit_reg.attacks.engine.examples import attack_inputs, check_examples
from logit_reg.attacks.engine.forward import LogitsFn, batch_spec, call_logits, compiled
from logit_reg.attacks.engine.gradients import logits_and_gradient
from logit_reg.attacks.engine.losses import attack_loss, margin
from logit_reg.attacks.engine.random_numbers import example_noise, random_stream
from logit_reg.attacks.pgd import PGD
from logit_reg.progress import Progress
from logit_reg.threat import ThreatModel

# Arrays of a `Comparison` and their axes: models, points, chosen examples.
_AXES = {
    "coordinates": "P",
    "mean_cross_entropy": "MPP",
    "mean_margin": "MPP",
    "chosen": "E",
    "cross_entropy": "MEPP",
    "margin": "MEPP",
}


@dataclasses.dataclass(frozen=True)
class Landscape:
    """A square of the plane through an image x, along an adversarial and a random direction.

    The point (a, b) is x + epsilon (a d + b r). Both directions have length 1 in the threat
    model's norm. In linf d is a sign vector for FGSM and r one of fair coins (Rademacher); in l2
    r is a Gaussian direction at a right angle to d; in l1 both are signs of few values, of those
    with the largest gradient and of random ones. Where the gradient is zero, so is d.

    Source:
        Shafahi et al., section 4. Deviations: l2, l1, PGD, and averages over many examples.
    """

    threat: ThreatModel
    """Norm, pixel range, and epsilon: the unit of both axes."""
    adversary: PGD | None = None
    """Whose last iterate lies in the adversarial direction; None for FGSM on cross-entropy."""
    extent: float = 2.0
    """The plane is drawn from -extent to extent, in multiples of epsilon."""
    num_points: int = 31
    """Points on each axis; odd, so that the image itself is one of them."""
    clip: bool = False
    """Clip every point to the pixel range. The surface is then no longer that of a plane, but
    each of its points is an image that an attacker could show."""
    batch_size: int = 200
    """Images sent through the network at once, whatever the number of examples and points."""

    def __post_init__(self):
        if not (math.isfinite(self.extent) and self.extent > 0):
            raise ValueError(f"extent must be above 0, in epsilons; got {self.extent}.")
        if self.num_points < 3 or self.num_points % 2 == 0:
            raise ValueError(f"num_points must be odd and at least 3; got {self.num_points}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}.")
        if self.adversary is not None and self.adversary.threat != self.threat:
            raise ValueError(
                f"the adversary's threat model is {self.adversary.threat}, the landscape's "
                f"{self.threat}; the axes have one unit."
            )

    @property
    def coordinates(self) -> np.ndarray:
        """(P,) float32 values of a and of b, multiples of epsilon."""
        return np.linspace(-self.extent, self.extent, self.num_points, dtype=np.float32)

    def run(
        self, logits_fn, images, labels, *, seed: int, indices=None, show_progress: bool = False
    ) -> "Surfaces":
        """Compute the surfaces of some examples.

        Args:
            logits_fn: images (N, H, W, C) in pixel units -> logits (N, K).
            images: (N, H, W, C) float, pixel units.
            labels: (N,) int true classes.
            seed: source of the random directions; an example's own depends on the seed and its
                index only.
            indices: (N,) int places of the images in their data set; 0 ... N-1 if None.
            show_progress: draw a progress bar.

        Returns:
            The `Surfaces` of the N examples.
        """
        images, labels, indices = attack_inputs(images, labels, indices)
        check_examples(logits_fn, images, labels)
        image, number = batch_spec(images.shape[1:]), batch_spec((), tf.int64)
        signature = (image, number, number, tf.TensorSpec((), tf.int64))
        compute = compiled(self, "_surfaces", (logits_fn,), signature)
        stream = random_stream(seed, type(self).__name__)
        cross_entropy, margins = [], []
        starts = range(0, len(images), self.batch_size)
        for start in Progress(starts, desc="landscape", unit="batch", disable=not show_progress):
            part = slice(start, start + self.batch_size)
            found = compute(images[part], labels[part], indices[part], stream)
            cross_entropy.append(found[0].numpy())
            margins.append(found[1].numpy())
        shape = (len(images), self.num_points, self.num_points)
        return Surfaces(
            coordinates=self.coordinates,
            cross_entropy=np.reshape(np.concatenate(cross_entropy), shape),
            margin=np.reshape(np.concatenate(margins), shape),
            indices=indices,
        )

    def _surfaces(self, logits_fn, images, labels, indices, stream):
        """(n, P P) cross-entropy and margin; all pairs of an example and a point, in chunks."""
        adversarial = self._adversarial_direction(logits_fn, images, labels, indices, stream)
        random = self._random_direction(adversarial, indices, stream)
        b, a = np.meshgrid(self.coordinates, self.coordinates, indexing="ij")
        steps = (self.threat.epsilon * np.stack([a, b], -1)).reshape(-1, 2).astype(np.float32)
        num_points = len(steps)
        num_pairs = tf.shape(images)[0] * num_points

        def chunk(start):
            # The last chunk is filled up with its last pair: every batch has the same size.
            pair = tf.minimum(start + tf.range(self.batch_size), num_pairs - 1)
            example, point = pair // num_points, pair % num_points
            along = tf.reshape(tf.gather(steps, point), (-1, 2, 1, 1, 1))
            points = (
                tf.gather(images, example)
                + along[:, 0] * tf.gather(adversarial, example)
                + along[:, 1] * tf.gather(random, example)
            )
            if self.clip:
                points = tf.clip_by_value(points, self.threat.lower, self.threat.upper)
            logits, targets = call_logits(logits_fn, points), tf.gather(labels, example)
            losses = attack_loss("xent", logits, targets), margin(logits, targets)
            return tuple(tf.cast(loss, tf.float32) for loss in losses)

        spec = tf.TensorSpec((self.batch_size,), tf.float32)
        found = tf.map_fn(
            chunk,
            tf.range(0, num_pairs, self.batch_size),
            fn_output_signature=(spec, spec),
            parallel_iterations=1,
        )
        return tuple(tf.reshape(tf.reshape(x, [-1])[:num_pairs], (-1, num_points)) for x in found)

    def _adversarial_direction(self, logits_fn, images, labels, indices, stream):
        if self.adversary is None:
            _, gradient = logits_and_gradient(
                logits_fn, images, lambda logits: attack_loss("xent", logits, labels)
            )
            return self.threat.ascent_direction(gradient)
        last = self.adversary.perturb(
            lambda points: call_logits(logits_fn, points),
            images,
            labels,
            noise=self._noise(images, indices, stream + 1),
            radius=example_noise("unit", (1, 1, 1), stream=stream + 2, indices=indices, restart=0),
        )
        length = tf.reshape(self.threat.distance(last, images), (-1, 1, 1, 1))
        return tf.math.divide_no_nan(last - images, length)

    def _random_direction(self, adversarial, indices, stream):
        noise = self._noise(adversarial, indices, stream)
        if self.threat.norm == "l2":
            along = tf.reduce_sum(noise * adversarial, axis=(1, 2, 3), keepdims=True)
            noise -= along * adversarial
        return self.threat.ascent_direction(noise)

    def _noise(self, images, indices, stream):
        options = {"stream": stream, "indices": indices, "restart": tf.constant(0, tf.int64)}
        return example_noise(self.threat.start_noise, images.shape[1:], **options)


@dataclasses.dataclass(frozen=True)
class Surfaces:
    """Loss of N examples over the plane of a `Landscape`."""

    coordinates: np.ndarray
    """(P,) float32 values of both axes, multiples of epsilon."""
    cross_entropy: np.ndarray
    """(N, P, P) float32 nats: [example, along the random, along the adversarial direction]."""
    margin: np.ndarray
    """(N, P, P) float32 true logit minus the largest other one, in the same order."""
    indices: np.ndarray
    """(N,) int64 places of the examples in their data set."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Surfaces of M models on the same examples: their averages, and a few examples in full."""

    coordinates: np.ndarray
    """(P,) float32 values of both axes, multiples of epsilon."""
    mean_cross_entropy: np.ndarray
    """(M, P, P) float32 averages over all examples."""
    mean_margin: np.ndarray
    """(M, P, P) float32 averages over all examples."""
    cross_entropy: np.ndarray
    """(M, E, P, P) float32 of the chosen examples."""
    margin: np.ndarray
    """(M, E, P, P) float32 of the chosen examples."""
    chosen: np.ndarray
    """(E,) int64 places of the chosen examples in the data set."""
    settings: dict
    """Provenance: "models" (M names in order), "landscape", "seed", "num_examples",
    "num_classes" and whatever else is known."""


def compare(
    landscape: Landscape,
    networks: Mapping[str, LogitsFn],
    images,
    labels,
    *,
    num_classes: int,
    chosen: Sequence[int] = (),
    seed: int = 0,
    settings: Mapping | None = None,
    show_progress: bool = False,
) -> Comparison:
    """Compute the surfaces of several models, in the same random directions.

    Args:
        landscape: the plane; each model has an adversarial direction of its own.
        networks: `logits_fn` of each model, by name.
        images: (N, H, W, C) float, pixel units.
        labels: (N,) int true classes.
        num_classes: K.
        chosen: places of the examples that are kept in full.
        seed: source of the random directions.
        settings: more provenance.
        show_progress: draw a progress bar for each model.

    Returns:
        The averages over all N examples and the surfaces of the chosen ones.

    Raises:
        ValueError: if there is no model or no image, or a chosen example is not among the N.
    """
    if not networks or not len(images):
        raise ValueError(
            f"a landscape needs a model and an image; got {len(networks)} and {len(images)}."
        )
    outside = [place for place in chosen if not 0 <= place < len(images)]
    if outside:
        raise ValueError(
            f"example {outside[0]} is not among the {len(images)} images; choose from 0 to "
            f"{len(images) - 1} or take more images."
        )
    picked = np.array(chosen, np.int64)
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for logits_fn in networks.values():
        surfaces = landscape.run(logits_fn, images, labels, seed=seed, show_progress=show_progress)
        for quantity in ("cross_entropy", "margin"):
            values = getattr(surfaces, quantity)
            found[f"mean_{quantity}"].append(values.mean(axis=0, dtype=np.float64))
            found[quantity].append(values[picked])
    return Comparison(
        coordinates=landscape.coordinates,
        chosen=picked,
        settings={
            "models": list(networks),
            "landscape": dataclasses.asdict(landscape),
            "seed": seed,
            "num_examples": len(images),
            "num_classes": num_classes,
            **(settings or {}),
        },
        **{name: np.stack(values).astype(np.float32) for name, values in found.items()},
    )


def save_comparison(comparison: Comparison, path: Path | str) -> None:
    """Write the arrays to `path`, an .npz, and the settings to the .json beside it."""
    arrays = {name: getattr(comparison, name) for name in _AXES}
    write_record(path, arrays, comparison.settings)


def load_comparison(path: Path | str) -> Comparison:
    """Read back what `save_comparison` wrote.

    Raises:
        ValueError: if the files are missing or damaged, or do not fit together.
    """
    arrays, settings = read_record(path, _AXES)
    comparison = Comparison(settings=settings, **arrays)
    models = settings.get("models")
    if not (isinstance(models, list) and models and all(isinstance(m, str) for m in models)):
        raise ValueError(f"{path}: the settings beside it list no models.")
    for name, least in (("num_classes", 2), ("num_examples", 1)):
        if not (isinstance(settings.get(name), int) and settings[name] >= least):
            raise ValueError(
                f"{path}: {name} is {settings.get(name)!r}, expected at least {least}."
            )
    _check_settings(path, settings.get("landscape"))
    check_axes(path, arrays, _AXES, {"M": len(models)})
    return comparison


def _check_settings(path, settings):
    """Refuse settings that no `Landscape` has."""
    try:
        threat = ThreatModel(**settings["threat"])
        adversary = settings["adversary"] and PGD(**{**settings["adversary"], "threat": threat})
        Landscape(**{**settings, "threat": threat, "adversary": adversary})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: the .json beside it describes no landscape ({error})."
        ) from error
