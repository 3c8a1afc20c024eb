"""Write a network as a checkpoint that the challenges' code restores."""

from _start import start

if __name__ == "__main__":
    start("export_checkpoint")
