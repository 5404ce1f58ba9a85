"""What `softcheck model` checks: the checkpoint, the head, the loss, every parameter, and where a fault is."""
