"""Draw the loss around test images, along an adversarial and a random direction."""

from _start import start

if __name__ == "__main__":
    start("landscape")
