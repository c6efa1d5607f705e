"""How much of the activations a reconstruction keeps, and how many latents that takes."""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from saex.evals.density import Counts
from saex.evals.heldout import HeldOut
from saex.evals.reconstructors import OfDictionary, Reconstructor


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Sums over rows in float64; the result does not depend on how rows are cut into blocks.

    Metrics, over the rows that count (x: what shall be reconstructed, of a transcoder its target):
      fvu: sum ||x - y||^2 / sum ||x - mean||^2, with the mean of these very rows (pooled, centred).
      fvu_without_first: the same without position 0 (where the store has positions).
      mse: mean over rows and entries of (x - y)^2. cosine: mean over rows (0 where one is 0).
      l2_ratio: mean of ||y|| / ||x||. relative_bias: sum ||y||^2 / sum x.y; below 1: shrunk.
      l0: mean of active latents. l1: mean of sum |f|, of the dictionary only.
      rows: how many.

    Fields:
      rows: about how many rows are read, evenly spread, where there are more.
    """

    rows: int = 262_144

    def run(self, sae: Any, params: Any, heldout: HeldOut) -> dict[str, float]:
        """Metrics of the dictionary and, under ``<control>.``, of each control."""
        heldout.rows.check_widths(sae)
        sums = self._pass(OfDictionary(sae, params), heldout)
        if heldout.shared is not None:
            counts = Counts(sums.fired, int(sums.counts[0]))
            heldout.shared[heldout.rows.count(self.rows)] = counts
        out = sums.result()
        for name, control in heldout.controls.items():
            scores = self.score(control, heldout)
            out |= {f"{name}.{key}": value for key, value in scores.items()}
        return out

    def score(self, reconstructor: Reconstructor, heldout: HeldOut) -> dict[str, float]:
        """The metrics of one reconstructor.

        Raises:
          ValueError: activations or reconstructions that are not finite.
        """
        out = self._pass(reconstructor, heldout).result()
        return out if reconstructor.l0 is None else out | {"l0": float(reconstructor.l0)}

    def _pass(self, reconstructor: Reconstructor, heldout: HeldOut) -> "_Sums":
        sums = _Sums(heldout)
        for block in heldout.rows.blocks(self.rows):
            if isinstance(reconstructor, OfDictionary):
                m = reconstructor.measure(block.x, block.kept)
                sums.fired = sums.fired + np.asarray(m.fired)
                sums.add(block, m.y, {"l0": m.l0, "l1": m.l1})
            else:
                sums.add(block, reconstructor.reconstruct(block.x, block.tokens), {})
        return sums


class _Sums:
    """Running sums in float64, of deviations from a shift near the mean: nothing cancels."""

    def __init__(self, heldout: HeldOut):
        self.shift = heldout.mean.astype(np.float32)
        self.site = heldout.rows.predicted
        self.scalars: dict[str, float] = defaultdict(float)
        self.vectors = np.zeros((2, len(self.shift)))
        self.counts = np.zeros(2, np.int64)
        self.fired = np.zeros(1, np.int64)

    def add(self, block: Any, y: Any, extra: dict[str, Any]) -> None:
        not_first = block.kept if block.positions is None else block.kept & (block.positions != 0)
        masks = np.stack([block.kept, not_first])
        per_row, vectors = jax.device_get(_moments(block.y, y, self.shift, masks))
        self.vectors += vectors
        self.counts += masks.sum(axis=1)
        columns = {k: np.asarray(v, np.float64) for k, v in {**per_row, **extra}.items()}
        for name, column in columns.items():
            self.scalars[name] += float(column[block.kept].sum())
        for name in ("residual", "centred"):
            self.scalars[f"{name}_without_first"] += float(columns[name][not_first].sum())

    def result(self) -> dict[str, float]:
        s, n = self.scalars, int(self.counts[0])
        if n and not math.isfinite(sum(s.values())):
            raise ValueError(
                f"site {self.site!r}: held-out activations or reconstructions are not finite; "
                "look for NaN in the store, or train with a lower learning rate"
            )
        means = {k: s[k] / max(n, 1) for k in ("cosine", "l2_ratio", "l0", "l1") if k in s}
        out = {
            "fvu": self._fvu("", 0),
            "mse": s["residual"] / max(n, 1) / len(self.shift),
            **means,
            "relative_bias": s["yy"] / s["xy"] if s["xy"] else 0.0,
            "rows": float(n),
        }
        if self.counts[1]:
            out["fvu_without_first"] = self._fvu("_without_first", 1)
        return out

    def _fvu(self, suffix: str, which: int) -> float:
        n = max(int(self.counts[which]), 1)
        residual = self.scalars[f"residual{suffix}"]
        spread = self.scalars[f"centred{suffix}"] - np.sum(self.vectors[which] ** 2) / n
        if spread <= 1e-10 * n:  # constant rows: there is no variance to explain
            return 0.0 if residual <= 1e-10 * n else 1.0
        return float(residual / spread)


@jax.jit
def _moments(
    x: Float[Array, "b d"], y: Float[Array, "b d"], shift: Float[Array, " d"], masks: Any
) -> tuple[dict[str, Any], Float[Array, "2 d"]]:
    """Per-row figures, and sums of the shifted rows that each mask keeps."""
    x = x.astype(jnp.float32)
    c, r = x - shift[None], x - y
    xx, yy, xy = jnp.sum(x * x, axis=1), jnp.sum(y * y, axis=1), jnp.sum(x * y, axis=1)
    norms = jnp.sqrt(xx) * jnp.sqrt(yy)
    per_row = {
        "residual": jnp.sum(r * r, axis=1),
        "centred": jnp.sum(c * c, axis=1),
        "yy": yy,
        "xy": xy,
        "cosine": jnp.where(norms > 0, xy / jnp.where(norms > 0, norms, 1.0), 0.0),
        "l2_ratio": jnp.sqrt(yy) / jnp.where(xx < 1e-8, 1.0, jnp.sqrt(xx)),
    }
    # a row that is left out may hold NaN: zero times NaN would not be zero
    clean = jnp.where(jnp.any(masks, axis=0)[:, None], c, 0.0)
    return per_row, masks.astype(jnp.float32) @ clean
