"""The data that ship: real, deterministic, and split without a leak."""

import itertools
import sys

import jax
import numpy as np
import pytest

from jaxgrad import data


def test_digits_are_all_there_once_and_standardized_by_the_training_part():
    train, test = data.digits(seed=3)
    assert train.x.shape == (1438, 64) and test.x.shape == (359, 64)
    assert train.x.dtype == np.float32 and train.y.dtype == np.int32
    assert abs(train.x.mean(dtype=np.float64)) < 1e-6
    assert abs(train.x.std(dtype=np.float64) - 1.0) < 1e-6
    assert abs(test.x.mean(dtype=np.float64)) > 1e-6  # its own mean was not taken out
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows = np.concatenate([train.x, test.x]).astype(np.float64)
    rows = (rows - rows.min()) * 16 / (rows.max() - rows.min())
    mine = sorted(zip(map(tuple, np.rint(rows)), np.concatenate([train.y, test.y]), strict=True))
    assert mine == sorted(zip(map(tuple, pixels), labels, strict=True))


def test_unit_scale_is_zero_to_one_and_keeps_the_split():
    standard, unit = data.digits(seed=1), data.digits(scale="unit", seed=1)
    assert unit.train.x.min() == 0.0 and unit.train.x.max() == 1.0
    assert np.array_equal(standard.train.y, unit.train.y)
    assert np.corrcoef(standard.train.x.ravel(), unit.train.x.ravel())[0, 1] > 1 - 1e-6


def test_the_seed_decides_the_split_and_nothing_else_does():
    assert np.array_equal(data.digits(seed=5).test.x, data.digits(seed=5).test.x)
    assert not np.array_equal(data.digits(seed=5).test.y, data.digits(seed=6).test.y)
    assert len(data.digits(test_share=0.5).test.y) in (898, 899)


def test_digits_say_what_was_wrong_and_what_to_install(untyped, monkeypatch):
    with pytest.raises(ValueError, match="got 'minmax'"):
        data.digits(scale="minmax")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"got 1\.0"):
        data.digits(test_share=1.0)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install"):
        data.digits()


def test_an_epoch_of_minibatches_visits_every_example_once_at_most():
    examples = data.Examples(
        np.arange(10.0, dtype=np.float32)[:, None], np.arange(10, dtype=np.int32)
    )
    epochs = list(data.minibatches(examples, batch_size=3, epochs=2))
    assert len(epochs) == 6
    first, second = (np.concatenate([b.y for b in e]) for e in (epochs[:3], epochs[3:]))
    assert len(set(first)) == 9 and len(set(second)) == 9
    assert not np.array_equal(first, second)
    assert all(np.array_equal(b.x[:, 0], b.y) for b in epochs)
    endless = itertools.islice(data.minibatches(examples, batch_size=3), 50)
    assert sum(len(b.y) for b in endless) == 150
    with pytest.raises(ValueError, match="between 1 and 10"):
        next(data.minibatches(examples, batch_size=11))


def test_english_text_is_english_and_decodes_to_itself():
    text = data.english_text()
    assert text.ids.dtype == np.int32 and len(text.ids) > 400_000
    assert 90 < len(text.vocabulary) < 130 and list(text.vocabulary) == sorted(text.vocabulary)
    assert text.ids.min() == 0 and text.ids.max() == len(text.vocabulary) - 1
    whole = text.decode(text.ids[:20_000])
    assert " the " in whole and np.array_equal(text.encode(whole), text.ids[:20_000])
    with pytest.raises(ValueError, match="'☃'"):
        text.encode("snow ☃")


@pytest.mark.parametrize("key", [7, jax.random.key(7)], ids=["numpy", "jax"])
def test_windows_are_runs_of_the_text_and_the_same_for_the_same_key(key):
    ids = np.arange(1000, dtype=np.int32)
    windows = data.text_windows(ids, key, batch_size=64, length=16)
    assert windows.shape == (64, 17) and windows.dtype == np.int32
    assert (np.diff(np.asarray(windows), axis=1) == 1).all()
    assert np.array_equal(windows, data.text_windows(ids, key, batch_size=64, length=16))
    other = 8 if isinstance(key, int) else jax.random.key(8)
    assert not np.array_equal(windows, data.text_windows(ids, other, batch_size=64, length=16))


@pytest.mark.parametrize("key", [0, jax.random.key(0)], ids=["numpy", "jax"])
def test_windows_reach_both_ends_of_the_text(key):
    ids = np.arange(4, dtype=np.int32)
    windows = np.asarray(data.text_windows(ids, key, batch_size=64, length=2))
    assert windows.min() == 0 and windows.max() == 3
    whole = data.text_windows(ids, key, batch_size=1, length=3)
    assert np.asarray(whole).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="length=4"):
        data.text_windows(ids, key, batch_size=1, length=4)
