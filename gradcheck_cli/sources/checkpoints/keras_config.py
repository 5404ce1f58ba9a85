"""Says what code the configuration of a Keras model asks for, without handing it to Keras."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from gradcheck_cli.sources.wording import printable

_DEEPEST = 200
# Parts of Keras that a model is made of. Others (utils, config, saving …) have functions that fetch or write files.
_MODELLING = frozenset(
    (
        *("activations", "backend", "constraints", "dtype_policies", "engine", "initializers", "layers", "losses"),
        *("metrics", "mixed_precision", "models", "ops", "optimizers", "quantizers", "random", "regularizers"),
    )
)
_OWN_CODE = frozenset(["TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"])
_LOOKUPS = frozenset(["StringLookup", "IntegerLookup", "TextVectorization"])
_PLAIN = frozenset(
    ["__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__", "__tuple__"]
)


class Asks(Enum):
    """What a part of a configuration asks for beyond Keras itself."""

    PYTHON = auto()
    """Python byte code that is stored in the file."""
    PROGRAM = auto()
    """A layer that loads a program of another kind from the file or the disk."""
    READING = auto()
    """Another file, named by this one."""
    CUSTOM = auto()
    """A class or function that is not part of Keras."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One such part: the name of its class or function, and the module and registered name that the file gives."""

    asks: Asks
    name: str
    module: str = ""
    registered: str = ""

    @property
    def text(self) -> str:
        """The name for a message."""
        place = f" ({printable(self.module)})" if self.module and self.asks is Asks.CUSTOM else ""
        return f"{printable(self.name)}{place}"


def requests_of(config: object) -> tuple[Request, ...]:
    """What a configuration (the content of config.json, or the model_config of an HDF5 file) asks for beyond Keras.

    Every object with a class name is looked at, however deep. A name without a module, as old files have, is CUSTOM
    here whether Keras knows it or not: only Keras can say. Raises RecursionError for an absurd depth.
    """
    return tuple(dict.fromkeys(_walk(config, 0)))


def _walk(node: object, depth: int) -> Iterator[Request]:
    if depth > _DEEPEST:
        raise RecursionError
    if isinstance(node, dict):
        if isinstance(node.get("class_name"), str):
            yield from _of_object(node)
        for part in node.values():
            yield from _walk(part, depth + 1)
    elif isinstance(node, list):
        for part in node:
            yield from _walk(part, depth + 1)


def _of_object(node: Mapping[str, object]) -> Iterator[Request]:
    name, module = str(node["class_name"]), node.get("module")
    place = module if isinstance(module, str) else ""
    inner = node.get("config")
    if name in _PLAIN:
        return
    if name == "__lambda__":
        yield Request(asks=Asks.PYTHON, name="a Python lambda")
    elif name == "function":
        if not _is_modelling(place):
            yield Request(asks=Asks.CUSTOM, name=str(inner), module="" if place == "builtins" else place)
    elif name == "__typespec__":
        yield Request(asks=Asks.CUSTOM, name=str(node.get("spec_name")), module=place)
    elif place and not _is_modelling(place):
        yield _custom(node, place)
    elif not place:
        yield _custom(node, "")
    if name in _OWN_CODE:
        yield Request(asks=Asks.PROGRAM, name=name)
    if name == "Lambda" and isinstance(inner, dict) and not _is_named(inner):
        yield Request(asks=Asks.PYTHON, name="a Lambda layer")
    if name in _LOOKUPS and isinstance(inner, dict) and isinstance(inner.get("vocabulary"), str):
        yield Request(asks=Asks.READING, name=f"{name} reads {inner['vocabulary']}")


def _custom(node: Mapping[str, object], module: str) -> Request:
    registered = node.get("registered_name")
    return Request(
        asks=Asks.CUSTOM,
        name=str(node["class_name"]),
        module=module,
        registered=registered if isinstance(registered, str) else "",
    )


def _is_named(inner: Mapping[str, object]) -> bool:
    """Whether the function of a Lambda layer is named, not stored."""
    function = inner.get("function")
    if isinstance(function, dict):
        return function.get("class_name") == "function"
    return isinstance(function, str) and inner.get("function_type") == "function"


def _is_modelling(module: str) -> bool:
    """Whether a module is one of Keras' own that models are made of."""
    parts = [part for part in module.split(".") if part not in ("src", "_tf_keras", "api")]
    return parts[:1] == ["keras"] and (len(parts) == 1 or parts[1] in _MODELLING)
