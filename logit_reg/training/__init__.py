"""Training: the model whose `train_step` regularises logits, its adversaries and the loop."""
