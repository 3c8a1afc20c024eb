"""The loss around test images of some models, with curves of their accuracy, and its files."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from logit_reg.analysis.curves import Curves, CurveSettings, load_curves, save_curves
from logit_reg.analysis.landscape import (
    Comparison,
    Landscape,
    compare,
    load_comparison,
    save_comparison,
)
from logit_reg.attacks import PGD
from logit_reg.evaluation.run import content_hash, network_hash
from logit_reg.evaluation.units import attack_notices, threat_notices
from logit_reg.experiments.attack_choice import AttackChoice, usual_step_size
from logit_reg.experiments.evaluations import NAME_DIGITS, refuse_other_settings
from logit_reg.experiments.sources import RUNS, Model, dataset_for, num_examples
from logit_reg.files import atomic_path, read_json
from logit_reg.messages import UsageError, tell
from logit_reg.report import audit_figures
from logit_reg.report.landscape_page import write_landscape_page
from logit_reg.report.style import to_svg
from logit_reg.threat import ThreatModel
from madry_compat.challenges import Challenge, challenge_for
from madry_compat.data import Dataset, to_pixels

_FOLDER = "landscapes"


@dataclasses.dataclass(frozen=True)
class LandscapeSettings:
    """What is drawn.

    Attributes:
        attack: the threat model, and steps of PGD.
        direction: the adversarial one: "fgsm" or "pgd".
        extent: half the side of the square, in epsilons.
        num_points: on each axis, odd.
        clip: whether each point is clipped to the pixel range.
        num_examples: test images to average, from the first.
        chosen: places of test images that are also drawn alone.
        seed: of the random directions and of the attacks.
        batch_size: images at once; the challenge's if None.
        with_curves: whether accuracy against the settings of the attack is measured, too.
        output_dir: of the files; one named after models and settings if None.
        show_progress: draw progress bars.
    """

    attack: AttackChoice = AttackChoice()
    direction: str = "fgsm"
    extent: float = 2.0
    num_points: int = 31
    clip: bool = False
    num_examples: int = 50
    chosen: tuple[int, ...] = (0,)
    seed: int = 0
    batch_size: int | None = None
    with_curves: bool = False
    output_dir: Path | None = None
    show_progress: bool = True


def shared_dataset(models: Sequence[Model], name: str | None, data_dir: str | None) -> str:
    """The one data set that models side by side are drawn on.

    Args:
        models: at least one.
        name: of the data set that was asked for, if any.
        data_dir: where the data are.

    Raises:
        UsageError: if the models belong to several.
    """
    names = {dataset_for(model, name, data_dir) for model in models}
    if len(names) > 1:
        raise UsageError(
            f"the models belong to {' and '.join(sorted(names))}; models side by side share their "
            f"images. Choose one with --dataset."
        )
    return names.pop()


def compute_landscape(
    models: Sequence[Model], dataset: Dataset, settings: LandscapeSettings
) -> tuple[Path, Comparison, dict[str, Curves]]:
    """Compute the surfaces and keep them, beside the settings that they were made with.

    Args:
        models: at least one.
        dataset: its test images.
        settings: what is drawn.

    Returns:
        The folder, the surfaces, and the curves by model.

    Raises:
        UsageError: if the folder holds another landscape.
    """
    challenge = challenge_for(dataset.name)
    count = num_examples(settings.num_examples, len(dataset.images))
    images = to_pixels(dataset.images[:count], dataset.name)
    labels = dataset.labels[:count]
    threat = settings.attack.threat(challenge)
    adversary = _adversary(settings, threat, challenge)
    shape = challenge.image_shape
    tell(threat_notices(threat, shape) if adversary is None else attack_notices([adversary], shape))
    batch_size = settings.batch_size or challenge.eval_batch_size
    landscape = Landscape(
        threat,
        adversary,
        extent=settings.extent,
        num_points=settings.num_points,
        clip=settings.clip,
        batch_size=batch_size,
    )
    networks = _by_name(models)
    provenance = {"dataset": dataset.name, "canonical": dataset.canonical}
    content = {
        "images_sha256": content_hash(images, labels),
        "networks_sha256": {name: network_hash(network) for name, network in networks.items()},
    }
    identity = {
        "models": list(networks),
        "landscape": dataclasses.asdict(landscape),
        "seed": settings.seed,
        "num_examples": count,
        **provenance,
        **content,
    }
    name = f"{settings.direction}-{threat.norm}{threat.epsilon:g}-n{count}-{_digest(identity)}"
    folder = settings.output_dir or _folder_of(models, networks) / name
    if (folder / "landscape.json").exists():
        refuse_other_settings(
            folder, read_json(folder / "landscape.json"), identity, "--output_dir"
        )
    options: dict[str, Any] = {
        "num_classes": challenge.num_classes,
        "seed": settings.seed,
        "show_progress": settings.show_progress,
    }
    comparison = compare(
        landscape,
        networks,
        images,
        labels,
        chosen=list(settings.chosen),
        settings=provenance | content | {"paths": [str(model.path) for model in models]},
        **options,
    )
    save_comparison(comparison, folder / "landscape.npz")
    curves = {}
    for i, (name, network) in enumerate(networks.items() if settings.with_curves else ()):
        curves[name] = CurveSettings(threat, batch_size=batch_size).run(
            network, images, labels, settings=provenance | {"model": name}, **options
        )
        save_curves(curves[name], folder / f"curves-{i}.npz")
    return folder, comparison, curves


def load_landscape(path: Path) -> tuple[Comparison, dict[str, Curves]]:
    """What `compute_landscape` kept.

    Args:
        path: of its `landscape.npz`.
    """
    comparison = load_comparison(path)
    files = [path.parent / f"curves-{i}.npz" for i in range(len(comparison.settings["models"]))]
    return comparison, {
        name: load_curves(file)
        for name, file in zip(comparison.settings["models"], files, strict=True)
        if file.exists()
    }


def draw_landscape(folder: Path, comparison: Comparison, curves: Mapping[str, Curves]) -> Path:
    """Write the figures and the page; gives the page's path."""
    for quantity in ("cross_entropy", "margin"):
        for kind, draw in (
            ("map", audit_figures.loss_maps),
            ("surface", audit_figures.loss_surfaces),
        ):
            with atomic_path(folder / f"{quantity}-{kind}.svg") as temporary:
                temporary.write_bytes(to_svg(draw(comparison, quantity)))
    page = folder / "landscape.html"
    write_landscape_page(page, comparison, curves)
    return page


def _adversary(
    settings: LandscapeSettings, threat: ThreatModel, challenge: Challenge
) -> PGD | None:
    """PGD with the steps that were asked for, or None for FGSM."""
    if settings.direction == "fgsm":
        return None
    num_steps, step_size = settings.attack.num_steps, settings.attack.step_size
    if num_steps is None:
        num_steps = challenge.attack.num_steps
    if step_size is None:
        step_size = usual_step_size(threat, challenge, num_steps)
    return PGD(threat, num_steps=num_steps, step_size=step_size)


def _by_name(models: Sequence[Model]) -> dict[str, keras.Model]:
    """Networks by the name of their folder, by the whole path where two are called the same."""
    names = [model.release or model.path.stem for model in models]
    return {
        name if names.count(name) == 1 else str(model.path): model.network
        for name, model in zip(names, models, strict=True)
    }


def _folder_of(models: Sequence[Model], networks: Mapping[str, keras.Model]) -> Path:
    """A run's own folder where it is drawn alone, else one named after the first model."""
    run = models[0].folder
    if len(models) == 1 and run is not None:
        return run / _FOLDER
    names = [Path(name).name for name in networks]
    others = f"-and-{len(names) - 1}" if len(names) > 1 else ""
    return RUNS / _FOLDER / f"{names[0]}{others}"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:NAME_DIGITS]
