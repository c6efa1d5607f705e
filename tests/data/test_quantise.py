"""int8 columns: the error of each channel, what stays bfloat16, and that readers see float rows."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from saex.data import Column, Store, StoreError, StoreWriter, calibrate
from saex.data import store_tools as tools
from saex.data.manifest import json_sha256
from saex.data.mixed import Mixed
from saex.data.split import Part
from saex.data.stream import Stream

ROWS, D = 600, 32
HEAVY, SHIFTED = 5, 20


def make_rows(rows=ROWS, seed=0):
    """Channels of very different sizes; one with rare huge values, one far from 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, D)) * 10.0 ** rng.uniform(-3, 3, D)
    x[::50, HEAVY] *= 300
    x[:, SHIFTED] += 1000 * x[:, SHIFTED].std()
    return x.astype(np.float32)


def write(path, x, column, **options):
    columns = {"x": column, "n": Column((), "int32")}
    with StoreWriter(path, columns, {"made": "here"}, chunk_rows=16, **options) as writer:
        n = np.arange(writer.rows, len(x))
        for part in np.array_split(n, 3):
            writer.append({"x": x[part], "n": part})
            writer.commit({}, shuffle=(0, int(part[0])))
        writer.finish()
    return Store.open(path)


def test_each_channel_is_within_half_a_step_and_outliers_are_bfloat16(tmp_path):
    x = make_rows()
    column = calibrate(x)
    assert column.outliers == (HEAVY, SHIFTED)
    np.testing.assert_allclose(column.scales, 1.25 * np.abs(x).max(0) / 127, rtol=1e-6)
    store = write(tmp_path, x, column)
    store.verify()
    read, n = store.read("x"), store.read("n")
    assert read.dtype == np.float32 and read.shape == (ROWS, D)
    outliers = list(column.outliers)
    kept = x[n][:, outliers].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (read[:, outliers] == kept).all()
    rest = np.setdiff1d(np.arange(D), outliers)
    error = np.abs(read - x[n])[:, rest].max(0) / np.array(column.scales)[rest]
    assert error.max() <= 0.5 + 1e-5 and error.min() > 0.3  # rounding, and not something finer
    noise = ((read - x[n]) ** 2).mean(0) / x.var(0)
    assert noise[rest].max() < 1e-3
    assert store.stats["x"].clipped == 0 and store.stats["x"].count == ROWS
    np.testing.assert_allclose(store.stats["x"].mean, read.mean(0, dtype=np.float64), rtol=1e-9)
    size = sum(f.bytes for s in store.manifest.segments for k, f in s.files.items() if "x." in k)
    assert size < 0.75 * ROWS * D * 2  # two outliers of 32 cost an eighth; padding of chunks too


def test_readers_of_all_kinds_see_the_same_rows(tmp_path):
    x = make_rows()
    store = write(tmp_path / "a", x, calibrate(x))
    whole, n = store.read("x"), store.read("n")
    by_number = whole[np.argsort(n)]
    for checksums in (False, True):
        assert (store.read("x", 95, 317, checksums) == whole[95:317]).all()
    for split in ("train", "heldout"):
        part = Part(store, split)
        assert (part.read("x") == by_number[part.read("n")]).all()
    for source in (store, Part(store, "train")):
        batches = Stream(batch=32, window=8, threads=0).open(source, {"x": "x", "row": "n"}, 0)
        for step in (0, 3, 40):
            batch = batches.batch_at(step)
            assert batch["x"].dtype == np.float32
            assert (np.asarray(batch["x"]) == by_number[np.asarray(batch["row"])]).all()
        # In memory a row takes a byte a channel, two for each outlier, and its number.
        assert batches._lanes.nbytes == batches.info["window_rows"] * (D + 2 * 2 + 4)
        batches.close()
    batches = Stream(batch=32, threads=0).open(store, ["x"], 0, dtype="bfloat16")
    assert batches.batch_at(0)["x"].dtype == jax.numpy.bfloat16
    batches.close()
    # Stores with scales of their own are mixed: rows are read, not codes.
    other = write(tmp_path / "b", make_rows(seed=1), calibrate(make_rows(seed=1)))
    mixed = Mixed([store, other], [1.0, 1.0], tmp_path)
    assert (mixed.read("x", 590, 610) == np.r_[whole[590:], other.read("x", 0, 10)]).all()


def test_sites_side_by_side_and_strings_stay_aligned(tmp_path):
    x, n = make_rows(), np.arange(ROWS)
    columns = {"a": calibrate(x), "b": calibrate(2 * x), "n": Column((), "int32")}
    with StoreWriter(tmp_path, {**columns, "label": Column((), "string")}, chunk_rows=16) as writer:
        for part in np.array_split(n, 3):
            label = [f"{i % (3 + i // 200)}" for i in part]
            writer.append({"a": x[part], "b": 2 * x[part], "n": part, "label": label})
            writer.commit({})
        writer.finish()
    store = Store.open(tmp_path)
    both = np.concatenate([store.read("a"), store.read("b")], axis=1)
    named = {"x": "a+b", "row": "n", "label": "label"}
    batches = Stream(batch=32, window=8).open(store, named, 0)
    for step in range(5):
        batch = {name: np.asarray(v) for name, v in batches.batch_at(step).items()}
        assert (batch["x"] == both[batch["row"]]).all()
        for row, label in zip(batch["row"], batch["label"]):
            assert store.strings("label")[label] == f"{row % (3 + row // 200)}"
    batches.close()


def test_goes_on_and_merges_only_with_equal_scales(tmp_path):
    x = make_rows()
    store = write(tmp_path, x, calibrate(x))
    assert Store.open(tmp_path).digest == store.digest
    with pytest.raises(StoreError, match="another configuration:\n  columns"):
        StoreWriter(tmp_path, {"x": calibrate(2 * x), "n": Column((), "int32")},
                    {"made": "here"}, chunk_rows=16)  # fmt: skip
    scaled = write(tmp_path / "two", 2 * x, calibrate(2 * x))
    for a, b in zip(store.manifest.segments, scaled.manifest.segments):
        file = "x.codes/c/0/0"
        assert a.files[file].sha256 == b.files[file].sha256
    assert scaled.digest != store.digest  # the same codes, of other steps


def test_values_beyond_the_calibration_are_clipped_and_counted(tmp_path):
    x = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    column = calibrate(x)
    beyond = x.copy()
    beyond[7, 2], beyond[9, 0] = 1000, -1000
    store = write(tmp_path, beyond, column)
    assert store.stats["x"].clipped == 2
    largest = np.float32(127) * np.array(column.scales, np.float32)
    read = store.read("x")[np.argsort(store.read("n"))]
    assert read[7, 2] == largest[2] and read[9, 0] == -largest[0]
    info = tools.info(store)["columns"]
    assert info["x"]["clipped"] == 2 and "x.codes" not in info
    assert "clipped 2" in tools.info_table(store)
    assert tools.head(store, 1)[0]["x"]["norm"] == pytest.approx(np.linalg.norm(store.read("x")[0]))


def test_nan_is_refused_or_dropped_before_it_becomes_a_code(tmp_path):
    x = make_rows(40)
    column = calibrate(x)
    x[3, 1] = np.nan
    x[8, HEAVY] = np.inf
    with pytest.raises(StoreError, match="'x' has 2 values that are NaN"):
        write(tmp_path / "a", x, column)
    store = write(tmp_path / "b", x, column, non_finite="drop")
    assert sorted(store.read("n")) == sorted(set(range(40)) - {3, 8})
    with pytest.raises(StoreError, match="'x' is int8 with scales, for floating point, its values"):
        write(tmp_path / "c", np.ones((40, D), np.int8), column)


def test_channels_that_are_always_zero_and_rows_that_cannot_be_used():
    x = np.zeros((50, 3), np.float32)
    assert calibrate(x).scales == (1.0, 1.0, 1.0)
    x[:, 1] = np.arange(50)
    x[0] = np.nan
    scales = calibrate(x).scales
    assert scales[0] == scales[1] == scales[2] > 0
    for bad in (np.zeros((0, 3)), np.zeros(5), np.ones((4, 3), int), np.full((4, 3), np.nan)):
        with pytest.raises(StoreError, match="cannot calibrate"):
            calibrate(bad)
    many = calibrate(make_rows(), max_noise=0.0, max_outliers=4)
    assert many.outliers == tuple(sorted(np.argsort(many.scales)[-4:].tolist()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scales": [1.0]}, "as many float32"),
        ({"scales": [0.0] * D}, "as many float32"),
        ({"scales": [0.1] * D}, "as many float32"),  # 0.1 is no float32
        ({"outliers": [D]}, "expected channels, rising"),
        ({"outliers": [2, 1]}, "expected channels, rising"),
        ({"outliers": [1]}, "needs 'x.outliers' of shape [1]"),
        ({"dtype": "int16"}, "scales are of int8"),
    ],
)
def test_a_manifest_whose_scales_make_no_sense_is_refused(tmp_path, change, named):
    write(tmp_path, make_rows(), calibrate(make_rows()))
    file = tmp_path / "manifest.json"
    body = json.loads(file.read_text())
    assert body["version"] == 2
    body["columns"]["x"] |= change
    body["checksum"] = json_sha256({k: v for k, v in body.items() if k != "checksum"})
    file.write_text(json.dumps(body))
    with pytest.raises(StoreError) as error:
        Store.open(tmp_path)
    assert named in str(error.value) and "columns['x']" in str(error.value)


def test_names_of_parts_are_not_to_be_taken(tmp_path):
    columns = {"x": calibrate(make_rows()), "x.codes": Column((), "int32")}
    with pytest.raises(StoreError, match=r"'x.codes' is a part of the int8 column 'x'; rename"):
        StoreWriter(tmp_path / "new", columns)
    assert not (tmp_path / "new").exists()
