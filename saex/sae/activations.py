"""Activation functions whose gradients are estimates: straight-through estimators."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(
    p: Float[Array, "*shape"], theta: Float[Array, "*shape"], bandwidth: float
) -> Float[Array, "*shape"]:
    """JumpReLU: p where p > theta, else 0 (Rajamanoharan et al. 2024, arXiv 2407.14435).

    Gradients: to p, g where p > theta; to theta, -(theta / bandwidth) g where |p - theta| is below
    bandwidth / 2 (strictly), the rectangle's estimate of what a sum over rows would feel.
    """
    return jnp.where(p > theta, p, 0)


def _jump_forward(p, theta, bandwidth):
    return jump(p, theta, bandwidth), (p, theta)


def _jump_backward(bandwidth, residuals, g):
    p, theta = residuals
    return jnp.where(p > theta, g, 0), -theta * _window(p, theta, bandwidth) * g


jump.defvjp(_jump_forward, _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def step_up(
    p: Float[Array, "*shape"], theta: Float[Array, "*shape"], bandwidth: float
) -> Float[Array, "*shape"]:
    """1 where p > theta, else 0: what an L0 counts (same source).

    Gradients: none to p; to theta, -g / bandwidth inside the rectangle.
    """
    return (p > theta).astype(p.dtype)


def _step_forward(p, theta, bandwidth):
    return step_up(p, theta, bandwidth), (p, theta)


def _step_backward(bandwidth, residuals, g):
    p, theta = residuals
    return jnp.zeros_like(p), -_window(p, theta, bandwidth) * g


step_up.defvjp(_step_forward, _step_backward)


def _window(p, theta, bandwidth):
    return (jnp.abs(p - theta) < bandwidth / 2).astype(p.dtype) / bandwidth
