"""Networks, images, labels and paths as people really have them."""

import dataclasses
import json
import pickle
import re
import zipfile

import keras
import numpy as np
import pytest
from commands import assert_one_line_error, command

from logit_reg.experiments.defaults import resolve_settings
from logit_reg.experiments.keras_files import read_keras
from logit_reg.experiments.sources import find_model, load_keras, load_model, load_own_images
from logit_reg.files import read_json, write_json
from madry_compat.networks import mnist_cnn
from madry_compat.tf1_checkpoints import load_network, read_step, save_network

SHAPE = (8, 8, 1)


def classifier(num_classes=4):
    images = keras.Input(SHAPE, name="pixels")
    return images, keras.layers.Dense(num_classes)(keras.layers.Flatten()(images))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network in many formats, by name."""
    folder = tmp_path_factory.mktemp("files")
    images, logits = classifier()
    network = keras.Model(images, logits)
    for name in ("network.keras", "network.h5"):
        network.save(folder / name)
    network.save_weights(folder / "network.weights.h5")
    keras.Model(images, {"logits": logits}).save(folder / "dict.keras")
    keras.Model({"pixels": images}, [logits]).save(folder / "nested.keras")
    keras.Model(images, [logits, keras.layers.Dense(2)(logits)]).save(folder / "two.keras")
    keras.Model(images, images).save(folder / "images.keras")
    keras.Model(*classifier(1)).save(folder / "one.keras")
    with zipfile.ZipFile(folder / "network.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents["metadata.json"] = json.dumps({"keras_version": "2.15.0"}).encode()
    with zipfile.ZipFile(folder / "keras2.keras", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(folder / "network.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    (folder / "network.pkl").write_bytes(pickle.dumps({}))
    (folder / "network.tflite").write_bytes(b"\x1c\0\0\0TFL3" + bytes(40))
    (folder / "empty.keras").write_bytes(b"")
    (folder / "text.keras").write_text("a network")
    np.savez(folder / "arrays.npz", images=np.zeros(3))
    (folder / "saved").mkdir()
    (folder / "saved" / "saved_model.pb").write_bytes(b"")
    (folder / "run").mkdir()
    network.save(folder / "run" / "model.keras")
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("network.h5", 'legacy HDF5 format; save it again in Keras 3: keras.models.load_model("m'),
        ("network.weights.h5", "weights without their network; build the network"),
        ("keras2.keras", "of Keras 2.15.0: save the network there as an .h5 file"),
        ("saved", "a SavedModel"),
        ("network.tflite", "TensorFlow Lite"),
        ("network.pkl", "a pickle"),
        ("network.pt", "PyTorch"),
        ("arrays.npz", "arrays (.npz)"),
        ("empty.keras", "empty"),
        ("text.keras", "no zip file"),
    ],
)
def test_a_file_of_another_format_is_named_with_the_way_to_save_it_again(files, name, words):
    for load in (read_keras, lambda path: load_model(str(path))):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            load(files / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{files / name}: expected a .keras file of Keras 3; ")


def test_a_folder_is_told_from_the_network_in_it(files):
    with pytest.raises(ValueError, match=r"name the file in it, .*run/model\.keras"):
        read_keras(files / "run")


@pytest.mark.parametrize("name", ["network", "dict", "nested"])
def test_one_input_and_one_output_load_whatever_they_are_wrapped_in(files, name):
    network = load_keras(files / f"{name}.keras")
    assert (network.input_shape, network.output_shape) == ((None, *SHAPE), (None, 4))
    images = np.ones((2, *SHAPE), np.float32)
    plain = load_keras(files / "network.keras")
    np.testing.assert_array_equal(network(images), plain(images))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two", "the network has 2 outputs"),
        ("images", "output has shape (None, 8, 8, 1)"),
        ("one", "output has shape (None, 1)"),
    ],
)
def test_what_gives_no_logits_is_refused(files, name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_keras(files / f"{name}.keras")


def own_images(folder, **arrays):
    rng = np.random.default_rng(0)
    images = rng.random((6, *SHAPE), np.float32)
    path = folder / "images.npz"
    np.savez(path, **({"images": images, "labels": np.arange(6) % 4} | arrays))
    return path, images


def test_labels_in_a_column_are_labels(tmp_path):
    path, _ = own_images(tmp_path, labels=np.arange(6)[:, None])
    np.testing.assert_array_equal(load_own_images(path, (0.0, 1.0))[1], np.arange(6))


@pytest.mark.parametrize(
    ("pixel", "bounds"), [(1.0000001, (0, 1)), (-1e-7, (0, 1)), (255.00003, (0, 255))]
)
def test_a_rounding_beyond_the_bounds_is_clipped_with_a_notice(tmp_path, capsys, pixel, bounds):
    path, images = own_images(tmp_path)
    images[2, 0, 0, 0] = pixel
    np.savez(path, images=images, labels=np.arange(6))
    found = load_own_images(path, bounds)[0]
    assert bounds[0] <= found.min() and found.max() <= bounds[1]
    assert "a rounding; they are clipped" in capsys.readouterr().err
    np.testing.assert_allclose(found, images, atol=1e-4)


@pytest.mark.parametrize(
    ("pixel", "words"),
    [
        (1.00001, "1.00001001], outside --bounds=0,1"),
        (200.0, "200], outside --bounds=0,1"),
        (np.nan, "image 2 has pixels that are not finite, as 1 of 6 have"),
        (-np.inf, "image 2 has pixels that are not finite"),
    ],
)
def test_pixels_beyond_a_rounding_are_refused_with_all_their_digits(tmp_path, pixel, words):
    path, images = own_images(tmp_path)
    images[2, 0, 0, 0] = pixel
    np.savez(path, images=images, labels=np.arange(6))
    with pytest.raises(ValueError, match=re.escape(words)):
        load_own_images(path, (0.0, 1.0))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": np.eye(6)}, "save labels.argmax(axis=1)"),
        ({"labels": np.arange(5)}, "labels are int64 (5,), expected (6,)"),
        ({"labels": np.ones(6)}, "expected (6,) integers; save labels.astype(int)."),
        ({"images": np.zeros((6, 8, 8), np.float32)}, "save images[..., None]."),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, arrays, words):
    path, _ = own_images(tmp_path, **arrays)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_own_images(path, (0.0, 1.0))


@pytest.mark.parametrize("names", [("x_test", "y_test"), ("images", "y"), ("arr_0",)])
def test_arrays_of_other_names_are_named_beside_those_expected(tmp_path, names):
    path = tmp_path / "test.npz"
    np.savez(path, **dict.fromkeys(names, np.zeros(3)))
    with pytest.raises(ValueError, match="expected images, labels") as caught:
        load_own_images(path, (0.0, 1.0))
    assert all(repr(name) in str(caught.value) for name in names)
    assert 'np.savez("images.npz", images=x, labels=y)' in str(caught.value)


# Paths


NAMES = ["m[1]", "[!a]", "a*b?", "{a,b}", "back\\slash", "ünï code [2]"]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_back_from_a_folder_of_any_name(tmp_path, name, monkeypatch):
    network = mnist_cnn()
    folder = tmp_path / name
    prefix = save_network(network, folder, 5)
    monkeypatch.setenv("TMPDIR", str(folder))
    for path in (prefix, folder, f"{folder}/", folder / ".." / name, f"{prefix}.index"):
        assert read_step(path) == 5
    found = load_network(folder).get_weights()
    assert all(map(np.array_equal, found, network.get_weights()))
    monkeypatch.chdir(folder)
    assert read_step("checkpoint-5") == read_step(".") == 5
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint",
        "checkpoint-5.data-00000-of-00001",
        "checkpoint-5.index",
    ]


@pytest.mark.parametrize(("planned", "is_told"), [(5, False), (20_000, True)])
def test_every_command_tells_of_an_unfinished_run(tmp_path, capsys, planned, is_told):
    save_network(mnist_cnn(), tmp_path, 5)
    settings = resolve_settings({"dataset": "mnist_5k", "max_num_training_steps": planned})
    write_json(tmp_path / "run.json", {"schema": 1, "settings": dataclasses.asdict(settings)})
    find_model(tmp_path / "checkpoint-5")
    assert ("5 of 20,000 training steps" in capsys.readouterr().err) == is_told


def test_a_folder_that_another_one_matches_as_a_pattern_is_not_read_in_its_place(tmp_path):
    """`[1]` matches the name 1."""
    for name, step in (("run1", 1), ("run[1]", 2)):
        save_network(mnist_cnn(), tmp_path / name, step)
        for path in (tmp_path / name).glob("checkpoint-*"):
            path.rename(path.with_name(path.name.replace(f"-{step}.", "-9.")))
    assert read_step(tmp_path / "run[1]" / "checkpoint-9") == 2
    assert read_step(tmp_path / "run1" / "checkpoint-9") == 1


@pytest.mark.slow
def test_the_chain_of_commands_holds_in_folders_with_brackets(tmp_path):
    steps = ("--max_num_training_steps=1", "--training_batch_size=4", "--noprogress")
    few = ("--num_eval_examples=2", "--num_steps=1", "--step_size=0.2", "--noprogress")
    lines = [
        ("train", "--dataset=mnist_5k", "--model_dir=runs[1]/a", *steps),
        ("export_checkpoint", "--model_dir=runs[1]/a", "--output_dir=out[2]"),
        ("eval_challenge", "--model_dir=out[2]", "--dataset=mnist_5k", "--output_dir=e[3]", *few),
        ("attack", "--model_dir=runs[1]/a", "--store_adv_path=adv[4]/a.npy", *few),
    ]
    for script, *flags in lines:
        process = command(script, *flags, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
    assert read_json(tmp_path / "e[3]" / "result.json")["num_examples"] == 2
    assert np.load(tmp_path / "adv[4]" / "a.npy").shape == (2, 28, 28, 1)


# Commands


@pytest.mark.slow
def test_a_foreign_network_gets_advice_that_each_command_can_follow(files):
    lines = [
        ("eval_challenge", "--model_dir=network.keras"),
        ("attack", "--model_dir=network.keras"),
        ("landscape", "--model_dir=network.keras"),
        ("export_checkpoint", "--model_dir=network.keras", "--output_dir=out"),
    ]
    for script, *flags in lines:
        process = command(script, *flags, cwd=files)
        assert_one_line_error(process, "the network takes (8, 8, 1) images and has 4 classes")
        can_take_it = script == "eval_challenge"
        assert ("--data" in process.stderr.strip().splitlines()[-1]) == can_take_it


@pytest.mark.slow
def test_a_budget_in_other_units_stands_in_the_terminal_and_in_the_result(files, tmp_path):
    path, _ = own_images(tmp_path)
    own = (f"--model={files / 'dict.keras'}", f"--data={path}", "--bounds=0,1", "--noprogress")
    process = command("eval_challenge", *own, "--epsilon=8", "--output_dir=out", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "is it meant for [0, 255]?" in process.stderr
    (found,) = read_json(tmp_path / "out" / "result.json")["notices"]
    assert found["name"] == "budget_large" and found["value"] == 8.0
    zero = command("eval_challenge", *own, "--epsilon=0", cwd=tmp_path)
    assert_one_line_error(zero, "epsilon must be above 0", "got 0")
    for name, words in (("paper-fgsm", "is frozen to its challenge's images"), ("no", "got 'no'")):
        process = command(
            "eval_challenge", *own, "--epsilon=0.1", f"--protocol={name}", cwd=tmp_path
        )
        choices = "autoattack, autoattack-each, autoattack-rand, adaptive"
        assert_one_line_error(process, choices, words)
        assert "leave out" not in process.stderr
    label = own_images(tmp_path, labels=np.array([0, 1, 7, 1, 2, 9]))[0]
    outside = command("eval_challenge", *own, "--epsilon=0.1", cwd=label.parent)
    assert_one_line_error(outside, "image 2 has the label 7, the network has 4 classes")
