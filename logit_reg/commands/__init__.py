"""The commands: absl flags -> records -> `logit_reg.experiments`."""
