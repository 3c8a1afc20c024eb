"""Fetch released challenge models by name, as `fetch_model.py mnist/secret`.

A model is downloaded to the cache, proved by the sha256 that was published (where none was, it is
printed and called unverified), unpacked, and put into --models_dir, as models/secret; what is
there already is not fetched again, and an interrupted download goes on. Without a network the
error says which file to put where.
"""

from pathlib import Path

from absl import flags

from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS
from logit_reg.experiments.fetching import fetch_models
from madry_compat.challenges import challenge_for
from madry_compat.files import default_cache_dir
from madry_compat.releases import RELEASES

flags.DEFINE_list("name", None, f"models to fetch, from {', '.join(RELEASES)}")
flags.DEFINE_string(
    "cache_dir", None, "where models are kept; $LOGIT_REG_CACHE or ~/.cache/logit_reg if not given"
)
flags.DEFINE_string("models_dir", "models", "folder that gets a folder of each model")
flags.DEFINE_bool("progress", True, "draw a progress bar")


def main(arguments: list[str]) -> None:
    """Fetch the models that the arguments and --name name."""
    names = [name.strip() for name in [*arguments, *(FLAGS.name or [])]]
    cache_dir = Path(FLAGS.cache_dir) if FLAGS.cache_dir else default_cache_dir()
    places = fetch_models(
        names,
        cache_dir.expanduser(),
        Path(FLAGS.models_dir).expanduser(),
        show_progress=FLAGS.progress,
    )
    name, place = next(iter(places.items()))
    dataset = name.partition("/")[0]
    next_flags = {"model_dir": place, "dataset": dataset, "data_dir": "FOLDER"}
    command_line.print_next(
        "eval_challenge", next_flags | {"protocol": challenge_for(dataset).protocol}
    )


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, takes_arguments=True, needs_tensorflow=False)


if __name__ == "__main__":
    run()
