"""The user's program: found and called, run in float64, under measured rounding, or without its custom backwards."""
