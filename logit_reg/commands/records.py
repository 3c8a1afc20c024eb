"""What the flags of `flag_groups` say, as records; imported once TensorFlow may start."""

from pathlib import Path

from logit_reg.commands.command_line import FLAGS
from logit_reg.commands.flag_groups import ATTACK_FLAGS
from logit_reg.experiments.attack_choice import AttackChoice
from logit_reg.experiments.own_models import OwnModel, load_own_model
from logit_reg.experiments.sources import Model, find_model, newest_run
from logit_reg.messages import UsageError, existing_path, notice
from logit_reg.threat import ThreatModel

_OF_OWN_MODEL = ("model", "data", "bounds", "epsilon")


def attack_choice() -> AttackChoice:
    """The attack that the flags name or describe."""
    names = FLAGS.protocol if "protocol" in FLAGS else None
    return AttackChoice(
        tuple(name.strip() for name in names or ()),
        **{name: FLAGS[name].value for name in ATTACK_FLAGS if name in FLAGS},
    )


def given_model(value: str | None, flag: str = "model_dir") -> Model:
    """The model that a flag names, the newest run where it names none.

    Args:
        value: of the flag.
        flag: its name.
    """
    if value is not None:
        return find_model(value, f"--{flag}={value}")
    path = newest_run()
    notice(f"model: {path}, the newest run (choose with --{flag})")
    return find_model(path)


def own_model() -> OwnModel:
    """The network of --model on those images of --data that the flags name.

    Raises:
        UsageError: if a flag is missing or the parts do not fit together.
    """
    missing = [f"--{name}" for name in _OF_OWN_MODEL if FLAGS[name].value is None]
    if missing:
        raise UsageError(
            f"your own model and data need --model, --data, --bounds and --epsilon together; "
            f"missing {', '.join(missing)}."
        )
    threat = ThreatModel(FLAGS.norm or "linf", FLAGS.epsilon, *_bounds())
    model, data = existing_path("model", FLAGS.model), existing_path("data", FLAGS.data)
    first = FLAGS.first_eval_example if "first_eval_example" in FLAGS else 0
    return load_own_model(model, data, threat, FLAGS.num_eval_examples, first)


def data_dir(model: Model) -> str | None:
    """Where the flags say that the data are, else where the model's run had them from."""
    said = [FLAGS[name].value for name in ("data_dir", "data_path") if name in FLAGS]
    return next(filter(None, said), model.usable_data_dir)


def optional_path(name: str) -> Path | None:
    """The path that a flag names; None if it was not given."""
    value = FLAGS[name].value
    return Path(value).expanduser() if value else None


def _bounds() -> tuple[float, float]:
    try:
        lower, upper = (float(value) for value in FLAGS.bounds)
    except ValueError as error:
        raise UsageError(
            f"--bounds must be two numbers, as 0,1; got {','.join(FLAGS.bounds)!r}."
        ) from error
    return lower, upper
