"""Models of `transformers` in miniature, with random weights, and a tokenizer made here."""

import functools
import pathlib

import numpy as np
import pytest

VOCAB, CONTEXT, WIDTH, LAYERS = 300, 32, 16, 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)
NORMAL = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
NEOX = {k: v for k, v in NORMAL.items() if k not in ("num_key_value_heads", "head_dim")}
CONFIGS = {
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2,
            "n_positions": CONTEXT, "n_inner": 24, "bos_token_id": 0, "eos_token_id": 1,
        },
    ),
    "pythia": ("GPTNeoXConfig", NEOX),
    "llama": ("LlamaConfig", NORMAL),
    "gemma2": ("Gemma2Config", {**NORMAL, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    # the friendly names of these are promised too
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 2,
            "attention_types": [[["global"], LAYERS]], "max_position_embeddings": CONTEXT,
            "intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 1,
        },
    ),
    "mistral": ("MistralConfig", NORMAL),
    "qwen2": ("Qwen2Config", NEOX | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3Config", NORMAL),
    "gemma": ("GemmaConfig", NORMAL),
    "gemma3": ("Gemma3TextConfig", {**NORMAL, "sliding_window": 8}),
    "phi3": ("Phi3Config", NEOX | {"num_key_value_heads": 1}),
    "olmo": ("OlmoConfig", NEOX | {"num_key_value_heads": 1}),
    "olmo2": ("Olmo2Config", NEOX | {"num_key_value_heads": 1}),
}  # fmt: skip


@functools.cache
def make(name: str):
    """The torch module; weights large enough that every part of it matters."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra 'torch')")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind, fields = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**fields)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for x in module.parameters():
            x.add_(0.3 * torch.randn_like(x))
    return module


def tokenizer(template: str | None = TEMPLATE, bos: bool = True):
    """Words and bytes, by the tokenizers library: byte-level BPE with a few merges."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'torch')")
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(["def return import class self for in range print not"] * 3, trainer)
    special = {"bos_token": "<s>"} if bos else {}
    out = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], **special,
    )  # fmt: skip
    out.chat_template = template
    return out


def save(folder: pathlib.Path, name: str = "llama", **options) -> pathlib.Path:
    """The folder of a model, as a user has it."""
    make(name).save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder


def tokens(rows: int = 3, length: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(4, VOCAB, (rows, length)).astype(np.int32)
