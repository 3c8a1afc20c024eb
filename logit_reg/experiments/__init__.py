"""Where `madry_compat` and `logit_reg` meet: runs, models, evaluations, sweeps and exports."""
