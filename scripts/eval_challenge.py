"""Measure what attacks leave of a network's accuracy."""

from _start import start

if __name__ == "__main__":
    start("eval_challenge")
