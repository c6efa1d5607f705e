"""What rows may be given as; with torch also its tensors, which numpy alone does not take."""

import ml_dtypes
import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter, calibrate


def write(path, columns, rows):
    with StoreWriter(path, columns) as writer:
        writer.append(rows)
        writer.finish()
    return Store.open(path)


def test_every_finite_bfloat16_of_torch_arrives_exactly(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80][: 5 * 13000].reshape(-1, 5)
    tensor = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert tensor.float().numpy().tobytes() == bits.view(ml_dtypes.bfloat16).astype("f4").tobytes()
    columns = {"x": Column((5,)), "y": Column((5,), "float32"), "t": Column((5,))}
    transposed = tensor.t().contiguous().t()  # a view whose rows do not follow each other
    store = write(tmp_path, columns, {"x": tensor, "y": tensor, "t": transposed})
    for name in ("x", "t"):
        assert (store.read(name).view(np.uint16) == bits).all()
    assert (store.read("y") == bits.view(ml_dtypes.bfloat16).astype("f4")).all()


def test_tensors_with_a_gradient_and_of_other_kinds(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra torch is not installed")
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    half = (weight * 2).to(torch.float16)
    columns = {"x": Column((3,), "float32"), "h": Column((3,), "float32"), "n": Column((), "int32")}
    rows = {"x": weight, "h": half, "n": torch.arange(4)}
    store = write(tmp_path / "a", columns, rows)
    assert (store.read("x") == weight.detach().numpy()).all()
    assert (store.read("h") == half.detach().float().numpy()).all()
    assert store.read("n").tolist() == [0, 1, 2, 3]
    sample = torch.randn(300, 4)
    assert calibrate(sample.bfloat16().requires_grad_()) == calibrate(sample.bfloat16().float())
    with StoreWriter(tmp_path / "b", {"x": Column((3,), "float32")}) as writer:
        with pytest.raises(StoreError, match=r"column 'x' was given Tensor of dtype torch.float32"):
            writer.append({"x": torch.eye(3).to_sparse()})
        with pytest.raises(StoreError, match="NaN or infinite"):
            writer.append({"x": torch.full((2, 3), float("nan"), dtype=torch.bfloat16)})
        assert writer.buffered == 0


def test_what_is_no_array_is_refused_by_its_column(tmp_path):
    with StoreWriter(tmp_path, {"x": Column((2,), "float32")}) as writer:
        with pytest.raises(StoreError, match=r"column 'x' was given list of dtype none, of which"):
            writer.append({"x": [[1.0, 2.0], [3.0]]})
