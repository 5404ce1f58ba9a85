"""`MODEL_FAULTS`: every fault of the three networks, by name "network: kind, layer"."""

from tests.model_zoo.base import ModelFault
from tests.model_zoo.mlp_faults import MLP_FAULTS
from tests.model_zoo.resnet_faults import RESNET_FAULTS
from tests.model_zoo.transformer_faults import TRANSFORMER_FAULTS

__all__ = ["MODEL_FAULTS", "ModelFault", "model_fault"]

MODEL_FAULTS: tuple[ModelFault, ...] = (*TRANSFORMER_FAULTS, *RESNET_FAULTS, *MLP_FAULTS)


def model_fault(name: str) -> ModelFault:
    """The planted fault of that name, as in "transformer: values detached, middle"."""
    return next(one for one in MODEL_FAULTS if one.name == name)
