"""Reports show what was measured, broken numbers above all, and nothing a name could smuggle in."""

import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxgrad import store
from jaxgrad.report import figures, html, record, terminal

EVIL = '<script>alert("x")</script>&$\\frac{1}$\x1b[31m'


def make_flow(gradients, *, names=None, activations=None, zero_share=0.5):
    """A flow of synthetic numbers: each site holds one leaf, named as the site with '/kernel'."""
    gradients = np.asarray(gradients, np.float32)
    n = len(gradients)
    names = tuple(names) if names else tuple(f"layer{k:03d}" for k in range(n))
    activations = np.ones(n, np.float32) if activations is None else np.asarray(activations)
    leaves = tuple(f"{name}/kernel" for name in names)
    return SimpleNamespace(
        names=names,
        activation_rms=activations,
        activation_zero_share=np.full(n, zero_share, np.float32),
        activation_nonfinite=np.isinf(activations) * 1.0,
        gradient_rms=gradients,
        gradient_nonfinite=np.where(np.isfinite(gradients), 0.0, 7.0),
        parameter_names=leaves,
        weight_rms=np.ones(n, np.float32),
        weight_gradient_rms=gradients * 0.5,
        site_parameters=tuple((leaf,) for leaf in leaves),
    )


def make_record(flow, **changes):
    n, steps = len(flow.names), np.arange(0, 50, 10)
    history = record.History(
        steps, np.tile(np.asarray(flow.gradient_rms), (5, 1)), np.linspace(2.3, 0.1, 50)
    )
    gains = record.Gains(flow.names, np.linspace(0.5, 1.5, n))
    fields = {
        "name": "model", "title": "A model", "description": "What it is.", "initial": flow,
        "final": flow, "initial_gains": gains, "final_gains": gains, "history": history,
        "facts": {"parameters": "1,234"}, "notes": ("cond: not looked into",),
    }  # fmt: skip
    return record.RunRecord(**(fields | changes))


VANISHING = np.logspace(-12, -2, 30)
BROKEN = np.asarray([math.nan, 1e-30, 0.0, math.inf, 1e-3])


# ---------------------------------------------------------------------------------------- the rows


def test_rows_join_gains_by_name_and_leaves_by_the_flows_own_table():
    flow = make_flow([1.0, 2.0, 3.0])
    flow.site_parameters = (("layer002/kernel", "layer000/kernel"), (), ("not/there",))
    gains = record.Gains(("layer002", "elsewhere"), np.asarray([5.0, 6.0]))
    first, second, third = record.rows(flow, gains)
    assert (first.gain, second.gain, third.gain) == (None, None, 5.0)
    assert first.weight_gradient_rms == 1.5  # the larger of 0.5 and 1.5
    assert second.weight_gradient_rms is None and third.weight_gradient_rms is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_nan_weight_gradient_is_never_hidden_by_a_number(order):
    flow = make_flow([1.0, math.nan])
    flow.site_parameters = (tuple(flow.parameter_names[i] for i in order), ())
    assert math.isnan(record.rows(flow)[0].weight_gradient_rms)


def test_a_branch_that_did_not_run_is_neither_broken_nor_counted():
    flow = make_flow([1e-3, math.nan, 1e-3], activations=[1.0, math.nan, 1.0])
    flow.gradient_nonfinite[1] = 0
    rows = record.rows(flow)
    assert [row.ran for row in rows] == [True, False, True]
    assert "keeps its scale" in record.reading(flow) and not record.is_alarming(flow)
    assert "did not run" in terminal.plain_table(rows, "t")


@pytest.mark.parametrize(
    ("gradients", "words", "alarming"),
    [
        ([1e-12, 1e-2], "shrinks by 10.0 powers of ten", True),
        ([1e-4, 1e-2], "shrinks 100 times", False),
        ([1e3, 1e-2], "grows 100,000 times", True),
        ([2e-3, 1e-3], "first layer's RMS is 2 times the last one's", False),
        ([0.0, 0.0, 1e-2], "No gradient at all reaches layer001 and 1 other", True),
        ([0.0, 0.0], "No gradient reaches any layer", True),
        ([1e-3, math.nan, math.inf], "14 values are NaN or infinite; the first layer", True),
        ([], "No layer was found", True),
    ],
)  # fmt: skip
def test_the_reading_says_in_words_what_the_numbers_are(gradients, words, alarming):
    flow = make_flow(gradients)
    assert words in record.reading(flow)
    assert record.is_alarming(flow) is alarming


def test_a_loss_that_is_nan_is_said_first_though_every_layer_looks_healthy():
    flow = make_flow([1e-3, 1e-3])
    assert record.reading(flow, math.nan).startswith("The loss itself is NaN. The gradient keeps")
    assert "inf" in record.reading(flow, math.inf)
    assert record.is_alarming(flow, math.nan) and not record.is_alarming(flow, 1.0)
    page = html.report_page(make_record(flow, initial_loss=math.nan, final_loss=1.0))
    assert page.count("The loss itself is NaN") == 1
    assert page.count('class="alarm"') == 1


def test_a_flow_without_layers_makes_a_page_that_says_so():
    text = html.report_page(make_record(make_flow([]), history=None))
    assert "No layer was found to measure" in text
    empty = record.History(np.arange(2), np.zeros((2, 0)), np.ones(2))
    assert "While training" in html.report_page(make_record(make_flow([]), history=empty))
    assert "No layer was found" in html.index_page([make_record(make_flow([]))])
    assert terminal.plain_table((), "t").count("\n") == 3


def test_a_gradient_below_the_smallest_float32_normal_is_still_a_gradient():
    flow = make_flow([1e-42, 1e-2])
    assert "powers of ten" in record.reading(flow)
    assert terminal.number(float(flow.gradient_rms[0])).endswith("e-42")


# ---------------------------------------------------------------------------------------- the table


def test_the_plain_table_is_at_most_100_columns_of_printable_text():
    names = [EVIL, "x" * 300, *(f"layer{k}" for k in range(98))]
    flow = make_flow(np.logspace(-38, 38, 100), names=names)
    text = terminal.plain_table(record.rows(flow), "title", max_rows=100)
    assert max(map(len, text.splitlines())) <= 100
    assert all(line.isprintable() for line in text.splitlines())
    assert "\x1b" not in text


def test_the_bar_is_proportional_to_the_logarithm():
    text = terminal.plain_table(record.rows(make_flow([1e-8, 1e-6, 1e-4])), "t")
    bars = [line.count("#") for line in text.splitlines()[4:]]
    assert bars == [0, 8, 16]


def test_broken_and_silent_layers_are_said_in_words():
    text = terminal.plain_table(record.rows(make_flow(BROKEN)), "t")
    lines = text.splitlines()[4:]
    assert "7 NaN/inf" in lines[0] and "no gradient" in lines[2] and "7 NaN/inf" in lines[3]
    assert "1.00e-30" in lines[1]
    nothing = terminal.plain_table(record.rows(make_flow([0.0, 0.0])), "t")
    assert "no layer has a finite gradient" in nothing


def test_a_folded_table_counts_and_bounds_what_it_hides():
    gradients = np.logspace(-12, -2, 100)
    gradients[50] = math.nan
    rows = record.rows(make_flow(gradients))
    text = terminal.plain_table(rows, "t", max_rows=11)
    shown = [line for line in text.splitlines() if line.startswith("layer0")]
    hidden = next(line for line in text.splitlines() if line.startswith("..."))
    assert len(shown) == 10 and "90 more rows" in hidden and "1 of them with NaN/inf" in hidden
    assert terminal.number(float(rows[5].gradient_rms)) in hidden
    assert terminal.number(float(rows[94].gradient_rms)) in hidden
    assert "report.html" in hidden
    whole = terminal.plain_table(rows, "t", max_rows=100)
    assert "more rows" not in whole and len(whole.splitlines()) == 104


def test_the_rich_table_holds_the_same_numbers_and_takes_no_markup_from_names():
    from rich.console import Console

    flow = make_flow([*BROKEN, 1e-5], names=["[red]a[/red]", *"bcdef"])
    console = Console(width=100, force_terminal=True, color_system=None, file=None)
    with console.capture() as capture:
        console.print(terminal.rich_table(record.rows(flow), "[bold]t[/bold]"))
    text = capture.get()
    assert "[red]a[/red]" in text and "[bold]t[/bold]" in text
    assert "1.00e-30" in text and "7 NaN/inf" in text and "no gradient" in text
    assert max(map(len, text.splitlines())) <= 100


# ------------------------------------------------------------------------------------ the pictures


def points(svg: str, marker: str) -> int:
    """How many markers of one shape stand in a figure; matplotlib draws them as <use> of a path."""
    root = ElementTree.fromstring(svg)
    space = {"s": "http://www.w3.org/2000/svg"}
    paths = {p.get("id"): p.get("d", "") for p in root.iterfind(".//s:defs/s:path", space)}
    uses = root.iterfind(".//s:use", space)
    drawn = [paths.get(u.get("{http://www.w3.org/1999/xlink}href", "")[1:], "") for u in uses]
    shape = {"circle": "C", "triangle": "M -0 3.25", "cross": "M -3.25 3.25"}[marker]
    return sum(shape in " ".join(d.split()) for d in drawn)


def test_a_profile_draws_every_layer_zero_and_broken_ones_included():
    svg = figures.profile("t", BROKEN, None)
    assert points(svg, "circle") == 2
    assert points(svg, "triangle") == 1
    assert points(svg, "cross") == 2


def test_figures_have_no_color_of_their_own_but_the_maps():
    for svg in (
        figures.profile("t", VANISHING, VANISHING),
        figures.loss_curve([1.0, math.nan, 3.0]),
        figures.heat_map(["a", "b"], [0, 1], np.ones((2, 2))),
    ):
        colors = set(re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{3,6})", svg))
        assert colors <= {"#ffffff", "#fff"}, colors
        assert "var(--ink)" in svg
        _ = ElementTree.fromstring(svg)


def test_figures_are_the_same_bytes_every_time():
    cells = np.asarray([[1.0, 0.0], [math.nan, 2.0]])
    one, two = (figures.heat_map(["a", "b"], [0, 1], cells) for _ in range(2))
    assert one == two
    assert figures.profile("t", VANISHING, None) == figures.profile("t", VANISHING, None)


@pytest.mark.parametrize(("low", "high"), [(0.12, 9.0), (0.9, 1.1), (1e-13, 1e-2), (1e-5, 3e-4)])
def test_no_two_ticks_of_a_logarithmic_axis_read_alike(low, high):
    svg = figures.profile("t", [low, high], None)
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    axis = next(g for g in root.iter(f"{space}g") if g.get("id") == "matplotlib.axis_2")
    texts = ["".join(t.itertext()) for t in axis.iter(f"{space}text")]
    assert len(texts) >= 2 and len(texts) == len(set(texts)), texts


@pytest.mark.parametrize("values", [[], [1e-3], [0.0], [math.nan, math.inf], [1e-45, 3e38]])
def test_any_numbers_make_figures(values):
    values = np.asarray(values, np.float32)
    _ = ElementTree.fromstring(figures.profile("t", values, values))
    _ = ElementTree.fromstring(figures.loss_curve(values))
    names = [(r"$\frac$", r"$x^{2}$", "a$b\n\x1b")[k % 3] for k in range(len(values))]
    if names:
        svg = figures.heat_map(names, [0], values[None])
        _ = ElementTree.fromstring(svg)
        assert names[0] in svg  # as text, not as mathematics


def test_a_heat_map_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \(3, 2\).*got \(2, 3\)"):
        _ = figures.heat_map(["a", "b"], [0, 1, 2], np.ones((2, 3)))


# ---------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a browser would see: tags, the texts in them, and every address."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in (
            "meta",
            "br",
            "rect",
            "path",
            "image",
            "use",
            "line",
            "img",
            "link",
            "input",
        ):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        before = list(self.open)
        self.handle_starttag(tag, attrs)
        self.open = before

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of order"

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page_text() -> str:
    names = [EVIL, *(f"layer{k}" for k in range(4))]
    finding = SimpleNamespace(
        code="gradient.vanishing", severity="error", where=EVIL, cause=EVIL, fix=EVIL
    )
    made = make_record(
        make_flow(BROKEN, names=names), title=EVIL, description=EVIL, facts={EVIL: EVIL},
        notes=(EVIL,), findings=(finding,), command=EVIL,
    )  # fmt: skip
    return html.report_page(made)


def test_the_page_is_well_formed_and_its_ids_are_unique(page_text):
    page = Page(page_text)
    assert not page.open, page.open
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 5 and page.tags.count("h1") == 1


def test_no_request_leaves_the_page(page_text):
    page = Page(page_text)
    assert all(a.startswith(("#", "data:")) for a in page.addresses), page.addresses
    assert "default-src 'none'" in page_text
    for load in re.findall(r"url\(([^)]*)\)", page_text):
        assert load.startswith("#"), load
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)


def test_names_of_users_are_text_and_never_markup(page_text):
    assert "<script" not in page_text
    assert page_text.count("&lt;script&gt;") >= 9
    assert EVIL in "".join(Page(page_text).texts)


def test_inner_references_of_a_figure_stay_inside_it(page_text):
    page = Page(page_text)
    wanted = {a[1:] for a in page.addresses if a.startswith("#")}
    wanted |= {m[1:] for m in re.findall(r"url\((#[^)]*)\)", page_text)}
    assert wanted and wanted <= set(page.ids)


def test_the_page_shows_the_numbers_and_says_what_is_broken(page_text):
    text = "".join(Page(page_text).texts)
    assert "1.00e-30" in text and "7 NaN or infinite" in text and "no gradient" in text
    assert "14 values are NaN or infinite" in text


def test_a_record_without_training_makes_a_page_without_training_pictures():
    bare = make_record(
        make_flow(VANISHING), final=None, final_gains=None, history=None, initial_gains=None
    )
    text = html.report_page(bare)
    assert "While training" not in text and "After training" not in text
    assert Page(text).tags.count("svg") == 3


def test_a_long_table_starts_closed_and_is_whole():
    text = html.report_page(make_record(make_flow(np.ones(200)), final=None, history=None))
    assert "<details open>" not in text and "layer199" in text


def test_the_index_links_to_each_report_and_is_safe(tmp_path):
    records = [
        make_record(make_flow(VANISHING), name="one"),
        make_record(make_flow(BROKEN), title=EVIL),
    ]
    path = html.write_index(records, tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.addresses == ["one/report.html", "model/report.html"]
    assert not page.open and "script" not in page.tags
    assert html.write_report(records[0], tmp_path / "one").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "one"]


def test_the_same_record_gives_the_same_bytes():
    made = make_record(make_flow(VANISHING))
    assert html.report_page(made) == html.report_page(made)


def test_a_record_is_stored_and_comes_back_with_its_nan(tmp_path):
    made = make_record(make_flow(BROKEN), findings=(SimpleNamespace(code="x", severity="info"),))
    back = store.load_run(store.save_run(tmp_path / "run", made.to_dict()))
    assert np.array_equal(
        back["initial"]["gradient_rms"], BROKEN.astype(np.float32), equal_nan=True
    )
    assert back["initial"]["names"] == list(made.initial.names)
    assert back["findings"][0]["code"] == "x" and back["history"]["losses"].shape == (50,)
