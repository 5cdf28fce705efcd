"""The experiments: a preference world, the paper's sweeps and theorems, a small real model."""
