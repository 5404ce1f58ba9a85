"""The only readers of files: score arrays from storage, and the user's own code from modules."""
