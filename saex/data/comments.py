"""The standard library's sources with a label for every byte: whether it stands in a comment."""

import dataclasses
import io
import itertools
import tokenize
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from saex.data.text import Chunk, Document, Stdlib, chunk

LABEL = "label"  # the column


@dataclasses.dataclass(frozen=True)
class StdlibComments:
    """``Stdlib``, and a column `label`: 1 for tokens of a comment (its # on, without the line end).

    For models whose tokens are bytes. path: as ``Stdlib``. Where Python cannot read a file to its
    end, what comes behind counts as no comment. BOS has label 0.
    """

    path: str = ""

    @property
    def token_columns(self) -> dict[str, str]:
        """Columns of a store beside the usual ones: name -> dtype."""
        return {LABEL: "int8"}

    def documents(self, split: str) -> Iterator[Document]:
        """As ``Stdlib``."""
        return Stdlib(self.path).documents(split)

    def digest(self, split: str) -> str:
        """As ``Stdlib``."""
        return Stdlib(self.path).digest(split)

    def chunks(
        self, split: str, context: int, tokenizer: Any, wanted: Collection[int] | None = None
    ) -> Iterator[Chunk]:
        """Contexts as of ``Stdlib``, with column `label`; of the ``wanted`` documents alone.

        Raises ValueError where the tokenizer does not give one token a byte.
        """
        for number, document in enumerate(self.documents(split)):
            if wanted is not None and number not in wanted:
                continue
            label = in_comments(document.text)
            ids = np.asarray(tokenizer.encode(document.text), np.int32)
            if len(ids) != len(label):
                raise ValueError(
                    f"{document.name}: {len(ids)} tokens for {len(label)} bytes: comments are "
                    "labelled byte by byte, so take a model of bytes (subject.name='pocket-lm')"
                )
            for piece in chunk([document], lambda _, ids=ids: ids, context, tokenizer.bos):
                column = np.zeros(context, np.int8)
                column[1 : piece.length] = label[piece.start : piece.start + piece.length - 1]
                yield dataclasses.replace(piece, document=number, columns={LABEL: column})


def in_comments(text: str) -> np.ndarray:
    """Int8 [bytes of the text in UTF-8]: 1 where a byte belongs to a comment of Python."""
    lines = io.StringIO(text, newline="").readlines()
    starts = [0, *itertools.accumulate(len(_bytes(line)) for line in lines)]
    out = np.zeros(starts[-1], np.int8)
    rest = iter(lines)
    try:
        for token in tokenize.generate_tokens(lambda: next(rest, "")):
            if token.type == tokenize.COMMENT:
                (row, begin), (_, end) = token.start, token.end
                line, first = lines[row - 1], starts[row - 1]
                out[first + len(_bytes(line[:begin])) : first + len(_bytes(line[:end]))] = 1
    except (tokenize.TokenError, SyntaxError):
        pass  # what was read until here is labelled
    return out


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
