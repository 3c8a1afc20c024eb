"""Fixtures shared by the tests."""

import gc
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# Tests leave the user's cache alone.
os.environ.setdefault("LOGIT_REG_CACHE", tempfile.mkdtemp(prefix="logit-reg-tests-"))
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import pytest

# A shell's background job ignores Ctrl-C, and so would all commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

_OPTIMISER_OFF = "disable_meta_optimizer"
# Set it to run every test as those that are marked so.
_OPTIMISES = bool(os.environ.get("GRAPH_OPTIMISER"))


def pytest_collection_finish():
    """Keep all that was imported out of the garbage collections: tracing causes many of them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Leave TensorFlow's graph optimiser out, which takes longer than most tests' own work.

    With it run the commands, as in a user's hands, the tests on real networks, and those marked
    `graph_optimiser`: of fast paths, precision, repeatability and whole audits.
    """
    if "tensorflow" in sys.modules:
        import tensorflow as tf

        marks = ("graph_optimiser", "shared")
        optimises = _OPTIMISES or any(map(item.get_closest_marker, marks))
        if tf.config.optimizer.get_experimental_options().get(_OPTIMISER_OFF, False) == optimises:
            tf.config.optimizer.set_experimental_options({_OPTIMISER_OFF: not optimises})


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After a module's last test forget its traces, and keep what is left out of collections.

    Keras collects whenever a layer loses a variable, which takes seconds on the heap of a whole
    suite.
    """
    if nextitem is None or nextitem.path != item.path:
        if "logit_reg.attacks.engine.forward" in sys.modules:
            from logit_reg.attacks.engine.forward import forget_traces

            forget_traces()
        gc.collect()
        gc.freeze()


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and golden models beside the project; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture(scope="session")
def tfds_dir(shared: Path) -> Path:
    """A prepared TFDS folder with MNIST and the JPEG copy of CIFAR-10."""
    return shared / "data" / "tfds"
