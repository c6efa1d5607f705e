"""Conversations as the model was tuned on them: one a sequence, in its own chat template.

After *Training Superior Sparse Autoencoders for Instruct Models* (Li et al. 2025, arXiv
2506.07691): each conversation is formatted with the model's template and read alone, not cut out of
a stream of concatenated text. Every token carries its role, by which a stream leaves rows out.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saex.data.text import Chunk, Document, Table, check_split, digest_documents, split_of

ROLE = "role"  # the column
# What column `role` holds, by number; of a prompt 1, 2 and 4, of an answer 3.
ROLES = ("template", "system", "user", "assistant", "tool")
# Other names of these, and of the fields of a message.
_SAME = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
}
_MARK = "\ue000{}\ue001"  # stands for a message's content; private characters, in no template
_MARKS = re.compile("\ue000[0-9]+\ue001")

Render = Callable[[Sequence[Mapping[str, Any]]], str]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A JSONL or parquet file with one conversation a row.

    path: the file. messages: its column, a list of {"role": ..., "content": ...} (or {"from": ...,
    "value": ...}) with the roles system, user, assistant, tool and their usual other names. id:
    column whose value names the conversation (and so decides its split); '' takes the row number.
    Longer conversations are cut at the context's end. The store gets the column `role`: 0 for
    tokens of the template, 1 system, 2 user, 3 assistant, 4 tool.
    """

    path: str
    messages: str = "messages"
    id: str = ""

    @property
    def token_columns(self) -> dict[str, str]:
        """Columns of a store beside the usual ones: name -> dtype."""
        return {ROLE: "int8"}

    def documents(self, split: str) -> Iterator[Document]:
        """Conversations in row order, as text in a plain template.

        Raises as `saex.data.text.Table.documents`, and ValueError for what is no conversation.
        """
        for name, messages in self._conversations(split):
            yield Document(name, plain(messages))

    def digest(self, split: str) -> str:
        """sha256 (hex) of the split's names and messages."""
        texts = ((n, json.dumps(m, sort_keys=True)) for n, m in self._conversations(split))
        return digest_documents(itertools.starmap(Document, texts))

    def chunks(
        self, split: str, context: int, tokenizer: Any, wanted: Container[int] | None = None
    ) -> Iterator[Chunk]:
        """One context a conversation, padded at the right or cut, with column `role`.

        wanted: numbers of conversations in the split; None: all.
        tokenizer: has `chat_template(messages)` and `encode_parts(parts)`, as
        `saex.models.tokenizer.Pretrained`; without a template, as for bytes, `encode` and `bos`
        serve, and conversations are written plainly ("User: ...").
        Raises ValueError where a template refuses a conversation, or changes what it says.
        """
        for number, (name, messages) in enumerate(self._conversations(split)):
            if wanted is not None and number not in wanted:
                continue
            try:
                ids, roles = tokens_of(messages, tokenizer)
            except ValueError as error:
                raise ValueError(f"{self.path}, conversation {name!r}: {error}") from error
            length = min(len(ids), context)
            tokens, column = np.zeros(context, np.int32), np.zeros(context, np.int8)
            tokens[:length], column[:length] = ids[:length], roles[:length]
            yield Chunk(tokens, length, number, 0, {ROLE: column})

    def _conversations(self, split: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(name, messages) of the split; empty ones are skipped."""
        check_split(split)
        for name, where, value in Table(self.path, self.messages, self.id).cells():
            if split_of(name) != split:
                continue
            try:
                messages = conversation(value)
            except ValueError as error:
                raise ValueError(f"{where}: column {self.messages!r} {error}") from error
            if messages:
                yield name, messages


def conversation(value: Any) -> list[dict[str, Any]]:
    """A cell of a table as messages {"role", "content", ...}; ValueError for what is none."""
    if not isinstance(value, list):
        raise ValueError(f"holds {type(value).__name__}, expected a list of messages")
    return [_message(m) for m in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"has a message that is {type(message).__name__}, expected an object")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    role = _SAME.get(str(role), role)
    if role not in ROLES[1:]:
        raise ValueError(f"has a message of role {role!r}, expected {', '.join(ROLES[1:])}")
    if not isinstance(content, str):
        raise ValueError(
            f"has a message whose content is {type(content).__name__}, expected text (leave out "
            "messages that only call tools or show pictures)"
        )
    rest = {k: v for k, v in message.items() if k not in ("from", "value") and v is not None}
    return {**rest, "role": role, "content": content}


def plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """A template for models that have none: "User: ...", a blank line between messages."""
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages) + "\n"


def tokens_of(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [t] of a conversation and the role of each, int8 [t], as in `ROLES`."""
    templated = hasattr(tokenizer, "chat_template")
    cut = parts(messages, tokenizer.chat_template if templated else plain)
    if templated:
        ids, owner = tokenizer.encode_parts([text for text, _ in cut])
    else:
        pieces = [np.asarray(tokenizer.encode(text), np.int32) for text, _ in cut]
        ids = np.concatenate([[tokenizer.bos], *pieces]).astype(np.int32)
        owner = np.repeat(np.arange(len(pieces)), [len(p) for p in pieces])
        owner = np.concatenate([[0], owner])  # the template's first part
    return ids, np.array([role for _, role in cut], np.int8)[owner]


def parts(messages: Sequence[Mapping[str, Any]], render: Render) -> list[tuple[str, int]]:
    """The rendered conversation in parts: (text, role), template and contents in turns.

    What belongs to the template is found by rendering marks in the contents' place; contents may
    lose white space at their ends. ValueError where a template leaves out or changes more.
    """
    marked = [{**m, "content": _MARK.format(i)} for i, m in enumerate(messages)]
    frame, text = _MARKS.split(render(marked)), render(messages)
    if len(frame) != len(messages) + 1:
        raise ValueError(
            f"the template shows {len(frame) - 1} of {len(messages)} messages, so that the roles "
            "of tokens are not known"
        )
    out, at = [(frame[0], 0)], len(frame[0])
    for i, (message, behind) in enumerate(zip(messages, frame[1:])):
        content = _shown(message["content"], behind, text, at, last=i + 1 == len(messages))
        out += [(content, ROLES.index(message["role"])), (behind, 0)]
        at += len(content) + len(behind)
    if "".join(part for part, _ in out) != text:
        raise ValueError("the template is another one for these messages: their order or length")
    return out


def _shown(content: str, behind: str, text: str, at: int, last: bool) -> str:
    """The content as it stands at a place of the text, before what comes behind it."""
    for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
        if text.startswith(variant + behind, at):
            if not last or len(text) == at + len(variant) + len(behind):
                return variant
    raise ValueError(
        f"the template does not show a message as it is ({content[:40]!r}...): the roles of its "
        "tokens are not known; take such messages out"
    )
