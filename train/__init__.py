"""RL against the quantized deployment target."""
