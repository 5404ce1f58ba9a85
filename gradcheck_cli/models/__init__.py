"""From a checkpoint to a model that can be run: architecture, inputs, targets and loss."""
