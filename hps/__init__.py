"""HPS: Hard Preference Sampling for human preference alignment, from scratch in PyTorch."""
