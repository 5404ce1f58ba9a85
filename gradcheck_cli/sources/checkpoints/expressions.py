"""Tells arithmetic over symbolic sizes from code, in the strings that torch.export evaluates."""

import ast
import re
from collections.abc import Callable

_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "floor"}
    | {"ceiling", "Piecewise", "ITE", "And", "Or", "Not", "Eq", "Ne", "Gt", "Ge", "Lt", "Le", "Equality"}
    | {"Unequality", "StrictGreaterThan", "GreaterThan", "StrictLessThan", "LessThan", "FloorDiv"}
    | {"ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift"}
    | {"RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv"}
    | {"IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal"}
    | {"ToFloat", "Identity", "OpaqueUnaryFn_sqrt", "Zero", "One", "NegativeOne", "Half"}
)
_GROWING = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_CONSTANTS = frozenset({"true", "false", "oo", "int_oo", "inf", "L", "math"})
_ATTRIBUTES = frozenset({"size", "stride", "storage_offset", "shape", "ndim", "isnan", "isinf", "inf", "dim", "numel"})
_SYMBOL = re.compile(r"[a-z]{1,3}\d+")
_TEXT = re.compile(r"[\w.+\-]*")
_PARTS = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.keyword, ast.Load, ast.Expression)
_COMPOSED = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Tuple, ast.IfExp)
_MAX_LENGTH = 10_000
_MAX_DIGITS = 24  # of a double, and of an int64
_MAX_EXPONENT = 64


def is_symbolic_size(text: str) -> bool:
    """Whether `text` is arithmetic over symbols and numbers as sympy prints it, and small enough to evaluate."""
    return _consists_of(text, _is_arithmetic)


def is_guard(text: str) -> bool:
    """Whether `text` compares sizes of inputs, such as "L['x'].size()[0] == 3"."""
    return _consists_of(text, lambda node: _is_arithmetic(node) or _is_access(node))


def _consists_of(text: str, known: Callable[[ast.AST], bool]) -> bool:
    """Whether every node of the expression is known, and every text in it spells a name, a number or a key."""
    if len(text) > _MAX_LENGTH or not text.isascii() or not text.isprintable():
        return False
    try:
        nodes = [*ast.walk(ast.parse(text.strip(), mode="eval"))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    spelled = {id(node) for parent in nodes for node in _spelled(parent)}
    return all(id(node) in spelled or known(node) for node in nodes)


def _spelled(node: ast.AST) -> list[ast.expr]:
    """The texts in a node that may be there: in Symbol('s0'), Integer('3') and L['x']."""
    match node:
        case ast.Call(func=ast.Name(id="Symbol" | "Integer" | "Float"), args=parts):
            pass
        case ast.Subscript(slice=part):
            parts = [part]
        case _:
            return []
    return [part for part in parts if isinstance(part, ast.Constant) and _TEXT.fullmatch(str(part.value))]


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, bool | int | float) and len(repr(value)) <= _MAX_DIGITS
        case ast.Name(id=name):
            return name in _FUNCTIONS or name in _CONSTANTS or bool(_SYMBOL.fullmatch(name))
        case ast.Call(func=ast.Name(id=name)) if name not in _FUNCTIONS:
            return False
        case ast.Call(func=ast.Name()) | ast.BinOp():
            return not _grows(node) or _stays_small(node)
        case _:
            return isinstance(node, _PARTS + _COMPOSED)


def _is_access(node: ast.AST) -> bool:
    """Whether a node of a guard asks an input for a size."""
    match node:
        case ast.Attribute(attr=name):
            return name in _ATTRIBUTES
        case ast.Call(func=ast.Attribute(attr=name), keywords=[]):
            return name in _ATTRIBUTES
        case _:
            return isinstance(node, ast.Subscript)


def _grows(node: ast.AST) -> bool:
    """Whether a power or a shift, which can make a huge number out of two small ones."""
    match node:
        case ast.BinOp(op=ast.Pow() | ast.LShift()):
            return True
        case ast.Call(func=ast.Name(id=name)):
            return name in _GROWING
        case _:
            return False


def _stays_small(power: ast.AST) -> bool:
    """Whether a power has a small exponent and no power inside it."""
    match power:
        case ast.BinOp(right=exponent) | ast.Call(args=[_, exponent]):
            numbers = [node.value for node in ast.walk(exponent) if isinstance(node, ast.Constant)]
        case _:
            return False
    small = all(not isinstance(number, int | float) or abs(number) <= _MAX_EXPONENT for number in numbers)
    nested = any(_grows(node) for node in ast.walk(power) if node is not power)
    products = any(isinstance(node, ast.BinOp) for node in ast.walk(exponent))
    return small and not nested and not products
