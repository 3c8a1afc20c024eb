"""Transfer: images that were made elsewhere, on another network or in a file, judged here."""

import dataclasses
import hashlib
import math
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from logit_reg.attacks.engine.active_set import ActiveSetAttack
from logit_reg.attacks.engine.attack import Attack, Cascade, run_attack
from logit_reg.attacks.engine.forward import Classifier, LogitsFn
from logit_reg.attacks.restarts import Restarts
from logit_reg.files import one_line, read_arrays
from logit_reg.threat import ThreatModel

# How far images of a file may be beyond epsilon and pixel range, as in the challenges: rounding
# of whoever wrote them.
_TOLERANCE = 1e-4
_MAX_BYTES = 4 * 2**30
_CLASSIFIER = Classifier()


@dataclasses.dataclass(frozen=True)
class Transfer(ActiveSetAttack):
    """An attack on a source network, whose images are judged on the attacked network.

    By default the attacked network sees one image only, the one that the attack returns: for most
    attacks the first iterate that fools the source. Iterates of the source do not count.

    `forwards` and `backwards` are those of both networks together; a `gradient_logits_fn` has no
    use here.

    Source:
        Papernot et al. 2016, arXiv:1605.07277; the challenges' black-box leaderboards.
    """

    attack: Attack
    """Attacks the source, within its own threat model."""
    source: dataclasses.InitVar[LogitsFn]
    """The source network: images (N, H, W, C) in pixel units -> logits. Not among the settings;
    `source_hash` stands for it."""
    source_hash: str
    """Identifies the source by its content, as `logit_reg.evaluation.run.network_hash` does. Two
    transfers are equal if attack and hash are."""
    every_iterate: bool = False
    """Take directions from the source and judge every iterate on the attacked network, which is
    stronger: the source being fooled ends nothing. For attacks that only follow gradients; a
    search would be one on the attacked network itself."""

    _source: ClassVar[Any]

    def __post_init__(self, source):
        if not self.source_hash:
            raise ValueError(
                "source_hash must identify the source network; give network_hash(source)."
            )
        if self.every_iterate and not _follows_gradients(self.attack):
            raise ValueError(
                f"every_iterate needs an attack that only follows gradients, such as PGD; got "
                f"{type(self.attack).__name__}. Leave every_iterate out."
            )
        # No field: settings hold its hash.
        object.__setattr__(self, "_source", source)

    @property
    def threat(self) -> ThreatModel:
        """The attack's threat model."""
        return self.attack.threat

    def _attack(self, active):
        rows = active.rows
        if not len(rows):
            return
        examples = active.examples.take(rows)
        if self.every_iterate:
            examples = dataclasses.replace(examples, gradient_logits_fn=self._source)
            found = run_attack(self.attack, active.logits_fn, examples)
            fooled = found.fooled
        else:
            examples = dataclasses.replace(examples, gradient_logits_fn=None)
            found = run_attack(self.attack, self._source, examples)
            fooled = _CLASSIFIER.judge(active.logits_fn, found.adversarial, examples.labels).fooled
            active.count(len(rows), forwards=1)
        # The images that are returned count here as the last iterates, too.
        active.add(rows, dataclasses.replace(found, fooled=fooled, last_iterate_fooled=fooled))

    def cost(self):
        """Return the most forwards and backwards that one image can take, on both networks."""
        forwards, backwards = self.attack.cost()
        return (2 * forwards + 1 if self.every_iterate else forwards + 2), backwards


@dataclasses.dataclass(frozen=True)
class Replay(ActiveSetAttack):
    """Images that were made before, judged once: `images[i]` for the image of index i.

    `run` raises ValueError if there is no image of an index, the shapes differ, or an image is not
    finite or is outside of the threat model.

    Source:
        The challenges' `run_attack.py`, which allows 1e-4 beyond epsilon and pixel range. Up to
        there an image is projected before it is judged; beyond it is refused.
    """

    threat: ThreatModel
    """Norm, budget and pixel range that the images have to keep to."""
    images: dataclasses.InitVar[np.ndarray]
    """(M, H, W, C) or (M, H * W * C) float, pixel units, in the order of the data set. Not among
    the settings; `content` stands for them."""
    content: str = dataclasses.field(init=False)
    """sha256 of the images' shape and float32 values."""

    _images: ClassVar[Any]

    def __post_init__(self, images):
        images = np.asarray(images)
        if images.dtype.kind != "f" or images.ndim not in (2, 4):
            raise ValueError(
                f"images must be float (M, H, W, C) or (M, H * W * C) in pixel units; got "
                f"{images.dtype} {images.shape}."
            )
        images = np.ascontiguousarray(images, np.float32)
        digest = hashlib.sha256(str(images.shape).encode())
        digest.update(images.data)
        object.__setattr__(self, "content", digest.hexdigest())
        # No field: settings hold its hash.
        object.__setattr__(self, "_images", images)

    @classmethod
    def from_file(cls, threat: ThreatModel, path: Path | str) -> "Replay":
        """Take the images from a file that anyone may have written.

        Args:
            threat: norm, budget and pixel range.
            path: an `.npy`, or an `.npz` with an array "adversarial", as evaluations write it.

        Returns:
            A `Replay`.

        Raises:
            ValueError: if the file is missing, damaged, above 4 GiB, or holds anything but floats
                of a shape that images can have.
        """
        images = read_images(path)
        try:
            return cls(threat, images)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _attack(self, active):
        rows = active.rows
        if not len(rows):
            return
        examples = active.examples.take(rows)
        replayed = self._matching(examples.images, examples.indices)
        fooled = _CLASSIFIER.judge(active.logits_fn, replayed, examples.labels).fooled
        active.count(len(rows), forwards=1)
        active.record(rows, replayed, fooled)

    def cost(self):
        """Return the most forwards and backwards that one image can take."""
        return 2, 0

    def _matching(self, images, indices):
        """The replayed images of these indices, checked against the images themselves."""
        stored = self._images
        shape = images.shape[1:]
        if stored.shape[1:] not in (shape, (math.prod(shape),)):
            raise ValueError(
                f"replayed images have shape {stored.shape[1:]}, expected {shape} or "
                f"{(math.prod(shape),)} as the attacked ones."
            )
        absent = indices[(indices < 0) | (indices >= len(stored))]
        if len(absent):
            raise ValueError(
                f"replayed images number {len(stored)}, but image {absent[0]} of the data set is "
                f"attacked; give one for each, in the order of the data set."
            )
        replayed = stored[indices].reshape(images.shape)
        self._check(replayed, images, indices)
        return self.threat.project(replayed, images).numpy()

    def _check(self, replayed, images, indices):
        lower, upper, epsilon = self.threat.lower, self.threat.upper, self.threat.epsilon
        flat = replayed.reshape(len(replayed), -1).astype(np.float64)
        distance = self.threat.distance(*(x.astype(np.float64) for x in (replayed, images)))
        for is_bad, problem in (
            (~np.isfinite(flat).all(axis=1), "is not finite"),
            (
                (flat.min(axis=1) < lower - _TOLERANCE) | (flat.max(axis=1) > upper + _TOLERANCE),
                f"leaves the pixel range [{lower:g}, {upper:g}]",
            ),
            (
                distance.numpy() > epsilon + _TOLERANCE,
                f"is farther than {epsilon:g} in {self.threat.norm} from the original",
            ),
        ):
            bad = np.flatnonzero(is_bad)
            if len(bad):
                raise ValueError(
                    f"replayed image {indices[bad[0]]} {problem} ({len(bad)} such images); "
                    f"replay images of this threat model, in the same pixel units and order."
                )


def read_images(path: Path | str) -> np.ndarray:
    """Read an array of images from a file that anyone may have written.

    Args:
        path: an `.npy`, or an `.npz` with an array "adversarial".

    Returns:
        The array as stored.

    Raises:
        ValueError: if the file is missing, damaged, holds pickled objects or is above 4 GiB.
    """
    path = Path(path)
    # A pipe would be waited for.
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    if zipfile.is_zipfile(path):
        return read_arrays(path, max_bytes=_MAX_BYTES, names=["adversarial"])["adversarial"]
    try:
        with path.open("rb") as file:
            _check_header(file, path.stat().st_size)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    # A damaged header makes numpy raise nearly anything; for the reader it is one thing.
    except Exception as error:
        raise ValueError(f"{path}: not an .npy of numbers ({one_line(error)}).") from error


def _check_header(file, size):
    """Refuse an `.npy` whose header does not promise plain numbers of just the file's size."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"format {version}, expected 1.0 or 2.0")
    shape, _, dtype = readers[version](file)
    if dtype.kind not in "iufb":
        raise ValueError(f"holds {dtype} values; objects are never loaded")
    promised, present = math.prod(shape) * dtype.itemsize, size - file.tell()
    if promised != present:
        raise ValueError(f"{present} bytes of values, its header promises {promised}")
    if promised > _MAX_BYTES:
        raise ValueError(f"larger than {_MAX_BYTES >> 30} GiB")


def _follows_gradients(attack: Attack) -> bool:
    while isinstance(attack, Restarts):
        attack = attack.attack
    return attack.cost()[1] > 0 and not isinstance(attack, Cascade)
