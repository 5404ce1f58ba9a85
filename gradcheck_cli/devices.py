"""The device that was asked for, or a clear refusal; never another one in its place."""

import torch

from gradcheck_cli.errors import SoftcheckError


def resolve_device(name: str) -> torch.device:
    """The device of that name, which exists and works here: cpu, cuda, cuda:N or mps.

    Raises SoftcheckError with the reason and a hint; there is no silent fall-back.
    """
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise SoftcheckError(f"unknown device {name!r}", hint="known devices: cpu, cuda, cuda:N, mps") from problem
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        return _cuda(device)
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise SoftcheckError("device mps is not available: this torch sees no Apple GPU", hint="use --device cpu")
        return device
    raise SoftcheckError(f"device {name!r} is not supported", hint="known devices: cpu, cuda, cuda:N, mps")


def _cuda(device: torch.device) -> torch.device:
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]  # unannotated in torch
        raise SoftcheckError(
            f"device {device} is not available: this torch ({torch.__version__}) is built without CUDA",
            hint="install a CUDA build of torch, or use --device cpu",
        )
    count = torch.cuda.device_count()
    if count == 0:
        raise SoftcheckError(
            f"device {device} is not available: no CUDA device or driver was found",
            hint="see nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu",
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise SoftcheckError(
            f"device {device} is not available: there are {count}", hint=f"use cuda:0 … cuda:{count - 1}"
        )
    return torch.device("cuda", index)


def device_label(device: torch.device) -> str:
    """The device as the report names it, with the GPU's model."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
