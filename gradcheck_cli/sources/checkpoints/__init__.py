"""Readers of model checkpoints; none of them runs code from a file unless it is trusted."""

from gradcheck_cli.sources.checkpoints.checkpoint import Checkpoint
from gradcheck_cli.sources.checkpoints.read import read_checkpoint
from gradcheck_cli.sources.checkpoints.state_dict import strip_common_prefix

__all__ = ["Checkpoint", "read_checkpoint", "strip_common_prefix"]
