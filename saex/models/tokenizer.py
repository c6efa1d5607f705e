"""Text to token ids and back: bytes, as saex's own models read them, and `transformers` tokenizers.

A subject model that reads other tokens than bytes has one of these as its attribute `tokenizer`.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from saex.models import transformer

# For chat templates that print a date: rows must not depend on the day on which they are made.
DATE = "26 Jul 2024"
SPACE = "\u2581"  # SentencePiece's


class Bytes:
    """The tokens of saex's own models."""

    bos = transformer.BOS
    encode = staticmethod(transformer.encode)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A tokenizer of `transformers`: of a folder, or of a name on the hub.

    bos_text: token that contexts of text begin with, where it is not the tokenizer's own BOS.
    """

    path: str
    bos_text: str = ""

    @functools.cached_property
    def loaded(self) -> Any:
        """The tokenizer as transformers has it; FileNotFoundError where the folder has none."""
        import transformers

        try:
            return transformers.AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, TypeError, ValueError) as error:
            line = (str(error) or type(error).__name__).splitlines()[0]
            raise FileNotFoundError(
                f"no tokenizer can be read from {self.path!r} ({line}): save one there with "
                "tokenizer.save_pretrained(folder)"
            ) from error

    def encode(self, text: str) -> Integer[np.ndarray, " t"]:
        """Text to token ids, int32 [t], without BOS or other special tokens."""
        ids = self.loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, np.int32)

    @functools.cached_property
    def bos(self) -> int:
        """Id of the token that contexts of text begin with; ValueError where there is none."""
        if not self.bos_text:
            if self.loaded.bos_token_id is None:
                raise ValueError(
                    f"the tokenizer of {self.path!r} has no BOS token: name the token that "
                    "contexts begin with by config.subject.bos, such as '<|endoftext|>'"
                )
            return int(self.loaded.bos_token_id)
        ids = self.encode(self.bos_text)
        if len(ids) != 1:
            raise ValueError(
                f"config.subject.bos={self.bos_text!r} is {len(ids)} tokens of {self.path!r}, "
                "expected one"
            )
        return int(ids[0])

    def decode(self, ids: Iterable) -> str:
        """Token ids to text, special tokens as they are written."""
        return "".join(self.token_text(int(i)) for i in ids)

    def token_text(self, token: int) -> str:
        """One token as a reader sees it; part of a character is shown as the tokenizer has it."""
        piece = self.loaded.convert_ids_to_tokens(int(token))
        if piece is None:
            return f"<{token}>"
        if SPACE in piece:  # decode would drop it
            return piece.replace(SPACE, " ")
        text = self.loaded.decode([int(token)])
        return piece if "\ufffd" in text or not text else text

    def chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model's own template writes it.

        Raises ValueError where the tokenizer has no template, or the template refuses it.
        """
        import jinja2

        if self.loaded.chat_template is None:
            raise ValueError(
                f"the tokenizer of {self.path!r} has no chat template: take the model's "
                "instruction-tuned version"
            )
        conversation = [dict(message) for message in messages]
        try:
            return self.loaded.apply_chat_template(conversation, tokenize=False, date_string=DATE)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.path!r}: {error}") from error

    def encode_parts(
        self, parts: Sequence[str]
    ) -> tuple[Integer[np.ndarray, " t"], Integer[np.ndarray, " t"]]:
        """The tokens of the joined parts, and the part that each belongs to, int32 [t] both.

        A token that reaches over several parts belongs to the last of them that it has a
        character of; no special tokens are added. ValueError for a tokenizer without offsets.
        """
        if not self.loaded.is_fast:
            raise ValueError(
                f"the tokenizer of {self.path!r} does not say which characters its tokens are: "
                "save it with a tokenizer.json (a 'fast' tokenizer)"
            )
        out = self.loaded(
            "".join(parts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        last = np.array([max(end - 1, start) for start, end in out["offset_mapping"]], np.int64)
        ends = np.cumsum([len(part) for part in parts])
        owner = np.minimum(np.searchsorted(ends, last, side="right"), len(parts) - 1)
        return np.asarray(out["input_ids"], np.int32), owner.astype(np.int32)

    def describe(self) -> dict[str, Any]:
        """What decides its ids, for the meta of a store."""
        backend = getattr(self.loaded, "backend_tokenizer", None)
        rules = backend.to_str() if backend else json.dumps(self.loaded.get_vocab(), sort_keys=True)
        template = self.loaded.chat_template
        digest = hashlib.sha256(f"{rules}\n{template}".encode()).hexdigest()
        out = {"bos": self.bos_text, "sha256": digest}
        if "strftime_now" in str(template) and "date_string" not in str(template):
            out["date"] = datetime.date.today().isoformat()  # it prints today's
        return out
