"""Run folders keep what broke the run, and never hand back a mixture."""

import hashlib
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrad import store

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-45, 1.7976931348623157e308]


def same(a: object, b: object) -> bool:
    """Equality that tells NaN from a number, -0.0 from 0.0, True from 1, and 1 from 1.0."""
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex()
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


records = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(records)
def test_json_gives_back_every_record_and_is_strict(record):
    text = store.to_json(record)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"not strict JSON: {name}"))
    if isinstance(record, float) and math.isnan(record):
        assert math.isnan(store.from_json(text))
    else:
        assert same(store.from_json(text), json_floats(record))


def json_floats(record):
    """NaN has many bit patterns and one name: all of them come back as the one."""
    if isinstance(record, float) and math.isnan(record):
        return math.nan
    if isinstance(record, list):
        return [json_floats(v) for v in record]
    if isinstance(record, dict):
        return {k: json_floats(v) for k, v in record.items()}
    return record


@pytest.mark.parametrize("value", SPECIAL, ids=repr)
def test_a_special_float_survives_as_scalar_and_in_an_array(value, tmp_path):
    with np.errstate(over="ignore"):
        narrow = np.asarray([value, 1.0], np.float32)
    store.save_run(tmp_path / "run", {"scalar": value, "wide": np.asarray(value), "narrow": narrow})
    back = store.load_run(tmp_path / "run")
    assert back["scalar"].hex() == value.hex()
    assert back["wide"].tobytes() == np.asarray(value).tobytes()
    assert back["narrow"].tobytes() == narrow.tobytes()


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16", "float8_e4m3fn", "int4", "float16", "float32", "float64", "int8", "uint32",
        "bool", "complex64", "<U3",
    ],
)  # fmt: skip
def test_an_array_comes_back_with_its_dtype_shape_and_bits(dtype, tmp_path):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = np.arange(6).reshape(2, 1, 3).astype(dtype)
    store.save_run(tmp_path / "run", {"nested": [{"array": array, "empty": array[:0]}]})
    back = store.load_run(tmp_path / "run")["nested"][0]
    assert back["array"].dtype == dtype and back["empty"].dtype == dtype
    assert back["array"].shape == (2, 1, 3) and back["empty"].shape == (0, 1, 3)
    assert back["array"].tobytes() == array.tobytes()


def test_bfloat16_keeps_its_nan_its_infinity_and_its_subnormals(tmp_path):
    values = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1e-40, 3.0e38], jnp.bfloat16)
    store.save_run(tmp_path / "run", {"a": values})
    back = store.load_run(tmp_path / "run")["a"]
    assert back.dtype == ml_dtypes.bfloat16
    assert back.tobytes() == np.asarray(values).tobytes()


def test_scalars_of_numpy_and_jax_come_back_as_numbers(tmp_path):
    record = {
        "half": np.float16(0.1), "brain": ml_dtypes.bfloat16(3.0), "count": np.int64(7),
        "flag": np.bool_(True), "zero_d": jnp.float32(0.5), "z": complex(math.nan, -math.inf),
        "pair": (1, 2.5),
    }  # fmt: skip
    store.save_run(tmp_path / "run", record)
    back = store.load_run(tmp_path / "run")
    assert back["half"] == float(np.float16(0.1)) and back["brain"] == 3.0
    assert back["count"] == 7 and back["flag"] is True and back["pair"] == [1, 2.5]
    assert back["zero_d"] == np.float32(0.5) and back["zero_d"].shape == ()
    assert math.isnan(back["z"].real) and back["z"].imag == -math.inf


def test_names_of_arrays_may_be_anything(tmp_path):
    record = {"file": np.ones(1), "a/b": np.full(1, 2.0), "a": {"b": {"c": np.full(1, 3.0)}}}
    record |= {"../up": np.full(1, 4.0), "": np.full(1, 5.0), "names": np.full(1, 6.0)}
    store.save_run(tmp_path / "run", record)
    back = store.load_run(tmp_path / "run")
    assert back["file"] == 1 and back["a/b"] == 2 and back["a"]["b"]["c"] == 3
    assert back["../up"] == 4 and back[""] == 5 and back["names"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_two_paths_that_read_alike_keep_two_arrays(tmp_path):
    store.save_run(tmp_path / "run", {"a/b": np.ones(1), "a": {"b": np.zeros(1)}})
    back = store.load_run(tmp_path / "run")
    assert back["a/b"] == 1 and back["a"]["b"] == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"f": {1, 2}}, "set at '/f'"),
        ({"f": object()}, "object at '/f'"),
        ({"f": {1: 2}}, "key 1 of the dict at '/f'"),
        ({"$float": 1}, r"key '\$float'"),
        ({"f": np.asarray([None])}, "dtype object at '/f'"),
        ({"f": [jax.random.key(0)]}, "PRNG key at '/f/0'"),
    ],
)
def test_what_cannot_be_stored_is_named_by_its_path_and_nothing_is_written(value, words, tmp_path):
    with pytest.raises(store.StoreError, match=words):
        store.save_run(tmp_path / "run", value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_run(tmp_path):
    store.save_run(tmp_path / "run", {"a": np.ones(3)})
    with pytest.raises(store.StoreError):
        store.save_run(tmp_path / "run", {"a": np.zeros(3), "b": object()})
    assert store.load_run(tmp_path / "run")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("links", [True, False])
def test_an_overwrite_interrupted_between_the_two_files_leaves_the_old_run(
    tmp_path, monkeypatch, links
):
    run = store.save_run(tmp_path / "run", {"a": np.ones(3)})
    replace = os.replace

    def dies_at_the_record(source, target):
        if Path(target).name == store.RECORD_FILE:
            raise KeyboardInterrupt
        replace(source, target)

    def no_link(*_):
        raise OSError("no links here")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies_at_the_record)
        if not links:
            patch.setattr(os, "link", no_link)
        for _ in range(2):  # and once more, on what the first interruption left
            with pytest.raises(KeyboardInterrupt):
                store.save_run(run, {"a": np.zeros(3)})
            np.testing.assert_array_equal(store.load_run(run)["a"], np.ones(3))
    store.save_run(run, {"a": np.zeros(3)})
    np.testing.assert_array_equal(store.load_run(run)["a"], np.zeros(3))
    kept = {path.name for path in run.iterdir() if path.suffix == ".npz"}
    assert kept == {store.ARRAYS_FILE}


def test_a_folder_that_could_not_be_finished_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(
        np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        store.save_run(tmp_path / "run", {"a": np.ones(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", [store.RECORD_FILE, store.ARRAYS_FILE])
def test_a_damaged_or_missing_file_is_named(file, tmp_path):
    run = store.save_run(tmp_path / "run", {"a": np.arange(100.0)})
    content = (run / file).read_bytes()
    (run / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(store.StoreError, match=f"{file}.*damaged"):
        store.load_run(run)
    (run / file).unlink()
    with pytest.raises(store.StoreError, match=f"{file} is missing"):
        store.load_run(run)


def test_one_flipped_bit_in_the_arrays_is_found(tmp_path):
    run = store.save_run(tmp_path / "run", {"a": np.arange(100.0)})
    content = bytearray((run / store.ARRAYS_FILE).read_bytes())
    content[len(content) // 3] ^= 1
    (run / store.ARRAYS_FILE).write_bytes(bytes(content))
    with pytest.raises(store.StoreError, match=store.ARRAYS_FILE):
        store.load_run(run)


def test_a_later_format_and_a_foreign_file_are_refused(tmp_path):
    run = store.save_run(tmp_path / "run", {})
    (run / store.RECORD_FILE).write_text('{"format": 2}')
    with pytest.raises(store.StoreError, match="expected format 1, found 2"):
        store.load_run(run)
    (run / store.RECORD_FILE).write_text("[1]")
    with pytest.raises(store.StoreError, match="found 'list'"):
        store.load_run(run)
    with pytest.raises(store.StoreError, match="missing"):
        store.load_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(store.StoreError, match="expected a folder"):
        store.save_run(tmp_path / "file", {})


def test_a_pickle_inside_the_arrays_is_never_opened(tmp_path):
    run = store.save_run(tmp_path / "run", {"a": np.ones(1)})
    evil = np.empty(1, object)
    evil[0] = {"would": "execute"}
    np.savez(run / store.ARRAYS_FILE, names=np.asarray('["a"]'), a0=evil)
    envelope = json.loads((run / store.RECORD_FILE).read_text())
    envelope["arrays_sha256"] = hashlib.sha256((run / store.ARRAYS_FILE).read_bytes()).hexdigest()
    (run / store.RECORD_FILE).write_text(json.dumps(envelope))
    with pytest.raises(store.StoreError, match="damaged"):
        store.load_run(run)
