"""What a run will need, computed from its config and its model's shapes: no GPU, no weights."""
