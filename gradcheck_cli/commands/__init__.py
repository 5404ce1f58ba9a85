"""One thin module per command: options, check, report."""
