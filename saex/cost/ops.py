"""FLOPs and bytes of single ops: what a benchmark of one op divides by, as ``terms`` of a step."""

from saex.cost import terms
from saex.cost.terms import Term

ADAM = 28  # bytes a number: weight and two moments read and written, gradient read


def of_op(name: str, b: int, d: int, n: int, k: int, dtype: str = "float32") -> list[Term]:
    """What one op has to do at least, on float32 arrays that lie in memory.

    Args:
      name: a key of ``OPS``. b: rows. d: width. n: latents; of "auxk" the dead ones.
      k: slots a row; of "above" and "cut" what there is room for.
      dtype: of the matmul's inputs.

    Raises:
      KeyError: an unknown name.
    """
    s = 2 if dtype == "bfloat16" else 4
    return [Term(name, *numbers) for numbers in OPS[name](b, d, n, k, s)]


def _encode(b: int, d: int, n: int, k: int, s: int) -> list[tuple[float, float | int]]:
    return [(2.0 * b * d * n, s * (n * d + b * d)), (0.0, terms.selection(b, n, k, s))]


def _gather(b: int, d: int, n: int, k: int, s: int) -> list[tuple[float, float | int]]:
    return [(2.0 * b * k * d, 4 * min(b * k, n) * d + 4 * b * d + 8 * b * k)]


def _scatter(b: int, d: int, n: int, k: int, s: int) -> list[tuple[float, float | int]]:
    return [(2.0 * b * k * d, 4 * b * d + 4 * n * d + 8 * b * k)]


def _backward(b: int, d: int, n: int, k: int, s: int) -> list[tuple[float, float | int]]:
    return [(6.0 * b * k * d, 8 * b * d + 12 * n * d + 12 * b * k)]


OPS = {
    "top_k": lambda b, d, n, k, s: [(0.0, 4 * b * n + 8 * b * k)],
    "cut": lambda b, d, n, k, s: [(0.0, 4 * b * k)],
    "encode": _encode,
    "above": lambda b, d, n, k, s: [(2.0 * b * d * n, s * (n * d + b * d)), (0.0, 16 * b * k)],
    "decode": _gather,
    "dots": _gather,
    "scatter": _scatter,
    "backward": _backward,
    "auxk": lambda b, d, n, k, s: [(10.0 * b * n * d, 16 * b * n + 24 * n * d)],
    "adam": lambda b, d, n, k, s: [(0.0, ADAM * 2 * n * d)],
}
