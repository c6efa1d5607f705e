"""The backward pass as XLA on CPU runs it well, by the forms of ``sparse_decode``."""

import jax.numpy as jnp

from saex.kernels.sparse_decode import cpu
from saex.kernels.sparse_decode.reference import sums


def grads(values, dvalues, indices, g, x, W_dec):
    """As ``reference.grads``; both scatters have their slots from one sort."""
    n = W_dec.shape[0]
    dz = jnp.where(values != 0, dvalues + cpu.dots(indices, g, W_dec), 0)
    dW_dec, dW_enc = cpu.scatters(((values, g), (dz, x)), indices, n)
    return dW_dec, dW_enc, sums(dz, indices, n)


def grads_lines(values, dvalues, indices, g, x, W_dec, owner, levels):
    """``grads`` of lines: a line's row of g is ``owner``, that of x ``owner // levels``."""
    n = W_dec.shape[0]
    dz = jnp.where(values != 0, dvalues + cpu.dots_lines(indices, g, W_dec, owner), 0)
    terms = (values, g, owner), (dz, x, owner // levels)
    dW_dec, dW_enc = cpu.scatters_lines(terms, indices, n)
    return dW_dec, dW_enc, sums(dz, indices, n)
