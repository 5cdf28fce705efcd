"""Methods beside the paper's five, the reward model, and samples during training."""
