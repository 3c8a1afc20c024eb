"""The MadryLab MNIST and CIFAR-10 challenges as published. Imports nothing from `logit_reg`."""
