"""Fetch released challenge models by name, as `fetch_model.py mnist/secret`."""

from _start import start

if __name__ == "__main__":
    start("fetch_model")
