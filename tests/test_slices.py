"""Slices of an evaluation: the same rows as one run, joined only where they fit together."""

import csv
import dataclasses
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from commands import assert_one_line_error, command
from test_chain import tiny, tiny_images
from test_report import save_run, save_strong

from logit_reg.attacks import FAB, PGD, Square
from logit_reg.attacks.engine.hyperplane import project_on_hyperplane
from logit_reg.evaluation.ledger import read_ledger
from logit_reg.experiments.evaluations import evaluate_protocols
from logit_reg.experiments.merging import merge_slices
from logit_reg.files import read_json, write_json
from logit_reg.report.runs import load_run
from logit_reg.report.tables import results_table
from logit_reg.threat import ThreatModel

TEST = tiny_images(num=18)
LINF = ThreatModel("linf", 0.05, 0.0, 1.0)
PROTOCOLS = {
    "one": {
        "pgd": PGD(LINF, num_steps=5, early_stop=True),
        "fab": FAB(LINF, num_steps=5),
    },
    "two": {"square": Square(LINF, num_queries=50)},
}
TIMES = {"seconds", "forwards", "backwards"}


def right_labels(test):
    """Labels of which the tiny network gets two of three."""
    predicted = tiny().predict(test.images, verbose=0).argmax(axis=1)
    predicted[::3] = (predicted[::3] + 1) % 4
    return dataclasses.replace(test, labels=predicted)


def evaluate_part(
    folder, begin, end, *, network=None, test=None, seed=0, protocols=PROTOCOLS, **options
):
    test = test or right_labels(TEST)
    return evaluate_protocols(
        network or tiny(),
        test.first(end).without_first(begin),
        protocols,
        folder,
        batch_size=5,
        seed=seed,
        settings={"model": "tiny"},
        show_progress=False,
        **options,
    )[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The whole in "whole", its thirds in "0", "6" and "12"."""
    folder = tmp_path_factory.mktemp("parts")
    evaluate_part(folder / "whole", 0, 18)
    for begin in (0, 6, 12):
        evaluate_part(folder / str(begin), begin, begin + 6)
    return folder


def without(value, names):
    if not isinstance(value, dict):
        return value
    return {key: without(part, names) for key, part in value.items() if key not in names}


def test_joined_slices_are_the_ledger_and_the_result_of_one_run(parts, tmp_path):
    merge_slices([parts / name for name in ("12", "0", "6")], tmp_path / "joined")

    whole, joined = (
        read_json(path / "result.json") for path in (parts / "whole", tmp_path / "joined")
    )
    assert (tmp_path / "joined/ledger.csv").read_bytes() == (
        parts / "whole/ledger.csv"
    ).read_bytes()
    assert without(joined, TIMES | {"slices"}) == without(whole, TIMES)
    assert 0 < joined["robust_accuracy"] < joined["clean_accuracy"] < 1
    attacks = [p["attacks"].values() for p in joined["protocols"].values()]
    expected = [p["attacks"].values() for p in whole["protocols"].values()]
    for mine, theirs in zip(attacks, expected, strict=True):
        assert [a["backwards"] for a in mine] == [a["backwards"] for a in theirs]
    assert [part["first_eval_example"] for part in joined["slices"]] == [0, 6, 12]
    with (
        np.load(parts / "whole/examples.npz") as one,
        np.load(tmp_path / "joined/examples.npz") as b,
    ):
        assert all(np.array_equal(one[name], b[name]) for name in one)
    assert not (tmp_path / "joined/.state").exists()


def test_what_was_joined_is_joined_with_the_rest(parts, tmp_path):
    merge_slices([parts / "0", parts / "6"], tmp_path / "two")
    merge_slices([tmp_path / "two", parts / "12"], tmp_path / "all")
    ledger, result = read_ledger(tmp_path / "all")
    assert len(ledger.index) == 18 and len(result["slices"]) == 3


def test_an_interrupted_slice_goes_on_and_its_name_tells_its_images(parts, tmp_path):
    index = read_ledger(parts / "6")[0].index
    np.testing.assert_array_equal(index, np.arange(6, 12))
    assert evaluate_part(parts / "6", 6, 12)["robust_accuracy"] is not None
    notices = [notice["message"] for notice in read_json(parts / "6/result.json")["notices"]]
    assert any("images 6 to 11" in message for message in notices)


def test_joined_slices_of_a_randomised_network_speak_of_all_images(tmp_path):
    images = keras.Input(TEST.images.shape[1:])
    noisy = keras.layers.GaussianNoise(0.3)(images, training=True)
    network = keras.Model(images, keras.layers.Dense(4)(keras.layers.Flatten()(noisy)))
    test = dataclasses.replace(TEST, labels=network.predict(TEST.images, verbose=0).argmax(axis=1))
    protocols = {"one": {"pgd": PGD(LINF, num_steps=3)}}
    for begin in (0, 6):
        folder = tmp_path / str(begin)
        evaluate_part(
            folder, begin, begin + 6, network=network, test=test, protocols=protocols, eot=4
        )
        result = read_json(folder / "result.json")
        result["notices"].append({"name": "unconfirmed", "message": "some", "value": 2})
        write_json(folder / "result.json", result)
    merge_slices([tmp_path / "0", tmp_path / "6"], tmp_path / "joined")
    joined = read_json(tmp_path / "joined/result.json")
    values: dict[str, list] = {}
    for notice in joined["notices"]:
        values.setdefault(notice["name"], []).append(notice["value"])
    with (tmp_path / "joined/ledger.csv").open() as file:
        shares = [float(row["share_right"]) for row in csv.DictReader(file)]
    assert len(shares) == 12 and values["repeated_passes"] == [pytest.approx(np.mean(shares))]
    own = [
        notice["value"]
        for begin in (0, 6)
        for notice in read_json(tmp_path / str(begin) / "result.json")["notices"]
        if notice["name"] == "unconfirmed"
    ]
    assert values["unconfirmed"] == [sum(own)]


def edited(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "edited")
    path = tmp_path / "edited/ledger.csv"
    path.write_text(path.read_text().replace(",1,", ",0,", 1))
    return tmp_path / "edited"


def other(tmp_path, begin=6, end=12, **changes):
    evaluate_part(tmp_path / "other", begin, end, **changes)
    return tmp_path / "other"


OTHER_START = np.concatenate([1 - TEST.images[:1], TEST.images[1:]])
REFUSED = {
    "gap": (lambda t: None, "images 6 to 11 are missing between"),
    "overlap": (lambda t: other(t, 5, 12), "image 5 is in"),
    "seed": (lambda t: other(t, seed=1), "random_seed 0 -> 1"),
    "network": (lambda t: other(t, network=tiny(1)), "other network"),
    "protocol": (lambda t: other(t, protocols={"one": PROTOCOLS["one"]}), "attacks "),
    "settings": (
        lambda t: other(t, protocols={**PROTOCOLS, "two": {"square": Square(LINF, num_queries=9)}}),
        "num_queries 50 -> 9",
    ),
    "data": (
        lambda t: other(t, test=dataclasses.replace(right_labels(TEST), images=OTHER_START)),
        "the images before this slice are not those of",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_slices_that_do_not_fit_are_refused(what, parts, tmp_path):
    make, words = REFUSED[what]
    middle = make(tmp_path)
    folders = [parts / "0", *([middle] if middle else []), parts / "12"]
    with pytest.raises(ValueError, match=words):
        merge_slices(folders, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_a_changed_ledger_and_a_missing_start_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="not the file that result.json was made with"):
        merge_slices([parts / "0", edited(parts / "6", tmp_path)], tmp_path / "joined")
    with pytest.raises(ValueError, match="images 0 to 5 are missing"):
        merge_slices([parts / "6", parts / "12"], tmp_path / "joined")


def test_what_machines_differ_in_is_told_and_kept(parts, tmp_path):
    shutil.copytree(parts / "6", tmp_path / "6")
    result = read_json(tmp_path / "6/result.json")
    result["settings"]["versions"] = {"python": "9"}
    write_json(tmp_path / "6/result.json", result)

    joined = merge_slices([parts / "0", tmp_path / "6"], tmp_path / "joined")

    assert [part["versions"] == {"python": "9"} for part in joined["slices"]] == [False, True]
    assert "differ in versions" in joined["notices"][-1]["message"]


def test_the_line_search_of_an_image_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    points, normals = (rng.random((64, 40)).astype(np.float32) for _ in range(2))
    values = (rng.normal(size=64) * 3).astype(np.float32)
    together = project_on_hyperplane(points, normals - 0.5, values, LINF)
    for i in range(64):
        row = slice(i, i + 1)
        alone = project_on_hyperplane(points[row], normals[row] - 0.5, values[row], LINF)
        tf.debugging.assert_equal(alone, together[row])


# The report


def as_slice(folder, begin):
    """Make an evaluation one of the images from `begin` on."""
    result = read_json(folder / "result.json")
    write_json(folder / "result.json", {**result, "first_example": begin})


def test_a_table_names_the_images_of_a_slice_and_keeps_it_apart(tmp_path):
    for name in ("a", "b"):
        save_run(tmp_path / name, name)
        save_strong(tmp_path / name / "strong", 10, 20)
    save_strong(tmp_path / "b/late", 5, 20, indices=np.arange(20, 40))
    as_slice(tmp_path / "b/late", 20)

    table = results_table([load_run(tmp_path / name) for name in ("a", "b")])

    columns = [" ".join(column.split()) for column in table.columns]
    place = next(i for i, name in enumerate(columns) if "images 20 to 39" in name)
    strong = next(i for i, name in enumerate(columns) if name.startswith("strong attack"))
    assert [row[place][:4] for row in table.rows] == ["–", "25.0"]
    assert [row[strong][:4] for row in table.rows] == ["50.0", "50.0"]


def test_a_table_leaves_out_what_was_joined(parts, tmp_path):
    run = tmp_path / "run"
    for name in ("0", "6", "12"):
        shutil.copytree(parts / name, run / name)
    merge_slices([run / name for name in ("0", "6", "12")], run / "joined")
    table = results_table([load_run(run)])
    assert "images" not in " ".join(table.columns)
    assert "n = 18" in " ".join(table.columns) and "n = 6" not in " ".join(table.columns)


# The commands


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    tiny().save(folder / "tiny.keras")
    test = right_labels(TEST)
    np.savez(folder / "images.npz", images=test.images, labels=test.labels)
    return folder


OWN = ("--model=tiny.keras", "--data=images.npz", "--bounds=0,1", "--epsilon=0.05", "--num_steps=3")


@pytest.mark.slow
def test_the_command_evaluates_and_joins_slices_of_ones_own_images(own):
    assert command("eval_challenge", *OWN, "--output_dir=whole", cwd=own).returncode == 0
    for begin in (0, 9):
        flags = (f"--first_eval_example={begin}", "--num_eval_examples=9")
        done = command("eval_challenge", *OWN, *flags, cwd=own)
        assert done.returncode == 0, done.stderr
    slices = sorted((own / "runs/evaluations").glob("*/*"))
    assert [path.name.rpartition("-n9")[2] for path in slices] == ["", "-from9"]
    joined = command(
        "eval_challenge", f"--merge={slices[1]},{slices[0]}", "--output_dir=j", cwd=own
    )
    assert joined.returncode == 0, joined.stderr
    assert (own / "j/ledger.csv").read_text() == (own / "whole/ledger.csv").read_text()
    report = command("report", "--runs=j", cwd=own)
    assert report.returncode == 0 and "pgd" in report.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((*OWN, "--first_eval_example=18"), "--first_eval_example=18: there are 18 images"),
        (("--merge=a,b",), "--merge=a: no such file or folder"),
        (("--merge=own,own",), "--merge needs --output_dir"),
        (("--merge=a", "--output_dir=j", "--store_adv_path=a.npy"), "ledgers hold no images"),
        (("--merge=a", "--output_dir=j", "--random_seed=1"), "without --merge"),
    ],
)
def test_a_slip_with_slices_is_one_line(flags, words, own):
    if "needs" not in words and flags[0] == "--merge=a,b":
        flags = (*flags, "--output_dir=j")
    assert_one_line_error(command("eval_challenge", *flags, cwd=own), words)
