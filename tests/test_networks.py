"""The challenges' networks: sizes, standardisation, and loading anywhere."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from madry_compat.networks import mnist_cnn, wide_resnet


def test_mnist_cnn_has_the_challenge_s_parameters():
    assert mnist_cnn().count_params() == 3_274_634


def test_wide_resnet_has_the_challenge_s_parameters():
    network = wide_resnet()
    trainable = network.trainable_variables
    assert sum(int(np.prod(v.shape)) for v in trainable) == 45_901_914
    assert (len(trainable), len(network.variables)) == (95, 157)


def test_width_one_is_the_narrow_network():
    channels = [
        wide_resnet(1).get_layer(f"unit_{group}_0_conv1").kernel.shape[-1] for group in (1, 2, 3)
    ]
    assert channels == [16, 32, 64]


def test_cifar_100_has_a_hundred_logits():
    assert wide_resnet(1, 100).output_shape == (None, 100)


def test_images_are_standardised_one_by_one_inside_the_network():
    """Brightness and contrast of an image do not change its logits; a flat image is no 0 / 0."""
    network = wide_resnet(1)
    rng = np.random.default_rng(0)
    images = rng.uniform(50, 200, (3, 32, 32, 3)).astype(np.float32)
    changed = 0.5 * images + 20.0
    np.testing.assert_allclose(network(changed), network(images), rtol=1e-3, atol=1e-4)
    flat = np.full((1, 32, 32, 3), 100.0, np.float32)
    assert np.isfinite(network(flat)).all()


def test_initial_weights_have_the_challenge_s_distribution():
    keras.utils.set_random_seed(0)
    kernel = mnist_cnn().get_layer("dense").kernel.numpy()
    # Truncated at two deviations, a normal keeps .8796 of its deviation.
    assert kernel.std() == pytest.approx(0.08796, rel=0.01)
    assert np.abs(kernel).max() <= 0.2
    assert (mnist_cnn().get_layer("dense").bias.numpy() == np.float32(0.1)).all()
    resnet = wide_resnet(1)
    conv = resnet.get_layer("unit_3_4_conv1").kernel.numpy()
    assert conv.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    logits = resnet.get_layer("logits").kernel.numpy()
    assert np.abs(logits).max() <= np.sqrt(3 / 64)
    assert logits.std() == pytest.approx(np.sqrt(1 / 64), rel=0.1)


@pytest.mark.parametrize("arguments", [(0, 10), (1, 0), (-3, 10)])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="positive width and num_classes"):
        wide_resnet(*arguments)


_LOAD = """
import sys
import keras
import numpy as np
network = keras.saving.load_model(sys.argv[1], safe_mode=True, compile=False)
images = np.load(sys.argv[2])
logits = keras.ops.convert_to_numpy(network(keras.ops.convert_to_tensor(images)))
np.save(sys.argv[3], logits)
ours = [name for name in sys.modules if name.startswith(("madry_compat", "logit_reg"))]
if ours:
    raise SystemExit(f"imported {ours}")
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
@pytest.mark.parametrize("name", ["mnist_cnn", "wide_resnet"])
def test_a_saved_network_loads_in_safe_mode_without_this_project(tmp_path, backend, name):
    pytest.importorskip(backend)
    network = mnist_cnn() if name == "mnist_cnn" else wide_resnet(1)
    scale = 1.0 if name == "mnist_cnn" else 255.0
    images = scale * np.random.default_rng(0).random((4, *network.input_shape[1:]))
    images = images.astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    network.save(tmp_path / "model.keras")
    paths = [str(tmp_path / file) for file in ("model.keras", "images.npy", "logits.npy")]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": ""}
    code = [sys.executable, "-c", _LOAD, *paths]
    subprocess.run(code, check=True, cwd=tmp_path, env=environment)
    expected = network(images).numpy()
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
