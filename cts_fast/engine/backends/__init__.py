"""Ways to run the step, by device: `base.Backend` is their contract, `reference` their oracle."""
