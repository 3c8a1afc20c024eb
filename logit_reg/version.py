"""The version, apart from the package so that packaging can read it without TensorFlow."""

__version__ = "0.1.0"
