"""Readers of model checkpoints; none of them runs code from a file unless it is trusted."""

from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
