"""What each command does, as generators of results."""
