"""Small real models of TensorFlow, Keras and JAX, and the code that goes with their files."""

import textwrap
import zipfile
from pathlib import Path

import numpy as np

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.models.framework.keras_start import keras_module
from gradcheck_cli.models.framework.tf_model import silent

keras = keras_module()
layers = keras.layers

MODULES = """
    import tensorflow as tf

    @tf.custom_gradient
    def right(x):
        return tf.tanh(x), lambda dy: dy * (1 - tf.tanh(x) ** 2)

    @tf.custom_gradient
    def wrong(x):
        return tf.tanh(x), lambda dy: dy * (1 - tf.tanh(x))

    class Block(tf.Module):
        def __init__(self, function, inside, outside):
            super().__init__()
            self.w = tf.Variable(tf.random.stateless_normal((inside, outside), (1, 2)), name="w")
            self.b = tf.Variable(tf.zeros(outside), name="b")
            self.function = function

        def __call__(self, x):
            return self.function(x @ self.w + self.b)

    class Net(tf.Module):
        def __init__(self, function=right, hidden=5):
            super().__init__()
            self.blocks = [Block(tf.sin, 4, hidden), Block(function, hidden, 6)]
            self.head = Block(tf.identity, 6, 3)
            self.count = tf.Variable(0, trainable=False)

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def wrong_net():
        return Net(wrong)

    def not_a_model():
        return 3
"""

KERAS_CODE = """
    import keras
    import tensorflow as tf

    @tf.custom_gradient
    def wrong(x):
        return tf.tanh(x), lambda dy: dy * (1 - tf.tanh(x))

    @keras.saving.register_keras_serializable("mine")
    class Scale(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

        def call(self, x):
            return x * self.scale

    class Broken(keras.layers.Layer):
        def call(self, x):
            return wrong(x)

    class Sub(keras.Model):
        def __init__(self, hidden=5, **more):
            super().__init__(**more)
            self.hidden = keras.layers.Dense(hidden, activation="tanh")
            self.out = keras.layers.Dense(3)

        def call(self, x, training=False):
            return self.out(self.hidden(x))

    def scaled():
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense"), Scale(name="scale")])

    def broken():
        first, inner = keras.layers.Dense(5, name="first"), keras.Sequential([keras.Input((5,)), Broken(name="broken")])
        return keras.Sequential([keras.Input((4,)), first, inner, keras.layers.Dense(3, name="last")])
"""

JAX_CODE = """
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def wrong(x):
        return jnp.tanh(x)

    wrong.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x)),))

    def apply(params, x):
        for layer in params["layers"][:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ params["layers"][-1]["w"] + params["layers"][-1]["b"]

    def broken(params, x):
        x = wrong(x @ params["layers"][0]["w"] + params["layers"][0]["b"])
        return x @ params["layers"][1]["w"] + params["layers"][1]["b"]

    def narrow(params, x):
        return apply(params, x).astype(jnp.float32)

    def dropping(params, x, training=False):
        x = x @ params["layers"][0]["w"] + params["layers"][0]["b"]
        if training:
            kept = jax.random.bernoulli(jax.random.PRNGKey(3), 0.5, x.shape)
            x = jnp.where(kept, x / 0.5, 0)
        return x @ params["layers"][1]["w"] + params["layers"][1]["b"]

    class Linen:
        # stands for a module of Flax: parameters in collections, the mode by name
        def init(self, key, x):
            raise NotImplementedError

        def __call__(self, x, train):
            raise NotImplementedError

        def apply(self, variables, x, train, rngs=None, mutable=False):
            dense, stats = variables["params"]["Dense_0"], variables["batch_stats"]
            y = (x @ dense["kernel"] + dense["bias"]) - stats["mean"]
            if mutable:
                return y, {"batch_stats": {"mean": stats["mean"] + 1}}
            return y

    def linen():
        return Linen()

    @jax.tree_util.register_pytree_with_keys_class
    class Tree:
        # stands for a module of Equinox: a callable tree for one example
        def __init__(self, weight, bias):
            self.weight, self.bias = weight, bias

        def tree_flatten_with_keys(self):
            key = jax.tree_util.GetAttrKey
            return ((key("weight"), self.weight), (key("bias"), self.bias)), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

        def __call__(self, x):
            assert x.ndim == 1
            return self.weight @ x + self.bias

    def tree(outputs=3):
        return Tree(jnp.zeros((outputs, 4)), jnp.zeros(outputs))
"""


def code(folder: Path, text: str, name: str = "code.py") -> Path:
    """The text as a Python file."""
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def dense() -> object:
    """The smallest chain."""
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, name="out")])


def mixed_up() -> object:
    """Batch norm, dropout and a softmax at the end."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="relu", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, name="drop"),
            layers.Dense(3, activation="softmax", name="last"),
        ]
    )


def nested() -> object:
    """Two inputs, a model in the model, and an operation without a layer."""
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = layers.Concatenate(name="joined")([layers.Dense(5, activation="tanh", name="left")(a), b])
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="deep")], name="inner")
    return keras.Model([a, b], layers.Dense(3, name="out")(inner(x) + x * 2.0))


def tokens() -> object:
    """Ids through an embedding, whose input Keras declares as floating by default."""
    inputs = keras.Input((7,))
    x = layers.Embedding(11, 3, mask_zero=True, name="table")(inputs)
    return keras.Model(inputs, layers.Dense(4, name="out")(layers.LSTM(5, name="lstm")(x)))


def saved(model: object, path: Path) -> str:
    """The model in a file: a whole one, or its weights where the name says so."""
    with silent():
        model.save_weights(path) if path.name.endswith(".weights.h5") else model.save(path)
    return str(path)


def replaced(path: Path, changes: dict[str, bytes]) -> Path:
    """The archive with other or more members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def parameters(folder: Path, *, separator: str = "/", prefix: str = "") -> str:
    """Two layers as .npz."""
    random = np.random.default_rng(0)
    shapes = {"w": [(4, 5), (5, 3)], "b": [(5,), (3,)]}
    arrays = {
        separator.join([*([prefix] if prefix else []), "layers", str(place), name]): random.normal(size=sizes[place])
        for place in (0, 1)
        for name, sizes in shapes.items()
    }
    path = folder / "params.npz"
    np.savez(path, **{name: one.astype(np.float32) for name, one in arrays.items()})
    return str(path)


class Exported(tf.Module):
    """A model for SavedModels: one matrix behind a custom gradient."""

    def __init__(self, *, wrong: bool, dtype: object = tf.float32) -> None:
        super().__init__()
        self.w = tf.Variable(tf.random.stateless_normal((4, 3), (1, 2), dtype=dtype), name="w")
        self.unused = tf.Variable([1.0], trainable=False)
        power = 0 if wrong else 1

        @tf.custom_gradient
        def squared(x: object) -> object:
            return x * x, lambda dy: 2 * dy * x**power

        @tf.function(input_signature=[tf.TensorSpec((None, 4), dtype, name="x")])
        def call(x: object) -> object:
            return squared(x @ self.w)

        self.call = call
