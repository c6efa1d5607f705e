"""Names in a store's folder: of the whole, and of the parts that several writers make of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from saex.data.manifest import MANIFEST, StoreError

# Everything that writers may have left in a folder that is, or will be, a store.
_OURS = re.compile(
    r"segment-.*|manifest(\.[0-9]+of[0-9]+)?\.json(\.tmp)?|writer(\.[0-9]+of[0-9]+)?\.lock"
)
_PART = re.compile(r"manifest\.([0-9]+)of([0-9]+)\.json")


@dataclass(frozen=True)
class Names:
    """What one writer owns in the folder.

    Attributes:
      part: (number from 0, parts in all), or None for the writer of the whole store.
    """

    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.part is not None and not 0 <= self.part[0] < self.part[1] < 10**6:
            raise StoreError(f"part={self.part}: expected (i, n), part i from 0 of n parts")

    @property
    def manifest(self) -> str:
        """`manifest.json`, or `manifest.2of8.json`."""
        return f"manifest.{self._of()}.json" if self.part else MANIFEST

    @property
    def lock(self) -> str:
        """`writer.lock`, or `writer.2of8.lock`."""
        return f"writer.{self._of()}.lock" if self.part else "writer.lock"

    def segment(self, place: int, token: str) -> str:
        """`segment-000007-TOKEN`, or `segment-2of8-000007-TOKEN`."""
        return f"segment-{self._of() + '-' if self.part else ''}{place:06d}-{token}"

    def owns(self, name: str) -> bool:
        """Whether a folder is a segment of this writer, listed or left by a killed attempt."""
        prefix = f"{self._of()}-" if self.part else ""
        return re.fullmatch(rf"segment-{prefix}[0-9]{{6}}-[0-9a-f]{{12}}", name) is not None

    def _of(self) -> str:
        assert self.part is not None
        return f"{self.part[0]}of{self.part[1]}"


def is_ours(name: str) -> bool:
    """Whether a name is one that writers of stores give."""
    return _OURS.fullmatch(name) is not None


def part_of(name: str) -> tuple[int, int] | None:
    """(number, parts) from the name of a part's manifest; None for other names."""
    found = _PART.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None
