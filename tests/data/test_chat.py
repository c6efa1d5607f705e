"""Conversations: one a context, in the model's own template, with the role of every token."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from saex.data import SOURCES, chat
from saex.data.chat import ROLES, Chat, parts
from saex.data.stream import Stream
from saex.data.text import split_of
from saex.harvest import Harvest, harvest
from saex.models.tokenizer import Bytes
from saex.models.transformer import Transformer, decode
from saex.registry import make
from tests.models import tiny

TALK = [
    {"role": "system", "content": "Be user friendly."},
    {"role": "user", "content": "user"},  # a word that stands in templates, too
    {"role": "assistant", "content": "  What of it?\n"},
    {"role": "user", "content": "<|im_end|> naïve 0"},
    {"role": "assistant", "content": ""},
]


def write(path, talks):
    lines = [json.dumps({"id": f"talk-{i}", "messages": talk}) for i, talk in enumerate(talks)]
    path.write_text("\n".join(lines))
    return str(path)


def talks(count=60):
    """Conversations of different lengths; what is said in each is said nowhere else."""
    return [
        [
            {"role": "user", "content": f"ask {i} " + "x" * (i % 17)},
            {"role": "assistant", "content": f"answer {i} " + "y" * (i % 23)},
        ]
        for i in range(count)
    ]


def chatml(messages):
    """A template as many models have it: trims, and says who speaks."""
    texts = [f"<|im_start|>{m['role']}\n{m['content'].strip()}<|im_end|>\n" for m in messages]
    return "<s>" + "".join(texts)


def real(messages):
    """Whether these are the messages themselves, not marks in their places."""
    return messages[1]["content"] == TALK[1]["content"]


def said(cut):
    return [(ROLES[role], text) for text, role in cut if role]


def test_parts_are_template_and_contents_in_turns():
    cut = parts(TALK, chatml)
    assert "".join(text for text, _ in cut) == chatml(TALK)
    assert said(cut) == [(m["role"], m["content"].strip()) for m in TALK]
    assert [role for _, role in cut][::2] == [0] * 6
    assert said(parts(TALK, chat.plain)) == [(m["role"], m["content"]) for m in TALK]


@pytest.mark.parametrize(
    ("render", "match"),
    [
        (lambda ms: chatml(ms[1:]), "shows 4 of 5 messages"),
        (lambda ms: chatml(ms).replace("What of it?", "What?"), r"does not show .*'  What of it"),
        (lambda ms: chatml(ms) + "!" * real(ms), "does not show a message"),
        (lambda ms: "!" * real(ms) + chatml(ms), "does not show a message"),
    ],
)
def test_templates_that_hide_what_was_said_are_refused(render, match):
    with pytest.raises(ValueError, match=match):
        parts(TALK, render)


def test_plain_conversations_for_models_that_read_bytes(tmp_path):
    source = Chat(write(tmp_path / "t.jsonl", [TALK, *talks()]), id="id")
    names = {f"talk-{i}" for i in range(61)}
    for split in ("train", "heldout"):
        found = {d.name: d.text for d in source.documents(split)}
        assert set(found) == {n for n in names if split_of(n) == split}
        chunks = list(source.chunks(split, 40, Bytes))
        assert len(chunks) == len(found), "not one context a conversation"
        for c, text in zip(chunks, found.values()):
            assert c.tokens[0] == 256 and decode(c.tokens[1 : c.length]) == text[: c.length - 1]
            assert c.length == min(40, 1 + len(text)) and not c.tokens[c.length :].any()
            roles = c.columns["role"]
            assert roles.dtype == np.int8 and roles.shape == (40,)
            if text.startswith("User: ask "):
                words = [decode(c.tokens[roles == number]) for number in (2, 3)]
                assert f"User: {words[0]}\n\nAssistant: {words[1]}".startswith(text[:39].rstrip())
    assert source.digest("train") != source.digest("heldout")
    other = Chat(write(tmp_path / "u.jsonl", [TALK[:-1], *talks()]), id="id")
    assert {other.digest(s) == source.digest(s) for s in ("train", "heldout")} == {True, False}


def test_packed_conversations_are_whole_and_apart(tmp_path):
    """So that one a sequence is what the model sees of each, with less padding."""
    source = Chat(write(tmp_path / "t.jsonl", talks()), id="id")
    model = Transformer(d_model=8, n_layers=1, n_heads=1, d_mlp=8, context=120)
    site, params = "blocks.0.attn_out", model.init(jax.random.key(0))
    cfg = Harvest(sites=(site,), rows=10**6, batch=4, dtype="float32", shuffle=False)
    found = []
    for pack in (False, True):
        cfg = dataclasses.replace(cfg, pack=pack)
        store = harvest(model, params, source, "train", tmp_path / str(pack), cfg)
        columns = [store.read(n) for n in ("document", "position", "tokens", "role", site)]
        order = np.lexsort(columns[1::-1])  # by document, then position
        found.append([x[order] for x in columns])
    for alone, packed in zip(*found):
        np.testing.assert_allclose(alone, packed, atol=1e-5)


def test_other_names_of_roles_and_fields():
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert chat.conversation(talk) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    (kept,) = chat.conversation([{"role": "tool", "content": "7", "name": "sum", "id": None}])
    assert kept == {"role": "tool", "content": "7", "name": "sum"}


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("text", "column 'messages' holds str, expected a list of messages"),
        (["text"], "a message that is str, expected an object"),
        ([{"role": "judge", "content": "a"}], "a message of role 'judge', expected system, user"),
        ([{"role": "user", "content": [1]}], "content is list, expected text"),
        ([{"role": "user"}], "content is NoneType, expected text"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, value, match):
    source = Chat(write(tmp_path / "t.jsonl", [*talks(3), value]))
    with pytest.raises(ValueError, match=f"t.jsonl row 4: .*{match}"):
        for split in ("train", "heldout"):
            list(source.documents(split))


@dataclasses.dataclass(frozen=True)
class Toy:
    """A stand-in subject model: its site says which token stands where."""

    context: int = 64
    sites = {"x": 4}

    def run(self, params, tokens, taps=(), edits=None, stop_at=None):
        import jax.numpy as jnp

        ones = jnp.ones((*tokens.shape, 4))
        return None, {"x": ones * tokens[..., None] / 2}


CFG = Harvest(
    rows=10**5, heldout_rows=10**4, batch=4, segment_rows=256, chunk_rows=64, dtype="float32"
)


def test_roles_are_a_column_by_which_a_stream_leaves_rows_out(tmp_path):
    source = Chat(write(tmp_path / "t.jsonl", talks()), id="id")
    store = harvest(Toy(), {}, source, "train", tmp_path / "store", CFG, sites=["x"])
    role, tokens = store.read("role"), store.read("tokens")
    assert store.columns["role"].dtype == "int8" and set(role.tolist()) == {0, 2, 3}
    document, position = store.read("document"), store.read("position")
    assert len(set(zip(document.tolist(), position.tolist()))) == store.rows
    longest = [position[document == d].max() + 1 for d in range(document.max() + 1)]
    assert (np.bincount(document) == longest).all(), "a conversation is in several contexts"
    rule = {"role": (0, 1, 2, 4)}
    batches = Stream(batch=8, exclude=rule, exclude_positions=()).open(store, ["x", "tokens"], 0)
    got = batches.gather(0, batches.rows)
    assert batches.rows == (role == 3).sum() > 300
    assert sorted(got["tokens"].tolist()) == sorted(tokens[role == 3].tolist())
    assert (got["x"] == got["tokens"][:, None] / 2).all()
    batches.close()


def test_it_is_a_config_section():
    assert make(SOURCES, {"name": "chat", "path": "a.jsonl"}) == Chat("a.jsonl")


# ---------------------------------------------------------------------- with a model's own template


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from saex.models.tokenizer import Pretrained

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return Pretrained(str(folder))


def test_tokens_are_those_of_the_model_s_template(tokenizer, tmp_path):
    source = Chat(write(tmp_path / "t.jsonl", [TALK[:3], *talks()]), id="id")
    all_of = {f"talk-{i}": talk for i, talk in enumerate([TALK[:3], *talks()])}
    for split in ("train", "heldout"):
        names = [d.name for d in source.documents(split)]
        for name, c in zip(names, source.chunks(split, 48, tokenizer)):
            ids = tokenizer.loaded.apply_chat_template(all_of[name], return_dict=False)
            assert c.tokens[: c.length].tolist() == ids[:48] and c.length == min(len(ids), 48)


def test_roles_of_a_model_s_own_tokens(tokenizer):
    talk = TALK[:3]
    ids, roles = chat.tokens_of(talk, tokenizer)
    for number, message in zip((1, 2, 3), talk):
        text = tokenizer.loaded.decode(ids[roles == number])
        assert text == message["content"].strip(), ROLES[number]
    marks = {"<|im_start|>", "<|im_end|>", "<s>"}
    template = [tokenizer.token_text(int(i)) for i in ids[roles == 0]]
    assert marks <= set(template) and "assistant" in "".join(template)
    assert not marks & {tokenizer.token_text(int(i)) for i in ids[roles > 0]}


def test_a_token_over_two_parts_belongs_to_what_was_said(tokenizer):
    ids, owner = tokenizer.encode_parts(["for ret", "urn naïve", ""])
    text = [tokenizer.token_text(int(i)) for i in ids]
    assert tokenizer.loaded.decode(ids) == "for return naïve"
    assert owner.tolist() == sorted(owner) and set(owner.tolist()) == {0, 1}
    assert owner[next(i for i, t in enumerate(text) if "return" in t)] == 1


def test_templates_that_refuse(tmp_path):
    from saex.models.tokenizer import Pretrained

    loud = "{{ raise_exception('only users speak') if messages[0]['role'] != 'user' }}"
    tiny.tokenizer(template=loud).save_pretrained(tmp_path / "loud")
    source = Chat(write(tmp_path / "t.jsonl", [TALK]), id="id")
    split = split_of("talk-0")
    with pytest.raises(ValueError, match=r"t.jsonl, conversation 'talk-0': .*only users speak"):
        list(source.chunks(split, 8, Pretrained(str(tmp_path / "loud"))))
    tiny.tokenizer(template=None).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="has no chat template: take the model's instruction"):
        list(source.chunks(split, 8, Pretrained(str(tmp_path / "none"))))


def test_a_day_that_a_template_prints_is_part_of_the_store(tmp_path):
    from saex.models.tokenizer import DATE, Pretrained

    def rendered(name, template):
        tiny.tokenizer(template=template).save_pretrained(tmp_path / name)
        tokenizer = Pretrained(str(tmp_path / name))
        return tokenizer.chat_template(TALK), tokenizer.describe()

    llama = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{{ date_string }}"
    )
    text, meta = rendered("llama", llama)
    assert text == DATE and "date" not in meta
    assert "date" in rendered("other", "{{ strftime_now('%Y') }}")[1]
