"""Where rows come from and how they reach the training step: text, store, stream."""

from saex.data.manifest import Column, StoreError
from saex.data.statistics import ColumnStats
from saex.data.store import Store
from saex.data.store_merge import merge_parts
from saex.data.store_writer import StoreWriter
from saex.data.text import SOURCES

__all__ = ["SOURCES", "Column", "ColumnStats", "Store", "StoreError", "StoreWriter", "merge_parts"]
