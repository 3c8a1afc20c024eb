"""What a sweep asks of the flags of its evaluations, and how long all of it takes.

A process of its own: it has the flags of eval_challenge.py, and alone starts TensorFlow. Reads
JSON from its input: "datasets" and "lines", the flags of evaluations to check; "trainings", pairs
of a run's name and flags; and "evaluations", pairs of those of a training and a line. Prints the
seconds of all trainings and of all evaluations.
"""

import dataclasses
import json
import sys
from typing import Any

from logit_reg.commands import command_line, eval_challenge
from logit_reg.commands.command_line import FLAGS
from logit_reg.commands.flag_groups import TRIAL_EXAMPLES
from logit_reg.messages import UsageError
from madry_compat.challenges import challenge_for


def main() -> None:
    """Print the estimate as JSON: [seconds of training, seconds of evaluations at most]."""
    from logit_reg.commands import records
    from logit_reg.experiments.sweep_estimate import evaluation_seconds, training_seconds

    asked = json.load(sys.stdin)
    for line in asked["lines"]:
        try:
            _parse(line)
            command_line.check_values()
            eval_challenge.check_flags()
            for dataset in asked["datasets"]:
                records.attack_choice().on_challenge(challenge_for(dataset))
        except (ValueError, command_line.flags.Error) as error:
            raise UsageError(f"--evaluate: {' '.join(str(error).split())}") from error
    seconds = [0.0, 0.0]
    for name, training in asked["trainings"]:
        try:
            seconds[0] += training_seconds(_settings(training))
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
    for training, line in asked["evaluations"]:
        _parse(line)
        count = FLAGS.num_eval_examples
        if FLAGS.trial:
            count = min(count or TRIAL_EXAMPLES, TRIAL_EXAMPLES)
        seconds[1] += evaluation_seconds(_settings(training), records.attack_choice(), count)
    print(json.dumps(seconds))


def _parse(line: list[str]) -> None:
    """Take the flags of one evaluation and forget those of the one before."""
    FLAGS.unparse_flags()
    for name in FLAGS:
        FLAGS[name].unparse()
    rest = FLAGS(["", *line])[1:]
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; flags look like --name=value.")


def _settings(training: dict[str, Any]):
    from logit_reg.experiments.defaults import resolve_settings
    from logit_reg.experiments.settings import RunSettings, as_tuples

    names = {field.name for field in dataclasses.fields(RunSettings)}
    given = {name: as_tuples(value) for name, value in training.items() if name in names}
    # As many images, and as large ones, as those that a bare command takes instead.
    given["dataset"] = given.get("dataset") or "mnist"
    return resolve_settings(given, is_challenge_config=bool(training.get("config")))


if __name__ == "__main__":
    command_line.run(main, __doc__)
