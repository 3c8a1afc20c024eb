"""The challenges' constants, and what their submissions may and may not be."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_reg.report.published import published_accuracies
from madry_compat import challenges, submissions
from madry_compat.challenges import CIFAR10, CIFAR100, MNIST
from madry_compat.files import write_atomically
from madry_compat.submissions import SubmissionError

N = 10_000


@pytest.fixture(scope="module")
def natural() -> np.ndarray:
    """A made-up MNIST test set whose pixels stay .4 away from both ends of the range."""
    images = np.random.default_rng(0).uniform(0.4, 0.6, size=(N, 28, 28, 1))
    return images.astype(np.float32)


def save(path, array, **kwargs):
    np.save(path, array, **kwargs)
    return path


def test_the_challenges_are_as_published():
    assert (MNIST.epsilon, MNIST.paper.epsilon_l2, MNIST.upper) == (0.3, 2.0, 1.0)
    assert (CIFAR10.epsilon, CIFAR10.paper.epsilon_l2, CIFAR10.upper) == (8.0, 1.5 * 255, 255.0)
    assert MNIST.submission_shape == (10_000, 784)
    assert CIFAR10.submission_shape == (10_000, 32, 32, 3)
    assert (MNIST.attack.num_steps, MNIST.attack.step_size) == (40, 0.01)
    # The leaderboard's protocol, not the config file's 10 steps of 2.
    assert (CIFAR10.attack.num_steps, CIFAR10.attack.step_size) == (20, 1.0)
    # What the released model was trained with, not the config file's 10 steps.
    assert (CIFAR10.training.attack.num_steps, CIFAR10.training.attack.step_size) == (7, 2.0)
    assert (MNIST.training.reduction, CIFAR10.training.reduction) == ("sum", "mean")
    assert CIFAR100.num_classes == 100
    assert CIFAR100.training == CIFAR10.training


@pytest.mark.parametrize(
    ("dataset_name", "challenge"),
    [
        ("mnist", MNIST),
        ("mnist_5k", MNIST),
        ("fashion_mnist", MNIST),
        ("cifar10", CIFAR10),
        ("cifar100", CIFAR100),
    ],
)
def test_every_data_set_has_its_challenge(dataset_name, challenge):
    assert challenges.challenge_for(dataset_name) is challenge


def test_an_unknown_data_set_lists_the_options():
    with pytest.raises(ValueError, match="mnist_5k, mnist.*got 'svhn'"):
        challenges.challenge_for("svhn")


def test_published_results_are_fractions_by_protocol():
    secret = published_accuracies("cifar10/secret")
    assert secret["madry-cifar10/xent"] == 0.4704
    assert published_accuracies("mnist/secret")["madry-mnist-100/xent"] == 0.9252
    # The public model's 45.84 is a protocol of its own: steps of 2.
    assert published_accuracies("cifar10/adv_trained")["paper-20/xent"] == 0.4584
    assert published_accuracies("mnist/natural") == {}


def test_a_test_set_that_is_not_the_original_is_refused_with_the_reason():
    submissions.require_canonical("the challenge's own files", True)
    with pytest.raises(SubmissionError, match="a JPEG copy of CIFAR-10"):
        submissions.require_canonical("a JPEG copy of CIFAR-10", False)


def test_a_written_submission_is_flat_and_reads_back(tmp_path, natural):
    path = tmp_path / "attack.npy"
    submissions.write_submission(path, natural, MNIST)
    assert np.load(path).shape == (N, 784)
    assert np.load(path).dtype == np.float32
    np.testing.assert_array_equal(submissions.load_submission(path, MNIST), natural)
    assert [entry.name for entry in tmp_path.iterdir()] == ["attack.npy"]


def test_the_challenge_code_s_own_float64_files_are_read(tmp_path, natural):
    flat = natural.reshape(N, 784).astype(np.float64)
    for array in (flat, np.asfortranarray(flat), flat.astype(">f8")):
        images = submissions.load_submission(save(tmp_path / "attack.npy", array), MNIST)
        assert images.dtype == np.float32
        np.testing.assert_array_equal(images, natural)


def test_a_cifar_submission_keeps_its_shape(tmp_path):
    images = np.full((N, 32, 32, 3), 255.00009, np.float32)
    loaded = submissions.load_submission(save(tmp_path / "attack.npy", images), CIFAR10)
    np.testing.assert_array_equal(loaded, images)


@pytest.mark.parametrize(
    ("shape", "challenge", "message"),
    [
        (
            (N, 28, 28),
            MNIST,
            "attack.npy: shape (10000, 28, 28), expected (10000, 784). "
            "MNIST submissions are flattened; use images.reshape(-1, 784).",
        ),
        (
            (N - 1, 784),
            MNIST,
            "attack.npy: shape (9999, 784), expected (10000, 784). "
            "A submission holds all 10000 test images, in the original order.",
        ),
        (
            (N, 3072),
            CIFAR10,
            "attack.npy: shape (10000, 3072), expected (10000, 32, 32, 3). "
            "CIFAR submissions are not flattened; use images.reshape(-1, 32, 32, 3).",
        ),
        (
            (N, 3, 32, 32),
            CIFAR10,
            "attack.npy: shape (10000, 3, 32, 32), expected (10000, 32, 32, 3). "
            "Channels come last; use images.transpose(0, 2, 3, 1).",
        ),
        (
            (),
            MNIST,
            "attack.npy: shape (), expected (10000, 784). "
            "Save the perturbed mnist test set as one array.",
        ),
    ],
)
def test_a_wrong_shape_says_how_to_make_it_right(tmp_path, shape, challenge, message):
    # Only the header matters: the check comes before anything is loaded.
    path = tmp_path / "attack.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(SubmissionError) as refused:
        submissions.load_submission(path, challenge)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((N, 784), np.uint8), "dtype uint8, expected float32. Integers wrap around"),
        (np.zeros((N, 784), bool), "dtype 'bool', expected float32"),
        (np.zeros((N, 784), np.complex64), "dtype 'complex64', expected float32"),
        (np.zeros((N, 784), "S1"), r"dtype '\|S1', expected float32"),
    ],
)
def test_other_types_than_floats_are_refused(tmp_path, array, message):
    with pytest.raises(SubmissionError, match=message):
        submissions.load_submission(save(tmp_path / "attack.npy", array), MNIST)


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_refused_and_never_run(tmp_path):
    evil = _Payload(tmp_path / "evil")
    objects = save(tmp_path / "objects.npy", np.array([evil], dtype=object), allow_pickle=True)
    with pytest.raises(SubmissionError, match=r"objects.npy: holds pickled objects"):
        submissions.load_submission(objects, MNIST)

    bare = tmp_path / "bare.npy"
    bare.write_bytes(pickle.dumps(evil))
    with pytest.raises(SubmissionError, match=r"bare.npy: not a .npy array"):
        submissions.load_submission(bare, MNIST)
    assert not (tmp_path / "evil").exists()


def test_a_truncated_file_is_refused(tmp_path, natural):
    path = save(tmp_path / "attack.npy", natural.reshape(N, 784))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SubmissionError, match=f"truncated, {size - 1000} bytes .* {size}"):
        submissions.load_submission(path, MNIST)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(SubmissionError, match="does not exist"):
        submissions.load_submission(tmp_path / "attack.npy", MNIST)
    with pytest.raises(SubmissionError, match="not a regular file"):
        submissions.load_submission(tmp_path, MNIST)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_before_the_range(tmp_path, natural, value):
    images = natural.reshape(N, 784).copy()
    images[17, 3] = value
    images[18, 3] = 2.0
    with pytest.raises(SubmissionError, match="image 17 has a NaN or infinite pixel"):
        submissions.load_submission(save(tmp_path / "attack.npy", images), MNIST)


def test_a_double_that_overflows_a_float_is_out_of_range(tmp_path, natural):
    images = natural.reshape(N, 784).astype(np.float64)
    images[0, 0] = 1e300
    with pytest.raises(SubmissionError, match=r"Invalid pixel range. Expected \[0, 1\], found"):
        submissions.load_submission(save(tmp_path / "attack.npy", images), MNIST)


def test_the_pixel_range_has_the_challenge_s_tolerance(tmp_path, natural):
    images = natural.reshape(N, 784).copy()
    images[0, :2] = [-0.9e-4, 1 + 0.9e-4]
    submissions.load_submission(save(tmp_path / "attack.npy", images), MNIST)
    images[0, 0] = -2e-4
    with pytest.raises(SubmissionError, match="Invalid pixel range"):
        submissions.load_submission(save(tmp_path / "attack.npy", images), MNIST)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_distance_has_the_challenge_s_tolerance(natural, sign):
    adversarial = natural + np.float32(sign * (0.3 + 0.9e-4))
    distances = submissions.check_submission(adversarial, natural, MNIST)
    np.testing.assert_allclose(distances, 0.30009, atol=1e-6)

    adversarial = natural.copy()
    adversarial[4321, 5, 6] += np.float32(sign * 0.301)
    with pytest.raises(SubmissionError) as refused:
        submissions.check_submission(adversarial, natural, MNIST, name="attack.npy")
    assert "attack.npy: maximum perturbation found: 0.301 (image 4321; 1 of 10000" in str(
        refused.value
    )
    assert "maximum perturbation allowed: 0.3 " in str(refused.value)
    submissions.check_submission(adversarial, natural, MNIST, epsilon=0.4)


def test_cifar_keeps_its_tolerance_at_the_end_of_the_range():
    # One float32 step at 255 is 1.5e-5, small against the tolerance of 1e-4.
    natural = np.full((3, 32, 32, 3), 247.0, np.float32)
    adversarial = np.full_like(natural, np.float32(255.00009))
    submissions.check_submission(adversarial, natural, CIFAR10)
    with pytest.raises(SubmissionError, match="image 0; 3 of 3"):
        submissions.check_submission(adversarial + 1e-3, natural, CIFAR10)


def test_unsigned_integers_do_not_wrap_around_in_the_distance():
    natural = np.full((1, 32, 32, 3), 10, np.uint8)
    adversarial = np.full((1, 32, 32, 3), 5, np.uint8)
    assert submissions.check_submission(adversarial, natural, CIFAR10) == [5.0]


def test_a_nan_is_outside_every_threat_model(natural):
    adversarial = natural[:3].copy()
    adversarial[1, 0, 0] = np.nan
    with pytest.raises(SubmissionError, match="image 1; 1 of 3"):
        submissions.check_submission(adversarial, natural[:3], MNIST, epsilon=1e9)


def test_natural_images_in_the_wrong_units_are_the_caller_s_mistake(natural):
    with pytest.raises(ValueError, match=r"natural images must lie in \[0, 1\]"):
        submissions.check_submission(natural[:2], natural[:2] * 255, MNIST)
    with pytest.raises(ValueError, match="must both be"):
        submissions.check_submission(natural[:2], natural[:3], MNIST)
    with pytest.raises(ValueError, match="epsilon must be finite"):
        submissions.check_submission(natural, natural, MNIST, epsilon=float("nan"))


def test_scoring_by_hand():
    """The "network" answers ten times the first pixel; three of five labels agree."""
    images = np.zeros((5, 28, 28, 1), np.float32)
    images[:, 0, 0, 0] = [0.1, 0.2, 0.3, 0.4, 0.5]
    labels = np.array([1, 2, 9, 4, 0])
    sizes = []

    def predict(batch):
        sizes.append(len(batch))
        assert batch.dtype == np.float32
        return np.round(10 * batch[:, 0, 0, 0]).astype(np.int32)

    accuracy, predictions = submissions.score_submission(predict, images, labels, 2)
    assert sizes == [2, 2, 1]
    assert accuracy == 0.6
    assert predictions.dtype == np.int64
    assert predictions.tolist() == [1, 2, 3, 4, 5]


def test_scoring_refuses_logits_and_labels_of_another_length():
    images, labels = np.zeros((4, 28, 28, 1), np.float32), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match=r"got \(4, 10\) of float64. Take the argmax"):
        submissions.score_submission(lambda batch: np.zeros((len(batch), 10)), images, labels, 4)
    with pytest.raises(ValueError, match=r"labels must be \(4,\)"):
        submissions.score_submission(lambda batch: labels, images, labels[:3], 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        submissions.score_submission(lambda batch: labels, images, labels, 0)


def test_the_worst_case_counts_an_example_only_if_every_file_leaves_it_correct():
    labels = np.array([0, 1, 2, 3])
    first, second = np.array([0, 1, 9, 9]), np.array([0, 9, 2, 9])
    correct = submissions.worst_case([first, second], labels)
    assert correct.tolist() == [True, False, False, False]
    assert submissions.worst_case([first], labels).mean() == 0.5
    with pytest.raises(ValueError, match="got none"):
        submissions.worst_case([], labels)


def test_the_printed_lines_are_the_challenge_s():
    assert submissions.format_score(0.1234) == "Accuracy: 12.34%\nOutput saved at pred.npy"


def test_predictions_are_written_as_int64(tmp_path):
    submissions.write_predictions(tmp_path / "pred.npy", np.array([3, 1], np.int32))
    written = np.load(tmp_path / "pred.npy")
    assert written.dtype == np.int64
    assert written.tolist() == [3, 1]
    with pytest.raises(ValueError, match="integer classes"):
        submissions.write_predictions(tmp_path / "pred.npy", np.array([0.5]))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "pred.npy"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[:100], r"shape \(100, 28, 28, 1\), expected \(10000, 28, 28, 1\)"),
        (lambda images: images + 1, "Invalid pixel range"),
        (lambda images: (images * 255).astype(np.uint8), "Integers wrap around"),
    ],
)
def test_an_invalid_submission_is_not_written(tmp_path, natural, change, message):
    with pytest.raises(SubmissionError, match=message):
        submissions.write_submission(tmp_path / "attack.npy", change(natural), MNIST)
    assert list(tmp_path.iterdir()) == []


def _npy_header(text: str) -> bytes:
    body = text.encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x03\x00\x00\x00\x00\x00",
        b"PK\x03\x04 an npz archive",
        _npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + "f" * 9000 + ",)}"),
        _npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 4000 + ")}"),
        _npy_header("(" * 9000),
        _npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 784)}"),
        _npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (10000, 784)}"),
        _npy_header("{'descr': '<f16', 'fortran_order': False, 'shape': (10000, 784)}"),
    ],
)
def test_strange_headers_are_refused_in_one_line(tmp_path, data):
    path = tmp_path / "attack.npy"
    path.write_bytes(data)
    with pytest.raises(SubmissionError) as refused:
        submissions.load_submission(path, MNIST)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def _valid_prefix() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 784), np.float32))
    return buffer.getvalue()[:200]


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 199), replacement=st.binary(min_size=0, max_size=8))
def test_a_mutated_file_is_refused_and_nothing_else(tmp_path_factory, position, replacement):
    data = _valid_prefix()
    path = tmp_path_factory.getbasetemp() / "mutated.npy"
    path.write_bytes(data[:position] + replacement + data[position + len(replacement) :])
    with pytest.raises(SubmissionError):
        submissions.load_submission(path, MNIST)
