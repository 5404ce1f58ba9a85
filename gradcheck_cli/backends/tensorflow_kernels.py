"""How each operation of TensorFlow rounds: not at all, once per result, or along the sums inside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gradcheck_cli.backends.tensorflow_import import inner, tf
from gradcheck_cli.program.kernels import ACCUMULATOR, FLOAT16_UNIT, Rounding, growth

_FUNCTION_ULPS = 2.0
"""Exponentials and the like: their errors have a root mean square of 0.5 to 1.1 units where ξ leaves 0.6."""
_ALONG = 0.07
_ACROSS = 0.25
"""Growth of sums with √length. Measured in float32, random signs, units of u·√Σa², length 16 / 64 / 256 / 1024 / 16384:
along the last axis 1.0 1.2 1.5 1.8 5.0, across it (one addition per row) 1.0 1.6 2.7 5.2 16.5; cumulative and segment
sums 1.2 2.9 5 7.5 33; products 1.2 2.5 5.0 5.0 5.6, of single rows 1.4 2.2 4.9 8.2 40."""
_ACROSS_SAME_SIGN = 0.11
_SAME_SIGN = 0.45
_LONGEST = 16.0
"""The same for terms of one sign, in units of u·|result|: sums along the axis 0.7 0.7 0.6 0.8 0.9, across it 0.7 0.7
1.2 2.2 8.3, products 1.0 1.9 3.7 1.9 1.2."""
_WINDOW = 9.0
"""Terms in a window, where nothing tells."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perturbation:
    """Sizes of the random relative errors of the operands before an operation and of its results after it.

    `by_norm` measures those of the operands by the largest entry of each matrix.
    """

    operands: float = 0.0
    results: float = 0.0
    by_norm: bool = False


EXACT = Perturbation()


def perturbation(name: str, inputs: Sequence[Any], attributes: Mapping[str, Any], unit: float) -> Perturbation:
    """What plays the rounding of an operation with roundoff `unit`; what is not known is taken for a reduction."""
    if _is_exact(name, inputs):
        return EXACT
    if name in _ONE_STEP:
        return Perturbation(results=unit)
    if name in _FUNCTIONS:
        return Perturbation(results=_FUNCTION_ULPS * unit)
    kind = _kind(name, inputs)
    operands, results = _growth(kind, name, inputs, attributes)
    inside = _inner_unit(name, kind, unit)
    by_norm = kind is Rounding.DECOMPOSITION
    return Perturbation(operands=inside * operands, results=math.hypot(unit, inside * results), by_norm=by_norm)


def _is_exact(name: str, inputs: Sequence[Any]) -> bool:
    """Whether the operation moves, selects, compares or draws, scales by a power of two, or adds up single entries."""
    if name in _MOVES or name.startswith(_MOVE_STARTS) or not _returns_numbers(name):
        return True
    if name in _SUMS:
        return bool(math.prod(inputs[0].shape) == _kept(inputs))
    if name == "AddN":  # backward graphs of tf.function add zeros for values that nobody used
        return sum(bool(np.any(value.numpy())) for value in inputs) <= 1
    return (name in _SCALINGS and _by_power_of_two(inputs)) or (name in _RINGS and _are_whole(inputs))


@cache
def _returns_numbers(name: str) -> bool:
    """Whether some result may hold floating-point numbers: its dtype is one of them, or one of an input."""
    definition = inner("framework.op_def_registry").get(name)
    if definition is None:
        return True
    return any(not one.type or tf.as_dtype(one.type).is_floating for one in definition.output_arg)


def _growth(kind: Rounding, name: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> tuple[float, float]:
    """Factors for operands and results: those of torch's kernels where TensorFlow's have not been seen to differ."""
    length = _length(name, inputs, attributes)
    operands, results = growth(kind, length)
    root = math.sqrt(length)
    if name in _PARAMETERS:  # orders and exponents that are whole numbers have to stay whole
        return 0.0, results
    if kind is Rounding.PRODUCT:
        return operands, max(results, _SAME_SIGN * min(root, _LONGEST))
    if name == "BiasAddGrad" or (name in _SUMS and len(inputs[0].shape) - 1 not in _axes(inputs)):
        return max(operands, _ACROSS * root), max(results, _ACROSS_SAME_SIGN * root)
    return (max(operands, _ALONG * root) if name in _SUMS else operands), results


def _kind(name: str, inputs: Sequence[Any]) -> Rounding:
    if name in _PRODUCTS:
        thin = any(1 in value.shape[-2:] for value in inputs[:2])
        return Rounding.VECTOR_PRODUCT if thin or "BackpropFilter" in name else Rounding.PRODUCT
    named = {
        Rounding.FUSED: name in _FUSED,
        Rounding.SERIES: name in _SERIES or name.startswith("Bessel"),
        Rounding.SCATTER: name in _SCATTERS,
        Rounding.DECOMPOSITION: name in _DECOMPOSITIONS,
    }
    return next((kind for kind, is_it in named.items() if is_it), Rounding.SUM)


def _inner_unit(name: str, kind: Rounding, unit: float) -> float:
    """The unit roundoff in which the kernel adds up.

    On the CPU, below float32: softmax kernels, scatters, cumulative sums and float16 sums work in the dtype itself,
    products and gradients of filters partly (half its errors), convolutions in float32 but for their last steps.
    """
    if kind in (Rounding.FUSED, Rounding.SERIES, Rounding.SCATTER, Rounding.DECOMPOSITION):
        return unit
    wide = min(unit, ACCUMULATOR)
    if kind is Rounding.SUM:
        return unit if unit == FLOAT16_UNIT else wide
    return max(wide, unit / 8 if name in _CONVOLUTIONS else unit / 2) if unit > ACCUMULATOR else unit


def _length(name: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> float:
    """Terms per result; the longest axis where it is not known."""
    if name in _SUMS:
        return float(math.prod(inputs[0].shape)) / max(1.0, _kept(inputs))
    if name in _PRODUCTS and name != "Einsum":
        return _product_length(name, inputs, attributes)
    if name in _SCATTERS and not name.startswith("Cum"):
        return _repeats(inputs[1]) if name in _SEGMENTS else _WINDOW
    known = {"AddN": len(inputs), "BiasAddGrad": math.prod(inputs[0].shape[:-1])}
    if name in known:
        return float(known[name])
    return float(max((max(value.shape, default=1) for value in inputs), default=1))


def _product_length(name: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> float:
    """Terms per entry of a matrix product or convolution."""
    if "MatMul" in name:
        transposed = attributes.get("transpose_a") or attributes.get("adj_x")
        return float(inputs[0].shape[-2 if transposed else -1])
    filters = inputs[1].shape
    if "BackpropInput" in name:
        return float(math.prod(filters) / max(1, filters[-2]))
    if "BackpropFilter" in name:
        return float(math.prod(inputs[2].shape[:-1]))
    return float(math.prod(filters[:-1]))


def _kept(inputs: Sequence[Any]) -> float:
    """Results of a sum along axes: the sizes of the others."""
    shape = tuple(inputs[0].shape)
    return float(math.prod(size for axis, size in enumerate(shape) if axis not in _axes(inputs)))


def _axes(inputs: Sequence[Any]) -> set[int]:
    rank = len(inputs[0].shape)
    if len(inputs) < 2:
        return set(range(rank))
    return {int(axis) % max(rank, 1) for axis in np.asarray(inputs[1].numpy()).reshape(-1)}


def _repeats(indices: Any) -> float:
    """How often the most frequent place occurs."""
    found = np.asarray(indices.numpy()).reshape(-1)
    return float(np.bincount(found[found >= 0]).max(initial=1))


def _by_power_of_two(inputs: Sequence[Any]) -> bool:
    """Whether a scalar operand (of a division: the divisor) is a power of two."""
    return any(_is_power_of_two(value) for value in inputs if value.shape.rank == 0 and value.dtype.is_floating)


def _are_whole(inputs: Sequence[Any]) -> bool:
    """Whether the operands are a few small whole numbers, as the exponents that the derivative of a power computes."""
    if any(math.prod(value.shape) > _FEW for value in inputs):
        return False
    arrays = [np.asarray(value.numpy()).astype(np.complex128) for value in inputs]
    return all(bool(np.all((array == np.round(array)) & (np.abs(array) <= _WHOLE))) for array in arrays)


def _is_power_of_two(value: Any) -> bool:
    number = float(value.numpy())
    return math.isfinite(number) and abs(math.frexp(number)[0]) == 0.5


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVE_STARTS = (
    "Random",
    "StatelessRandom",
    "StatelessTruncated",
    "TensorList",
    "TensorArray",
    "MatrixDiag",
    "MatrixSetDiag",
    "MatrixBandPart",
    "Arg",
    "Shape",
)
_MOVES = _names(
    """
    Identity IdentityN Reshape ExpandDims Squeeze Transpose ConjugateTranspose Pack Unpack Concat ConcatV2 Split SplitV
    Slice StridedSlice StridedSliceGrad Gather GatherV2 GatherNd Where Select SelectV2 Pad PadV2 MirrorPad Tile
    BroadcastTo Fill Const ZerosLike OnesLike Range Neg Abs Sign Max Min Maximum Minimum Floor Ceil Round Rint FloorDiv
    FloorMod Mod TruncateMod TruncateDiv Relu Relu6 ReluGrad Relu6Grad MaxPool MaxPoolV2 MaxPool3D
    MaxPoolWithArgmax MaxPoolGradGrad TopK TopKV2 Sort Unique UniqueV2 StopGradient PreventGradient CheckNumerics
    CheckNumericsV2 Print PrintV2 VarHandleOp Bitcast Real Imag Conj Complex Reverse ReverseV2 ReverseSequence Roll
    DepthToSpace SpaceToDepth BatchToSpace BatchToSpaceND SpaceToBatch SpaceToBatchND ExtractImagePatches Diag DiagPart
    OneHot DynamicPartition DynamicStitch ParallelDynamicStitch TensorScatterUpdate TensorScatterMax TensorScatterMin
    TensorStridedSliceUpdate ClipByValue Snapshot EnsureShape NextAfter UnsortedSegmentMax UnsortedSegmentMin SegmentMax
    SegmentMin Cast PyFunc EagerPyFunc PyFuncStateless HostConst MutexLock TruncatedNormal ParameterizedTruncatedNormal
    Multinomial InplaceUpdate DeepCopy XlaSharding ResizeNearestNeighbor DataFormatVecPermute LowerBound UpperBound
    Dequantize GuaranteeConst Size
    """
)
_SCALINGS = _names("Mul RealDiv Div")
_RINGS = _names("Add AddV2 Sub Mul")
_FEW = 64
_WHOLE = 16
"""Sums and products of whole numbers up to this size are exact in bfloat16."""
_ONE_STEP = _names(
    """
    Add AddV2 Sub Mul MulNoNan Div RealDiv DivNoNan Reciprocal Inv ReciprocalGrad InvGrad Sqrt Rsqrt SqrtGrad RsqrtGrad
    Square SquaredDifference LinSpace BiasAdd BiasAddV1 LeakyRelu LeakyReluGrad SigmoidGrad TanhGrad EluGrad SeluGrad
    SoftsignGrad ComplexAbs AccumulateNV2 Lerp
    """
)
_FUNCTIONS = _names(
    """
    Exp Expm1 Log Log1p Sin Cos Tan Asin Acos Atan Atan2 Sinh Cosh Tanh Asinh Acosh Atanh Erf Erfc Softplus SoftplusGrad
    Softsign Elu Selu Xlogy Xlog1py Xdivy Angle
    """
)
_SERIES = _names("Sigmoid Pow Digamma Polygamma Lgamma Igamma Igammac IgammaGradA Betainc Zeta Erfinv Ndtri Ndtr")
_PARAMETERS = _names("Pow Polygamma Igamma Igammac IgammaGradA Betainc Zeta")
_FUSED = _names(
    """
    Softmax LogSoftmax SoftmaxCrossEntropyWithLogits SparseSoftmaxCrossEntropyWithLogits Cross Prod
    """
)
_SUMS = _names("Sum Mean EuclideanNorm")
_CONVOLUTIONS = _names("Conv2D Conv3D Conv DepthwiseConv2dNative")
_PRODUCTS = _CONVOLUTIONS | _names(
    """
    MatMul BatchMatMul BatchMatMulV2 BatchMatMulV3 SparseMatMul _FusedMatMul Einsum Conv2DBackpropInput
    Conv2DBackpropInputV2 Conv3DBackpropInput Conv3DBackpropInputV2 DepthwiseConv2dNativeBackpropInput
    Conv2DBackpropFilter Conv2DBackpropFilterV2 Conv3DBackpropFilter Conv3DBackpropFilterV2
    DepthwiseConv2dNativeBackpropFilter
    """
)
_SEGMENTS = _names("UnsortedSegmentSum SegmentSum UnsortedSegmentProd SegmentProd SegmentMean")
_SCATTERS = _SEGMENTS | _names(
    """
    ScatterNd TensorScatterAdd TensorScatterSub Cumsum Cumprod CumulativeLogsumexp MaxPoolGrad MaxPoolGradV2
    MaxPool3DGrad MaxPoolGradWithArgmax AvgPoolGrad AvgPool3DGrad ResizeBilinearGrad ResizeBicubicGrad
    ResizeNearestNeighborGrad
    """
)
_DECOMPOSITIONS = _names(
    """
    Cholesky CholeskyGrad MatrixInverse MatrixSolve MatrixTriangularSolve Qr Svd SelfAdjointEig SelfAdjointEigV2 Eig
    MatrixDeterminant LogMatrixDeterminant MatrixExponential MatrixSquareRoot MatrixLogarithm MatrixSolveLs Lu
    TridiagonalSolve BandedTriangularSolve
    """
)
