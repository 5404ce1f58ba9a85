"""The softmax family: values, exact Jacobians and the rounding error that each may have."""
