"""Packaging entry point; metadata and tool settings stand in pyproject.toml."""

from setuptools import setup

setup()
