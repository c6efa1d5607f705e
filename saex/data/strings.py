"""Short strings as numbers: each the place of a string in a sorted list without repetitions.

On disk each segment of a store has a list of its own, so segments stay as they are when stores
become one; who reads several segments takes the list of all their strings.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from saex.data.manifest import StoreError

# Longer ones do not belong into a list that is held in memory.
_LONGEST = 1024


class Codes:
    """Strings on their way into a segment: numbers in the order in which strings first came."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def encode(self, name: str, values: Any) -> np.ndarray:
        """[rows] int32: a number for each string; a new string takes the next.

        Raises:
          StoreError: what is no string, too long, or no Unicode text (half of a surrogate pair).
        """
        values = _listed(name, values)
        numbers = self._numbers
        for row, value in enumerate(values):
            if type(value) is not str or value not in numbers:
                _check(name, row, value)
        return np.fromiter((numbers.setdefault(v, len(numbers)) for v in values), np.int32)

    def clear(self) -> None:
        """Forgets all strings."""
        self._numbers.clear()

    def sorted(self, codes: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The strings that `codes` stand for, sorted by code point, and their places, int32."""
        used = np.unique(codes)
        known = list(self._numbers)
        strings = sorted(known[i] for i in used)
        places = np.zeros(len(known), np.int32)
        places[[self._numbers[s] for s in strings]] = np.arange(len(strings))
        return strings, places[codes]


def to_json(strings: Sequence[str]) -> str:
    """The text of a list of strings: JSON, all that is not ASCII escaped."""
    return json.dumps(list(strings)) + "\n"


def from_json(text: str) -> tuple[str, ...]:
    """The inverse of `to_json`. Raises ValueError: not a sorted list of different strings."""
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
        raise ValueError("it is no list of strings")
    "".join(found).encode()  # UnicodeEncodeError is a ValueError
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError("its strings are not in order")
    return tuple(found)


def union(lists: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """All strings of some lists, sorted by code point."""
    return tuple(sorted({s for strings in lists for s in strings}))


def places(strings: Sequence[str], whole: Sequence[str]) -> np.ndarray | None:
    """[len(strings)] int32: where each string is in `whole`; None if each keeps its number."""
    if list(strings) == list(whole[: len(strings)]):
        return None
    return np.array([bisect.bisect_left(whole, s) for s in strings], np.int32)


def _listed(name: str, values: Any) -> list[Any]:
    """The values one by one. Lists are taken as they are: numpy drops zeros at a string's end."""
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise StoreError(f"column {name!r} was given an array of shape {values.shape}; "
                             "expected [rows], a string each")  # fmt: skip
        return values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise StoreError(
            f"column {name!r} holds strings and was given {values!r:.80}; expected a list of "
            "them, one a row"
        )
    return list(values)


def _check(name: str, row: int, value: Any) -> None:
    if not isinstance(value, str):
        raise StoreError(
            f"column {name!r} holds strings; row {row} of what was given is {value!r:.80}"
        )
    try:
        size = len(value.encode())
    except UnicodeEncodeError as err:
        raise StoreError(
            f"column {name!r}: row {row} of what was given is not Unicode text ({err}): "
            "decode it with errors='replace'"
        ) from err
    if size > _LONGEST:
        raise StoreError(
            f"column {name!r}: row {row} of what was given is a string of {size} bytes; short "
            f"strings have at most {_LONGEST}. Store a number, and the texts elsewhere"
        )
