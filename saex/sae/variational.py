"""Variational TopK SAE (Baker, Li 2025, arXiv 2509.22994)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, losses, ops, selection, sums
from saex.sae.base import ArraySpec, DenseCodes, Out, SparseCodes
from saex.sae.topk import TopK
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class Variational:
    """TopK whose latents are Gaussian in training, with a KL term to N(0, 1): a negative result.

    mu = (x - b_dec) W_enc^T + b_enc, log sigma^2 = (x - b_dec) W_var^T + b_var within -10..2,
    z = mu + sigma e with e ~ N(0, 1); f = relu(top_k(z)); x_hat = f W_dec + b_dec. At inference
    z = mu. Loss: s * MSE + kl_coefficient * KL + aux_coefficient * AuxK (of mu), where KL is the
    mean over rows of the sum over latents of (sigma^2 + mu^2 - 1 - log sigma^2) / 2 and its weight
    grows from 0 over ``kl_warmup_steps``. The source finds it worse than TopK, and half of the
    latents dead, at every k: a baseline, not a recommendation.

    Several versions of the authors' code exist, and which made which figure is not known. This is
    the one with ReLU and learned variance, in its mode with b_dec taken from x and unit decoder
    rows; where it put relu(z) for mu into KL (no KL then) we put mu. It weighs KL by 500, beside
    squares that are summed over d. Rows here have mean square norm 1: what was sigma 1 is far more
    noise, hence the smaller sigma at the start, the wider bounds and the smaller weight. That
    sigma, 0.05, is still much where latents are many: the largest of 2048 draws is 0.17, and a code
    of a row of norm 1 that has 32 of them is 0.18.

    It costs: mu, log sigma^2, noise and z are dense [b, n], and so is the gradient of KL; W_var is
    a second encoder.

    Fields:
      variance: "learned"; "fixed": sigma 1, no W_var; "none": no noise (z = mu), KL = mu^2 / 2.
      log_variance: b_var at the start (the source: 0 or -2).
      kl_coefficient, kl_warmup_steps: as said (the source: 500, 5% of the run).
      kl_over: latents whose KL counts: "all", or "selected" by the top k (another version).
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    variance: Literal["learned", "fixed", "none"] = "learned"
    log_variance: float = -6.0
    kl_coefficient: float = 1e-5
    kl_warmup_steps: int = 1000
    kl_over: Literal["all", "selected"] = "all"
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        self.plain()  # checks what it shares
        for name in ("kl_coefficient", "kl_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: cannot be negative")
        if not LOWEST <= self.log_variance <= HIGHEST:
            raise ValueError(f"log_variance={self.log_variance}: in {LOWEST}..{HIGHEST}")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def plain(self) -> TopK:
        """The TopK that it is at inference."""
        return TopK(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TopK)})

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``TopK``, and where the variance is learned a second encoder."""
        specs = self.plain().specs()
        if self.variance == "learned":
            n, d, what = self.n, self.d_in, "of log sigma^2; training alone reads it"
            specs["params"]["W_var"] = ArraySpec((n, d), ("n", "d"), doc=f"encoder {what}")
            specs["params"]["b_var"] = ArraySpec((n,), ("n",), doc=f"bias {what}")
        return specs

    def hyper(self) -> dict[str, float]:
        """k, the weights of KL and AuxK."""
        return {**self.plain().hyper(), "kl_coefficient": self.kl_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK``; W_var uniform in +-1/sqrt(d)."""
        params, stats = self.plain().init(key, sample)
        if self.variance == "learned":
            key = jax.random.fold_in(key, 1)
            params["W_var"] = affine.tied_init(key, self.d_in, self.n)
            params["b_var"] = jnp.full((self.n,), self.log_variance)
        return params, stats

    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d], by mu."""
        shared = self.plain().specs()["params"]
        return self.plain().encode({name: params[name] for name in shared}, x)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE, the warmed-up KL and AuxK of one global batch, with noise drawn from ``key``."""
        x = affine.scaled(params, batch["x"])
        weights = (params["b_dec"], params["W_enc"], params["b_enc"])
        mu = pre_activations(x, *weights, self.matmul_dtype)
        log_variance = self._log_variance(params, x, mu)
        z = mu
        if self.variance != "none":
            z = mu + jnp.exp(log_variance / 2) * normal(key, mu)
        codes = self._largest(z, hyper["k"])
        stats, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
        y = affine.decode(params, codes)
        aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
        aux_k, served = affine.aux_alone(params, x, x - y, dead, *aux)

        each = divergence(mu, log_variance)
        if self.kl_over == "selected":
            each = jnp.take_along_axis(each, codes.indices, axis=1) * (codes.values != 0)
        kl = sums.mean_sum(DenseCodes(each))
        mse = stats["mse_scale"] * losses.mse(x - y)
        metrics = {"mse": mse, "kl": kl, "aux_k": aux_k, "aux_served": served}
        metrics |= losses.figures(x, x - y, codes, dead)
        kl = hyper["kl_coefficient"] * losses.ramp(step, self.kl_warmup_steps) * kl
        return mse + kl + hyper["aux_coefficient"] * aux_k, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _log_variance(self, params: Params, x: Any, mu: Any) -> Any:
        if self.variance != "learned":
            return jnp.zeros_like(mu)
        weights = (params["b_dec"], params["W_var"], params["b_var"])
        return jnp.clip(pre_activations(x, *weights, self.matmul_dtype), LOWEST, HIGHEST)

    def _largest(self, z: Any, k: Any) -> SparseCodes:
        """relu of the k largest of all devices' z; what is chosen is held constant."""
        at, kept = selection.largest(z, self.k, k)
        return affine.used_slots(jnp.where(kept, jnp.take_along_axis(z, at, axis=1), 0), at)


LOWEST, HIGHEST = -10.0, 2.0  # bounds of log sigma^2


def divergence(
    mu: Float[Array, "*shape"], log_variance: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """KL(N(mu, sigma^2) || N(0, 1)) of each entry, in nats."""
    return 0.5 * (jnp.exp(log_variance) + jnp.square(mu) - 1 - log_variance)


def normal(key: Any, like: Float[Array, "b n"]) -> Float[Array, "b n"]:
    """Standard normal numbers, one a row and latent: this device's part of the same on any mesh.

    A device draws its rows' numbers of all latents.
    """
    (b_local, n_local), n = like.shape, ops.latents_count(like[0])
    rows = ops.rows_offset(b_local) + jnp.arange(b_local)
    drawn = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (n,)))(rows)
    return jax.lax.dynamic_slice_in_dim(drawn, ops.latents_offset(n_local), n_local, axis=1)
