"""The stress lattice: many small cases around one function, and the smallest input on which it still fails."""
