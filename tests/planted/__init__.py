"""The planted faults of general functions, by theme; tests.function_faults gathers them."""
