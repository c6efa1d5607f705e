"""The gradient of a language model's loss at its sites."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from saex.models.transformer import Edit, Tokens, next_token_nats


def at_sites(
    model: Any,
    params: Any,
    tokens: Tokens,
    counted: Bool[Array, "b t"],
    sites: Sequence[str],
    taps: Sequence[str] = (),
    positions: Tokens | None = None,
) -> tuple[dict[str, Float[Array, "b t d"]], dict[str, Float[Array, "b t d"]]]:
    """d loss / d x at each site, one row a token, from one clean forward and one backward pass.

    The loss is the sum of the next-token nats over the tokens that count: a sum, so that a gradient
    depends neither on the batch nor on padding, and its scale stays far from the smallest floats.
    At a position it gathers what the activation does to all later predictions of its context; at
    the last one that counts it is 0.

    Args:
      model: a `Transformer`, or what is run in the same way. params: its parameters.
      tokens: int [b, t].
      counted: which tokens are predicted: no padding, no first token.
      sites: where. taps: sites whose activations are wanted too.
      positions: as of `Transformer.run`; None where each context is one document.

    Returns:
      ({site: gradient f32}, {tap: activation f32}).
    """
    where = {} if positions is None else {"positions": positions}
    zeros = {site: jnp.zeros((*tokens.shape, model.sites[site])) for site in sites}

    def loss(deltas):
        edits = {site: Edit(jnp.add, (delta,)) for site, delta in deltas.items()}
        logits, acts = model.run(params, tokens, taps=taps, edits=edits, **where)
        nats = next_token_nats(logits, tokens)
        return jnp.sum(jnp.where(counted[:, 1:], nats, 0)), acts

    return jax.grad(loss, has_aux=True)(zeros)
