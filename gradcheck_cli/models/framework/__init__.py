"""Models of TensorFlow, Keras and JAX: from their files, or code with their weights, to cases that can be checked."""
