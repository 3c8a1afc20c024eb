"""One record for each data set: its files and their checksums, and the challenge it is under.

Whatever differs between data sets is here and nowhere else; `docs/adding.md` adds one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isclose


@dataclass(frozen=True)
class AttackDefaults:
    """Settings of a PGD attack, in the challenge's pixel units."""

    num_steps: int
    step_size: float
    random_start: bool = True
    loss_func: str = "xent"


@dataclass(frozen=True)
class TrainingDefaults:
    """How a challenge trains its network.

    Attributes:
        optimizer: "adam" or "momentum".
        step_size_schedule: (first step, learning rate) pairs, ascending from step 0.
        reduction: how the challenge's loss reduces over the batch, "sum" or "mean".
        augmentation: whether images are padded, cropped and flipped.
        attack: the attack inside adversarial training.
    """

    optimizer: str
    step_size_schedule: tuple[tuple[int, float], ...]
    training_batch_size: int
    max_num_training_steps: int
    weight_decay: float
    momentum: float
    reduction: str
    augmentation: bool
    attack: AttackDefaults
    num_output_steps: int
    num_summary_steps: int
    num_checkpoint_steps: int


@dataclass(frozen=True)
class PaperDefaults:
    """How the paper trains and attacks on a challenge's images, in pixel units.

    Attributes:
        sigma: standard deviation of the Gaussian noise beside a regulariser, pixel units.
        adversarial_step_size: of a step of 7-step adversarial training.
        step_size: of the attacks of the `paper-*` protocols.
        epsilon_l2: l2 distance of `paper-l2`. The challenges have no l2 threat model.
        stretch: how many times longer than the challenge it trains its regularised networks; the
            boundaries of the learning rate are unpublished and stretched as much.
        width: of the network; 0 where that has one size.
        needs_ramp: whether short adversarial training learns nothing unless its budget grows.

    Source:
        Shafahi et al.; the noise on [0, 1] is that of its sibling arXiv:1910.11585. MNIST's l2
        distance is the field's.
    """

    sigma: float
    adversarial_step_size: float
    step_size: float
    epsilon_l2: float
    stretch: int
    width: int
    needs_ramp: bool


@dataclass(frozen=True)
class Challenge:
    """One challenge: its images, its threat model and its published settings.

    Attributes:
        name: "mnist", "cifar10" or "cifar100": also the data set it was made for.
        family: "mnist" or "cifar": what its protocols and its controls go by.
        network: the function of `madry_compat.networks` that builds its network.
        protocol: the name that its own protocol has in this project.
        image_shape: (height, width, channels) of one image.
        lower: smallest pixel value, in the pixel units of the network's input.
        upper: largest pixel value, likewise.
        epsilon: allowed l-infinity distance, in pixel units.
        autoattack_epsilon_l2: l2 distance of `autoattack-l2`, in pixel units.
        autoattack_epsilon_l1: l1 distance of `autoattack-l1`, in pixel units: on [0, 1] the 12 of
            Croce and Hein 2021 (arXiv:2103.01208) on CIFAR-10, the field's 10 on MNIST.
        submission_shape: shape of `attack.npy`; MNIST submissions are flattened.
        attack: the attack of the published protocol, which is not always the one in config.json.
        training: the published training.
        paper: what the paper does on these images.
        config_names: keys of its config.json that it spells in its own way.
        config_extras: keys that its scripts read beyond those of both challenges, with the value
            of those that `training` does not have.
    """

    name: str
    family: str
    network: str
    protocol: str
    image_shape: tuple[int, int, int]
    num_classes: int
    lower: float
    upper: float
    epsilon: float
    autoattack_epsilon_l2: float
    autoattack_epsilon_l1: float
    num_test_examples: int
    submission_shape: tuple[int, ...]
    eval_batch_size: int
    eval_on_cpu: bool
    attack: AttackDefaults
    training: TrainingDefaults
    paper: PaperDefaults
    config_names: Mapping[str, str] = field(hash=False)
    config_extras: Mapping[str, str | None] = field(hash=False)


MNIST = Challenge(
    name="mnist",
    family="mnist",
    network="mnist_cnn",
    protocol="madry-mnist",
    image_shape=(28, 28, 1),
    num_classes=10,
    lower=0.0,
    upper=1.0,
    epsilon=0.3,
    autoattack_epsilon_l2=2.0,
    autoattack_epsilon_l1=10.0,
    num_test_examples=10_000,
    submission_shape=(10_000, 784),
    eval_batch_size=200,
    eval_on_cpu=True,
    attack=AttackDefaults(num_steps=40, step_size=0.01),
    training=TrainingDefaults(
        optimizer="adam",
        step_size_schedule=((0, 1e-4),),
        training_batch_size=50,
        max_num_training_steps=100_000,
        weight_decay=0.0,
        momentum=0.0,
        reduction="sum",
        augmentation=False,
        attack=AttackDefaults(num_steps=40, step_size=0.01),
        num_output_steps=100,
        num_summary_steps=100,
        num_checkpoint_steps=300,
    ),
    paper=PaperDefaults(
        sigma=0.5,
        adversarial_step_size=0.1,
        step_size=0.01,
        epsilon_l2=2.0,
        stretch=1,
        width=0,
        needs_ramp=True,
    ),
    config_names={"num_steps": "k", "step_size": "a"},
    config_extras={},
)

CIFAR10 = Challenge(
    name="cifar10",
    family="cifar",
    network="wide_resnet",
    protocol="madry-cifar10",
    image_shape=(32, 32, 3),
    num_classes=10,
    lower=0.0,
    upper=255.0,
    epsilon=8.0,
    # 0.5 on [0, 1], which the field evaluates; the paper has 1.5.
    autoattack_epsilon_l2=127.5,
    autoattack_epsilon_l1=12.0 * 255,
    num_test_examples=10_000,
    submission_shape=(10_000, 32, 32, 3),
    eval_batch_size=100,
    eval_on_cpu=False,
    # The leaderboard's 20 steps of 1; the published config.json says 10 steps of 2.
    attack=AttackDefaults(num_steps=20, step_size=1.0),
    training=TrainingDefaults(
        optimizer="momentum",
        step_size_schedule=((0, 0.1), (40_000, 0.01), (60_000, 0.001)),
        training_batch_size=128,
        max_num_training_steps=80_000,
        weight_decay=2e-4,
        momentum=0.9,
        reduction="mean",
        augmentation=True,
        # What the released models were trained with; the published config.json says 10 steps.
        attack=AttackDefaults(num_steps=7, step_size=2.0),
        num_output_steps=100,
        num_summary_steps=100,
        num_checkpoint_steps=1000,
    ),
    paper=PaperDefaults(
        sigma=20.0,
        adversarial_step_size=2.0,
        step_size=2.0,
        epsilon_l2=382.5,
        stretch=2,
        width=10,
        needs_ramp=False,
    ),
    config_names={"random_seed": "tf_random_seed"},
    config_extras={
        "data_path": "cifar10_data",
        "np_random_seed": None,
        "step_size_schedule": None,
        "weight_decay": None,
        "momentum": None,
    },
)

# Not a MadryLab challenge: the paper runs CIFAR-100 with everything else as on CIFAR-10.
CIFAR100 = replace(CIFAR10, name="cifar100", num_classes=100)


@dataclass(frozen=True)
class Ceiling:
    """The best robust accuracy that was published under a threat model.

    Attributes:
        norm: "linf", "l2" or "l1".
        epsilon: of the pixel range.
        accuracy: a fraction.
        source: who published it, and the attack.
    """

    norm: str
    epsilon: float
    accuracy: float
    source: str


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One data set: how it was published and which challenge's settings it takes.

    Attributes:
        name: of the data set, as flags and files say it.
        challenge: gives shape, classes, pixel range, threat model, training and attacks.
        format: "idx", "pickles" or "embedded": the reader of `madry_compat.data` for its own
            files. Where these are not, a TFDS folder of its name is read.
        files: its own files by split, in their order, with their md5: of IDX files uncompressed,
            of pickles as unpacked. Looked up at every load.
        folder: where the published archive unpacks them.
        labels_key: of a pickle's labels.
        num_examples: by split, where TFDS's ids count them or nothing else tells them; elsewhere
            TFDS's shuffle is undone.
        validation_examples: so many first training images the challenge's reader kept back.
        taken_from: the data set whose training images these are.
        ceilings: the best published robust accuracies; see `published_ceiling`.
    """

    name: str
    challenge: Challenge
    format: str
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    folder: str = ""
    labels_key: str = ""
    num_examples: Mapping[str, int] = field(default_factory=dict)
    validation_examples: int = 0
    taken_from: str = ""
    ceilings: tuple[Ceiling, ...] = ()

    @property
    def pixel_divisor(self) -> float:
        """Stored values, of 0 to 255, over this are in the challenge's pixel units."""
        return 255.0 / self.challenge.upper

    @property
    def num_test_examples(self) -> int:
        """How many images the test split has."""
        return self.num_examples.get("test", self.challenge.num_test_examples)

    def published_ceiling(self, norm: str, epsilon: float) -> Ceiling | None:
        """The best that was published for a norm and an epsilon in pixel units, if it is known."""
        share = epsilon / (self.challenge.upper - self.challenge.lower)
        same = (
            c for c in self.ceilings if c.norm == norm and isclose(c.epsilon, share, rel_tol=0.02)
        )
        return next(same, None)


IMAGE_SETS = {
    record.name: record
    for record in (
        ImageSet(
            "mnist_5k",
            MNIST,
            "embedded",
            num_examples={"train": 4_000, "test": 1_000},
            taken_from="mnist",
        ),
        ImageSet(
            "mnist",
            MNIST,
            "idx",
            {
                "train": {
                    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
                    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
                },
                "test": {
                    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
                    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
                },
            },
            folder="mnist",
            validation_examples=5_000,
            ceilings=(Ceiling("linf", 0.3, 0.9634, "Gowal et al. 2020 (AutoAttack)"),),
        ),
        ImageSet(
            "fashion_mnist",
            MNIST,
            "idx",
            {
                "train": {
                    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
                },
                "test": {
                    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
                    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
                },
            },
            folder="fashion_mnist",
        ),
        ImageSet(
            "cifar10",
            CIFAR10,
            "pickles",
            {
                "train": {
                    "data_batch_1": "c99cafc152244af753f735de768cd75f",
                    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                    "data_batch_4": "634d18415352ddfa80567beed471001a",
                    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                },
                "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
            },
            folder="cifar-10-batches-py",
            labels_key="labels",
            num_examples={"train": 50_000, "test": 10_000},
            ceilings=(
                Ceiling("linf", 8 / 255, 0.7371, "Bartoldson et al. 2024 (RobustBench)"),
                Ceiling("l2", 0.5, 0.8497, "Wang et al. 2023 (RobustBench)"),
                Ceiling("l2", 1.5, 0.33, "l2 adversarial training, interpolated (MadryLab)"),
            ),
        ),
        ImageSet(
            "cifar100",
            CIFAR100,
            "pickles",
            {
                "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
                "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
            },
            folder="cifar-100-python",
            labels_key="fine_labels",
            num_examples={"train": 50_000, "test": 10_000},
            ceilings=(Ceiling("linf", 8 / 255, 0.4267, "Wang et al. 2023 (RobustBench)"),),
        ),
    )
}


# The data set that needs no files but those of an installed package.
EMBEDDED = next(record.name for record in IMAGE_SETS.values() if record.format == "embedded")


def image_set(name: str) -> ImageSet:
    """The record of a data set.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in IMAGE_SETS:
        raise ValueError(f"dataset must be one of {', '.join(IMAGE_SETS)}; got {name!r}.")
    return IMAGE_SETS[name]


def challenge_for(dataset_name: str) -> Challenge:
    """The challenge whose images, threat model and defaults a data set takes.

    Raises:
        ValueError: if no challenge covers the data set.
    """
    return image_set(dataset_name).challenge
