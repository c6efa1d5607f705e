"""pocket-lm: the byte language model that the package ships."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.text = {"name": "stdlib"}
    config.model = {
        "d_model": 256,
        "n_layers": 4,
        "n_heads": 4,
        "d_mlp": 1024,
        "context": 256,
        "matmul": "bfloat16",
    }
    config.steps = 3000
    return config.lock()
