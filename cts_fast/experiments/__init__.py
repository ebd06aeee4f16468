"""Meta-training, meta-test and all that a run keeps, from settings to figures."""
