"""The strings of an open store: one list for each column, whatever its segments have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saex.data import strings
from saex.data.manifest import STRINGS, Manifest, StoreError
from saex.data.store_remote import RemotePath


class StoreStrings:
    """Reads lists of strings when they are first asked for, and renumbers rows by them."""

    def __init__(
        self,
        path: Path | RemotePath,
        manifest: Manifest,
        whole: Mapping[str, tuple[str, ...]] | None = None,
    ):
        """Reads nothing yet.

        Args:
          path: of the store.
          manifest: of the store.
          whole: column -> sorted strings by which rows are numbered, at least the store's own;
            None: the store's own.
        """
        self._path, self._manifest = path, manifest
        self._whole = dict(whole or {})
        self._own: dict[tuple[int, str], tuple[str, ...]] = {}
        self._places: dict[tuple[int, str], np.ndarray | None] = {}

    def of(self, name: str) -> tuple[str, ...]:
        """All strings of a column, sorted by code point; row i of the column is number i of them.

        Raises:
          StoreError: a list cannot be read; its file is named.
        """
        if name not in self._whole:
            lists = (self._segment(i, name) for i in range(len(self._manifest.segments)))
            self._whole[name] = strings.union(lists)
        return self._whole[name]

    def renumber(self, segment: int, name: str, rows: np.ndarray) -> None:
        """Turns the numbers of a segment, in place, into those of the whole column.

        Raises:
          ValueError: a number that stands for no string.
          StoreError: as `of`.
        """
        own = self._segment(segment, name)
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < len(own):
            raise ValueError("holds numbers that stand for no string (altered)")
        key = segment, name
        if key not in self._places:
            self._places[key] = strings.places(own, self.of(name))
        table = self._places[key]
        if table is not None:
            rows[...] = table[rows]

    def _segment(self, segment: int, name: str) -> tuple[str, ...]:
        key = segment, name
        if key not in self._own:
            file = self._path / self._manifest.segments[segment].path / name / STRINGS
            try:
                self._own[key] = strings.from_json(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as err:
                raise StoreError(
                    f"{file} cannot be read ({err}): `saex store verify` says what is hurt"
                ) from err
        return self._own[key]
