"""One training step of other libraries on the GPU, in torch, at what they do best: see ``gpu.py``.

bf16 autocast, TF32 elsewhere, fused Adam, no auxiliary loss, unit decoder rows, on the rows that
saex's own steps have. A library that is not installed is left out by name. A process without JAX.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_clock import Clock, arguments, hand_on, sizes
from gpu_peers_openai import openai
from measure import zipf_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], Any]


def main() -> None:
    args = arguments(__doc__)
    torch.set_float32_matmul_precision("high")
    wait = (lambda _: torch.cuda.synchronize()) if DEVICE == "cuda" else (lambda _: None)
    clock, found = Clock(args.rounds, args.calls, wait), {}
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    for shape, (b, d, n, k) in sizes(args.shapes).items():
        found[shape] = {}
        for name, ms in steps(clock, b, d, n, k):
            found[shape][name] = ms
            print(args.part, shape, name, ms, flush=True)
            hand_on(args.to, device, found)


def steps(clock: Clock, b: int, d: int, n: int, k: int) -> Iterator[tuple[str, float | str]]:
    """(library, milliseconds of its step, or why there are none)."""
    x = torch.from_numpy(zipf_rows(b, d)).to(DEVICE)
    for name, make in PEERS.items():
        yield name, clock.made(lambda make=make: make(x, n, k))
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    yield from top_k(clock, x, n)


def top_k(clock: Clock, x: torch.Tensor, n: int) -> Iterator[tuple[str, float | str]]:
    """torch.topk of as many scores, and a pass that only reads them: how many passes it is."""
    for k in (32, 64):
        yield f"torch.topk alone, k {k}", clock.made(lambda k=k: _selecting(x, n, k))
    yield "one reading pass over the scores", clock.made(lambda: _selecting(x, n, 0))


def _selecting(x: torch.Tensor, n: int, k: int) -> Step:
    p = torch.randn(len(x), n, device=DEVICE)
    return (lambda: p.topk(min(k, n), dim=1)) if k else (lambda: p.sum(1))


def autocast() -> Any:
    return torch.autocast(DEVICE, torch.bfloat16)


def compiled(f: Callable) -> Callable:
    """torch.compile on GPUs; on a CPU it would want a compiler of C++."""
    return torch.compile(f) if DEVICE == "cuda" else f


def adam(weights: Any) -> torch.optim.Adam:
    return torch.optim.Adam(weights, lr=1e-4, fused=True)


def dense(x: torch.Tensor, n: int, k: int, compile_it: bool = False) -> Step:
    """What one writes by hand: dense codes, autograd, Adam."""
    d = x.shape[1]
    W = torch.nn.functional.normalize(torch.randn(n, d, device=DEVICE), dim=1)
    weights = [W, W.clone(), torch.zeros(n, device=DEVICE), torch.zeros(d, device=DEVICE)]
    W_enc, W_dec, b_enc, b_dec = (w.requires_grad_() for w in weights)
    optimizer = adam(weights)

    def loss_of(x):
        with autocast():
            p = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)
            values, indices = p.topk(k, dim=1)
            codes = torch.zeros_like(p).scatter(1, indices, values.relu())
            y = codes @ W_dec + b_dec
        return (x - y.float()).square().mean()

    loss_of = compiled(loss_of) if compile_it else loss_of

    def step():
        loss_of(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def sparsify(x: torch.Tensor, n: int, k: int) -> Step:
    """What sparsify's trainer does with a SparseCoder in a step, with Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=n, k=k), device=DEVICE)
    optimizer = adam(coder.parameters())

    def step():
        coder.set_decoder_norm_to_unit_norm()
        with autocast():
            out = coder(x=x, y=x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sae_lens(
    x: torch.Tensor, n: int, k: int, compile_it: bool = False, sparse: bool = False
) -> Step:
    """TopKTrainingSAE's forward pass for training, with Adam.

    compile_it: its ``compile_sae``. sparse: its ``use_sparse_activations``, whose products refuse
    bfloat16: so without autocast, in TF32.
    """
    import contextlib

    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(
        d_in=x.shape[1], d_sae=n, k=k, device=DEVICE, use_sparse_activations=sparse
    )
    sae = TopKTrainingSAE(config)
    optimizer = adam(sae.parameters())
    forward = compiled(sae.training_forward_pass) if compile_it else sae.training_forward_pass
    given = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )

    def step():
        with contextlib.nullcontext() if sparse else autocast():
            out = forward(given)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(x: torch.Tensor, n: int, k: int) -> Step:
    """TopKTrainer.update under autocast, with torch's fused Adam."""
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
    for group in trainer.optimizer.param_groups:  # read in every step; no state has been made yet
        group["fused"], group["foreach"] = True, False
    count = iter(range(10**6))

    def step():
        with autocast():
            trainer.update(next(count), x)

    return step


PEERS: dict[str, Callable[[torch.Tensor, int, int], Step]] = {
    "torch, dense": dense,
    "torch, dense, compiled": lambda *a: dense(*a, compile_it=True),
    "OpenAI's algorithm in torch": openai,
    "eai-sparsify": sparsify,
    "sae-lens": sae_lens,
    "sae-lens, compiled": lambda *a: sae_lens(*a, compile_it=True),
    "sae-lens, sparse activations": lambda *a: sae_lens(*a, sparse=True),
    "dictionary-learning": dictionary_learning,
}


if __name__ == "__main__":
    main()
