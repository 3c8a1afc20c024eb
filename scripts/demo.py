"""Train the paper's defences and a baseline on 5,000 real digits, attack them, show the table."""

from _start import start

if __name__ == "__main__":
    start("demo")
