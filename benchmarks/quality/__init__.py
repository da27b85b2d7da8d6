"""What optimizers in a subspace do to the loss, each at the best of its learning rates."""
