"""What the four training loops share: optimizers, batches, checkpoints, steps, processes."""
