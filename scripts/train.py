"""Train a logit-regularised network, or a baseline, on real data."""

from _start import start

if __name__ == "__main__":
    start("train")
