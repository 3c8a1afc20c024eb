"""Train and evaluate a grid of runs, each in a process of its own."""

from _start import start

if __name__ == "__main__":
    start("sweep")
