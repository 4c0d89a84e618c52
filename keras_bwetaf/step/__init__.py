"""What a step of `fit` and `evaluate` computes."""
