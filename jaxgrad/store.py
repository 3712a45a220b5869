"""Run folders: `run.json` for people, `arrays.npz` for programs, and nothing lost.

The evidence of a broken run is NaN and infinity, and common JSON writers turn both into `null`.
Here a non-finite number is written as a string in a tagged object, `{"$float": "nan"}`, so that
the file stays strict JSON and the number comes back. An array stays in the npz file under its path
in the record and `{"$array": path, "dtype": ...}` stands for it. Nothing is pickled, so a run
folder of a stranger is safe to open.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 1
RECORD_FILE = "run.json"
ARRAYS_FILE = "arrays.npz"
_OLD_ARRAYS_FILE = "arrays.old.npz"


class StoreError(ValueError):
    """A run folder cannot be written or read; says which file, why and what to do."""


def save_run(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Writes a record to a folder, atomically.

    A new folder appears complete or not at all. In an existing folder each file is replaced by a
    rename, `run.json` holds the hash of the `arrays.npz` that belongs to it, and the arrays of the
    run before stand beside them until both are written: whenever an overwrite is interrupted, the
    folder reads as the old run or as the new one, never as a mixture.

    Args:
        folder: where to write; made if missing, with its parents.
        record: nested dicts with string keys, lists, tuples (which come back as lists), None, bool,
            int, float, complex, str, numpy scalars (which come back as Python scalars) and arrays
            of numpy or jax (which come back as numpy arrays of the same dtype, bfloat16 included).

    Returns:
        The folder's path.

    Raises:
        StoreError: a value that cannot be stored, named by its path in the record.
    """
    folder = Path(folder)
    arrays: dict[str, np.ndarray] = {}
    body = _encode(record, "", arrays)
    if folder.is_dir():
        _write_files(folder, body, arrays)
        return folder
    if folder.exists():
        raise StoreError(f"{folder} is a file; expected a folder to write the run to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        inner = Path(temporary) / folder.name
        inner.mkdir()
        _write_files(inner, body, arrays)
        os.replace(inner, folder)
    return folder


def load_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_run` wrote.

    Raises:
        StoreError: a folder or file that is missing, damaged, of another format, or of another run.
    """
    folder = Path(folder)
    record_path, arrays_path = folder / RECORD_FILE, folder / ARRAYS_FILE
    for path in (record_path, arrays_path):
        if not path.is_file():
            raise StoreError(
                f"{path} is missing; expected a run folder with {RECORD_FILE} and {ARRAYS_FILE}, "
                "as save_run writes it."
            )
    try:
        envelope = json.loads(record_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"{record_path} is damaged, not JSON: {error}.") from error
    if not isinstance(envelope, dict) or envelope.get("format") != FORMAT:
        found = envelope.get("format") if isinstance(envelope, dict) else type(envelope).__name__
        raise StoreError(f"{record_path}: expected format {FORMAT}, found {found!r}.")
    # the arrays of the run before are those of run.json where a save was interrupted in between
    for path in (arrays_path, folder / _OLD_ARRAYS_FILE):
        if path.is_file() and _digest(path) == envelope.get("arrays_sha256"):
            return _decode(envelope.get("record"), _read_arrays(path), record_path)
    raise StoreError(
        f"{arrays_path} is not the file that {RECORD_FILE} was written with: it is damaged. "
        "Write the run again."
    )


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON of a value without arrays; non-finite floats survive.

    Raises:
        StoreError: an array, or a value that cannot be stored, named by its path.
    """
    arrays: dict[str, np.ndarray] = {}
    body = _encode(value, "", arrays)
    if arrays:
        raise StoreError(
            f"to_json: an array at {next(iter(arrays))!r}; expected scalars. "
            "Use save_run, or .tolist()."
        )
    return json.dumps(body, allow_nan=False, ensure_ascii=False, indent=indent)


def from_json(text: str) -> Any:
    """The value that `to_json` wrote."""
    return _decode(json.loads(text), {}, Path("<text>"))


# ----------------------------------------------------------------------------------------- encoding


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.generic):
        value = _python_scalar(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, complex):
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, np.ndarray | jax.Array):
        return _encode_array(value, path, arrays)
    if isinstance(value, Mapping):
        return {_key(k, path): _encode(v, f"{path}/{k}", arrays) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v, f"{path}/{i}", arrays) for i, v in enumerate(value)]
    raise StoreError(
        f"cannot store {type(value).__name__} at {path or '/'!r}; expected dict, list, tuple, "
        "None, bool, int, float, complex, str or an array."
    )


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str) or key.startswith("$"):
        raise StoreError(
            f"cannot store the key {key!r} of the dict at {path or '/'!r}; expected a string that "
            "does not begin with '$'."
        )
    return key


def _python_scalar(value: np.generic) -> Any:
    if _is_extended(value.dtype):
        return float(value) if jnp.issubdtype(value.dtype, jnp.floating) else int(value)
    return value.item()


def _is_extended(dtype: np.dtype) -> bool:
    """Whether the dtype is an extension's (bfloat16, float8, int4): npz reads those as raw."""
    return dtype.isbuiltin == 2


def _encode_array(value: np.ndarray | jax.Array, path: str, arrays: dict[str, np.ndarray]) -> dict:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise StoreError(
            f"cannot store a typed PRNG key at {path!r}; store jax.random.key_data of it."
        )
    array = np.asarray(value)
    dtype = array.dtype
    if dtype.hasobject or dtype.names:
        raise StoreError(
            f"cannot store an array of dtype {dtype} at {path!r}; "
            "expected numbers, booleans or text."
        )
    if _is_extended(dtype):  # exact: every such float fits float32, every such integer int32
        array = array.astype(np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.int32)
    name = path.strip("/") or "array"
    while name in arrays:  # {"a/b": ...} and {"a": {"b": ...}} read alike
        name += "~"
    arrays[name] = array
    return {"$array": name, "dtype": dtype.name if _is_extended(dtype) else dtype.str}


def _write_files(folder: Path, body: Any, arrays: dict[str, np.ndarray]) -> None:
    # np.savez takes names as keyword arguments, where "file" would clash: entries are numbered
    entries = {f"a{index}": array for index, array in enumerate(arrays.values())}
    names = json.dumps(list(arrays))
    arrays_path = folder / ARRAYS_FILE
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
        np.savez_compressed(file, names=np.asarray(names), **entries)  # pyright: ignore[reportArgumentType]
    digest = _digest(Path(file.name))
    envelope = {"format": FORMAT, "arrays_sha256": digest, "record": body}
    text = json.dumps(envelope, allow_nan=False, ensure_ascii=False, indent=1)
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, suffix=".part", delete=False, encoding="utf-8"
    ) as record:
        _ = record.write(text)
    _keep_old(folder)
    os.replace(file.name, arrays_path)
    os.replace(record.name, folder / RECORD_FILE)
    (folder / _OLD_ARRAYS_FILE).unlink(missing_ok=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _keep_old(folder: Path) -> None:
    """Keeps the arrays that `run.json` belongs to until a new one stands in its place."""
    old = folder / _OLD_ARRAYS_FILE
    if not (folder / ARRAYS_FILE).exists() or not (folder / RECORD_FILE).exists():
        return
    if old.exists():  # left by an interrupted save: it may be the one that run.json belongs to
        text = (folder / RECORD_FILE).read_text(encoding="utf-8", errors="replace")
        if _digest(old) in text:
            return
        old.unlink()
    try:
        os.link(folder / ARRAYS_FILE, old)
    except OSError:  # a file system without links
        _ = shutil.copyfile(folder / ARRAYS_FILE, old)


# ----------------------------------------------------------------------------------------- decoding


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = json.loads(str(file["names"]))
            return {name: file[f"a{index}"] for index, name in enumerate(names)}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise StoreError(f"{path} is damaged: {error}.") from error


def _decode(value: Any, arrays: dict[str, np.ndarray], source: Path) -> Any:
    if isinstance(value, list):
        return [_decode(v, arrays, source) for v in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$complex" in value:
        real, imaginary = value["$complex"]
        return complex(float(real), float(imaginary))
    if "$array" in value:
        name = value["$array"]
        if name not in arrays:
            raise StoreError(
                f"{source} names the array {name!r}, which {ARRAYS_FILE} does not hold."
            )
        return arrays[name].astype(jnp.dtype(value["dtype"]), copy=False)
    return {k: _decode(v, arrays, source) for k, v in value.items()}
