"""Right and wrong functions of TensorFlow and JAX for `softcheck function`."""
