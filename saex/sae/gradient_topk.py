"""g-SAE: TopK that prefers latents with an effect on the model's loss (arXiv 2411.10397)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, losses, ops, selection
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class GradientTopK:
    """f = relu(p) at the k largest s = relu(p) (1 + beta |g W_dec^T|); x_hat = f W_dec + b_dec.

    p = (x - b_dec) W_enc^T + b_enc. g (column "gradient") is the gradient of the language model's
    loss, summed over tokens, at the site (``harvest.gradients``): writing f_i W_dec,i into x moves
    that loss by about f_i <g, W_dec,i>. s chooses and nothing else: values, decoder and loss (s *
    MSE + aux_coefficient * AuxK) are those of ``TopK``, no gradient goes through g or beta, and
    beta = 0 is ``TopK``.

    The paper's own text was not at hand: this is our reading of its abstract and of others'
    summaries, and beta's default is ours. g is multiplied by ``gradient_scale``, with which the
    mean of |g W_dec^T| is 1 at the start.

    At inference ``encode`` is plain TopK (beta = 0): it reads rows alone. ``encode_by_effect`` is
    the choice of training (metric "moved": in which share of rows it is another one); it needs
    gradients, so the text's next tokens, which is a leak where cross-entropy is measured.

    Cost: the scores of all latents [b, n], twice (x and g), and their top k.

    Fields:
      d_in: activation width. n: latents. k: active latents a row (a sweep's upper bound).
      beta: weight of the effect in the choice.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    beta: float = 1.0
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x", "gradient")
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: cannot be negative")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``affine.specs``, and gradient_scale; stats as ``TopK``."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        params["gradient_scale"] = ArraySpec((), (), trainable=False, doc="of the gradient column")
        stats = affine.stats_specs(self.n)
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k, beta and the weight of AuxK."""
        return {"k": float(self.k), "beta": self.beta, "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``TopK``; gradient_scale by up to 512 rows of the sample."""
        weights_key, probe_key = jax.random.split(key)
        how = self.normalize, self.b_dec_init
        params, x = affine.init_tied(weights_key, sample["x"], self.n, *how)
        params = affine.match_norms(probe_key, params, self.k)
        g = sample["gradient"][:512].astype(jnp.float32)
        effect = jnp.mean(jnp.abs(g @ params["W_dec"].T))
        params["gradient_scale"] = 1 / jnp.maximum(effect, 1e-30)
        stats = affine.stats(self.n, x)
        return params, stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d], chosen without gradients."""
        weights = (params["b_dec"], params["W_enc"], params["b_enc"])
        x = affine.scaled(params, x)
        values, indices = ops.select_topk(x, *weights, self.k, self.k, self.matmul_dtype)
        return affine.used_slots(jax.nn.relu(values), indices)

    @ops.encode
    def encode_by_effect(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of x = (raw rows [b, d], their gradients [b, d]), as in training."""
        rows, g = x
        return self._choose(params, affine.scaled(params, rows), g, self.k, self.beta)[0]

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows "x"."""
        x, held = affine.scaled(params, batch["x"]), jax.lax.stop_gradient(params)
        chosen, z = self._choose(held, x, batch["gradient"], hyper["k"], hyper["beta"])
        stats, dead = affine.tally(stats, chosen, ops.rows_count(x), self.dead_after_tokens)
        codes, y, aux_k, served = affine.decode_aux(
            params, x, chosen, dead, self.aux_coefficient, self.aux_latents, self.matmul_dtype
        )
        mse = stats["mse_scale"] * losses.mse(x - y)
        metrics = {"mse": mse, "aux_k": aux_k, "aux_served": served, "moved": _moved(z, chosen)}
        metrics |= losses.figures(x, x - y, codes, dead)
        return mse + hyper["aux_coefficient"] * aux_k, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _choose(
        self, params: Params, x: Any, g: Any, k: Any, beta: Any
    ) -> tuple[SparseCodes, jax.Array]:
        """(codes at the k largest scores of each row, relu(p) of all); x in scaled units."""
        weights = (params["b_dec"], params["W_enc"], params["b_enc"])
        z = jax.nn.relu(pre_activations(x, *weights, self.matmul_dtype))
        g = g.astype(jnp.float32) * params["gradient_scale"]
        inputs = g.astype(self.matmul_dtype), params["W_dec"].astype(self.matmul_dtype)
        effect = jnp.abs(jnp.einsum("bd,nd->bn", *inputs, preferred_element_type=jnp.float32))
        indices, kept = selection.largest(z * (1 + beta * effect), self.k, k)
        values = jnp.where(kept, jnp.take_along_axis(z, indices, axis=1), 0)
        return affine.used_slots(values, indices), z


def _moved(z: jax.Array, codes: SparseCodes) -> jax.Array:
    """The share of rows of the global batch in which TopK would have chosen other latents."""
    used = codes.values != 0
    least = -ops.latents_max(-jnp.min(jnp.where(used, codes.values, jnp.inf), axis=1))
    larger = ops.latents_sum(jnp.sum(z > least[:, None], axis=1))
    kept = ops.latents_sum(jnp.sum(used, axis=1))
    return ops.rows_mean((larger > jnp.maximum(kept - 1, 0)).astype(jnp.float32))
