"""Judging derivatives: comparison with the reference, verdicts, and the reasons behind a failure."""
