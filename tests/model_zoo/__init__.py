"""Models that a model check is measured on: small real networks, faults planted into them, correct models of all kinds."""
