"""BatchTopK crosscoder (Minder, Dumas et al. 2025, arXiv 2504.02922)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.encode_topk import pre_activations
from saex.sae import affine, crosscoder, losses, ops, selection, sites
from saex.sae.base import ArraySpec, DenseCodes, Out
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class BatchCrosscoder:
    """f = relu(p) where p N is among a batch's b k largest, p and N as in ``Crosscoder``.

    p = sum_l x^l W_enc^l^T + b_enc, N_i = sum_l ||W_dec,i^l||, x_hat^l = f W_dec^l + b_dec^l. The
    selection sees p N, what a latent adds to all sites, so the loss does not change when a latent's
    encoder grows as its decoder shrinks; there is no penalty that could shrink a latent at one site
    alone. At inference f = p where p is above the latent's ``threshold``: the running mean of a
    batch's smallest kept p N, over N.

    Loss: s * MSE + aux_coefficient * AuxK, as in ``BatchTopK``, over all sites at once, dead
    latents ranked by p N. The authors take the plain norm of the error, not its square. Decoder
    norms are free; the encoder starts as the decoder's copy, scaled so that ||x_hat|| is ||x||, and
    b_enc at -W_enc b_dec, so that latents see centred rows at first (the authors: at 0, with which
    64% of the latents of three sites of a small language model were dead after 300 steps, not 57%).

    Fields:
      d_in: width of all sites together. n: latents. widths: width of each site; (): one site.
      k: mean of active latents a row (a sweep's upper bound).
      capacity, threshold_rate: as in ``BatchTopK``.
      decoder_norm: norm of decoder rows at each site at initialisation (the authors: 1).
      others: as in ``TopK``.
    """

    d_in: int
    n: int
    widths: tuple[int, ...] = ()
    k: int = 32
    capacity: int | None = None
    threshold_rate: float = 0.01
    decoder_norm: float = 1.0
    aux_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    normalize: affine.Normalize = "unit_mean_square"
    b_dec_init: affine.BiasInit = "geometric_median"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"

    codes: ClassVar[type] = DenseCodes
    columns: ClassVar[tuple[str, ...]] = ("x",)
    frozen: ClassVar[tuple[str, ...]] = ("threshold",)
    unit_rows: ClassVar[tuple[str, ...]] = ()
    aux_latents = affine.aux_latents

    def __post_init__(self) -> None:
        sites.check_widths(self.site_widths, self.d_in)
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)
        selection.check_capacity(self.capacity, self.k)
        selection.check_rate(self.threshold_rate)

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    @property
    def site_widths(self) -> tuple[int, ...]:
        """``widths``, of one site where there are none."""
        return self.widths or (self.d_in,)

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """See ``crosscoder.specs``, and thresholds; stats as ``BatchTopK``, and a mean cut."""
        params = crosscoder.specs(self.d_in, self.n)
        params["threshold"] = ArraySpec((self.n,), ("n",), trainable=False, doc="of codes")
        stats = {
            **affine.stats_specs(self.n),
            **selection.STATS,
            "cut": ArraySpec((), (), doc="running mean of a batch's smallest kept p N"),
        }
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """As ``Crosscoder``, scaled as ``TopK``; thresholds by up to 512 rows of the sample."""
        weights_key, probe_key = jax.random.split(key)
        W = crosscoder.decoder(weights_key, self.site_widths, self.n, self.decoder_norm)
        scale = sites.scales(sample["x"], self.site_widths, self.normalize)
        x = sample["x"].astype(jnp.float32) * scale[None]
        N = jnp.sum(sites.norms(W, self.site_widths), axis=1)
        params = {
            "W_enc": W,
            "W_dec": W + 0,
            "b_enc": jnp.zeros((self.n,)),
            "b_dec": affine.centre(x, self.b_dec_init),
            "scale": scale,
        }
        params = affine.match_norms(probe_key, params, self.k)
        params["b_enc"] = -(params["W_enc"] @ params["b_dec"])
        p = x[:512] @ params["W_enc"].T + params["b_enc"][None]
        cut = selection.batch_cut(self.k * p.shape[0], p * N[None])
        params["threshold"] = cut / N
        return params, {**affine.stats(self.n, x), **selection.stats(cut), "cut": cut}

    @ops.encode
    def encode(self, params: Params, x: Any) -> DenseCodes:
        """Dense codes [b, n] of raw rows [b, d] of all sites, by the thresholds."""
        p = self._scores(params, crosscoder.scaled(params, x))
        return DenseCodes(jnp.where(p > params["threshold"][None], jax.nn.relu(p), 0))

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d] of all sites, float32."""
        return affine.decode(params, codes, self.matmul_dtype) / params["scale"][None]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows."""
        x = crosscoder.scaled(params, batch["x"])

        def objective(params, codes, cut):
            after, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
            normed = {**self._normed(params)[0], "b_dec": jnp.zeros((self.d_in,))}
            aux = self.aux_coefficient, self.aux_latents, self.matmul_dtype
            codes, y, y_dead, served = affine.decode_both(normed, x, codes, dead, *aux)
            y = y + params["b_dec"][None]
            aux_k = jnp.zeros(()) if y_dead is None else losses.aux_k(x - y, y_dead, dead)
            mse = stats["mse_scale"] * losses.mse(x - y)
            metrics = {"mse": mse, "aux_k": aux_k, "aux_served": served, "cut": cut}
            metrics |= losses.figures(x, x - y, codes, dead)
            metrics |= sites.fvus(x, x - y, self.site_widths)
            lowest = selection.smallest(codes)
            return mse + hyper["aux_coefficient"] * aux_k, (metrics, after, y, lowest)

        def encoder(params):
            normed = self._normed(params)[0]
            return jnp.zeros((self.d_in,)), normed["W_enc"], normed["b_enc"]

        how = hyper["k"], self.k, self.capacity, objective, self.matmul_dtype, encoder
        loss, metrics, after, y, lowest = selection.of_batch(params, stats, x, *how)
        cut = selection.follow(stats["cut"], lowest, self.threshold_rate)
        N = self._normed(jax.lax.stop_gradient(params))[1]
        metrics |= {"threshold": cut}
        return loss, Out(metrics, {**after, "cut": cut}, y, {"threshold": cut / N})

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _normed(self, params: Params) -> tuple[Params, Any]:
        """The same function with N = 1 for every latent, so that codes are p N; and N before."""
        N = jnp.maximum(jnp.sum(sites.norms(params["W_dec"], self.site_widths), axis=1), 1e-12)
        weights = {"W_enc": params["W_enc"] * N[:, None], "b_enc": params["b_enc"] * N}
        return {**params, **weights, "W_dec": params["W_dec"] / N[:, None]}, N

    def _scores(self, params: Params, x: Any) -> Any:
        weights = (jnp.zeros((self.d_in,)), params["W_enc"], params["b_enc"])
        return pre_activations(x, *weights, self.matmul_dtype)
