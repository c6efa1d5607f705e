"""sparsify's transcoder on raw rows, trained as its ``Trainer.fit`` does, which wants a model.

That is: encoder centred and b_dec at the mean of the first batch, loss FVU, no auxiliary loss;
SignSGD within a schedule-free wrapper by default.
"""

from typing import Any

import numpy as np
from quality_libraries import Data, Settings, Trained, array, no_grad, peer
from quality_weights import Weights


def train(
    method: str, s: Settings, data: Data, value: float, lr: float, seed: int, adam: bool = False
) -> Trained:
    """One run; ``adam``: with its other optimiser, warmed up and decaying to 0 to the end."""
    torch, sparsify = peer("torch"), peer("sparsify")
    torch.manual_seed(seed)
    skip = method == "skip_transcoder"
    config = sparsify.SparseCoderConfig(
        num_latents=s.n, k=round(value), transcode=True, skip_connection=skip
    )
    coder = sparsify.SparseCoder(s.d, config)
    optimiser, scheduler = (_adam if adam else _signum)(coder, s, lr)
    for step in range(s.steps):
        x, y = (torch.from_numpy(data.batches(step)[c]) for c in "xy")
        if step == 0:
            _centre(coder, x, y)
        coder(x, y).fvu.backward()
        optimiser.step()
        optimiser.zero_grad()
        if scheduler is not None:
            scheduler.step()
    data.done()
    if scheduler is None:
        optimiser.eval()  # the schedule-free average, which its trainer saves
    return Trained(_weights(coder, s), no_grad(lambda x: coder(x).sae_out, 1, 1))


def _signum(coder: Any, s: Settings, lr: float) -> tuple[Any, None]:
    sign = peer("sparsify.sign_sgd").SignSGD([{"params": coder.parameters(), "lr": lr}])
    optimiser = peer("schedulefree").ScheduleFreeWrapper(sign, momentum=0.95)
    optimiser.train()
    return optimiser, None


def _adam(coder: Any, s: Settings, lr: float) -> tuple[Any, Any]:
    optimiser = peer("torch").optim.Adam(coder.parameters(), lr=lr)
    schedule = peer("transformers").get_linear_schedule_with_warmup
    return optimiser, schedule(optimiser, s.warmup, s.steps)


def _centre(coder: Any, x: Any, y: Any) -> None:
    coder.encoder.bias.data = -x.mean(0) @ coder.encoder.weight.data.T
    coder.b_dec.data = y.mean(0)


def _weights(coder: Any, s: Settings) -> Weights:
    return Weights(
        W_enc=array(coder.encoder.weight),
        b_enc=array(coder.encoder.bias),
        b_in=np.zeros(s.d, np.float32),
        W_dec=array(coder.W_dec),
        b_dec=array(coder.b_dec),
        k=s.l0,
        W_skip=None if coder.W_skip is None else array(coder.W_skip),
    )
