"""Make tables and figures from runs and their ledgers."""

from _start import start

if __name__ == "__main__":
    start("report")
