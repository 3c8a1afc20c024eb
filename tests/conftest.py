"""Fixtures shared by the tests."""

import os
import signal
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
