"""Multi-layer SAE: one TopK dictionary for the rows of many sites (arXiv 2409.04185)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.sae import affine, losses, ops
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params

FLOOR = 1e-5  # added to the standard deviation of a row, as the authors do


@dataclasses.dataclass(frozen=True)
class MultiLayer:
    """x' = (x - mean(x)) / (sd(x) + 1e-5); f = relu(top_k((c x' - b_dec) W_enc^T + b_enc)).

    x_hat = (f W_dec + b_dec) / c * sd(x) + mean(x): each row of each site is an example of its own,
    standardised over its d entries; c = 1 / sqrt(d) makes them unit vectors. Lawson et al. 2024.

    In training "x" is the sites side by side, [b, sites * d] (config.site "a+b+c", of equal
    widths); ``encode`` takes rows of any one site, [b, d]. ``decode`` wants them as ``context``,
    for mean and sd; without, it returns standardised rows.

    Loss: the mean over sites of FVU_l = sum ||x^l - x_hat^l||^2 / sum ||x^l - mean_b x^l||^2, in
    raw units, plus aux_coefficient * AuxK on standardised rows. The authors take the variance of
    all entries of a layer about one mean; here it is that about the mean row, as in every other
    FVU of this package. They have no b_enc. A batch of b rows counts as b * sites examples.

    Fields:
      d_in: width of one site. n: latents. sites: how many.
      k: active latents an example (a sweep's upper bound).
      dead_after_tokens: examples without firing after which a latent counts as dead.
      aux_coefficient, k_aux, b_dec_init (of standardised rows), matmul_dtype: as in ``TopK``.
    """

    d_in: int
    n: int
    sites: int = 1
    k: int = 32
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)
        if self.sites < 1 or self.d_in < 2:
            raise ValueError(f"sites={self.sites}, d_in={self.d_in}: at least 1, and 2")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def d_batch(self) -> int:
        """Width of a training batch's rows: all sites side by side."""
        return self.d_in * self.sites

    @property
    def column_widths(self) -> dict[str, int]:
        """x has all sites."""
        return {"x": self.d_batch}

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``; stats: examples since each latent fired."""
        stats = {
            "since_fired": ArraySpec((self.n,), ("n",), "int32", doc="examples since it last fired")
        }
        return {"params": affine.specs(self.d_in, self.d_in, self.n), "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK``, of the standardised rows of all sites."""
        weights_key, probe_key = jax.random.split(key)
        x, _, _ = standardised(self._examples(sample["x"]))
        scale = jnp.asarray(self.d_in**-0.5, jnp.float32)
        params, _ = affine.init_tied(weights_key, x * scale, self.n, "none", self.b_dec_init)
        params = affine.match_norms(probe_key, {**params, "scale": scale}, self.k)
        return params, {"since_fired": jnp.zeros((self.n,), jnp.int32)}

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d] of any site."""
        return self._encode(params, affine.scaled(params, standardised(x)[0]), self.k)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Rows [b, d], float32: raw ones by the ``context`` that was encoded, else standardised."""
        y = affine.decode(params, codes, self.matmul_dtype) / params["scale"]
        if context is None:
            return y
        _, mean, sd = standardised(context)
        return y * sd + mean

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """Mean FVU over sites plus AuxK of one global batch of raw rows of all sites."""
        raw = self._examples(batch["x"])
        x, mean, sd = standardised(raw)
        x = affine.scaled(params, x)
        chosen = self._encode(jax.lax.stop_gradient(params), x, hyper["k"])
        stats, dead = affine.tally(stats, chosen, ops.rows_count(x), self.dead_after_tokens)
        codes, y, aux_k, served = affine.decode_aux(
            params, x, chosen, dead, self.aux_coefficient, self.aux_latents, self.matmul_dtype
        )
        y = y / params["scale"] * sd + mean
        each = [
            losses.mse(r) / jnp.maximum(losses.variance(rows), 1e-30)
            for r, rows in zip(self._by_site(raw - y), self._by_site(raw))
        ]
        fvu = sum(each) / self.sites
        metrics = {
            "aux_k": aux_k,
            "aux_served": served,
            **losses.figures(raw, raw - y, codes, dead),
        }
        metrics |= {"fvu": fvu, **{f"fvu_{i}": one for i, one in enumerate(each)}}
        reconstruction = y.reshape(batch["x"].shape)
        return fvu + hyper["aux_coefficient"] * aux_k, Out(metrics, stats, reconstruction)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _examples(self, x: Any) -> Any:
        """[b, sites * d] to [b * sites, d], float32; the sites of a row follow each other."""
        return x.astype(jnp.float32).reshape(-1, self.d_in)

    def _by_site(self, examples: Any) -> list[Any]:
        each = examples.reshape(-1, self.sites, self.d_in)
        return [each[:, i] for i in range(self.sites)]

    def _encode(self, params: Params, x: Any, k: Any) -> SparseCodes:
        weights = (params["b_dec"], params["W_enc"], params["b_enc"])
        values, indices = ops.select_topk(x, *weights, self.k, k, self.matmul_dtype)
        return affine.used_slots(jax.nn.relu(values), indices)


def standardised(x: Any) -> tuple[Any, Any, Any]:
    """(rows with mean 0 and standard deviation 1, mean [b, 1], sd [b, 1]); sd has ddof 1."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=1, keepdims=True)
    sd = jnp.std(x, axis=1, keepdims=True, ddof=1) + FLOOR
    return (x - mean) / sd, mean, sd
