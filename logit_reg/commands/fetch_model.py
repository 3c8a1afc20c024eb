"""Fetch released challenge models by name, as `fetch_model.py mnist/secret`.

A model is downloaded to the cache, proved by the sha256 that was published (where none was, it is
printed and called unverified), unpacked, and put into --models_dir, as models/secret; what is
there already is not fetched again, and an interrupted download goes on. Without a network the
error says which file to put where.
"""

import filecmp
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from absl import flags
from tqdm import tqdm

from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError
from madry_compat.files import default_cache_dir
from madry_compat.releases import RELEASES, Release, fetch, sha256_of

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
    protocol = "madry-mnist" if name.startswith("mnist/") else "madry-cifar10"
    next_flags = {"model_dir": place, "dataset": name.partition("/")[0], "data_dir": "FOLDER"}
    command_line.print_next("eval_challenge", next_flags | {"protocol": protocol})


def fetch_models(
    names: list[str],
    cache_dir: Path,
    models_dir: Path,
    *,
    releases: Mapping[str, Release] = RELEASES,
    show_progress: bool = True,
) -> dict[str, Path]:
    """Fetch models one after the other; print each one's folder and hash.

    Args:
        names: keys of `releases`.
        cache_dir: where archives and unpacked models are kept.
        models_dir: gets a folder of each model, with the last part of its name.
        releases: the known models.
        show_progress: draw a progress bar.

    Returns:
        The folder of each model by its name.

    Raises:
        UsageError: if there is no name, one is not known, or two models ask for one folder: then
            nothing is fetched; or if another model is in the folder of one.
        FetchError: if a model cannot be downloaded, has the wrong hash or is not safe.
    """
    wrong = [name for name in names if name not in releases]
    if wrong or not names:
        came = f"got {wrong[0]!r}" if wrong else "none was named"
        raise UsageError(f"name models to fetch from {', '.join(releases)}; {came}.")
    places = {name: models_dir / name.rpartition("/")[2] for name in names}
    if len(set(places.values())) < len(places):
        raise UsageError(
            f"two of {', '.join(places)} would go into the same folder of {models_dir}; fetch one "
            f"after the other, each with a --models_dir of its own."
        )
    for name, place in places.items():
        with tqdm(
            desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=not show_progress
        ) as bar:
            folder = fetch(name, cache_dir, releases=releases, progress=bar, notice=lambda _: None)
        digest = sha256_of(cache_dir / f"{name}.zip")
        is_verified = releases[name].sha256 is not None
        _put(folder, place, cache_dir / f"{name}.zip")
        print(f"{name}: {place}")
        print(
            f"SHA256 hash: {digest} "
            f"({'as published' if is_verified else 'unverified: no hash was published'})"
        )
    return places


def _put(model: Path, place: Path, archive: Path) -> None:
    """Copy an unpacked model; what is there already has to be the same, file by file.

    Its archive goes beside it, where the challenges' own script leaves it: it is the proof of
    which release the files are.
    """
    files = [path.relative_to(model) for path in model.rglob("*") if path.is_file()]
    if place.exists():
        if all(_is_same(model / file, place / file) for file in files):
            return
        raise UsageError(
            f"{place} holds something else than this model; remove it, or choose another "
            f"--models_dir."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all.
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        copy = Path(folder) / place.name
        shutil.copytree(model, copy)
        proof = shutil.copyfile(archive, Path(folder) / "archive")
        proof.replace(place.with_name(f"{place.name}.zip"))
        copy.rename(place)


def _is_same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, takes_arguments=True, needs_tensorflow=False)


if __name__ == "__main__":
    run()
