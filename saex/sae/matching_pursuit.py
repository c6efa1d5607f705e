"""MP-SAE: unrolled matching pursuit as the encoder (Costa et al. 2025, arXiv 2506.03093)."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from saex.kernels.sparse_decode import sparse_take
from saex.sae import affine, losses, ops, sums
from saex.sae.base import ArraySpec, Out, SparseCodes
from saex.typing import Batch, Params


@dataclasses.dataclass(frozen=True)
class MatchingPursuit:
    """r = x - b_dec; k times: j = argmax <r, D_j>, v = relu(<r, D_j>), f_j += v, r -= v D_j.

    D = W_dec, unit rows: the encoder too, nothing else encodes. x_hat = f D + b_dec = x - r, so
    what is left after each step is orthogonal to the atom just taken, and codes for fewer steps
    are a part of those for more. An atom may be taken again: at most k are active.

    Loss: s * MSE + aux_coefficient * AuxK. The gradient runs through all k steps to D, the choice
    of atoms held constant. AuxK is this file's own: dead atoms model what the pursuit left over
    (the authors' code has a weak pull towards the mean residual instead), since a pursuit has no
    other pre-activations for them. Rows of D go back to unit norm after each step, and the gradient
    along them is removed (the authors: the former alone).

    Sparsity is a matter of inference: ``dataclasses.replace(sae, k=..., tolerance=...)`` encodes
    with the same params in more or fewer steps, or until the residual of a row is small. Codes are
    in raw units: of all other methods they are in scaled ones.

    Cost: k products with all atoms forward, one after the other, k times a TopK's encoder. Backward
    makes none of them anew and holds no [b, n]: k small steps on the [b, k, d] atoms chosen.
    Devices that share the latents meet in every step ([b, d] numbers).

    Fields:
      d_in: activation width. n: atoms.
      k: steps (a sweep's upper bound).
      tolerance: inference stops a row where ||r|| is at most this, with rows of mean square norm 1
        (``normalize``); 0: after k steps. stop_training: so does training (as the authors' code).
      atom_dropout: share of atoms withheld from each batch of the first ``dropout_steps`` steps
        (the authors on MNIST: 0.75 for an epoch), against dead atoms.
      others: as in ``TopK``. matmul_dtype is that of the choice; residuals are float32.
    """

    d_in: int
    n: int
    k: int = 32
    tolerance: float = 0.0
    stop_training: bool = False
    atom_dropout: float = 0.0
    dropout_steps: int = 0
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
        affine.check_k(self.k, self.n)
        affine.check_dead_after(self.dead_after_tokens)
        if not 0 <= self.atom_dropout < 1:
            raise ValueError(f"atom_dropout={self.atom_dropout}: at least 0, below 1")
        if self.tolerance < 0 or self.dropout_steps < 0:
            raise ValueError(
                f"tolerance={self.tolerance}, dropout_steps={self.dropout_steps}: neither can be "
                "negative"
            )

    @property
    def d_out(self) -> int:
        """d_in."""
        return self.d_in

    def specs(self) -> dict[str, dict[str, ArraySpec]]:
        """W_dec [n, d_in], b_dec [d_in], scale []; stats as ``TopK``."""
        params = affine.specs(self.d_in, self.d_in, self.n)
        del params["W_enc"], params["b_enc"]
        stats = affine.stats_specs(self.n)
        return {"params": params, "stats": stats}

    def hyper(self) -> dict[str, float]:
        """k and the weight of AuxK."""
        return {"k": float(self.k), "aux_coefficient": self.aux_coefficient}

    def init(self, key: jax.Array, sample: Batch) -> tuple[Params, Params]:
        """Random unit atoms; b_dec at the sample's centre."""
        scale = affine.scale_of(sample["x"], self.normalize)
        x = sample["x"].astype(jnp.float32) * scale
        params = {
            "W_dec": affine.unit_rows(jax.random.normal(key, (self.n, self.d_in))),
            "b_dec": affine.centre(x, self.b_dec_init),
            "scale": scale,
        }
        stats = affine.stats(self.n, x)
        return params, stats

    @ops.encode
    def encode(self, params: Params, x: Any) -> SparseCodes:
        """Sparse codes [b, k], in raw units, of raw rows [b, d]."""
        r = affine.scaled(params, x) - params["b_dec"][None]
        values, indices, _ = self._pursue(params["W_dec"], r, self.k, self.tolerance)
        codes = _merged(values, indices)
        return SparseCodes(codes.values / params["scale"], codes.indices)

    @ops.decode
    def decode(self, params: Params, codes: Any, context: Any = None) -> jax.Array:
        """Raw rows [b, d], float32."""
        part = sums.decode_part(codes, params["W_dec"])
        return part + (params["b_dec"] / params["scale"])[None]

    @ops.loss
    def loss(
        self, params: Params, stats: Params, batch: Batch, key: Any, step: Any, hyper: Params
    ) -> tuple[Any, Out]:
        """s * MSE + aux_coefficient * AuxK of one global batch of raw rows ``batch["x"]``."""
        x, D = affine.scaled(params, batch["x"]), params["W_dec"]
        start = x - params["b_dec"][None]
        held, allowed = jax.lax.stop_gradient((D, start)), self._allowed(D, key, step)
        tolerance = self.tolerance if self.stop_training else 0.0
        values, indices, mine = self._pursue(*held, hyper["k"], tolerance, allowed)
        r = _residual(D, start, indices, mine)
        codes = _merged(values, indices)
        stats, dead = affine.tally(stats, codes, ops.rows_count(x), self.dead_after_tokens)
        aux_k = served = jnp.zeros(())
        if self.aux_coefficient:
            no_bias = {"b_dec": jnp.zeros((self.d_in,)), "b_enc": jnp.zeros((D.shape[0],))}
            atoms = {"W_enc": D, "W_dec": D, **no_bias}
            nothing = SparseCodes(*ops.own((jnp.zeros((x.shape[0], 1)), indices[:, :1] * 0)))
            aux = dead, self.aux_latents, self.matmul_dtype
            left = jax.lax.stop_gradient(r)
            _, _, y_dead, served = affine.decode_chosen_aux(atoms, left, nothing, *aux)
            aux_k = losses.aux_k(left, y_dead, dead)
        mse = stats["mse_scale"] * losses.mse(r)
        metrics = {"mse": mse, "aux_k": aux_k, "aux_served": served}
        metrics |= losses.figures(x, r, codes, dead)
        return mse + hyper["aux_coefficient"] * aux_k, Out(metrics, stats, x - r)

    def after_step(self, state: Any, out: Out, batch: Batch, key: Any) -> Any:
        """Nothing."""
        return state

    def _pursue(self, D: Any, r: Any, k: Any, tolerance: float, allowed: Any = None) -> tuple:
        """The steps, without gradients: (values, indices, mine), [b, self.k] each.

        mine: whether the atom of the step is one of this device's; elsewhere value and index are 0.
        """
        here = ops.latents_offset(D.shape[0]) // D.shape[0]

        def step(r, t):
            inputs = r.astype(self.matmul_dtype), D.astype(self.matmul_dtype)
            c = jnp.einsum("bd,nd->bn", *inputs, preferred_element_type=jnp.float32)
            c = c if allowed is None else jnp.where(allowed[None], c, -1)
            j, best = jnp.argmax(c, axis=1).astype(jnp.int32), jnp.max(c, axis=1)
            best = ops.latents_gather(best[:, None])
            going = (t < k) & (jnp.max(best, axis=1) > 0) & (jnp.linalg.norm(r, axis=1) > tolerance)
            mine = (jnp.argmax(best, axis=1) == here) & going
            atom = jnp.where(mine[:, None], D[j], 0)
            v = jax.nn.relu(jnp.sum(atom * r, axis=1))
            r = r - ops.latents_sum(v[:, None] * atom)
            return r, (v, jnp.where(mine, j, 0), mine)

        _, chosen = jax.lax.scan(step, r, jnp.arange(self.k))
        values, indices, mine = (a.T for a in chosen)
        return values, jnp.where(values != 0, indices, 0), mine & (values != 0)

    def _allowed(self, D: Any, key: Any, step: Any) -> Any:
        """This device's atoms that the batch may use, bool [n]; None: all."""
        if not (self.atom_dropout and self.dropout_steps):
            return None
        n = D.shape[0]
        kept = jax.random.bernoulli(key, 1 - self.atom_dropout, (ops.latents_count(D),))
        kept = jax.lax.dynamic_slice_in_dim(kept, ops.latents_offset(n), n)
        return kept | (step >= self.dropout_steps)


def _residual(D: Any, r: Any, indices: Any, mine: Any) -> Any:
    """What is left after the steps whose atoms are known, as a function of D and r.

    All atoms are gathered at once, so that the gradients of all steps go back to D in one sum.
    """
    taken: Any = sparse_take(*ops.own((D, indices)))
    atoms = ops.latents_sum(jnp.where(mine[:, :, None], taken, 0))

    def step(r, atom):
        v = jax.nn.relu(jnp.sum(atom * r, axis=1, keepdims=True))
        return r - v * atom, None

    return jax.lax.scan(step, r, jnp.swapaxes(atoms, 0, 1))[0]


def _merged(values: Any, indices: Any) -> SparseCodes:
    """Canonical codes: an atom that was taken again stands in the slot of its first time."""
    used = values != 0
    same = (indices[:, :, None] == indices[:, None, :]) & used[:, :, None] & used[:, None, :]
    total = jnp.sum(jnp.where(same, values[:, None, :], 0), axis=2)
    first = jnp.argmax(same, axis=2) == jnp.arange(values.shape[1])[None]
    return affine.used_slots(jnp.where(used & first, total, 0), indices)
