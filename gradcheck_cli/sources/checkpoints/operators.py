"""Which recorded operators may be in a graph: those that compute, and none that touch files, processes or a network."""

import torch

# Operators of the allowed namespaces that do more than compute.
_REFUSED = frozenset(
    {"aten::save", "aten::from_file", "prim::PythonOp", "prim::IgnoredPythonOp"}
    | {"prim::rpc_async", "prim::rpc_sync", "prim::rpc_remote"}
)
_COMPUTING = frozenset(
    {"aten", "prim", "prims", "quantized", "_quantized", "quantized_decomposed", "mkldnn", "mkldnn_prepacked"}
    | {"onednn", "mkl", "sparse", "profiler", "rngprims", "torchvision"}
)
# Namespaces that come with torch, torchvision and torchaudio and that read files, talk to other processes, call
# native code by address or work on raw memory.
_FOREIGN = frozenset(
    {"c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem", "rpc", "dist_rpc", "debugprims"}
    | {"inductor", "inductor_prims", "aoti_torch", "static_runtime", "_test", "onnx", "export", "streams", "_nnapi"}
    | {"image", "video_reader", "io", "torchaudio", "torchcodec", "c10", "cuda", "_native", "debug_mode_ops"}
)


def refusal(operator: str) -> str | None:
    """Why a graph that calls `operator` ("namespace::name") is refused; None if it may run.

    Operators of other packages may run if the package is imported in this process: then its code is trusted already.
    """
    namespace, _, name = operator.partition("::")
    if operator in _REFUSED or namespace in _FOREIGN:
        return f"calls the operator {operator}, which does more than compute"
    if namespace in _COMPUTING:
        return None
    packet = getattr(torch.ops, namespace)
    if name and hasattr(packet, name):
        return None
    return f"calls the operator {operator}, which is not known here"
