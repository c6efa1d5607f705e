"""KronSAE: an encoder of small heads whose units are paired (Kurochkin et al. 2025, 2505.22255)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from saex.sae import affine, losses, ops, selection, sums
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class KronSAE:
    """Each latent is a soft AND of a base and an extension unit of one head; TopK over all latents.

    a = relu(x W_enc^T + b_enc) of h = n / (base extension) heads; of a head, p are the first
    ``base`` units, q the others. mAND: z_ij = sqrt(p_i q_j) where both are above 0, else 0. Latent
    c base extension + i extension + j of head c is z_ij; f = the k largest of all heads;
    x_hat = f W_dec + b_dec. Loss: s * MSE + aux_coefficient * AuxK as in ``TopK``, AuxK over the z
    of dead latents. b_dec is not taken from x, as the source.

    The encoder has (base + extension) / (base extension) of TopK's parameters and operations. What
    it costs: every z of a batch, [b, n] float32, is made for the selection (not kept for the
    gradient, which goes to the chosen pairs alone) and once more where latents are dead; ``pair``
    is a product and a root each, so with small d the selection is what takes the time.

    Where we differ: z = sqrt(p q + epsilon) - sqrt(epsilon), 0 for pairs that are off, where the
    listing leaves the floor on; decoder rows stay at unit norm, in the listing only at first; the
    encoder starts scaled so that ||x_hat|| is ||x||, as in ``TopK``.

    Fields:
      n: latents, a multiple of base * extension. A mesh splits whole heads.
      base, extension: units of a head (the paper's m and n; m at least 2, the smaller the better).
      epsilon: bounds the slope of the root at 0.
      b_dec_init: where b_dec starts; b_enc starts at -W_enc b_dec, so that units see centred rows
        at first. With both at 0 ("zeros", the source) 11% of the latents of a small language
        model's rows were dead after 300 steps, of centred ones 2%.
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    k: int = 32
    base: int = 2
    extension: int = 4
    epsilon: float = 1e-5
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "mean"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = SparseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ()
    unit_rows: ClassVar[tuple[str, ...]] = ("W_dec",)
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)
        if self.base < 1 or self.extension < 1 or self.n % (self.base * self.extension):
            raise ValueError(
                f"n={self.n} latents in heads of base={self.base} x extension={self.extension}: "
                "n must be a multiple of their product"
            )
        if self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon}: cannot be negative")

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def heads(self) -> int:
        """How many heads the latents come from."""
        return self.n // (self.base * self.extension)

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """As ``TopK``, but for the encoder: one row a unit, by heads."""
        units = self.base + self.extension
        params = affine.specs(self.d_in, self.d_in, self.n)
        doc = "encoder, one row per unit: a head's base units, then its extension units"
        params["W_enc"] = ArraySpec((self.heads, units, self.d_in), ("n", None, "d"), doc=doc)
        params["b_enc"] = ArraySpec((self.heads, units), ("n", None), doc="encoder bias")
        stats = affine.stats_specs(self.n)
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Normal units, centred; a decoder row is the (unit) sum of its pair's two encoder rows."""
        weights_key, probe_key = jax.random.split(key)
        scale = affine.scale_of(sample["x"], self.normalize)
        x = sample["x"].astype(jnp.float32) * scale
        W = jax.random.normal(weights_key, (self.heads, self.base + self.extension, self.d_in))
        pairs = W[:, : self.base, None] + W[:, None, self.base :]
        params = {
            "W_enc": W / jnp.sqrt(2.0 * self.n),
            "W_dec": affine.unit_rows(pairs.reshape(self.n, self.d_in)),
            "b_enc": jnp.zeros(W.shape[:2]),
            "b_dec": affine.centre(x, self.b_dec_init),
            "scale": scale,
        }
        probes = affine.unit_rows(jax.random.normal(probe_key, (256, self.d_in)))
        y = sums.decode_part(self._encode(params, probes, self.k), params["W_dec"])
        params["W_enc"] = params["W_enc"] / jnp.mean(jnp.linalg.norm(y, axis=1))
        params["b_enc"] = -(params["W_enc"] @ params["b_dec"])
        stats = affine.stats(self.n, x)
        return params, stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k] of raw rows [b, d]."""
        return self._encode(params, affine.scaled(params, x), self.k)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        return affine.decode(params, codes) / params["scale"]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows ``batch["x"]``."""
        x = affine.scaled(params, batch["x"])
        codes = self._encode(params, x, hyper["k"])
        stats, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
        y = affine.decode(params, codes)
        aux, served = self._aux(params, x, x - y, dead)
        mse = stats["mse_scale"] * losses.mse(x - y)
        metrics = {"mse": mse, "aux_k": aux, "aux_served": served}
        metrics |= losses.figures(x, x - y, codes, dead)
        return mse + hyper["aux_coefficient"] * aux, Out(metrics, stats, y)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _encode(self, params: Params, x: Any, k: Any) -> SparseCodes:
        units = self._units(params, x)
        return self._largest(units, self._pairs(units), self.k, k)

    def _units(self, params: Params, x: Any) -> Float[Array, "b h e"]:
        """Activations of this device's heads' units."""
        u = jnp.einsum(
            "bd,hed->bhe",
            x.astype(self.matmul_dtype),
            params["W_enc"].astype(self.matmul_dtype),
            preferred_element_type=jnp.float32,
        )
        return jax.nn.relu(u + params["b_enc"][None])

    def _pairs(self, units: Float[Array, "b h e"]) -> Float[Array, "b n"]:
        """z of all of this device's latents, without a gradient."""
        units = jax.lax.stop_gradient(units)
        z = self._mand(units[:, :, : self.base, None], units[:, :, None, self.base :])
        return z.reshape(units.shape[0], -1)

    def _mand(self, p: Any, q: Any) -> Any:
        on = (p > 0) & (q > 0)
        product = jnp.where(on, p * q, 1.0)  # the slope of a root at 0 is infinite
        return jnp.where(on, jnp.sqrt(product + self.epsilon) - self.epsilon**0.5, 0.0)

    def _largest(self, units: Any, z: Any, k: int, active_k: Any) -> SparseCodes:
        """The ``active_k`` largest of all devices' z, as functions of the units."""
        at, kept = selection.largest(z, k, active_k)
        head, pair = jnp.divmod(at, self.base * self.extension)
        i, j = jnp.divmod(pair, self.extension)
        flat, first = units.reshape(units.shape[0], -1), head * (self.base + self.extension)
        p = jnp.take_along_axis(flat, first + i, axis=1)
        q = jnp.take_along_axis(flat, first + self.base + j, axis=1)
        return affine.used_slots(jnp.where(kept, self._mand(p, q), 0), at)

    def _aux(self, params: Params, x: Any, residual: Any, dead: Any) -> tuple[Any, Any]:
        """(AuxK, latents that it served); nothing is computed where nothing is dead."""

        def serve(params):
            units = self._units(params, x)
            z = jnp.where(dead[None], self._pairs(units), 0)
            codes = self._largest(units, z, self.aux_latents, self.aux_latents)
            served = jnp.sum(sums.fired(codes, dead.shape[0]), dtype=jnp.float32)
            y_dead = sums.decode_part(codes, params["W_dec"])
            return losses.aux_k(residual, y_dead, dead), ops.latents_sum(served)

        def nothing(params):
            zero = ops.zero_as_sum(residual).astype(jnp.float32)
            return zero, zero

        if not self.aux_coefficient:
            return nothing(params)
        x, residual = jax.lax.stop_gradient((x, residual))
        return jax.lax.cond(ops.latents_sum(jnp.sum(dead)) > 0, serve, nothing, params)
