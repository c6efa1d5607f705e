"""One training step of other libraries on the GPU, in torch, at what they do best: see ``gpu.py``.

bf16 autocast, TF32 elsewhere, fused Adam, no auxiliary loss, unit decoder rows. A library that is
not installed is left out by name.
"""

from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steps(clock: Any, b: int, d: int, n: int, k: int) -> dict[str, float | str]:
    """Milliseconds, or why there are none, by library."""
    torch.set_float32_matmul_precision("high")
    x = zipf_rows(b, d)
    makers = {
        "torch, dense": dense,
        "torch, dense, compiled": lambda *a: dense(*a, compiled=DEVICE == "cuda"),
        "eai-sparsify": sparsify,
        "sae-lens": sae_lens,
        "dictionary-learning": dictionary_learning,
    }
    found = {}
    for name, make in makers.items():
        try:
            found[name] = clock(synchronous(clock, make(x, n, k)))
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        print(b, d, n, k, name, found[name], flush=True)
    return found


def synchronous(clock: Any, step: Callable[[], Any]) -> Callable[[], None]:
    """The step; every so many-th call waits for the device, as the clock does for JAX."""
    count = [0]

    def call():
        step()
        count[0] += 1
        # the clock's two first calls, then the last of each round
        if DEVICE == "cuda" and (count[0] <= 2 or (count[0] - 2) % clock.calls == 0):
            torch.cuda.synchronize()

    return call


def zipf_rows(b: int, d: int) -> torch.Tensor:
    """Rows of 16 out of 4096 random directions, chosen with probability ~ 1 / i."""
    torch.manual_seed(0)
    p = 1 / torch.arange(1, 4097, dtype=torch.float32)
    chosen = torch.multinomial(p.expand(b, -1), 16)
    rows = torch.randn(4096, d)
    return torch.nn.functional.embedding_bag(
        chosen, rows, per_sample_weights=torch.rand(b, 16), mode="sum"
    ).to(DEVICE)


def autocast() -> Any:
    return torch.autocast(DEVICE, torch.bfloat16)


def dense(x: torch.Tensor, n: int, k: int, compiled: bool = False) -> Callable[[], Any]:
    """What one writes by hand: dense codes, autograd, Adam."""
    d = x.shape[1]
    W = torch.nn.functional.normalize(torch.randn(n, d, device=DEVICE), dim=1)
    weights = [W, W.clone(), torch.zeros(n, device=DEVICE), torch.zeros(d, device=DEVICE)]
    W_enc, W_dec, b_enc, b_dec = (w.requires_grad_() for w in weights)
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=DEVICE == "cuda")

    def loss_of(x):
        with autocast():
            p = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)
            values, indices = p.topk(k, dim=1)
            codes = torch.zeros_like(p).scatter(1, indices, values.relu())
            y = codes @ W_dec + b_dec
        return (x - y.float()).square().mean()

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step():
        loss_of(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def sparsify(x: torch.Tensor, n: int, k: int) -> Callable[[], Any]:
    """What sparsify's trainer does with a SparseCoder in a step, with Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=n, k=k), device=DEVICE)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=DEVICE == "cuda")

    def step():
        coder.set_decoder_norm_to_unit_norm()
        with autocast():
            out = coder(x=x, y=x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sae_lens(x: torch.Tensor, n: int, k: int) -> Callable[[], Any]:
    """TopKTrainingSAE's forward pass for training, with Adam."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=n, k=k, device=DEVICE)
    sae = TopKTrainingSAE(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=DEVICE == "cuda")

    def step():
        with autocast():
            out = sae.training_forward_pass(
                TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0)
            )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(x: torch.Tensor, n: int, k: int) -> Callable[[], Any]:
    """TopKTrainer.update, under autocast."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6,
        activation_dim=x.shape[1],
        dict_size=n,
        k=k,
        layer=0,
        lm_name="",
        device=DEVICE,
    )
    count = iter(range(10**6))

    def step():
        with autocast():
            trainer.update(next(count), x)

    return step
