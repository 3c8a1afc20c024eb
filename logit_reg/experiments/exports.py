"""Writing a network as a checkpoint of the challenges, with its config.json and model card."""

from pathlib import Path

import keras
import numpy as np

from logit_reg.experiments.model_cards import build_card
from logit_reg.experiments.sources import Model, dataset_for
from logit_reg.files import write_json
from logit_reg.messages import UsageError
from madry_compat.bundle_index import find_prefix
from madry_compat.challenges import Challenge, challenge_for
from madry_compat.config import load_config, write_config
from madry_compat.optimizers import TF1Adam, TF1Momentum
from madry_compat.releases import check_model_name, pack_release
from madry_compat.tf1_checkpoints import (
    has_training_state,
    load_network,
    load_training_state,
    read_step,
    save_network,
)


def export_model(
    model: Model,
    output_dir: Path,
    *,
    archive: Path | None = None,
    slots: bool | None = None,
    step: int | None = None,
    evaluations: list[Path] | None = None,
    link: str | None = None,
) -> None:
    """Write a bundle with its `checkpoint` file, config.json and model_card.json.

    Args:
        model: a run, a network from a `.keras` file, or a challenge's checkpoint.
        output_dir: folder to write; must hold no other checkpoint.
        archive: `NAME.zip` to pack in the layout of the released models.
        slots: with the optimiser's state; None: where the model has one.
        step: number of training steps of a network without a checkpoint; 0 if None.
        evaluations: folders of results of this network, for the card.
        link: where the model is described, for the card.

    Raises:
        UsageError: if these do not fit together, before anything is written.
        ValueError: if the network is not one of the challenges', or a file is damaged.
    """
    name = archive.stem if archive else output_dir.resolve().name
    if archive:
        check_model_name(name)
    challenge = challenge_for(dataset_for(model, None, None))
    bundle = _bundle_of(model)
    if bundle is not None and step is not None:
        raise UsageError("--step is for a .keras file; this model has its own.")
    step = read_step(bundle) if bundle is not None else step or 0
    optimizer = _optimizer(model, bundle, challenge, slots)
    card = build_card(
        model.network,
        challenge,
        evaluations or [],
        name=name,
        dataset=model.run.dataset if model.run is not None else None,
        # A run here sees the training images of its data set and nothing else.
        additional_data=False if model.run is not None else None,
        averaged_weights=model.run.ema if model.run is not None else None,
        training=model.training,
        link=link,
    )
    own_folder = find_prefix(bundle).parent if bundle is not None else model.path.parent
    _check_output_dir(output_dir, own_folder, f"checkpoint-{step}")

    prefix = save_network(model.network, output_dir, step, optimizer=optimizer)
    model_dir = f"models/{name}" if archive else str(output_dir)
    _write_config(output_dir / "config.json", own_folder, challenge, model_dir)
    print(f"checkpoint: {prefix} ({'with' if optimizer else 'without'} the optimiser's state)")
    if archive:
        archive.parent.mkdir(parents=True, exist_ok=True)
        digest = pack_release(archive, output_dir, name)
        card |= {"sha256": digest}
        print(f"archive: {archive}\nSHA256 hash: {digest}")
    write_json(output_dir / "model_card.json", card)
    print(f"card: {output_dir / 'model_card.json'}, from {len(evaluations or [])} ledgers")


def _bundle_of(model: Model) -> Path | None:
    """The TF1 checkpoint of a model: itself, or the one a run wrote beside its model.keras.

    Raises:
        UsageError: if a run's checkpoint is not of the same step as its model.keras.
    """
    if model.path.suffix == ".keras":
        return None
    if not (model.path / "model.keras").is_file():
        return model.path
    if not any(model.path.glob("*.index")):
        return None
    ours, theirs = model.network.get_weights(), load_network(model.path).get_weights()
    if len(ours) != len(theirs) or not all(map(np.array_equal, ours, theirs)):
        raise UsageError(
            f"{model.path}: model.keras and the newest checkpoint differ, as after a kill between "
            f"the two; go on with the run, or export --model_dir={model.path / 'model.keras'}."
        )
    return model.path


def _optimizer(
    model: Model, bundle: Path | None, challenge: Challenge, slots: bool | None
) -> keras.optimizers.Optimizer | None:
    """The optimiser whose state is to be written, or None to write none."""
    has_state = bundle is not None and has_training_state(bundle)
    if slots and not has_state:
        raise UsageError(
            "--slots: this model has no optimiser's state; give a run's folder or a checkpoint "
            "with slots, or leave --slots out."
        )
    if bundle is None or not has_state or slots is False:
        return None
    training = challenge.training
    # The rate is no part of the state.
    rate = training.step_size_schedule[0][1]
    is_adam = training.optimizer == "adam"
    optimizer = TF1Adam(rate) if is_adam else TF1Momentum(rate, training.momentum)
    load_training_state(bundle, model.network, optimizer)
    return optimizer


def _check_output_dir(output_dir: Path, own_folder: Path, name: str) -> None:
    """Refuse to write into the model's own folder or among other checkpoints."""
    others = [path.stem for path in output_dir.glob("*.index") if path.stem != name]
    if output_dir.resolve() == own_folder.resolve() or others:
        raise UsageError(
            f"--output_dir={output_dir}: holds {others[0] if others else 'the model itself'}; "
            f"choose another folder."
        )


def _write_config(path: Path, own_folder: Path, challenge: Challenge, model_dir: str) -> None:
    """The model's own config.json where it has one, else the challenge's defaults."""
    own = own_folder / "config.json"
    settings = load_config(own).settings if own.is_file() else {}
    write_config(path, challenge, {"random_seed": 0, **settings, "model_dir": model_dir})
