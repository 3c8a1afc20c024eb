"""Both challenges' config.json, read and written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from madry_compat.challenges import CIFAR10, CIFAR100, MNIST
from madry_compat.config import ChallengeConfig, ConfigError, load_config, write_config

MNIST_TEXT = """{
  "_comment": "MODEL",
  "model_dir": "models/robust",
  "_comment": "TRAINING",
  "random_seed": 7,
  "max_num_training_steps": 100000,
  "num_output_steps": 100,
  "num_summary_steps": 100,
  "num_checkpoint_steps": 300,
  "training_batch_size": 50,
  "num_eval_examples": 10000,
  "eval_batch_size": 200,
  "eval_on_cpu": true,
  "epsilon": 0.3,
  "k": 40,
  "a": 0.01,
  "random_start": true,
  "loss_func": "xent",
  "store_adv_path": "attack.npy"
}"""

CIFAR_TEXT = """{
  "_comment": "DATASET",
  "data_path": "cifar10_data",
  "tf_random_seed": 451,
  "np_random_seed": 216,
  "step_size_schedule": [[0, 0.1], [40000, 0.01], [60000, 0.001]],
  "weight_decay": 0.0002,
  "momentum": 0.9,
  "epsilon": 8,
  "num_steps": 10,
  "step_size": 2.0,
  "eval_on_cpu": false
}"""


@pytest.fixture
def read(tmp_path):
    def read_text(text: str | bytes) -> ChallengeConfig:
        path = tmp_path / "config.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path)

    return read_text


def test_the_mnist_spelling(read):
    config = read(MNIST_TEXT)
    assert config.challenge_name == "mnist"
    assert (config.num_steps, config.step_size, config.epsilon) == (40, 0.01, 0.3)
    assert (config.random_seed, config.np_random_seed) == (7, None)
    assert config.step_size_schedule is None
    assert config.random_start is True
    assert config.unknown == ()


def test_the_cifar_spelling(read):
    config = read(CIFAR_TEXT)
    assert config.challenge_name == "cifar10"
    assert (config.num_steps, config.step_size) == (10, 2.0)
    assert (config.random_seed, config.np_random_seed) == (451, 216)
    assert config.step_size_schedule == ((0, 0.1), (40_000, 0.01), (60_000, 0.001))
    assert config.epsilon == 8.0
    assert isinstance(config.epsilon, float)
    assert config.unknown == ()


def test_the_released_secret_model_s_extra_and_missing_keys(read):
    """No `loss_func`, an `optimizer`, and a `step_size` that is a learning rate."""
    config = read('{"epsilon": 0.3, "k": 40, "a": 0.01, "optimizer": "adam", "step_size": 1e-4}')
    assert config.challenge_name == "mnist"
    assert config.step_size == 0.01
    assert config.loss_func is None
    assert config.unknown == ("optimizer", "step_size")


def test_a_learning_rate_is_never_taken_for_the_attack_s_step(read):
    config = read('{"k": 40, "step_size": 1e-4}')
    assert config.step_size is None
    assert config.unknown == ("step_size",)


def test_an_unclear_file_names_no_challenge(read):
    config = read('{"epsilon": 0.3, "random_seed": 3}')
    assert config.challenge_name is None
    assert config.settings == {"epsilon": 0.3, "random_seed": 3}
    assert read("{}") == ChallengeConfig()


def test_unknown_keys_are_shown_without_control_characters(read):
    config = read('{"\\u001b[2J": 1, "_comment": 2, "x\\ud800": 3, "' + "y" * 500 + '": 4}')
    assert all(key.isprintable() and len(key) < 70 for key in config.unknown)
    assert len(config.unknown) == 3


def test_a_byte_order_mark_is_no_reason_to_refuse(read):
    assert read(b"\xef\xbb\xbf" + MNIST_TEXT.encode()).num_steps == 40


def test_a_repeated_key_must_say_the_same(read):
    assert read('{"epsilon": 0.3, "epsilon": 0.3}').epsilon == 0.3
    assert read('{"note": 1, "note": 2}').unknown == ("note",)
    with pytest.raises(ConfigError, match=r"epsilon is both 0.3 and 0.03, expected one value"):
        read('{"epsilon": 0.3, "epsilon": 0.03}')


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("epsilon", '"0.3"', "a finite number of at least 0"),
        ("epsilon", "NaN", "a finite number of at least 0"),
        ("epsilon", "Infinity", "a finite number of at least 0"),
        ("epsilon", "1e999", "a finite number of at least 0"),
        ("epsilon", "1" + "0" * 400, "a finite number of at least 0"),
        ("epsilon", "-0.1", "a finite number of at least 0"),
        ("epsilon", "true", "a finite number of at least 0"),
        ("epsilon", "null", "a finite number of at least 0"),
        ("k", "true", "an integer of at least 0"),
        ("k", "40.0", "an integer of at least 0"),
        ("k", "-1", "an integer of at least 0"),
        ("eval_batch_size", "0", "an integer of at least 1"),
        ("num_eval_examples", "9223372036854775808", "an integer of at least 1"),
        ("np_random_seed", "4294967296", "an integer from 0 to 2"),
        ("random_start", "1", "true or false"),
        ("eval_on_cpu", '"false"', "true or false"),
        ("loss_func", '"xnet"', "'xent' or 'cw'"),
        ("loss_func", '["xent"]', "'xent' or 'cw'"),
        ("model_dir", "3", "a path"),
        ("model_dir", '""', "a path"),
        ("store_adv_path", '"a\\u0000b"', "a path"),
        ("store_adv_path", '"a\\ud800b"', "a path"),
        ("step_size_schedule", "[]", "a list of"),
        ("step_size_schedule", "[[0, 0.1, 1]]", "a list of"),
        ("step_size_schedule", "[[1, 0.1]]", "a list of"),
        ("step_size_schedule", "[[0, 0.1], [0, 0.01]]", "a list of"),
        ("step_size_schedule", "[[0, -0.1]]", "a list of"),
        ("step_size_schedule", "[[0, 0.1], [0.5, 0.01]]", "a list of"),
        ("step_size_schedule", '{"a": 1, "b": 2}', "a list of"),
        ("step_size_schedule", '["01"]', "a list of"),
    ],
)
def test_a_wrong_value_names_the_key_the_value_and_the_type(read, key, value, expected):
    with pytest.raises(ConfigError) as refused:
        read(f'{{"{key}": {value}}}')
    message = str(refused.value)
    assert message.startswith(f"config.json: {key} is ")
    assert f"expected {expected}" in message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{'epsilon': 0.3}", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"epsilon": ' + "[" * 100_000, "nested too deeply"),
        ('{"k": ' + "9" * 5000 + "}", "not JSON"),
        ("[1, 2]", r"holds \[1, 2\], expected an object"),
        ("3", "holds 3, expected an object"),
        ("null", "holds null, expected an object"),
        (" " * 1_000_001, "larger than 1000000 bytes"),
    ],
)
def test_what_is_no_config_at_all(read, text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path)


# Every key that train.py, eval.py, pgd_attack.py and run_attack.py of a challenge index.
COMMON_KEYS = {
    "model_dir",
    "max_num_training_steps",
    "num_output_steps",
    "num_summary_steps",
    "num_checkpoint_steps",
    "training_batch_size",
    "num_eval_examples",
    "eval_batch_size",
    "eval_on_cpu",
    "epsilon",
    "random_start",
    "loss_func",
    "store_adv_path",
}
MNIST_KEYS = COMMON_KEYS | {"random_seed", "k", "a"}
CIFAR_KEYS = COMMON_KEYS | {
    "data_path",
    "tf_random_seed",
    "np_random_seed",
    "step_size_schedule",
    "weight_decay",
    "momentum",
    "num_steps",
    "step_size",
}


@pytest.mark.parametrize(
    ("challenge", "keys"), [(MNIST, MNIST_KEYS), (CIFAR10, CIFAR_KEYS), (CIFAR100, CIFAR_KEYS)]
)
def test_a_written_file_has_exactly_the_keys_that_the_challenge_reads(tmp_path, challenge, keys):
    path = tmp_path / "config.json"
    write_config(path, challenge, {"model_dir": "runs/a", "random_seed": 5})
    written = json.loads(path.read_text())
    assert set(written) == keys
    assert None not in written.values()
    assert written["epsilon"] == challenge.epsilon
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_settings_win_over_defaults_in_the_challenge_s_spelling(tmp_path):
    path = tmp_path / "config.json"
    given = {"model_dir": "m", "random_seed": 5, "num_steps": 7, "step_size": 0.1, "epsilon": None}
    write_config(path, MNIST, given)
    written = json.loads(path.read_text())
    assert (written["k"], written["a"], written["random_seed"]) == (7, 0.1, 5)
    assert written["epsilon"] == 0.3

    write_config(path, CIFAR10, given)
    written = json.loads(path.read_text())
    assert (written["num_steps"], written["step_size"]) == (7, 0.1)
    assert (written["tf_random_seed"], written["np_random_seed"]) == (5, 5)


@pytest.mark.parametrize(("challenge", "text"), [(MNIST, MNIST_TEXT), (CIFAR10, CIFAR_TEXT)])
def test_what_is_written_reads_back(tmp_path, read, challenge, text):
    config = read(text)
    path = tmp_path / "copy.json"
    write_config(path, challenge, {"model_dir": "m", **config.settings})
    again = load_config(path)
    assert again.challenge_name == challenge.name
    assert again.unknown == ()
    for key, value in config.settings.items():
        assert getattr(again, key) == value, key


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"model_dir": "m"}, r"missing \['random_seed'\]"),
        ({"model_dir": "m", "random_seed": 1, "k": 40}, r"unknown \['k'\]"),
        ({"model_dir": "m", "random_seed": 1, "epsilon": float("nan")}, "epsilon is NaN"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, settings_given, message):
    with pytest.raises(ConfigError, match=message):
        write_config(tmp_path / "config.json", MNIST, settings_given)
    assert list(tmp_path.iterdir()) == []


KEYS = sorted(MNIST_KEYS | CIFAR_KEYS | {"_comment", "optimizer"})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["xent", "cw", "attack.npy"]),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


def reads_or_refuses(path) -> None:
    try:
        config = load_config(path)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, ChallengeConfig)


@settings(max_examples=300, deadline=None)
@given(given_values=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES) | VALUES)
def test_any_json_is_read_or_refused(tmp_path_factory, given_values):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(given_values))
    reads_or_refuses(path)


@settings(max_examples=300, deadline=None)
@given(
    text=st.sampled_from([MNIST_TEXT, CIFAR_TEXT]),
    position=st.integers(0, 500),
    length=st.integers(0, 30),
    replacement=st.binary(max_size=6),
)
def test_any_mutation_is_read_or_refused(tmp_path_factory, text, position, length, replacement):
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    data = text.encode()
    path.write_bytes(data[:position] + replacement + data[position + length :])
    reads_or_refuses(path)
