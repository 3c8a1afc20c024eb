"""Fetch released challenge models by name, as `fetch_model.py mnist/secret`.

A model is downloaded to the cache, proved by the sha256 that was published (where none was, it is
printed and called unverified) and unpacked; what is there already is not fetched again, and an
interrupted download goes on. Without a network the error says which file to put where.
"""

from collections.abc import Mapping
from pathlib import Path

from absl import flags
from tqdm import tqdm

from logit_reg_scripts import command_line
from logit_reg_scripts.command_line import FLAGS, UsageError
from madry_compat.files import default_cache_dir
from madry_compat.releases import RELEASES, Release, fetch, sha256_of

flags.DEFINE_list("name", None, f"models to fetch, from {', '.join(RELEASES)}")
flags.DEFINE_string(
    "cache_dir", None, "where models are kept; $LOGIT_REG_CACHE or ~/.cache/logit_reg if not given"
)
flags.DEFINE_bool("progress", True, "draw a progress bar")


def main(arguments: list[str]) -> None:
    """Fetch the models that the arguments and --name name."""
    names = [name.strip() for name in [*arguments, *(FLAGS.name or [])]]
    cache_dir = Path(FLAGS.cache_dir) if FLAGS.cache_dir else default_cache_dir()
    fetch_models(names, cache_dir.expanduser(), show_progress=FLAGS.progress)


def fetch_models(
    names: list[str],
    cache_dir: Path,
    *,
    releases: Mapping[str, Release] = RELEASES,
    show_progress: bool = True,
) -> None:
    """Fetch models one after the other; print each one's folder and hash.

    Args:
        names: keys of `releases`.
        cache_dir: where archives and models are kept.
        releases: the known models.
        show_progress: draw a progress bar.

    Raises:
        UsageError: if there is no name, or one is not known: then nothing is fetched.
        FetchError: if a model cannot be downloaded, has the wrong hash or is not safe.
    """
    wrong = [name for name in names if name not in releases]
    if wrong or not names:
        came = f"got {wrong[0]!r}" if wrong else "none was named"
        raise UsageError(f"name models to fetch from {', '.join(releases)}; {came}.")
    for name in dict.fromkeys(names):
        with tqdm(
            desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=not show_progress
        ) as bar:
            folder = fetch(name, cache_dir, releases=releases, progress=bar, notice=lambda _: None)
        digest = sha256_of(cache_dir / f"{name}.zip")
        is_verified = releases[name].sha256 is not None
        print(f"{name}: {folder}")
        print(
            f"SHA256 hash: {digest} "
            f"({'as published' if is_verified else 'unverified: no hash was published'})"
        )


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, takes_arguments=True, needs_tensorflow=False)


if __name__ == "__main__":
    run()
