"""Multi-layer SAE: at how many layers a latent fires, for one token and over tokens.

    python experiments/reproductions/multi_layer.py

Data: the residual stream after each of pocket-lm's four blocks, on the standard library; in the
control, sums of random directions of which each is at one random layer of a token.
"""

from typing import Any

import numpy as np
from rates import SEEDS, SHORT_RUN, TUNED, best_rate
from study import (
    Found,
    Study,
    codes_of,
    compile_once,
    main,
    of,
    pocket,
    read,
    shuffled,
    told,
    trained,
)

from saex.sae import MultiLayer

STUDY = Study(
    name="multi_layer",
    methods=("multi_layer",),
    claim="For one token a latent mostly fires at one layer, over tokens at many: its variance "
    "over layers is about two orders of magnitude larger over tokens than for one token.",
    source="arXiv 2409.04185 (Lawson, Farnik, Houghton, Aitchison, ICLR 2025)",
    paper="often one layer for a token; variance about two orders of magnitude larger over tokens "
    "(abstract; Pythia of 6 layers and more)",
    own_text=False,
    baseline="the same codes with their layers dealt anew among a latent's firings: how far single "
    f"tokens' variance is from chance; trained {TUNED.format('FVU')}",
    says_no_if="in a seed less than half of the firings (weighed by size) are of a latent at its "
    "one layer of that token, or variance over tokens is less than 30 times that of one token "
    "(30: half an order short of two)",
)
SITES = tuple(f"blocks.{i}.resid_post" for i in range(4))
TIMES = 30
N, K, BATCH = 512, 16, 256


def run(small: bool) -> Found:
    """Three seeds at the best rate."""
    compile_once()
    steps, rows = (20, 20_000) if small else (400, 200_000)
    train, test = (
        np.stack(list(read(store, **{s: s for s in SITES}).values()), axis=1)
        for store in pocket(SITES, rows, rows // 4)
    )
    sae = MultiLayer(256, N, len(SITES), K, dead_after_tokens=200_000)
    cut = len(test) // 5
    tune, test = test[:cut], test[cut : cut + 20_000]

    def fvu(lr: float) -> float:
        return one(sae, train, tune, steps, lr, 0)["fvu"]

    grids = [] if small else [best_rate("multi_layer", fvu)]
    lr = 3e-3 if small else grids[0]["lr"]
    runs = [one(sae, train, test, steps, lr, seed) for seed in (SEEDS[:1] if small else SEEDS)]
    return judge(runs, grids)


def one(sae: Any, train: Any, test: Any, steps: int, lr: float, seed: int) -> dict[str, Any]:
    """Train on rows [b, layers, d]; FVU of held-out rows, and where latents fire in them."""
    batches = shuffled({"x": train.reshape(len(train), -1)}, BATCH, seed)
    params, _ = trained(sae, batches, steps=steps, lr=lr, seed=seed, **SHORT_RUN)
    codes = [codes_of(sae, params, test[:, i]) for i in range(sae.sites)]
    left = [fvu_of(sae, params, test[:, i]) for i in range(sae.sites)]
    settings = {"method": "multi_layer", "lr": lr, "seed": seed, "fvu": float(np.mean(left))}
    return settings | over_layers(np.stack(codes, axis=1), seed)


def fvu_of(sae: Any, params: Any, x: np.ndarray) -> float:
    """Of rows of one layer; ``decode`` puts their own mean and norm back."""
    y = np.asarray(sae.decode(params, sae.encode(params, x), x))
    return float(np.square(x - y).sum() / np.square(x - x.mean(0)).sum())


def over_layers(codes: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Variance over layers of codes [b, layers, n], each firing weighed by its size.

    q(l | f, t) is the share of latent f's size in token t that is at layer l. within: the mean of
    its variance over tokens and latents; latent: of q(l | f) over all tokens; total: of q(l).
    dealt: ``within`` after a latent's firings have got each other's layers. single: the share of
    firings that are their latent's only one of that token.
    """
    b, _, n = codes.shape
    token, layer, latent = np.nonzero(codes)
    z = codes[token, layer, latent].astype(np.float64)
    groups = {"within": token * n + latent, "latent": latent, "total": 0 * latent}
    out = {name: variance(group, layer, z) for name, group in groups.items()}
    order = np.argsort(latent, kind="stable")
    mixed = np.lexsort((np.random.default_rng(seed).random(len(z)), latent))
    out["dealt"] = variance(groups["within"][order], layer[mixed], z[order])
    firings = np.bincount(groups["within"], minlength=b * n)
    out["single"] = float(z[firings[groups["within"]] == 1].sum() / z.sum())
    out["layers"] = float(np.average(firings[groups["within"]], weights=z))
    return out | {"times": out["latent"] / max(out["within"], 1e-12)}


def variance(group: np.ndarray, layer: np.ndarray, z: np.ndarray) -> float:
    """Mean over z of the variance of the layer within its group, also weighed by z."""
    mass, first, second = (np.bincount(group, z * layer**power) for power in range(3))
    there = mass > 0
    spread = second[there] - first[there] ** 2 / mass[there]
    return float(max(spread.sum(), 0) / mass.sum())


def control(
    steps: int = 400, d: int = 64, features: int = 128, layers: int = 4
) -> tuple[bool, str]:
    """The same on features that are at one random layer of a token: ``times`` must be large."""
    rng = np.random.default_rng(5)
    D = rng.normal(size=(features, d))
    D /= np.linalg.norm(D, axis=1, keepdims=True)
    rows = np.zeros((20_000, layers, features), np.float32)
    token = np.arange(len(rows))[:, None]
    chosen = np.argsort(rng.random((len(rows), features)), axis=1)[:, : 4 * layers]
    at = np.repeat(np.arange(layers), 4)[None]
    rows[token, at, chosen] = rng.uniform(0.5, 1.5, chosen.shape)
    x = (rows @ D).astype(np.float32)
    sae = MultiLayer(d, features, layers, 4, dead_after_tokens=200_000)
    known = one(sae, x[4000:], x[:4000], steps, 1e-2, 0)
    return known["single"] >= 0.5 and known["times"] >= TIMES, (
        f"Where each feature is at one random layer of a token: {known['single']:.3f} of firings "
        f"at one layer, variance {known['times']:.0f} times larger over tokens."
    )


def judge(runs: Any, grids: Any) -> Found:
    single, times = of(runs, "single"), of(runs, "times")
    share = np.mean(of(runs, "within")) / np.mean(of(runs, "dealt"))
    ours = (
        f"{told(single, '.3f')} of firings at one layer, {told(of(runs, 'layers'), '.2f')} layers "
        f"on average; variance {told(times, '.2f')} times larger over tokens"
    )
    why = (
        f"Of a latent's variance over layers {np.mean(of(runs, 'latent')):.3f} (all latents "
        f"together: {np.mean(of(runs, 'total')):.3f}) single tokens have "
        f"{np.mean(of(runs, 'within')):.3f}, {share:.2f} of what layers dealt at random would give "
        "(those may repeat, so 1 is not its bound): layers differ within tokens, not between them."
    )
    return Found(min(single) >= 0.5 and min(times) >= TIMES, ours, why, runs, control, grids)


if __name__ == "__main__":
    main(STUDY, run)
