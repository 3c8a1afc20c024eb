"""Released challenge models: fetched to the cache, copied to where commands look for them."""

import filecmp
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from logit_reg.messages import UsageError
from madry_compat.releases import RELEASES, Release, fetch, sha256_of


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
