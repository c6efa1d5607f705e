"""Text as documents: where it comes from, how it is split, how it is cut into contexts.

A source yields `Document`s in a stable order. The split is decided by a hash of the document's
name alone, so a document stays on its side when others come or go, and a library file keeps its
side in every version of Python.
"""

import dataclasses
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.12  # of the documents; of the standard library's bytes this holds out 1.3 MB
# Folders that differ most between machines, or that distributions leave out.
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with a name that identifies it within its source."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One context of a document.

    tokens: int32 [context], BOS first, 0 from `length` on (padding is never stored nor scored).
    length: tokens that count, BOS included. document: index in the order of the source.
    start: index in the document's ids of the token after BOS. columns: [context] each, what else
    the source says of the tokens.
    """

    tokens: np.ndarray
    length: int
    document: int
    start: int
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def split_of(name: str) -> str:
    """'heldout' for about 12% of all names, 'train' for the others; the same on every machine."""
    digest = hashlib.sha256(b"saex:" + name.encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "heldout" if share < HELDOUT_SHARE else "train"


def check_split(split: str) -> str:
    """Returns `split`; ValueError when it is neither 'train' nor 'heldout'."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return split


def digest_documents(documents: Iterable[Document]) -> str:
    """sha256 (hex) over names and texts in order; the same bytes give the same digest anywhere."""
    total = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            data = part.encode("utf-8", "surrogateescape")
            total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def read_text(path: Path) -> str:
    """The file as text; bytes that are no UTF-8 become U+FFFD, line ends stay as they are."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise OSError(
            f"cannot read {str(path)!r} ({error.strerror or error}): "
            "mend its permissions or leave it out of the source"
        ) from error


def _select(documents: Iterator[Document], split: str) -> Iterator[Document]:
    """The documents of one split; empty ones are skipped."""
    return (d for d in documents if d.text and split_of(d.name) == split)


@dataclasses.dataclass(frozen=True)
class Stdlib:
    """The Python sources of a standard library, by default the running interpreter's own.

    path: another standard library's folder ('' is the running one). Left out are test folders,
    installed packages, and what belongs to one machine (config-*,
    _sysconfigdata*, sitecustomize).
    """

    path: str = ""

    def documents(self, split: str) -> Iterator[Document]:
        """Documents named by relative path ('json/decoder.py'), sorted by it.

        Raises ValueError for an unknown split, FileNotFoundError where the folder has no sources.
        """
        check_split(split)
        root = Path(self.path or sysconfig.get_paths()["stdlib"])
        names = sorted(_stdlib_names(root))
        if not names:
            raise FileNotFoundError(
                f"no Python sources in the standard library folder {str(root)!r}: install this "
                "Python's library sources, or take another source (files, table)"
            )
        return _select((Document(n, read_text(root / n)) for n in names), split)

    def digest(self, split: str) -> str:
        """sha256 (hex) of the split's names and texts."""
        return digest_documents(self.documents(split))


def _stdlib_names(root: Path) -> Iterator[str]:
    """Relative posix paths of the library's sources, in no promised order."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            d for d in subfolders if d not in STDLIB_SKIPPED and not d.startswith("config-")
        ]
        for file in files:
            path = Path(folder) / file
            local = file.startswith(("_sysconfigdata", "sitecustomize"))
            if path.suffix == ".py" and not local and path.is_file():
                yield path.relative_to(root).as_posix()


@dataclasses.dataclass(frozen=True)
class Files:
    """Text files of a folder (all files below it, hidden ones left out) or of a glob pattern.

    path: folder or pattern ('notes/**/*.md'; '**' goes through all subfolders).
    """

    path: str

    def documents(self, split: str) -> Iterator[Document]:
        """Documents named by path relative to the folder (to a pattern's fixed part), sorted.

        Raises ValueError for an unknown split, FileNotFoundError where no file matches.
        """
        check_split(split)
        root, names = _list_files(self.path)
        return _select((Document(n, read_text(root / n)) for n in names), split)

    def digest(self, split: str) -> str:
        """sha256 (hex) of the split's names and texts."""
        return digest_documents(self.documents(split))


def _list_files(path: str) -> tuple[Path, list[str]]:
    """(root folder, sorted relative posix names); FileNotFoundError where there is none."""
    if os.path.isdir(path):
        root, pattern = Path(path), os.path.join(glob.escape(path), "**", "*")
    elif glob.has_magic(path):
        fixed = next(i for i, part in enumerate(Path(path).parts) if glob.has_magic(part))
        root, pattern = Path(*Path(path).parts[:fixed]), path
    else:
        root, pattern = Path(path).parent, path
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"text source {path!r} does not exist: name a folder, a file or a glob pattern"
            )
    found = [Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if not found:
        raise FileNotFoundError(f"no file matches the text source {path!r}: check the pattern")
    return root, sorted(p.relative_to(root).as_posix() for p in found)


@dataclasses.dataclass(frozen=True)
class Table:
    """A JSONL (.jsonl, .ndjson, .json) or parquet file with one document a row.

    path: the file. text: name of the text column. id: column whose value names the document
    (and so decides its split); '' names it by its row number.
    """

    path: str
    text: str = "text"
    id: str = ""

    def documents(self, split: str) -> Iterator[Document]:
        """Documents in row order.

        Raises ValueError for an unknown split, a bad JSON line (with its number) or a value that
        is no text, KeyError for a missing column, FileNotFoundError for a missing file, ImportError
        where parquet needs pyarrow.
        """
        check_split(split)
        return _select(self._rows(), split)

    def digest(self, split: str) -> str:
        """sha256 (hex) of the split's names and texts."""
        return digest_documents(self.documents(split))

    def _rows(self) -> Iterator[Document]:
        for name, where, text in self.cells():
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: column {self.text!r} holds {type(text).__name__}, expected text"
                )
            yield Document(name, text)

    def cells(self) -> Iterator[tuple[str, str, Any]]:
        """(name, file and row, what the text column holds) of every row of both splits.

        Raises as `documents`, but for what the column holds.
        """
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"table {self.path!r} does not exist: name a JSONL or parquet")
        columns = [self.text] + ([self.id] if self.id else [])
        read = _read_parquet if self.path.endswith(".parquet") else _read_jsonl
        for number, row in read(self.path, columns):
            name = str(row[self.id]) if self.id else f"row {number}"
            yield name, f"{self.path} row {number}", row[self.text]


def _read_jsonl(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) for each line that is not blank."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} line {number} is no JSON ({error}): mend the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path} line {number} is a JSON {type(row).__name__}, expected an object"
                )
            _check_columns(f"{path} line {number}", columns, row)
            yield number, _whole(row)


def _whole(value: Any) -> Any:
    """A JSON value with U+FFFD for each half of a surrogate pair, which is no text (cut emoji)."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(v) for v in value]
    if isinstance(value, dict):
        return {_whole(k): _whole(v) for k, v in value.items()}
    return value


def _read_parquet(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict]]:
    """(row number from 1, row), read in pieces so that a large file needs little memory."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            f"reading {path!r} needs pyarrow: pip install 'saex[parquet]', or give a JSONL file"
        ) from error
    file = parquet.ParquetFile(path)
    _check_columns(path, columns, file.schema_arrow.names)
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _check_columns(where: str, columns: Sequence[str], present) -> None:
    for column in columns:
        if column not in present:
            raise KeyError(f"{where} has no column {column!r}: it has {', '.join(present)}")


def chunk(
    documents: Iterable[Document], encode: Callable[[str], Iterable[int]], context: int, bos: int
) -> Iterator[Chunk]:
    """Cuts documents into contexts of [bos] + (context - 1) tokens that do not overlap.

    A document's last, short context is padded at the right. A document without tokens gives none
    but keeps its number. ValueError when `context` < 2.
    """
    if context < 2:
        raise ValueError(f"context is {context}, expected at least 2: BOS and one token")
    for index, document in enumerate(documents):
        ids = np.asarray(encode(document.text), np.int32)
        for start in range(0, len(ids), context - 1):
            piece = ids[start : start + context - 1]
            tokens = np.zeros(context, np.int32)
            tokens[0], tokens[1 : 1 + len(piece)] = bos, piece
            yield Chunk(tokens, 1 + len(piece), index, start)
