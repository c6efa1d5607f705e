"""pocket-lm: the byte language model that the package ships.

    saex pretrain --config=experiments/pocket_lm.py --workdir=runs/pocket_lm

Text: the standard library of Python 3.11.7, without its tests (10.7 MB train, 1.36 MB held out).
Time: 80 minutes on a shared 2-core CPU with AVX-512 (about 55 on one core of it left alone, 3,500
bytes/s), JAX 0.10.2. Expected: 1.35 held-out bits per byte, where gzip -9 needs 1.95 and xz -9
1.64 for the held-out files in a row. The run was stopped and went on twice.
The log is experiments/logs/pocket_lm.jsonl, the model card saex/models/POCKET_LM.md.

The workdir's model.safetensors is what saex/models/pocket_lm.safetensors ships.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "text": {"name": "stdlib"},
            "model": {
                "d_model": 256,
                "n_layers": 4,
                "n_heads": 4,
                "d_mlp": 1024,
                "context": 256,
                "matmul": "bfloat16",
            },
            "steps": 1450,
            "batch_tokens": 8192,
            "short_context": 128,
            "short_share": 0.6,
            "decay_share": 0.5,
            "muon_rate": 0.02,
            "adam_rate": 0.003,
        }
    )
