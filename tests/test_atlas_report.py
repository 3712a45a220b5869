"""The atlas says what the stored data say, leaves nothing out, and no text in it is markup."""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
from test_report import EVIL, Page

from experiments import __main__ as command
from experiments import main_job
from experiments.atlas import chapters, drawing, frame, pictures, report, running, wording
from jaxgrad import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """A config."""

    scale: float = 1.0
    seeds: int = 3


def judge(config, data):
    x = data["a"]["x"]
    good = {"first": bool(x[0] > 0), "last": bool(x[-1] > 0)}
    size = abs(math.log(abs(x[0]) / config.scale)) if x[0] else math.inf
    return frame.conclude(good, f"first {x[0]:.3g}; last {x[-1]:.3g}", divergence=size)


def figures(config, data):
    figure, axes = drawing.panels(2)
    drawing.line(axes[0], 0, [1.123456, 2.0], np.tile(data["a"]["x"], (2, 1)).T, "$x_1$")
    drawing.words(axes[0], "a <title>", "layers", "norm")
    drawing.grid(axes[1], [[0.12345, np.nan]], ["r"], ["c", "d"], form="{:.4f}")
    return [figure]


def make(name="toy", values=(2.0, 3.0, 4.0), *, text="gradients keep their norm", **changes):
    """An experiment of two claims, positive where its data are."""
    claims = tuple(
        frame.Claim(key, f"{key}: {text}", f"0.9^50, {text}", judge, f"mind {text}")
        for key in ("one", "two")
    )
    fields = {
        "name": name, "question": f"what of {text}?", "claims": claims,
        "presets": {"quick": Config(), "full": Config(seeds=9)},
        "points": lambda config: {"a": lambda: {"x": config.scale * np.asarray(values)}},
        "figures": figures,
    }  # fmt: skip
    return frame.Experiment(**(fields | changes))


def atlas(experiments, folder):
    """(what was written, the page, the table)."""
    written = report.write(experiments, folder, folder / "out")
    return written, written.html.read_text(), written.markdown.read_text()


def badge(page, key):
    """The state that a claim's card shows: its class, and the word in its badge."""
    card = re.search(rf'<article class="claim ([\w-]+)" id="{key}".*?</article>', page, re.DOTALL)
    word = re.search(r'class="badge [\w-]+">(?:<svg.*?</svg>)?([^<]+)<', card[0])[1]
    assert card[1] == word.replace(" ", "-")
    return word


def change(path, edit):
    """Edits a stored result as a tamperer would."""
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("values", "word"),
    [((2.0, 3.0, 4.0), "holds"), ((-2.0, 3.0, 4.0), "holds if"), ((-2.0, 3.0, -4.0), "false")],
)  # fmt: skip
def test_a_tampered_result_flips_the_badge_in_page_and_table(tmp_path, values, word):
    _ = running.run(make(), "quick", tmp_path)

    def edit(record):
        record["data"]["a"]["x"]["values"] = list(values)

    change(tmp_path / "toy-quick.json", edit)
    written, page, table = atlas([make()], tmp_path)
    assert badge(page, "toy-one") == word and written.counts[word] == 2
    row = next(line for line in table.splitlines() if line.startswith("| one:"))
    assert row.split(" | ")[1].startswith({"holds": "✓ ", "holds if": "◐ ", "false": "✗ "}[word])
    assert "first -2" in page if values[0] < 0 else "first 2" in page
    assert ('class="condition">last<' in page) is (word == "holds if")


def test_what_was_not_run_is_listed_with_the_command_that_runs_it(tmp_path):
    _ = running.run(make(), "quick", tmp_path)
    written, page, table = atlas([make(), make("absent")], tmp_path)
    assert written.counts["not run yet"] == 2 and not written.faults
    assert badge(page, "absent-two") == "not run yet" and badge(page, "toy-two") == "holds"
    again = "python -m experiments run absent --preset quick"
    rows = [line for line in table.splitlines() if f"`{again}`" in line]
    assert len(rows) == 2 and all("not run yet" in row for row in rows)
    assert page.count(f"<code>{again}</code>") == 5  # 2 rows, 2 cards and the chapter's foot
    assert page.count("mind gradients") == 4  # nothing is concluded from what was not measured
    empty, page, table = atlas([make("absent")], tmp_path)
    assert empty.counts["not run yet"] == 2 and "nothing yet" in page and "nothing yet" in table


def test_a_result_of_an_older_config_is_named_and_not_judged(tmp_path):
    _ = running.run(make(), "quick", tmp_path)
    newer = make(presets={"quick": Config(scale=2.0), "full": Config()})
    written, page, table = atlas([newer], tmp_path)
    assert written.counts["older config"] == 2 and badge(page, "toy-one") == "older config"
    for text in (page, table):
        assert "is of an older config (other: scale)" in text
        assert "python -m experiments run toy --preset quick" in text
    assert "first 2" not in page


def test_the_full_result_is_preferred_and_a_quick_one_that_disagrees_is_shown_too(tmp_path):
    _ = running.run(make(values=(2.0, 3.0, -4.0)), "full", tmp_path)
    _ = running.run(make(), "quick", tmp_path)
    _, page, table = atlas([make()], tmp_path)
    assert badge(page, "toy-one") == "holds if"
    assert "Otherwise with --preset quick" in page and "last -4" in page and "last 4" in page
    assert "With --preset quick: holds: first 2; last 4" in table
    assert "`python -m experiments run toy --preset full`" in table
    (tmp_path / "toy-full.json").unlink()
    _ = running.run(make("other"), "full", tmp_path)
    _ = running.run(make("other"), "quick", tmp_path)
    _, page, _ = atlas([make(), make("other")], tmp_path)
    assert "Otherwise" not in page and badge(page, "toy-one") == "holds"


def test_a_damaged_file_and_a_judge_that_fails_are_said_and_hide_nothing_else(tmp_path, capsys):
    for name in ("good", "torn", "other"):
        _ = running.run(make(name), "quick", tmp_path)
    path = tmp_path / "torn-quick.json"
    path.write_text(path.read_text()[:-40])
    change(tmp_path / "other-quick.json", lambda record: record["data"]["a"].pop("x"))
    experiments = [make("torn"), make("other"), make("good")]
    written, page, table = atlas(experiments, tmp_path)
    assert [badge(page, f"{n}-one") for n in ("torn", "other", "good")] == [
        "not judged", "not judged", "holds",
    ]  # fmt: skip
    assert len(written.faults) == 4  # a file, two judges, and the figures that lack the data too
    for text in (page, table):
        assert "torn-quick.json is damaged" in text and "KeyError" in text
        assert "The figures could not be drawn" in text
    names = {e.name: e for e in experiments}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "NAMES", tuple(names))
        patch.setattr(command, "load", names.get)
        arguments = ["report", "--folder", str(tmp_path), "--output", str(tmp_path / "o")]
        assert command.main(arguments) == 1
        assert "error: torn: torn-quick.json is damaged" in capsys.readouterr().err
        patch.setattr(command, "NAMES", ("good",))
        assert command.main(arguments) == 0
        assert "2 statements: 2 holds" in capsys.readouterr().out


def test_nan_in_the_data_is_drawn_and_ranked_above_every_number(tmp_path):
    _ = running.run(make("nan", (math.nan, 1.0, 2.0)), "quick", tmp_path)
    _ = running.run(make("zero", (0.0, 1.0, 2.0)), "quick", tmp_path)
    _ = running.run(make("far", (1e30, 1.0, 2.0)), "quick", tmp_path)
    _ = running.run(make("near", (1.01, 1.0, 2.0)), "quick", tmp_path)
    names = ("near", "far", "nan")
    written, page, table = atlas([make(n) for n in (*names, "zero")], tmp_path)
    assert not written.faults
    places = [page.index(f'href="#{n}-one"', page.index("<ol")) for n in ("nan", "far", "near")]
    assert places == sorted(places)
    assert "not a number" in page and "infinite" in page and "×1.0·10<sup>30</sup>" in page
    assert "×1.0·10^30 | 69.1 |" in table and "nan%" not in page and "inf%" not in page


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    experiments = [make(f"e{k}", text=EVIL + "| *x* `y`") for k in range(3)]
    for experiment in experiments[:2]:
        _ = running.run(experiment, "quick", folder)
    return atlas(experiments, folder)


def test_the_page_is_well_formed_and_every_link_leads_somewhere(evil):
    _, text, _ = evil
    page = Page(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    assert page.tags.count("h1") == 1 and page.tags.count("article") == 6
    targets = {a[1:] for a in page.addresses if not a.startswith("data:")}
    assert targets <= set(page.ids) and {"figure-1", "e0-one", "evidence"} <= targets
    sizes = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(sizes))


def test_no_request_leaves_the_page_and_no_script_runs_in_it(evil):
    _, text, _ = evil
    page = Page(text)
    assert all(a.startswith(("#", "data:")) for a in page.addresses), page.addresses
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "default-src 'none'" in text and "@import" not in text
    assert all(load.startswith("#") for load in re.findall(r"url\(([^)]*)\)", text))


def test_texts_are_texts_in_page_and_table(evil):
    _, text, table = evil
    assert "<script" not in text and "<script" not in table
    assert text.count("&lt;script&gt;alert") >= 20
    rows = [line for line in table.splitlines() if line.startswith("| one:")]
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    assert all(r"\*x\*" in row and r"\`y\`" in row for row in rows)


def test_figures_are_described_small_and_colored_by_the_page(evil):
    _, text, _ = evil
    svg = re.search(r'<svg style[^>]*role="img".*?</svg>', text, re.DOTALL)[0]
    label = re.search(r'aria-label="([^"]*)"', svg)[1]
    assert label == "e0: a &lt;title&gt;: norm against layers; series: x_1. matrix of numbers"
    colors = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{3,6})", svg))
    assert colors <= {"#ffffff"} and "var(--series-0)" in svg  # white on the map's dark cells
    assert not re.findall(r' d="[^"]*\d\.\d{3}', svg) and "0.1235" in svg  # texts keep digits
    assert "Bands: 95 % intervals" in text
    assert pictures.rounded('<text x="1.23456">1.23456</text>') == '<text x="1.23">1.23456</text>'


def test_every_state_has_an_icon_a_filter_and_a_color_of_the_page(evil):
    _, text, _ = evil
    for state in chapters.STATES:
        slug = state.replace(" ", "-")
        assert f'id="icon-{slug}"' in text and f"main:has(#show-{slug}:checked)" in text
        assert f".badge.{slug}" in text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "×1.0000"), (0.02, "×1.020"), (-0.5, "×1.65"), (math.log(9.999), "×10.00"),
        (math.log(38.2), "×38"), (math.log(5300), "×5,300"), (math.log(3.2e38), "×3.2·10^38"),
        (math.log(9.99e20), "×1.0·10^21"), (800.0, "×2.7·10^347"), (math.inf, "infinite"),
        (math.nan, "not a number"),
    ],
)  # fmt: skip
def test_a_divergence_is_said_as_a_factor(value, words):
    assert wording.factor(value) == words


def test_powers_are_raised_and_nothing_else():
    assert wording.rich("0.9^50 < s^(1/2), e^(L m / 2), W^T, a^") == (
        "0.9<sup>50</sup> &lt; s<sup>1/2</sup>, e<sup>L m / 2</sup>, W<sup>T</sup>, a^"
    )
    assert wording.rich("2^-7.5 - 2^-n") == "2<sup>-7.5</sup> - 2<sup>-n</sup>"


def test_the_main_job_ends_with_the_atlas_and_a_diagnosis_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_study_all", lambda *_: None)
    monkeypatch.setattr(cli, "_tasks", lambda _: [lambda: None])
    monkeypatch.setattr(cli, "_healthy", lambda *_: True)
    monkeypatch.setattr(command, "NAMES", ("toy",))
    monkeypatch.setattr(command, "load", {"toy": make()}.get)
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    cli.main(["--out", str(tmp_path / "main")], after_main=main_job.write_atlas)
    assert "not run yet" in (tmp_path / "main" / "atlas" / "ATLAS.md").read_text()
    cli.main(["diagnose", "f.py:loss", "--out", str(tmp_path / "d")], main_job.write_atlas)
    assert not (tmp_path / "d").exists()
    (tmp_path / "toy-quick.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--out", str(tmp_path / "main")], after_main=main_job.write_atlas)
    assert stop.value.code == 1
