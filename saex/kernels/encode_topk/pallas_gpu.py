"""encode_topk on Hopper: a matmul whose epilogue also leaves the maximum of each group of scores.

The scores are written once and never read as a whole again: the second level of the selection reads
k groups of each row. That spares one pass over [b, n], which costs as much as the part
(1 / d) (FLOP/s) / (bytes/s) of the matmul: about a fourth at d = 768, a twentieth at d = 4096. A
matmul by XLA is likely to be better than this one by more than that where d is above ``WIDEST``.

Persistent: a program per multiprocessor takes tiles in turn, so that the loads of its next tile run
under the epilogue of the last. Two warpgroups compute, a third one loads.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from saex.kernels import like
from saex.kernels.mosaic_gpu import interpreter, vary, warpgroup_params
from saex.kernels.topk import xla_gpu as topk
from saex.kernels.topk.order import ordered

WIDEST = 1024  # d up to which this matmul can win by the pass that it spares
ROWS, LATENTS, DEPTH = 64, 256, 64  # of a warpgroup's tile; of the d entries of one step
WARPGROUPS = 2  # that compute; each has ROWS rows of the same latents
STEPS = 3  # steps of loads in flight: 3 * 48 KiB of shared memory
COLUMNS = 64  # of the scores that go to memory at a time, from one of two buffers a warpgroup


def encode_topk(
    x: Float[Array, "b d"],
    b_pre: Float[Array, " d"],
    W_enc: Float[Array, "n d"],
    b_enc: Float[Array, " n"],
    k: int,
    matmul_dtype: str = "float32",
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Exact; wider than ``WIDEST`` it works, but XLA's form should be the better one.

    NaN has its place where all scores of a row are NaN; one among finite scores of its group is
    left to the hardware's maximum, which may pass over it.

    Raises:
      ValueError: matmul inputs of float32, which the tensor cores do not take.
    """
    if matmul_dtype not in ("bfloat16", "float16"):
        raise ValueError(
            f"matmul_dtype={matmul_dtype!r}: impl='pallas_gpu' takes 'bfloat16' or 'float16'; "
            "leave impl at None for float32"
        )
    b, n = x.shape[0], W_enc.shape[0]
    g = min(max(topk.group_of(n, k), 8), LATENTS)
    inputs = _pad((x - b_pre[None]).astype(matmul_dtype), WARPGROUPS * ROWS, DEPTH)
    # What fills the last tile is the last latent again: a group that it is in keeps its maximum,
    # also where that is infinite or NaN. Those groups that hold nothing else come last.
    room = (0, -n % LATENTS)
    weights = jnp.pad(W_enc.astype(matmul_dtype), (room, (0, 0)), mode="edge").T
    p, maxima = scores(inputs, _pad(weights, DEPTH, 1), jnp.pad(b_enc, room, mode="edge"), g)
    real = jnp.arange(maxima.shape[0]) * g < n
    maxima = jnp.where(real[:, None], ordered(maxima), -jnp.inf)
    values, indices = topk.finish(p, maxima.T, k, g, n=n)
    return values[:b], indices[:b]


def scores(
    x: Float[Array, "b d"], W: Float[Array, "d n"], bias: Float[Array, " n"], g: int
) -> tuple[Float[Array, "b n"], Float[Array, "n_g b"]]:
    """(x W + bias, its maxima over groups of ``g`` neighbours, transposed), both float32.

    Args:
      x, W: bfloat16 or float16, in multiples of a tile. g: divides ``LATENTS``.
    """
    b, n = x.shape[0], W.shape[1]
    out = like(x, (b, n)), like(x, (n // g, b))
    kernel = plgpu.kernel(
        functools.partial(_tiles, g=g),
        out_type=out,
        grid=(_multiprocessors(),),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=warpgroup_params(),
        interpret=interpreter(),
    )
    return vary(kernel(x, W, bias), out)


def _tiles(x, W, bias, p, maxima, *, g):
    """One program: every so many-th tile of [WARPGROUPS * ROWS, LATENTS] scores."""
    (b, d), n = x.shape, W.shape[1]
    down = b // (WARPGROUPS * ROWS)
    pipeline = functools.partial(_pipeline, d // DEPTH, x.dtype)
    nothing = lambda *_: None  # noqa: E731  # what is allocated does not depend on what is done
    allocations = pipeline(nothing, nothing).get_allocations(x, W)
    out = plgpu.SMEM((WARPGROUPS, 2, ROWS, COLUMNS), jnp.float32, transforms=_layout(jnp.float32))

    @functools.partial(
        pl.run_scoped,
        pipeline=allocations,
        out=out,
        shift=plgpu.SMEM((WARPGROUPS, LATENTS), jnp.float32),
        arrived=plgpu.Barrier(num_barriers=WARPGROUPS),
        collective_axes="warpgroup",
    )
    def _(pipeline, out, shift, arrived):
        mine = jax.lax.axis_index("warpgroup")

        @plgpu.nd_loop((down * (n // LATENTS),), collective_axes="program")
        def _(loop):
            # Tiles of the same latents follow each other: x stays in the L2 cache, W is read once.
            i, j = loop.index[0] % down, loop.index[0] // down
            rows = pl.ds(i * WARPGROUPS * ROWS, WARPGROUPS * ROWS)
            latents = pl.ds(j * LATENTS, LATENTS)

            def compute(run):
                @functools.partial(
                    pl.run_scoped, total=plgpu.WGMMAAccumulatorRef((ROWS, LATENTS), jnp.float32)
                )
                def _(total):
                    plgpu.copy_gmem_to_smem(bias.at[latents], shift.at[mine], arrived.at[mine])
                    run(total)
                    plgpu.barrier_wait(arrived.at[mine])
                    own = pl.ds((i * WARPGROUPS + mine) * ROWS, ROWS)
                    tile = total[...] + jax.lax.broadcast_in_dim(shift[mine], total.shape, (1,))
                    for s in range(LATENTS // g):
                        best = jnp.max(tile[:, s * g : (s + 1) * g], axis=1)
                        maxima[j * (LATENTS // g) + s, own] = best
                    _write(tile, out.at[mine], p.at[own, latents])

            def step(_, x, W, total):
                own = pl.ds(mine * ROWS, ROWS)
                plgpu.wgmma(total, x.at[own], W)
                plgpu.wgmma_wait(0)
                return total

            run = _pipeline(d // DEPTH, x.dtype, step, compute)
            run(x.at[rows], W.at[:, latents], allocations=pipeline)

    plgpu.wait_smem_to_gmem(0)


def _pipeline(steps, dtype, step, compute):
    """Loads of both operands, ``STEPS`` ahead, under the products of ``step``."""
    block = functools.partial(plgpu.BlockSpec, transforms=_layout(dtype))
    specs = [
        block((WARPGROUPS * ROWS, DEPTH), lambda k: (0, k)),
        block((DEPTH, LATENTS), lambda k: (k, 0)),
    ]
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        max_concurrent_steps=STEPS,
        compute_context=compute,
    )


def _write(tile, buffers, p):
    """A warpgroup's tile to memory, by way of two buffers in shared memory."""
    for s in range(LATENTS // COLUMNS):
        columns = slice(s * COLUMNS, (s + 1) * COLUMNS)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the copy before the last has left
        buffers[s % 2] = tile[:, columns]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffers.at[s % 2], p.at[:, columns])


def _layout(dtype):
    """Tiles of 8 rows by 128 bytes, swizzled: what the tensor cores and the copy engine read."""
    return (
        plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(128),
    )


def _multiprocessors() -> int:
    """Of the device that is compiled for; a few on CPU, to be interpreted."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        device = jax.devices()[0]
        return getattr(device, "core_count", 2)
    return device.num_cores or 2


def _pad(a, rows, columns):
    return jnp.pad(a, ((0, -a.shape[0] % rows), (0, -a.shape[1] % columns)))
