"""Training: the paper's two stages, the embedded model's data, and its evaluation."""
