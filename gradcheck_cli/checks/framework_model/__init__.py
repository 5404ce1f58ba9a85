"""`softcheck model` for models that are not torch's: TensorFlow, Keras, JAX and third parties' frameworks."""
