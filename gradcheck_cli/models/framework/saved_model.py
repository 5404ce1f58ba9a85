"""A TensorFlow SavedModel as a function of its variables."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gradcheck_cli.backends.tensorflow_import import tf
from gradcheck_cli.errors import SoftcheckError
from gradcheck_cli.models.framework.inputs import InputSpec
from gradcheck_cli.models.framework.keras_models import FAILURES
from gradcheck_cli.models.framework.tf_model import TensorFlowModel, said, silent
from gradcheck_cli.models.framework.tf_parts import is_variable
from gradcheck_cli.sources.checkpoints.saved_models import check_saved_model

_SIGNATURE = "serving_default"
_LISTS = ("trainable_variables", "non_trainable_variables", "variables", "_all_variables", "_misc_assets")
"""How Keras' export and saved modules list variables that have their own places besides, or no other place."""
_DEEPEST = 64


def load_saved_model(folder: Path, *, trust: bool) -> TensorFlowModel:
    """The model in the folder; its graphs were looked through first, unless it is trusted.

    Raises SoftcheckError for graphs that reach outside the model, for damage, and where there is nothing to call.
    """
    check_saved_model(folder, trust=trust)
    try:
        with silent():
            root = tf.saved_model.load(str(folder))
    except FAILURES as error:
        raise SoftcheckError(f"{folder}: TensorFlow cannot load it: {said(error)}") from error
    function, by_name = _function(root, folder)
    concrete = function if by_name else function.concrete_functions[0]
    structure = concrete.structured_input_signature
    wanted = _tensors(structure)
    specs = [one for one in tf.nest.flatten(structure) if isinstance(one, tf.TensorSpec)]

    def call(arrays: Sequence[Any]) -> Any:
        given = iter(arrays)
        flat = [next(given) if isinstance(one, tf.TensorSpec) else one for one in tf.nest.flatten(structure)]
        args, kwargs = tf.nest.pack_sequence_as(structure, flat)
        if len(arrays) != wanted:
            raise SoftcheckError(f"{folder}: takes {wanted} inputs, and {len(arrays)} were given")
        return function(*args, **kwargs)

    variables = dict(_named(root))
    trainable = getattr(root, "trainable_variables", None)
    trained = {id(one) for one in trainable} if isinstance(trainable, list | tuple) else None
    return TensorFlowModel(
        name=folder.name or str(folder),
        call=call,
        variables=variables,
        trainable=frozenset(
            name for name, one in variables.items() if one.trainable and (trained is None or id(one) in trained)
        ),
        specs=tuple(_spec(one, place) for place, one in enumerate(specs)),
        root=root,
    )


def _function(root: Any, folder: Path) -> tuple[Any, bool]:
    """What is called, and whether it is a signature, which takes its inputs by name."""
    serve = getattr(root, "serve", None)
    if getattr(serve, "concrete_functions", None):
        return serve, False
    signatures = getattr(root, "signatures", {})
    name = _SIGNATURE if _SIGNATURE in signatures else next(iter(signatures), None)
    if name is not None:
        return signatures[name], True
    call = getattr(root, "__call__", None)  # noqa: B004  # the restored function is wanted, not whether it can be called
    if getattr(call, "concrete_functions", None):
        return call, False
    raise SoftcheckError(
        f"{folder}: has nothing to call: no serve, no signature and no __call__",
        hint="save it with signatures=, or with a traced @tf.function as its __call__",
    )


def _tensors(structure: Any) -> int:
    return sum(isinstance(one, tf.TensorSpec) for one in tf.nest.flatten(structure))


def _spec(spec: Any, place: int) -> InputSpec:
    sizes = None if spec.shape.rank is None else tuple(spec.shape.as_list())
    dtype = getattr(torch, spec.dtype.name, None)
    if not isinstance(dtype, torch.dtype):
        raise SoftcheckError(f"the model takes {spec.dtype.name} inputs, which are not numbers")
    return InputSpec(name=spec.name or f"input{place}", sizes=sizes, dtype=dtype)


def _named(root: Any) -> Iterator[tuple[str, Any]]:
    """The variables by their place in the object, or, in Keras' lists, by their own names."""
    view = tf.train.TrackableView(root)
    seen: set[int] = {id(root)}
    taken: set[str] = set()
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    while waiting:
        path, owner, depth = waiting.pop(0)
        for own, child in view.children(owner).items():
            if id(child) in seen or depth > _DEEPEST:
                continue
            seen.add(id(child))
            place = f"{path}.{own}" if path else str(own)
            if is_variable(child):
                listed = place.split(".")[0] in _LISTS
                name = str(child.name).partition(":")[0].replace("/", ".") if listed else place
                name = name if name not in taken else place
                taken.add(name)
                yield name, child
            else:
                waiting.append((place, child, depth + 1))
