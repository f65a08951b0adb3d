"""Optimizers that step in gradient subspaces. Any ``torch.optim`` optimizer works with the guards; none of ours yet."""
