"""Test whether a claim of robustness holds: 33 diagnostics and a verdict with its evidence."""

from _start import start

if __name__ == "__main__":
    start("audit")
