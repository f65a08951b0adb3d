"""Optimizers that step in gradient subspaces. Any ``torch.optim`` optimizer works with guards; none of ours yet."""
