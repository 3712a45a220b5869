"""The command line studies what it is pointed at, and says in one line what is wrong with it."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import cli, store
from jaxgrad.demo import loading, models
from jaxgrad.demo import study as studying

MODEL = '''
import jax
import jax.numpy as jnp

WIDTH = 8

def PARAMS():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = {f"layer_{k}": jax.random.normal(key, (WIDTH, WIDTH)) for k, key in enumerate(keys)}
    return layers | {"table": jnp.arange(3), "name": "tanh"}

BATCH = {"x": jnp.ones((4, WIDTH)), "y": jnp.zeros((4, WIDTH), jnp.int32)}

def loss(params, batch):
    """Three tanh layers pulled to zero."""
    h = batch["x"]
    for k in range(3):
        h = jnp.tanh(h @ params[f"layer_{k}"])
    return ((h - batch["y"]) ** 2).mean()

def no_scalar(params, batch):
    return batch["x"] @ params["layer_0"]

def wrong_shape(params, batch):
    return (batch["x"] @ jnp.ones((WIDTH + 1, 2))).mean()

def pair(params, batch):
    return loss(params, batch), {}

def integral(params, batch):
    return params["table"].sum()
'''


FAULTY = """
import jax, jax.numpy as jnp, optax

def PARAMS():
    keys = jax.random.split(jax.random.key(0), 3)
    return {f"layer_{k}": jax.random.normal(key, (8, 8)) / 3 for k, key in enumerate(keys)}

def BATCH():
    x = jax.random.normal(jax.random.key(1), (32, 8))
    return x, jnp.sin(x)

OPTIMIZER = optax.chain(optax.sgd(0.05, momentum=0.9), optax.clip_by_global_norm(0.01))

def loss(params, batch):
    h = batch[0]
    for name in ("layer_0", "layer_1"):
        h = jnp.tanh(h @ params[name])
    return ((h @ params["layer_2"] - batch[1]) ** 2).mean()
"""


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model.py"
    _ = path.write_text(MODEL)
    return path


def run(*arguments: str) -> int:
    """The exit status of a command."""
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_diagnose_prints_a_table_and_writes_a_report_of_what_it_measured(model, tmp_path, capsys):
    out = tmp_path / "results"
    assert run("diagnose", f"{model}:loss", "--out", str(out), "--steps", "3") == 0
    printed = capsys.readouterr()
    assert "layer_0" in printed.out and "layer_2" in printed.out
    assert "\x1b" not in printed.out and max(map(len, printed.out.splitlines())) <= 120
    assert "training" in printed.err  # its stages, apart from the result

    page = (out / "model-loss" / "report.html").read_text(encoding="utf-8")
    assert "Three tanh layers pulled to zero." in page and "diagnose" in page
    back = store.load_run(out / "model-loss")
    assert back["initial"]["names"] == ["layer_0", "layer_1", "layer_2"]
    expected = jax.grad(oracle)(oracle_params())
    for name, gradient in zip(
        back["initial"]["parameter_names"], back["initial"]["weight_gradient_rms"], strict=True
    ):
        rms = float(jnp.sqrt(jnp.mean(expected[name] ** 2)))
        np.testing.assert_allclose(gradient, rms, rtol=1e-5, atol=0)
    assert back["history"]["losses"].shape == (3,)
    np.testing.assert_allclose(back["history"]["losses"][0], oracle(oracle_params()), rtol=1e-6)
    assert back["history"]["losses"][2] < back["history"]["losses"][0]


def test_diagnose_names_the_cause_and_ends_with_status_1(tmp_path, capsys):
    path, out = tmp_path / "faulty.py", tmp_path / "results"
    _ = path.write_text(FAULTY)
    assert run("diagnose", f"{path}:loss", "--out", str(out), "--steps", "2") == 1
    assert "error: optimizer.clip_after_update at optimizer" in capsys.readouterr().out
    saved = json.loads((out / "faulty-loss" / "diagnosis.json").read_text(encoding="utf-8"))
    assert saved["primary"]["code"] == "optimizer.clip_after_update"
    assert "clip_after_update" in (out / "faulty-loss" / "diagnosis.html").read_text("utf-8")
    _ = path.write_text(FAULTY.replace("OPTIMIZER =", "OPTIMIZER = 3  #"))
    assert run("diagnose", f"{path}:loss", "--out", str(out)) == 2
    assert "OPTIMIZER is of type int; expected an optax transformation" in capsys.readouterr().err


def oracle_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {f"layer_{k}": jax.random.normal(key, (8, 8)) for k, key in enumerate(keys)}


def oracle(params):
    h = jnp.ones((4, 8))
    for k in range(3):
        h = jnp.tanh(h @ params[f"layer_{k}"])
    return (h**2).mean()


def test_without_steps_only_the_initialization_is_measured(model, tmp_path, capsys):
    out = tmp_path / "results"
    assert run("diagnose", f"{model}:loss", "--out", str(out), "--steps", "0") == 0
    assert "after training" not in capsys.readouterr().out
    back = store.load_run(out / "model-loss")
    assert back["final"] is None and back["history"] is None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("model.py", "expected FILE.py:LOSS"),
        ("nowhere.py:loss", "no file"),
        (".:loss", "no file"),
        ("{model}:los", "Perhaps you meant loss"),
        ("{model}:WIDTH", "WIDTH is of type int"),
        ("{model}:no_scalar", "returns shape (4, 8); expected a scalar"),
        ("{model}:wrong_shape", "fails on PARAMS and BATCH: TypeError: dot_general"),
        ("{model}:pair", "returns a tuple"),
        ("{model}:integral", "real scalar"),
    ],
)
def test_a_wrong_target_is_one_line_and_status_2(target, words, model, tmp_path, capsys):
    assert run("diagnose", target.format(model=model), "--out", str(tmp_path / "r")) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], printed.err
    assert printed.out == "" and "Traceback" not in printed.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("BATCH = 1.0\ndef loss(p, b): return p", "does not define PARAMS"),
        ("PARAMS = 1.0\ndef loss(p, b): return p", "does not define BATCH"),
        ("PARAMS = 1.0\nBatch = 1\ndef loss(p, b): return p", "Perhaps you meant Batch"),
        (
            "def PARAMS(): return 1 / 0\nBATCH = 1.0\ndef loss(p, b): return p",
            "PARAMS() fails: Zero",
        ),
        ("PARAMS = {}\nBATCH = 1.0\ndef loss(p, b): return 1.0", "PARAMS holds no arrays"),
        ("1 / 0", "fails when imported: ZeroDivisionError"),
        ("def loss(:", "fails when imported: SyntaxError"),
        ("raise SystemExit(3)", "fails when imported: SystemExit"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_file_that_lacks_something_is_one_line_and_status_2(source, words, tmp_path, capsys):
    path = tmp_path / "user.py"
    _ = path.write_text(source)
    assert run("diagnose", f"{path}:loss", "--out", str(tmp_path / "r")) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def test_a_file_may_import_its_neighbors_and_make_a_new_batch_for_every_step(tmp_path):
    _ = (tmp_path / "neighbor_of_model.py").write_text("SCALE = 3.0")
    _ = (tmp_path / "user.py").write_text(
        "from neighbor_of_model import SCALE\nimport itertools\nimport jax.numpy as jnp\n"
        "count = itertools.count()\nPARAMS = {'w': jnp.ones(2)}\n"
        "def BATCH(): return jnp.full(2, float(next(count)))\n"
        "def loss(p, b): return SCALE * (p['w'] * b).sum()\n"
    )
    task = loading.load_task(f"{tmp_path / 'user.py'}:loss", steps=1, learning_rate=0.1)
    batches = task.batches()
    first, second = float(next(batches)[0]), float(next(batches)[0])
    assert second == first + 1
    assert float(task.loss(task.params, jnp.ones(2))) == 6.0


def test_options_are_checked_before_any_work(model, tmp_path, capsys):
    assert run("diagnose", f"{model}:loss", "--steps", "-1") == 2
    assert "--steps: expected 0 or more, got -1" in capsys.readouterr().err
    assert run("--out", str(model)) == 2
    assert "is a file; expected a folder" in capsys.readouterr().err
    assert run("diagnos") == 2
    assert run("--help") == 0
    assert "diagnose" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the study


def test_a_layers_gain_is_its_jacobians_frobenius_norm_over_the_root_of_its_inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "narrow": 3.0 * jnp.linalg.qr(jax.random.normal(keys[0], (32, 32)))[0],
        "wide": jax.random.normal(keys[1], (32, 64)),
        "last": jax.random.normal(keys[2], (64, 8)),
    }

    def loss(params, batch):
        return jnp.mean((batch @ params["narrow"] @ params["wide"] @ params["last"]) ** 2)

    gains, notes = studying.layer_gains(loss, params, jnp.ones((32, 32)), probes=32)
    assert gains is not None and gains.names == ("narrow", "wide")
    exact = [3.0, float(jnp.linalg.norm(params["wide"]) / math.sqrt(32))]
    np.testing.assert_allclose(gains.values, exact, rtol=0.03)
    assert any("32 random cotangents" in note for note in notes)


def test_a_loss_without_a_path_from_the_batch_has_no_gains_and_says_why():
    def loss(params, batch):
        return (jax.lax.stop_gradient(batch) * params["w"]).sum() * 0 + params["w"].sum()

    gains, notes = studying.layer_gains(loss, {"w": jnp.ones(3)}, jnp.ones(3))
    assert gains is None and "no Jacobian gains" in notes[0]


def test_the_sigmoid_model_starves_its_first_layer_and_the_relu_one_does_not():
    found = {}
    for make in (models.sigmoid_mlp, models.he_relu_mlp):
        task = make(steps=0)
        record = studying.study(task, command="c")
        gradient = np.asarray(record.initial.gradient_rms, np.float64)
        assert record.initial.names[0] == "hidden_00" and record.initial.names[-1] == "output"
        found[task.name] = gradient[0] / gradient[-2], record.initial_gains.values[1:]
    ratio, gains = found["sigmoid-mlp"]
    assert ratio < 1e-8 and (gains < 0.25 * 1.05).all()  # a sigmoid's slope is a quarter at most
    ratio, gains = found["he-relu-mlp"]
    assert 0.1 < ratio < 10 and (abs(gains - 1) < 0.25).all()


@pytest.mark.slow
def test_the_main_job_runs_all_four_models_and_three_of_them_learn(tmp_path, capsys):
    assert run("--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.count("report: ") == 4
    accuracy, losses = {}, {}
    for folder in sorted(p for p in tmp_path.iterdir() if p.is_dir()):
        back = store.load_run(folder)
        losses[folder.name] = back["history"]["losses"]
        if "test accuracy" in back["facts"]:
            accuracy[folder.name] = float(back["facts"]["test accuracy"].rstrip(" %"))
    assert accuracy["sigmoid-mlp"] < 20
    assert accuracy["he-relu-mlp"] > 90
    assert accuracy["residual-mlp"] > 90
    assert losses["transformer"][-10:].mean() < losses["transformer"][0] - 1.5
    assert (tmp_path / "index.html").is_file()
