"""The commands: absl flags -> records -> the functions of the two packages.

Installed as the package `logit_reg_scripts`, so that a wheel works without the repository.
"""
