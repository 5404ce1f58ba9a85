"""softcheck: is this gradient right, and if not, where, by how much and why?"""

__all__ = ["__version__"]
__version__ = "0.1.0"
