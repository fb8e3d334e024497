"""What "deployed" means: one quantization target for rollouts, export and evaluation. Knows nothing of RL."""
