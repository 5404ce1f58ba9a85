"""Models that a model check is measured on: small real networks, faults planted into them, and correct models."""
