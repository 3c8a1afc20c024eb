"""Write adversarial images for a network, as the challenges' pgd_attack.py does."""

from _start import start

if __name__ == "__main__":
    start("attack")
