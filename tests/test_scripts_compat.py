"""Challenge files on the command line: export, releases, submissions, configs, going on."""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from commands import assert_one_line_error, command
from test_data import digits, write_idx, write_test_batch
from test_tf1_checkpoints import assert_same_values, keep_away_from_kinks, read_bundle
from tf1_challenge_graphs import mnist_graph

from logit_reg.attacks import FGSM, PGD, Restarts
from logit_reg.evaluation.protocols import threat_of
from logit_reg.experiments import evaluations
from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.evaluations import evaluate_protocols, print_result, published_beside
from logit_reg.experiments.exports import export_model
from logit_reg.experiments.runs import train_run
from logit_reg.experiments.sources import find_model
from logit_reg.experiments.submissions import score_files
from logit_reg.messages import UsageError
from logit_reg.training.feeding import BatchOrder
from madry_compat.archives import unpack
from madry_compat.challenges import CIFAR10, IMAGE_SETS, MNIST
from madry_compat.config import load_config
from madry_compat.data import load, to_pixels
from madry_compat.networks import mnist_cnn
from madry_compat.releases import Release, identify_release, pack_release, sha256_of
from madry_compat.submissions import SubmissionError
from madry_compat.tf1_checkpoints import (
    has_training_state,
    load_network,
    read_step,
    save_network,
    tf1_names,
)

STEPS = 4


@pytest.fixture(scope="module")
def digits_5k(tmp_path_factory):
    return {
        split: load("mnist_5k", split, cache_dir=tmp_path_factory.mktemp("cache"))
        for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_5k):
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    settings = resolve_settings(
        {"dataset": "mnist_5k", "max_num_training_steps": STEPS, "training_batch_size": 20}
    )
    train = digits_5k["train"]
    train_run(settings, train.images, train.labels, folder, show_progress=False)
    return folder


def evaluate_cheaply(network, test, output_dir, dataset="mnist_5k", **settings):
    """One ledger of five protocols, each so cheap that only its name is that of the real one."""
    threat = threat_of("linf", MNIST)
    protocols = {
        "paper-fgsm": {"fgsm-xent": FGSM(threat, "xent"), "fgsm-cw": FGSM(threat, "cw")},
        "madry-mnist": {"madry-pgd40-xent": PGD(threat, "xent", 3, 0.1)},
        "paper-restarts": {"restarts": Restarts(PGD(threat, "cw", 3, 0.1), 2)},
        "paper-l2": {"l2": Restarts(PGD(threat_of("l2", MNIST), "xent", 3, 5.0), 2)},
        "autoattack": {"autoattack": PGD(threat, "cw", 5, 0.1)},
    }
    return evaluate_protocols(
        network,
        test,
        protocols,
        output_dir,
        batch_size=50,
        seed=1,
        settings=settings,
        show_progress=False,
    )


@pytest.fixture(scope="module")
def few(digits_5k):
    test = digits_5k["test"]
    images = to_pixels(test.images[:50], "mnist_5k")
    return evaluations.TestImages("mnist_5k", images, test.labels[:50], bounds=(0.0, 1.0))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory, run, few):
    folder = tmp_path_factory.mktemp("ledger")
    evaluate_cheaply(find_model(str(run)).network, few, folder)
    return folder


def rows_of(folder):
    with (folder / "ledger.csv").open() as file:
        return list(csv.DictReader(file))


def share(rows, *columns):
    return 100 * np.mean([all(row[column] == "1" for column in columns) for row in rows])


# Export


def test_an_exported_run_is_the_same_network_and_can_be_trained_on(run, few, tmp_path):
    model = find_model(str(run))
    export_model(model, tmp_path / "bundle")
    exported = find_model(str(tmp_path / "bundle"))
    np.testing.assert_array_equal(exported.network(few.images), model.network(few.images))
    assert read_step(tmp_path / "bundle") == STEPS
    assert has_training_state(tmp_path / "bundle")
    files = {path.name for path in (tmp_path / "bundle").iterdir()}
    data = f"checkpoint-{STEPS}.data-00000-of-00001"
    assert files == {"checkpoint", f"checkpoint-{STEPS}.index", data} | {
        "config.json",
        "model_card.json",
    }
    # The slots are those of the run: exporting the export changes no byte.
    export_model(exported, tmp_path / "again")
    for name in ("checkpoint", f"checkpoint-{STEPS}.index", data):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes()
    own = f"{run}/{data}"
    assert (tmp_path / "bundle" / data).read_bytes() == Path(own).read_bytes()


def test_slots_can_be_left_out(run, tmp_path):
    export_model(find_model(str(run)), tmp_path, slots=False)
    assert read_step(tmp_path) == STEPS
    assert not has_training_state(tmp_path)


def test_a_keras_file_has_no_slots_to_export(run, tmp_path):
    model = find_model(str(run / "model.keras"))
    with pytest.raises(UsageError, match="--slots: this model has no optimiser's state"):
        export_model(model, tmp_path / "bundle", slots=True)
    assert not (tmp_path / "bundle").exists()
    export_model(model, tmp_path / "bundle", step=7)
    assert read_step(tmp_path / "bundle") == 7
    assert not has_training_state(tmp_path / "bundle")


@pytest.mark.slow
def test_a_bundle_is_evaluated_like_the_run_that_it_came_from(run, ledger, tmp_path):
    export_model(find_model(str(run)), tmp_path / "bundle")
    process = command(
        "eval_challenge",
        "--model_dir=bundle",
        "--dataset=mnist_5k",
        "--num_eval_examples=50",
        "--num_steps=1",
        "--output_dir=out",
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    ours, theirs = rows_of(ledger), rows_of(tmp_path / "out")
    columns = ("index", "label", "clean_prediction")
    assert [[row[c] for c in columns] for row in theirs] == [
        [row[c] for c in columns] for row in ours
    ]
    keys = [
        json.loads((folder / "result.json").read_text())["settings"]["network_sha256"]
        for folder in (ledger, tmp_path / "out")
    ]
    assert keys[0] == keys[1]


def test_an_export_never_lands_among_other_checkpoints(run, tmp_path):
    model = find_model(str(run))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match="holds the model itself"):
        export_model(model, run)
    save_network(mnist_cnn(), tmp_path, 99)
    with pytest.raises(UsageError, match="holds checkpoint-99"):
        export_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_whose_checkpoint_is_of_another_step_is_refused(run, tmp_path):
    for name in ("run.json", "model.keras"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    save_network(mnist_cnn(), tmp_path, STEPS)
    with pytest.raises(UsageError, match=r"model\.keras and the newest checkpoint differ"):
        export_model(find_model(str(tmp_path)), tmp_path / "bundle")


def test_the_archive_has_the_layout_of_a_release_and_always_the_same_bytes(
    run, few, tmp_path, capsys
):
    model = find_model(str(run))
    for place in ("a", "b"):
        export_model(model, tmp_path / place, archive=tmp_path / place / "tiny.zip")
    archive = tmp_path / "a" / "tiny.zip"
    assert archive.read_bytes() == (tmp_path / "b" / "tiny.zip").read_bytes()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert f"SHA256 hash: {digest}\n" in capsys.readouterr().out

    unpack(archive, tmp_path / "unpacked")
    inside = tmp_path / "unpacked" / "models" / "tiny"
    assert sorted(path.name for path in inside.iterdir()) == [
        "checkpoint",
        f"checkpoint-{STEPS}.data-00000-of-00001",
        f"checkpoint-{STEPS}.index",
        "config.json",
    ]
    network = load_network(tmp_path / "unpacked")
    np.testing.assert_array_equal(network(few.images), model.network(few.images))
    config = load_config(inside / "config.json")
    assert (config.model_dir, config.training_batch_size) == ("models/tiny", 20)
    assert config.max_num_training_steps == STEPS
    card = json.loads((tmp_path / "a" / "model_card.json").read_text())
    assert (card["name"], card["sha256"]) == ("tiny", digest)


def test_a_name_that_is_no_file_name_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="a model's name consists of letters"):
        pack_release(tmp_path / "x.zip", run, "../x")
    assert not (tmp_path / "x.zip").exists()


# The model card


def test_the_numbers_of_a_card_are_those_of_the_ledger(run, ledger, tmp_path):
    export_model(find_model(str(run)), tmp_path, evaluations=[ledger], link="https://example.org")
    card = json.loads((tmp_path / "model_card.json").read_text())
    rows = rows_of(ledger)
    clean = 100 * np.mean([row["broken_by"] != "clean" for row in rows])
    fgsm = share(rows, "correct_fgsm-xent", "correct_fgsm-cw")
    pgd = share(rows, "correct_madry-pgd40-xent")
    assert card["clean_acc"] == pytest.approx(clean)
    assert card["reported"] == pytest.approx(min(fgsm, pgd))
    assert card["autoattack_acc"] == pytest.approx(share(rows, "correct_autoattack"))
    # The l2 protocol is of another threat model.
    protocols = [entry["protocol"] for entry in card["evaluations"]]
    assert protocols == ["paper-fgsm", "madry-mnist", "paper-restarts", "autoattack"]
    assert (card["eps"], card["norm"], card["dataset"]) == (0.3, "Linf", "mnist_5k")
    assert card["additional_data"] is False
    assert card["link"] == "https://example.org"


def test_a_card_without_ledgers_has_no_numbers(run, tmp_path):
    export_model(find_model(str(run / "model.keras")), tmp_path)
    card = json.loads((tmp_path / "model_card.json").read_text())
    assert card["clean_acc"] is card["reported"] is card["autoattack_acc"] is None
    assert card["evaluations"] == []
    assert card["additional_data"] is None


def test_the_card_of_an_unfinished_run_says_so(run, tmp_path):
    model = find_model(str(run))
    export_model(model, tmp_path / "whole")
    longer = dataclasses.replace(model.run, max_num_training_steps=STEPS + 6)
    export_model(dataclasses.replace(model, run=longer), tmp_path / "part")
    notices = [
        json.loads((tmp_path / name / "model_card.json").read_text())["notices"]
        for name in ("whole", "part")
    ]
    assert notices[0] == []
    assert f"{STEPS} of {STEPS + 6} training steps" in notices[1][0]["message"]


def test_a_card_takes_no_ledger_of_another_network(run, few, tmp_path):
    evaluate_cheaply(mnist_cnn(), few, tmp_path / "other")
    with pytest.raises(UsageError, match="evaluates the network .*, not this one"):
        export_model(find_model(str(run)), tmp_path / "out", evaluations=[tmp_path / "other"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dataset": "mnist"}, "was made on 'mnist', this card is for 'mnist_5k'"),
        ({"contaminated": True}, "measured on images that the network was trained on"),
        ({"clean_accuracy": 0.99}, "changed by hand"),
    ],
)
def test_a_card_takes_no_ledger_that_says_nothing(run, ledger, tmp_path, change, expected):
    result = json.loads((ledger / "result.json").read_text())
    result["settings"] |= {k: v for k, v in change.items() if k == "contaminated"}
    result |= {k: v for k, v in change.items() if k != "contaminated"}
    (tmp_path / "ledger.csv").write_bytes((ledger / "ledger.csv").read_bytes())
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=expected):
        export_model(find_model(str(run)), tmp_path / "out", evaluations=[tmp_path])


# Releases


@pytest.fixture
def release(run, tmp_path):
    """A made-up release in a cache, and the models known by the hash of their archives."""
    cache = tmp_path / "cache" / "mnist"
    export_model(find_model(str(run)), tmp_path / "bundle", archive=cache / "tiny.zip")
    unpack(cache / "tiny.zip", cache / "tiny")
    return cache, {"mnist/tiny": Release("", sha256_of(cache / "tiny.zip"))}


def test_a_fetched_release_is_recognised_by_its_archive(release):
    cache, releases = release
    prefix = cache / "tiny" / "models" / "tiny" / f"checkpoint-{STEPS}"
    for path in (cache / "tiny", prefix.parent, prefix):
        assert identify_release(path, releases) == "mnist/tiny"
    assert identify_release(cache / "tiny", {"mnist/tiny": Release("", "0" * 64)}) is None
    assert identify_release(cache / "tiny") is None


def test_a_release_unpacked_by_the_challenges_script_is_recognised(release, tmp_path):
    cache, releases = release
    unpack(cache / "tiny.zip", tmp_path / "challenge")
    (tmp_path / "challenge" / "tiny.zip").write_bytes((cache / "tiny.zip").read_bytes())
    assert identify_release(tmp_path / "challenge" / "models" / "tiny", releases) == "mnist/tiny"


def test_changed_weights_are_no_release(release):
    cache, releases = release
    data = cache / "tiny" / "models" / "tiny" / f"checkpoint-{STEPS}.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    assert identify_release(cache / "tiny", releases) is None


def test_another_checkpoint_in_the_folder_of_a_release_is_no_release(release):
    cache, releases = release
    save_network(mnist_cnn(), cache / "tiny" / "models" / "tiny", STEPS + 1)
    assert identify_release(cache / "tiny", releases) is None


@pytest.mark.shared
def test_the_released_secret_model_is_recognised_by_its_index(shared, tmp_path):
    index = (shared / "reference" / "madry_mnist_secret.index").read_bytes()
    (tmp_path / "checkpoint-24900.index").write_bytes(index)
    assert identify_release(tmp_path) == "mnist/secret"
    (tmp_path / "checkpoint-24900.index").write_bytes(bytes([index[0] ^ 1]) + index[1:])
    assert identify_release(tmp_path) is None


def make_dataset(folder, monkeypatch, count=10_000):
    """A made-up canonical MNIST test set, in random order."""
    images, labels = digits(count)
    for stem, digest in write_idx(folder, "test", images, labels).items():
        monkeypatch.setitem(IMAGE_SETS["mnist"].files["test"], stem, digest)
    return load("mnist", "test", folder, cache_dir=folder / "cache")


def test_published_numbers_stand_beside_those_of_the_release_only(
    few, run, tmp_path, monkeypatch, capsys
):
    test = make_dataset(tmp_path, monkeypatch, 20)
    published = published_beside("mnist/secret", test)
    assert published["madry-mnist-100/xent"] == 0.9252
    threat = threat_of("linf", MNIST)
    attack = PGD(threat, "xent", 1, 0.1)
    names = ("madry-pgd100-xent", "madry-pgd100-cw")
    _, result = evaluate_protocols(
        find_model(str(run)).network,
        few,
        {"madry-mnist-100": dict.fromkeys(names, attack), "autoattack": {"autoattack": attack}},
        tmp_path / "out",
        batch_size=50,
        seed=0,
        settings={},
        show_progress=False,
    )
    capsys.readouterr()
    print_result(result, published)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["attack"].endswith("last iterate  published")
    assert lines["clean"].endswith(" 98.53%")
    assert lines["madry-pgd100-xent"].endswith(" 92.52%")
    assert lines["madry-pgd100-cw"].endswith(" 93.04%")
    assert lines["autoattack"].endswith(" 88.50%")
    assert lines["worst"].count("%") == 1

    print_result(result, published_beside(None, test))
    assert "published" not in capsys.readouterr().out


def test_published_numbers_do_not_stand_beside_another_test_set(digits_5k, capsys):
    assert published_beside("mnist/secret", digits_5k["test"]) == {}
    assert "published numbers are for the original test set" in capsys.readouterr().out


# Fetching


def fetch_without_tensorflow(*arguments, cwd):
    code = (
        "import sys; sys.modules['tensorflow'] = None; "
        "from logit_reg.commands.fetch_model import run; run()"
    )
    environment = os.environ | {"LOGIT_REG_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_model_without_a_published_hash_is_called_unverified(release, tmp_path):
    archive = (release[0] / "tiny.zip").read_bytes()
    for name in ("natural", "adv_trained"):
        place = tmp_path / "cache" / "cifar10" / f"{name}.zip"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(archive)
    process = fetch_without_tensorflow(
        "cifar10/natural", "--name=cifar10/adv_trained", cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    digest = hashlib.sha256(archive).hexdigest()
    for name in ("natural", "adv_trained"):
        assert f"cifar10/{name}: models/{name}\n" in process.stdout
        assert (tmp_path / "models" / name / "checkpoint").is_file()
    assert process.stdout.count(f"SHA256 hash: {digest} (unverified: ") == 2
    again = fetch_without_tensorflow("cifar10/natural", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "--model_dir=models/natural --dataset=cifar10 --data_dir=FOLDER" in again.stdout
    (tmp_path / "models" / "natural" / "checkpoint").write_text("of another model")
    other = fetch_without_tensorflow("cifar10/natural", cwd=tmp_path)
    assert other.returncode == 2
    assert "models/natural holds something else than this model" in other.stderr


def test_a_model_with_the_wrong_hash_is_refused(release, tmp_path):
    place = tmp_path / "cache" / "mnist" / "secret.zip"
    place.write_bytes((release[0] / "tiny.zip").read_bytes())
    process = fetch_without_tensorflow("mnist/secret", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("error: secret.zip: sha256 ")
    assert not (tmp_path / "cache" / "mnist" / "secret").exists()


@pytest.mark.parametrize("arguments", [["mnist/public"], [], ["mnist/secret", "--name=l2"]])
def test_unknown_models_are_a_usage_error(tmp_path, arguments):
    process = fetch_without_tensorflow(*arguments, cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith("error: name models to fetch from mnist/natural, ")
    assert not (tmp_path / "cache").exists()


# Going on from a challenge's checkpoint


def test_training_goes_on_as_the_challenge_would(tmp_path):
    """From the checkpoint of the original graph with its Adam slots, on the same batches."""
    # Noise: the flat regions of digits are ties of max-pooling, where a gradient is chance.
    stored, labels = digits(1000, shape=(28, 28, 1))
    images = to_pixels(stored, "mnist_5k")
    # The batches of a run depend on its seed and step alone.
    order = BatchOrder(len(images), 50, seed=3).batches(0)
    batches = [
        (images[batch].reshape(50, 784), labels[batch]) for batch in itertools.islice(order, 8)
    ]
    graph = mnist_graph()
    with graph.initialised() as session:
        keep_away_from_kinks(graph, session)
        graph.train(session, batches[:3])
        prefix = graph.save(session, tmp_path)
        graph.train(session, batches[3:])
        end = graph.save(session, tmp_path / "end")

    settings = resolve_settings(
        {
            "dataset": "mnist_5k",
            "adversary": "none",
            "init_checkpoint": prefix,
            "max_num_training_steps": 8,
            "random_seed": 3,
        },
        is_challenge_config=True,
    )
    run = tmp_path / "run"
    assert train_run(settings, stored, labels, run, show_progress=False).step == 8
    assert read_step(run) == 8
    assert_same_values(read_bundle(run / "checkpoint-8"), read_bundle(end))
    with (run / "log.csv").open() as file:
        assert next(csv.DictReader(file))["step"] == "8"


def test_going_on_with_another_network_is_a_clear_error(run, tmp_path):
    settings = resolve_settings(
        {"dataset": "cifar10", "width": 1, "init_checkpoint": str(run), "training_batch_size": 2}
    )
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="holds another network than this run's; check --dataset"):
        train_run(settings, images, labels, tmp_path / "run", show_progress=False)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_weights_alone_start_at_step_0(run, few, tmp_path, digits_5k):
    export_model(find_model(str(run)), tmp_path / "bundle", slots=False)
    settings = resolve_settings(
        {
            "dataset": "mnist_5k",
            "init_checkpoint": str(tmp_path / "bundle"),
            "max_num_training_steps": 1,
            "training_batch_size": 20,
            # Too small a rate to leave the weights that it starts from.
            "step_size_schedule": ((0, 1e-30),),
        }
    )
    train = digits_5k["train"]
    train_run(settings, train.images, train.labels, tmp_path / "run", show_progress=False)
    assert read_step(tmp_path / "run") == 1
    np.testing.assert_array_equal(
        load_network(tmp_path / "run")(few.images), load_network(run)(few.images)
    )


@pytest.mark.slow
def test_the_challenges_own_training_goes_on_with_nothing_but_its_config(run, tmp_path):
    export_model(find_model(str(run)), tmp_path / "bundle")
    config = MNIST_CONFIG.replace("100000", str(STEPS + 1))
    (tmp_path / "config.json").write_text(config)
    flags = ["--dataset=mnist_5k", "--init_checkpoint=bundle", "--noprogress"]
    process = command("train", "--config=config.json", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "models" / "secret"
    assert read_step(folder) == STEPS + 1
    settings = json.loads((folder / "run.json").read_text())["settings"]
    expected = {"loss_reduction": "sum", "training_batch_size": 50, "adversary": "pgd"}
    expected |= {"num_steps": 40, "step_size": 0.01, "epsilon": 0.3, "random_seed": 4557077}
    assert settings == settings | expected


@pytest.mark.slow
def test_a_start_from_a_checkpoint_is_told_and_one_that_cannot_be_leaves_no_run(run, tmp_path):
    export_model(find_model(str(run)), tmp_path / "slots")
    save_network(mnist_cnn(), tmp_path / "weights", 7)
    (tmp_path / "empty").mkdir()

    def train(start, steps):
        flags = ["--dataset=mnist_5k", "--model_dir=run", "--training_batch_size=4"]
        flags += [f"--init_checkpoint={start}", f"--max_num_training_steps={steps}"]
        return command("train", *flags, "--noprogress", cwd=tmp_path)

    refused = {
        "nowhere": "no such checkpoint",
        "empty": "no checkpoint inside",
        "slots": f"is of step {STEPS} already, so that nothing is left to train",
    }
    for start, words in refused.items():
        assert_one_line_error(train(start, STEPS), words)
        assert not (tmp_path / "run").exists()
    told = {
        "weights": "start: step 0 with the weights of weights, which holds no optimiser's state",
        "slots": f"start: step {STEPS} of slots, with its optimiser's state",
    }
    for start, words in told.items():
        process = train(start, STEPS + 1)
        assert process.returncode == 0, process.stderr
        assert words in process.stdout.splitlines()
        shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_training_in_the_folder_of_a_challenge_checkpoint_goes_on_from_it(run, tmp_path):
    export_model(find_model(str(run)), tmp_path / "challenge")
    (tmp_path / "challenge" / "config.json").write_text(MNIST_CONFIG)
    flags = ["--dataset=mnist_5k", "--model_dir=challenge", "--noprogress"]
    flags += ["--training_batch_size=8", f"--max_num_training_steps={STEPS + 2}"]
    for _ in range(2):  # the same command again finds the run finished
        process = command("train", *flags, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        with (tmp_path / "challenge" / "log.csv").open() as file:
            steps = [int(line.split(",")[0]) for line in file.readlines()[1:]]
        assert steps == [STEPS + 2]
    assert "goes on from it" not in process.stderr
    assert (tmp_path / "challenge" / "config.json").read_text() == MNIST_CONFIG


# Transfer


@pytest.mark.slow
def test_attacking_one_model_and_scoring_on_another_is_one_command(run, few, tmp_path):
    export_model(find_model(str(run)), tmp_path / "target")
    process = command(
        "attack",
        f"--model_dir={run}",
        "--target_model_dir=target",
        "--dataset=mnist_5k",
        "--num_eval_examples=30",
        "--num_steps=2",
        "--step_size=0.2",
        "--store_adv_path=moved.npy",
        "--noprogress",
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    adversarial = np.load(tmp_path / "moved.npy", allow_pickle=False)
    assert np.abs(adversarial - few.images[:30]).max() <= 0.3 + 1e-6
    predicted = load_network(tmp_path / "target")(adversarial).numpy().argmax(axis=1)
    accuracy = 100 * np.mean(predicted == few.labels[:30])
    for role in ("attacked", "target"):
        (line,) = [x for x in process.stdout.splitlines() if x.startswith(f"{role} ")]
        assert f"on these images {accuracy:.2f}% (30 of mnist_5k, pgd2-xent, seed 0)" in line


# Submissions


def first_pixels(images):
    """Logits that a test can read off: the first ten pixels of an image."""
    return tf.reshape(images, (-1, int(np.prod(images.shape[1:]))))[:, :10]


@pytest.fixture
def test_set(tmp_path, monkeypatch):
    return make_dataset(tmp_path, monkeypatch)


def score(paths, test, tmp_path, challenge=MNIST):
    return score_files(
        first_pixels,
        paths,
        test,
        challenge,
        epsilon=None,
        batch_size=1000,
        pred_path=tmp_path / "pred.npy",
    )


def good_submission(test):
    """Every second image is moved by epsilon, all within the pixel range."""
    images = to_pixels(test.images, test.name).reshape(len(test.images), -1)
    rng = np.random.default_rng(0)
    noise = 0.3 * rng.choice([-1, 1], images.shape).astype(np.float32)
    noise[::2] = 0
    return np.clip(images + noise, 0, 1)


def a_square(images):
    return images.reshape(-1, 28, 28)


def integers(images):
    return (255 * images).astype(np.uint8)


def not_a_number(images):
    images[17, 3] = np.nan
    return images


def too_far(images):
    natural = images[0].copy()
    images[0] = np.where(natural < 0.5, natural + 0.301, natural - 0.301)
    return images


def pickled_objects(images):
    return np.array([None, *images[:3]], dtype=object)


def one_row_short(images):
    return images[:-1]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (a_square, r"shape \(10000, 28, 28\), expected \(10000, 784\).*flattened"),
        (integers, "dtype uint8, expected float32. Integers wrap around"),
        (not_a_number, "image 17 has a NaN or infinite pixel"),
        (too_far, r"maximum perturbation found: 0\.301 \(image 0"),
        (pickled_objects, "holds pickled objects"),
        (one_row_short, r"shape \(9999, 784\), expected \(10000, 784\).*all 10000 test images"),
        (None, "truncated, .* bytes where its header promises"),
    ],
)
def test_a_bad_submission_is_refused_and_pred_npy_stays(test_set, tmp_path, spoil, expected):
    (tmp_path / "pred.npy").write_bytes(b"from before")
    good, bad = tmp_path / "good.npy", tmp_path / "bad.npy"
    images = good_submission(test_set)
    np.save(good, images)
    if spoil is None:
        bad.write_bytes(good.read_bytes()[:-100])
    else:
        np.save(bad, spoil(images), allow_pickle=True)
    # Also where a good one came first.
    for paths in ([bad], [good, bad]):
        with pytest.raises(SubmissionError, match=expected) as raised:
            score(paths, test_set, tmp_path)
        assert "bad.npy" in str(raised.value)
    assert (tmp_path / "pred.npy").read_bytes() == b"from before"


def test_two_submissions_give_the_worst_case_of_each_example(test_set, tmp_path, capsys):
    natural = to_pixels(test_set.images, "mnist").reshape(10_000, 784)
    first, second = good_submission(test_set), natural.copy()
    # Where the first file leaves the images alone, the second moves them.
    second[::2] = np.clip(natural[::2] + 0.3 * (natural[::2] < 0.5), 0, 1)
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, images in zip(files, (first, second), strict=True):
        np.save(path, images)

    correct = [x[:, :10].argmax(axis=1) == test_set.labels for x in (first, second)]
    both = np.mean(correct[0] & correct[1])
    assert both < min(correct[0].mean(), correct[1].mean())
    assert score(files, test_set, tmp_path) == both
    out = capsys.readouterr().out
    assert f"{files[0]}: {100 * correct[0].mean():.2f}%" in out
    assert out.endswith(f"Accuracy: {100 * both:.2f}%\nOutput saved at {tmp_path / 'pred.npy'}\n")
    predictions = np.load(tmp_path / "pred.npy", allow_pickle=False)
    assert predictions.dtype == np.int64
    assert ((predictions == test_set.labels) == (correct[0] & correct[1])).all()


def test_submissions_for_cifar10_need_the_original_pickle(tmp_path, monkeypatch):
    images, labels = digits(10_000, shape=(32, 32, 3))
    digest = write_test_batch(tmp_path / "cifar-10-batches-py", images, labels)
    submission = np.clip(images.astype(np.float32) + 8, 0, 255)
    np.save(tmp_path / "attack.npy", submission)
    paths = [tmp_path / "attack.npy"]

    copy = load("cifar10", "test", tmp_path, cache_dir=tmp_path / "cache")
    with pytest.raises(SubmissionError, match="original test set in its original order"):
        score(paths, copy, tmp_path, CIFAR10)
    assert not (tmp_path / "pred.npy").exists()

    monkeypatch.setitem(IMAGE_SETS["cifar10"].files["test"], "test_batch", digest)
    original = load("cifar10", "test", tmp_path, cache_dir=tmp_path / "cache")
    expected = np.mean(submission.reshape(10_000, -1)[:, :10].argmax(axis=1) == labels)
    assert score(paths, original, tmp_path, CIFAR10) == expected


@pytest.mark.slow
def test_a_refused_submission_is_status_2(run, tmp_path):
    (tmp_path / "pred.npy").write_bytes(b"from before")
    with (tmp_path / "attack.npy").open("wb") as file:
        pickle.dump(None, file)
    process = command(
        "eval_challenge",
        f"--model_dir={run}",
        "--dataset=mnist_5k",
        "--attack_file=attack.npy",
        cwd=tmp_path,
    )
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert line.startswith("error: a submission perturbs the original test set")
    assert (tmp_path / "pred.npy").read_bytes() == b"from before"


# Configs

MNIST_CONFIG = """{
  "_comment": "===== MODEL CONFIGURATION =====",
  "model_dir": "models/secret",
  "_comment": "===== TRAINING CONFIGURATION =====",
  "random_seed": 4557077, "max_num_training_steps": 100000, "num_output_steps": 100,
  "num_summary_steps": 100, "num_checkpoint_steps": 300, "training_batch_size": 50,
  "_comment": "===== EVAL CONFIGURATION =====",
  "num_eval_examples": 10000, "eval_batch_size": 200, "eval_on_cpu": true,
  "_comment": "=====ADVERSARIAL EXAMPLES CONFIGURATION=====",
  "epsilon": 0.3, "k": 40, "a": 0.01, "random_start": true, "loss_func": "xent",
  "store_adv_path": "attack.npy"
}"""
CIFAR10_CONFIG = """{
  "_comment": "===== MODEL CONFIGURATION =====",
  "model_dir": "models/a_very_robust_model",
  "_comment": "===== DATASET CONFIGURATION =====",
  "data_path": "cifar10_data",
  "_comment": "===== TRAINING CONFIGURATION =====",
  "tf_random_seed": 451760341, "np_random_seed": 216105420, "max_num_training_steps": 80000,
  "num_output_steps": 100, "num_summary_steps": 100, "num_checkpoint_steps": 300,
  "training_batch_size": 128,
  "step_size_schedule": [[0, 0.1], [40000, 0.01], [60000, 0.001]],
  "weight_decay": 0.0002, "momentum": 0.9,
  "_comment": "===== EVAL CONFIGURATION =====",
  "num_eval_examples": 10000, "eval_batch_size": 100, "eval_on_cpu": false,
  "_comment": "=====ADVERSARIAL EXAMPLES CONFIGURATION=====",
  "epsilon": 8.0, "num_steps": 10, "step_size": 2.0, "random_start": true,
  "loss_func": "xent", "store_adv_path": "attack.npy"
}"""
# What the challenge's train.py does that its config.json does not say, and what of this project
# must then be off.
OFF = {
    "reg": "none",
    "beta": 0.0,
    "gamma": 0.0,
    "smoothing": 0.0,
    "omega": 0.0,
    "sigma": 0.0,
    "clip_noise": True,
    "replays": 1,
    "free_gradient": "perturbation",
    "ramp_steps": 0,
    "init_checkpoint": "",
    "keep_checkpoint_steps": (),
    "num_output_steps": 100,
    "num_summary_steps": 100,
    "num_checkpoint_steps": 300,
    "adversary": "pgd",
    "random_start": True,
    "loss_func": "xent",
    "attack_batch_norm": "training",
    "train_dtype": "float32",
    "max_to_keep": 3,
    "matrix_norm": "frobenius",
    "centre": "zero",
    "beta_schedule": ((0, 1.0),),
    "beta_ramp_steps": 0,
    "start_noise": 0.0,
    "learning_rate_schedule": "steps",
    "ema": False,
    "ema_momentum": 0.999,
    "num_robustness_steps": -1,
    "stop_on_overfitting": False,
}
MNIST_TRAINING = OFF | {
    "dataset": "mnist",
    "loss_reduction": "sum",
    "epsilon": 0.3,
    "num_steps": 40,
    "step_size": 0.01,
    "width": 0,
    "max_num_training_steps": 100_000,
    "training_batch_size": 50,
    "step_size_schedule": ((0, 1e-4),),
    "weight_decay": 0.0,
    "momentum": 0.0,
    "augment": False,
    "first_example": 5000,
    "random_seed": 4557077,
}
CIFAR10_TRAINING = OFF | {
    "dataset": "cifar10",
    "loss_reduction": "mean",
    "epsilon": 8.0,
    "num_steps": 10,
    "step_size": 2.0,
    "width": 10,
    "max_num_training_steps": 80_000,
    "training_batch_size": 128,
    "step_size_schedule": ((0, 0.1), (40_000, 0.01), (60_000, 0.001)),
    "weight_decay": 2e-4,
    "momentum": 0.9,
    "augment": True,
    "first_example": 0,
    "random_seed": 451760341,
}


def resolve_config(path, dataset):
    """As `train.py --config` does: the file's keys that are settings of a run."""
    config = load_config(path)
    assert config.challenge_name == dataset
    given = {key: value for key, value in config.settings.items() if key in OFF | MNIST_TRAINING}
    return resolve_settings({"dataset": dataset, **given}, is_challenge_config=True)


@pytest.mark.parametrize(
    ("config", "expected"), [(MNIST_CONFIG, MNIST_TRAINING), (CIFAR10_CONFIG, CIFAR10_TRAINING)]
)
def test_a_challenges_config_alone_is_its_own_training(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(config)
    settings = resolve_config(tmp_path / "config.json", expected["dataset"])
    assert vars(settings) == expected


def test_without_attack_keys_a_config_gives_the_training_of_the_released_models(tmp_path):
    (tmp_path / "config.json").write_text('{"model_dir": "models/x", "data_path": "cifar10_data"}')
    settings = resolve_config(tmp_path / "config.json", "cifar10")
    assert (settings.num_steps, settings.step_size) == (7, 2.0)


@pytest.mark.slow
def test_an_exported_cifar10_network_has_the_challenges_names(tmp_path):
    settings = resolve_settings({"dataset": "cifar10", "width": 1, "training_batch_size": 2})
    settings = type(settings)(**(vars(settings) | {"max_num_training_steps": 1}))
    images, labels = digits(4, shape=(32, 32, 3))
    train_run(settings, images, labels, tmp_path / "run", show_progress=False)
    export_model(find_model(str(tmp_path / "run")), tmp_path / "bundle")
    names = dict(tf.train.list_variables(str(tmp_path / "bundle")))
    assert len(names) == 157 + 95 + 1
    assert names["unit_3_4/sub2/conv2/DW/Momentum"] == [64, 64, 3, 3][::-1]
    assert set(tf1_names(load_network(tmp_path / "bundle"))) < set(names)
    card = json.loads((tmp_path / "bundle" / "model_card.json").read_text())
    assert card["architecture"] == "WideResNet-32-1"
    assert card["eps"] == 8 / 255
