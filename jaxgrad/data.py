"""Real data that ships with what is installed already: no download, the same numbers every time.

`digits` are the 1,797 handwritten digits inside scikit-learn; `english_text` is the language
reference inside Python's own standard library (`pydoc_data.topics`), about half a million
characters of English.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Examples(NamedTuple):
    """Inputs and their labels.

    Attributes:
        x: float32, one row an example.
        y: int32 class numbers, one an example.
    """

    x: Float[np.ndarray, "n features"]
    y: Int[np.ndarray, " n"]


class Split(NamedTuple):
    """Examples to train on and examples held back."""

    train: Examples
    test: Examples


class Text(NamedTuple):
    """A text as numbers.

    Attributes:
        ids: int32, one a character: its place in `vocabulary`.
        vocabulary: the characters, sorted.
    """

    ids: Int[np.ndarray, " n"]
    vocabulary: tuple[str, ...]

    def encode(self, text: str) -> Int[np.ndarray, " m"]:
        """Numbers of a text's characters.

        Raises:
            ValueError: a character that is not in the vocabulary.
        """
        places = {character: place for place, character in enumerate(self.vocabulary)}
        unknown = sorted(set(text) - places.keys())
        if unknown:
            raise ValueError(f"characters outside the vocabulary: {unknown}.")
        return np.asarray([places[character] for character in text], np.int32)

    def decode(self, ids: Int[Array | np.ndarray, " m"]) -> str:
        """The text of some numbers."""
        return "".join(self.vocabulary[int(i)] for i in ids)


def digits(
    *, scale: Literal["standard", "unit"] = "standard", test_share: float = 0.2, seed: int = 0
) -> Split:
    """Handwritten digits, 8 by 8 pixels, ten classes (UCI ML hand-written digits, test set).

    Args:
        scale: "standard" subtracts the training pixels' mean and divides by their standard
        deviation
            (one number each for all pixels, so that constant border pixels stay harmless); "unit"
            divides by 16, the largest value, which gives [0, 1].
        test_share: the share of examples held back, in (0, 1).
        seed: of the shuffle before the split.

    Returns:
        Split of Examples with x of shape (n, 64), float32, and y of shape (n,), int32.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: an unknown scale, or a share outside (0, 1).
    """
    if scale not in ("standard", "unit"):
        raise ValueError(f'scale must be "standard" or "unit", got {scale!r}.')
    if not 0.0 < test_share < 1.0:
        raise ValueError(f"test_share must lie between 0 and 1, got {test_share}.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "jaxgrad.data.digits needs scikit-learn, which holds the data: "
            "pip install 'jaxgrad[demo]' or pip install scikit-learn."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = pixels[order], labels[order].astype(np.int32)
    n_test = min(max(1, round(test_share * len(y))), len(y) - 1)
    shift, width = (0.0, 16.0) if scale == "unit" else (x[n_test:].mean(), x[n_test:].std())
    x = ((x - shift) / width).astype(np.float32)
    return Split(train=Examples(x[n_test:], y[n_test:]), test=Examples(x[:n_test], y[:n_test]))


def minibatches(
    examples: Examples, *, batch_size: int, seed: int = 0, epochs: int | None = None
) -> Iterator[Examples]:
    """Shuffled batches of one size; what does not fill a batch at an epoch's end is left out.

    Args:
        examples: what to draw from.
        batch_size: examples a batch, at most `len(examples.y)`.
        seed: the order is a function of it and of the epoch's number.
        epochs: passes over the data; None never ends.

    Raises:
        ValueError: a batch larger than the data, or smaller than one (raised on the first `next`).
    """
    n = len(examples.y)
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must lie between 1 and {n}, the examples, got {batch_size}.")
    epoch = 0
    while epochs is None or epoch < epochs:
        order = np.random.default_rng((seed, epoch)).permutation(n)
        for start in range(0, n - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield Examples(examples.x[rows], examples.y[rows])
        epoch += 1


def english_text() -> Text:
    """English prose from the standard library, as characters.

    The topics of `pydoc_data.topics` (the Python language reference), in the order of their names.
    The text differs a little between Python versions, as the reference itself does.

    Returns:
        Text with about 500,000 characters and a vocabulary of about 100.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    vocabulary, ids = np.unique(np.asarray(list(text)), return_inverse=True)
    return Text(ids.astype(np.int32), tuple(str(character) for character in vocabulary))


def text_windows(
    ids: Int[Array | np.ndarray, " n"], key: jax.Array | int, *, batch_size: int, length: int
) -> Int[Array | np.ndarray, "batch length_and_one"]:
    """Windows of a text at random places: `[:, :-1]` is a model's input, `[:, 1:]` its target.

    Args:
        ids: the text's numbers.
        key: a jax key (the result is then a jax array, and the function may be jitted over the key)
            or an integer seed of numpy (the result is then a numpy array).
        batch_size: windows.
        length: T, characters the model reads; a window has T + 1.

    Returns:
        int32 of shape (batch_size, length + 1); the same for the same key.

    Raises:
        ValueError: a window longer than the text, or a length or batch below one.
    """
    last = ids.shape[0] - (length + 1)
    if last < 0 or length < 1 or batch_size < 1:
        raise ValueError(
            f"expected batch_size >= 1 and 1 <= length < {ids.shape[0]}, the text's length; "
            f"got batch_size={batch_size}, length={length}."
        )
    offsets = np.arange(length + 1)
    if isinstance(key, int):
        starts = np.random.default_rng(key).integers(0, last + 1, batch_size)
        return np.asarray(ids)[starts[:, None] + offsets]
    starts = jax.random.randint(key, (batch_size,), 0, last + 1)
    return jnp.asarray(ids)[starts[:, None] + offsets]
