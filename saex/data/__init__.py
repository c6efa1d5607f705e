"""Where rows come from and how they reach the training step: text, store, stream."""

from saex.data.chat import Chat
from saex.data.comments import StdlibComments
from saex.data.manifest import Column, StoreError
from saex.data.quantise import calibrate
from saex.data.statistics import ColumnStats
from saex.data.store import Store
from saex.data.store_merge import merge_parts
from saex.data.store_writer import StoreWriter
from saex.data.text import Files, Stdlib, Table

# Another source is one row: a frozen dataclass, its config section, with documents and digest.
SOURCES = {
    "stdlib": Stdlib,
    "files": Files,
    "table": Table,
    "chat": Chat,
    "stdlib_comments": StdlibComments,
}

__all__ = [
    "SOURCES",
    "Column",
    "ColumnStats",
    "Store",
    "StoreError",
    "StoreWriter",
    "calibrate",
    "merge_parts",
]
