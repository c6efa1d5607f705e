"""A TopK step as OpenAI's paper publishes it (Gao et al. 2024, arXiv 2406.04093, appendix D).

The algorithm, not their program: their kernels are in Triton, ours are what torch has, so this is a
best effort at what the algorithm takes and no measurement of theirs. What is theirs: nothing dense
behind the selection; slots in coordinate form, sorted by latent, from which the gradients of both
matrices are sparse-transpose-dense products; the codes' gradients as products of dense rows at the
slots' indices; the pre-bias' gradient summed over rows before it meets W_enc; gradients of the
decoder without the part along its rows; unit rows; fused Adam; bfloat16 here for their float16.
"""

from collections.abc import Callable
from typing import Any

import torch

torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud, or torch warns of its default
ROWS = 1024  # of a batch, whose [rows, k, d] exists at a time where nothing samples the product


def openai(x: torch.Tensor, n: int, k: int) -> Callable[[], Any]:
    """One step after the other on the rows ``x``: loss, gradients by hand, Adam."""
    d, device = x.shape[1], x.device
    W = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=1)
    weights = [W.clone(), W, torch.zeros(n, device=device), torch.zeros(d, device=device)]
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)

    def step():
        for w, g in zip(weights, gradients(x, *weights, k)):
            w.grad = g
        optimizer.step()
        weights[1].div_(weights[1].norm(dim=1, keepdim=True))

    return torch.no_grad()(step)


def gradients(
    x: torch.Tensor,
    W_enc: torch.Tensor,
    W_dec: torch.Tensor,
    b_enc: torch.Tensor,
    b_dec: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, ...]:
    """Of mean((x - x_hat)^2) in (W_enc, W_dec, b_enc, b_dec), W_dec's without the part along it."""
    centred = x - b_dec
    with torch.autocast(x.device.type, torch.bfloat16):
        p = torch.nn.functional.linear(centred, W_enc, b_enc)
    values, indices = p.topk(k, dim=1)
    values = values.relu().float()
    del p
    y = torch.nn.functional.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")
    g = (2 / x.numel()) * (y + b_dec - x)
    dz = torch.where(values > 0, at_indices(g, W_dec, indices), 0)
    order = by_latent(indices, len(W_enc))
    dW_dec = transpose_times_dense(values, order, g, len(W_enc))
    dW_enc = transpose_times_dense(dz, order, centred, len(W_enc))
    db_enc = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), dz.flatten())
    dW_dec -= (dW_dec * W_dec).sum(1, keepdim=True) * W_dec
    return dW_enc, dW_dec, db_enc, g.sum(0) - db_enc @ W_enc


def at_indices(g: torch.Tensor, W: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """<g[b], W[indices[b, j]]> as [b, k]: a sampled product where the device has one for floats."""
    if g.is_cuda:
        b, k = indices.shape
        columns, order = indices.sort(dim=1)
        pointers = torch.arange(0, b * k + 1, k, device=g.device)
        where = torch.sparse_csr_tensor(
            pointers, columns.flatten(), torch.zeros(b * k, device=g.device), (b, len(W))
        )
        found = torch.sparse.sampled_addmm(where, g, W.T).values().view(b, k)
        return torch.empty_like(found).scatter_(1, order, found)
    parts = zip(g.split(ROWS), indices.split(ROWS))
    return torch.cat([torch.einsum("bd,bkd->bk", rows, W[i]) for rows, i in parts])


def by_latent(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(slots in the order of their latents, the row of each, where each latent's begin)."""
    latents, order = indices.flatten().sort(stable=True)
    starts = torch.zeros(n + 1, dtype=torch.int64, device=indices.device)
    starts[1:] = torch.bincount(latents, minlength=n).cumsum(0)
    return order, order // indices.shape[1], starts


def transpose_times_dense(
    values: torch.Tensor, order: tuple[torch.Tensor, ...], rows: torch.Tensor, n: int
) -> torch.Tensor:
    """[n, d]: for each latent the sum of ``rows`` weighted by the slots that hold it."""
    slots, row, starts = order
    sparse = torch.sparse_csr_tensor(starts, row, values.flatten()[slots], (n, len(rows)))
    return sparse @ rows
