"""`compress report`: a page that says what the report says, fetches nothing, and believes no
file.
"""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

from compressor.checkpoint.digest import checkpoint_digest
from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError
from compressor.page import draw, read_record, render
from compressor.plots.charts import _ticks, columns, heat_map
from compressor.plots.spectra import DEPTHS, spectra
from compressor.records.scores import BY_TASK
from tests.conftest import ROOT

PARTS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


def facts(blocks, *, name="model.layers.{}.{}", error=0.02):
    linears = [
        {
            "name": name.format(block, part), "shape": [8, 8], "format": "sparse24",
            "sparsity": 0.5, "dense_bytes": 128,
            "error": None if error is None else error * (1 + block), "bytes": 72,
            "entry": {"format": "sparse24"},
        }
        for block in range(blocks)
        for part in PARTS
    ]  # fmt: skip
    return {
        "recipe": {"method": "wanda", "pattern": "2:4", "dataset": "self"}, "architecture": "llama",
        "parameters": 1000,
        "input_bytes": 2000, "output_bytes": 1500, "linears": linears, "calibration_tokens": 64,
        "blocks": [{"index": index, "error": error} for index in range(blocks)],
        "left_dense": [{"name": "lm_head.weight", "shape": [9, 8],
        "reason": "outside the decoder blocks"}],
        "totals": {"dense_bytes": 128 * len(linears), "bytes": 72 * len(linears), "sparsity": 0.5},
        "versions": {"torch": "2"},
    }  # fmt: skip


def measured(blocks):
    """Spectra as a low-rank run reports them: 10^0 … 10^-3 of 8 values, all at rank 2 but in block
    0, which stays dense.
    """
    values = [10.0 ** -(place * 3 / 7) for place in range(8)]
    return [
        {
            "block": block, "linear": part, "shape": [8, 16], "count": 1,
            "rank": 2 if block else None, "largest_rank": 5,
            "index": list(range(8)), "values": values,
        }
        for block in range(blocks)
        for part in PARTS
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    def make(found, **beside):
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found))
        (folder / "recipe.toml").write_text('method = "wanda"\n')
        (folder / "config.json").write_text("{}")
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        if "eval" in beside:
            known = {
                "digest": checkpoint_digest(Reader(folder)),
                "config": {"device": "cpu", "dtype": "float32"},
            }
            beside["eval"] = {**known, **{key: {} for key in BY_TASK}, **beside["eval"]}
        for name, value in beside.items():
            (tmp_path / f"out.{name}.json").write_text(json.dumps(value))
        return folder

    return make


class Page(HTMLParser):
    """Tags, attributes and text; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "rect", "line", "polyline", "link", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_from_a_run(cli, demo_model, tmp_path):
    cli("prune", demo_model, "-o", tmp_path / "out", "--method", "magnitude", "-q")
    done = cli("report", tmp_path / "out")
    page = tmp_path / "out.report.html"
    assert done.stdout.strip() == str(page)
    text = page.read_text()
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert all(row["name"] in text for row in report["linears"])
    assert all(left["name"] in text and left["reason"] in text for left in report["left_dense"])
    assert 'method = "magnitude"' in text.replace("&#34;", '"')
    assert "0.5625" in text
    assert "Time by block" in text
    before = page.read_bytes()
    assert "exists already" in cli("report", tmp_path / "out", code=1).stderr
    assert page.read_bytes() == before


@pytest.mark.parametrize("blocks", [1, 2, 80])
def test_holds_for_any_depth(folder, blocks):
    found = {**facts(blocks), "spectra": measured(blocks)}
    text = render(read_record(folder(found)))
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [
        value
        for name, value in page.attributes
        if name in ("href", "src", "xlink:href") or name.startswith("on")
    ]
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    charts = draw(read_record(folder(found)))
    assert "spectra" in {chart.name for chart in charts}
    assert all(
        chart.svg.get("role") == "img" and chart.svg.get("aria-label") == chart.text
        for chart in charts
    )
    for chart in charts:
        width, height = float(chart.svg.get("width")), float(chart.svg.get("height"))
        assert height < 1000
        for mark in chart.svg.iter("rect"):
            assert (
                0
                <= float(mark.get("x"))
                <= float(mark.get("x")) + float(mark.get("width"))
                <= width + 0.01
            )
            assert (
                0
                <= float(mark.get("y"))
                <= float(mark.get("y")) + float(mark.get("height"))
                <= height
            )
        for mark in chart.svg.iter("polyline"):
            for x, y in (map(float, point.split(",")) for point in mark.get("points").split()):
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_every_string_from_a_file_is_escaped(folder):
    evil = '</title></svg><script>alert("x")</script>\'"&\ud800'
    found = facts(2, name=f"model.layers.{{}}.{evil.replace('{', '')}{{}}")
    found["linears"][0]["format"] = found["architecture"] = evil
    found["recipe"] = dict.fromkeys(["method", "pattern", "refine", "tune", "dataset"], evil)
    found["left_dense"] = [{"name": evil, "shape": [1], "reason": evil}]
    found["versions"] = {evil: evil}
    found["spectra"] = [{**one, "linear": evil} for one in measured(2)]
    scores = {
        "results": {evil: {evil: 1.0}}, "baseline": {"results": {evil: {evil: 2.0}}},
    }  # fmt: skip
    made = folder(
        found,
        eval=scores,
        report={**found, "run": {"device": evil, "seconds": 1.0, "peak_memory": {evil: 5}}},
    )
    (made / "recipe.toml").write_text("# </pre><script>alert(1)</script>")
    text = render(read_record(made)).encode("utf-8", "replace").decode()
    assert "<script" not in text
    assert "script" not in Page(text).tags


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (["linears", 0, "error"], float("nan")),
        (["linears", 0, "error"], -1.0),
        (["linears", 0, "bytes"], "72"),
        (["linears", 0, "bytes"], 10**400),
        (["linears", 0, "shape"], [1.5]),
        (["linears", 0], 7),
        (["linears"], None),
        (["blocks", 0, "index"], -1),
        (["blocks", 0, "error"], float("inf")),
        (["totals"], []),
        (["left_dense", 0, "reason"], 3),
        (["versions"], "2"),
        (["spectra"], 3),
        (["spectra", 0, "index"], [0, 8]),
        (["spectra", 0, "index"], [0]),
        (["spectra", 0, "values"], [float("nan")] * 8),
        (["spectra", 0, "shape"], []),
        (["spectra", 0, "rank"], 9),
        (["spectra", 0, "rank"], "2"),
        (["spectra", 0, "block"], "0"),
    ],
    ids=str,
)
def test_a_report_that_lies_is_refused(folder, where, value):
    found = {**facts(2), "spectra": measured(2)}
    place = found
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(CheckpointError, match="is no report of this package"):
        read_record(folder(found))


def test_what_is_missing_is_said(cli, folder, tmp_path):
    made = folder(facts(2, error=None))
    text = render(read_record(made))
    assert "No scores are stored" in text
    assert "it is not there" in text
    assert "Error by" not in text
    assert "is not a folder" in cli("report", tmp_path / "none", code=1).stderr
    (made / "report.json").unlink()
    assert "has no report.json" in cli("report", made, code=1).stderr


def test_scores_of_another_checkpoint_and_the_run_of_another_are_left_out(folder):
    found = facts(2)
    scores = {
        "results": {"books": {"token_perplexity,none": 12.5}},
        "higher_is_better": {"books": {"token_perplexity": False}},
    }
    run = {
        "device": "cpu",
        "seconds": 5.0,
        "block_seconds": [1.0, 2.0],
        "peak_memory": {"host_bytes": 10},
    }
    record = read_record(folder(found, eval=scores, report={**found, "run": run}))
    assert [(score.task, score.better, score.value, score.before) for score in record.scores] == [
        ("books", "↓", 12.5, None)
    ]
    assert record.run["block_seconds"] == [1.0, 2.0]
    other = read_record(
        folder(
            found,
            eval={**scores, "digest": "another"},
            report={**found, "parameters": 3, "run": run},
        )
    )
    assert not other.scores
    assert "another checkpoint" in render(other)
    assert not other.run


def test_a_map_of_one_colour_is_a_sentence(folder):
    found = facts(3)
    assert "Zeros by linear: 50.0% everywhere." in render(read_record(folder(found)))
    factors = {"format": "lowrank", "entry": {"format": "lowrank", "rank": 4}}
    pruned = {"format": "sparse24", "entry": {"format": "sparse24"}}
    found["linears"][0] |= factors
    assert "Zeros by linear: 50.0%, or left dense, or of low rank." in render(
        read_record(folder(found))
    )
    assert "Rank by linear: 4, or not of low rank." in render(read_record(folder(found)))
    found["linears"][0] |= pruned
    found["linears"][1]["sparsity"] = 0.7
    found["linears"][2] |= factors
    names = [chart.name for chart in draw(read_record(folder(found)))]
    assert names == ["sizes", "block-error", "error", "sparsity"]


def test_experts_share_a_column(folder):
    found = facts(2, name="model.layers.{}.mlp.experts.7.{}")
    assert {row.part for row in read_record(folder(found)).rows} == {
        f"mlp.experts.*.{part}" for part in PARTS
    }


def test_a_linear_that_the_first_block_lacks_has_its_place():
    names = ["q k o", "q k v o", "q z o", "p q"]
    cells = {
        (block, part): 1.0 + block for block, parts in enumerate(names) for part in parts.split()
    }
    chart = heat_map("h", "H", range(4), cells, str, "nothing")
    assert [text.text for text in chart.svg.iter("text")][:6] == ["p", "q", "z", "k", "v", "o"]


def test_columns_and_cells_are_to_scale():
    chart = columns("c", "C", "u", {0: 1.0, 3: 4.0}, str)
    heights = [float(bar.get("height")) for bar in chart.svg.iter("rect")]
    assert heights[1] == pytest.approx(4 * heights[0])
    assert "from 1.0 in block 0 to 4.0 in block 3" in chart.text
    cells = {(block, "a"): float(10**block) for block in range(4)}
    chart = heat_map("h", "H", range(5), cells, str, "nothing")
    kinds = [rect.get("class") for rect in chart.svg.iter("rect") if rect.find("title") is not None]
    assert kinds == ["r0", "r3", "r6", "r8", "none"]


def test_spectra_are_to_scale(folder):
    record = read_record(folder({**facts(3), "spectra": measured(3)}))
    chart = spectra("s", "S", record.spectra)
    lines = list(chart.svg.iter("polyline"))
    assert [line.get("class") for line in lines] == ["d0", "d2", f"d{DEPTHS - 1}"] * len(PARTS)
    points = [tuple(map(float, point.split(","))) for point in lines[0].get("points").split()]
    assert len(points) == 8
    steps = [(x - before, y - above) for (before, above), (x, y) in pairwise(points)]
    assert all(
        x == pytest.approx(steps[0][0], abs=0.2) and y == pytest.approx(steps[0][1], abs=0.2)
        for x, y in steps
    )
    marks = [mark for mark in chart.svg.iter("rect") if mark.find("title") is not None]
    assert len(marks) == 2 * len(PARTS)  # block 0 stays dense
    middle = (
        float(marks[0].get("x")) + float(marks[0].get("width")) / 2,
        float(marks[0].get("y")) + float(marks[0].get("height")) / 2,
    )
    assert middle == pytest.approx(points[1], abs=0.1)  # rank 2 is on the second value
    assert "rank 2 of 8, factors are smaller up to 5" in marks[0].find("title").text
    assert "9 spectra, kept ranks from 2 of 8" in chart.text
    assert "3 left dense" in chart.text


def test_marks_of_deep_ranks_are_on_their_lines(folder):
    found = [
        {**one, "values": [10.0**-place for place in range(8)], "rank": 7} for one in measured(2)
    ]
    chart = spectra("s", "S", read_record(folder({**facts(2), "spectra": found})).spectra)
    points = [
        float(point.split(",")[1])
        for point in next(chart.svg.iter("polyline")).get("points").split()
    ]
    mark = next(mark for mark in chart.svg.iter("rect") if mark.find("title") is not None)
    assert float(mark.get("y")) + float(mark.get("height")) / 2 == pytest.approx(points[6], abs=0.1)
    assert points[5] < points[6] < points[7]


@pytest.mark.parametrize(
    "values", [[0.0] * 8, [1.0] * 8, [5.0, *[0.0] * 7], [1e299] * 7 + [1e-299]], ids=str
)
def test_flat_and_empty_spectra(folder, values):
    found = [{**one, "values": values} for one in measured(1)]
    names = [chart.name for chart in draw(read_record(folder({**facts(1), "spectra": found})))]
    assert ("spectra" in names) == any(values)


def test_no_section_without_spectra(folder):
    assert "Singular values" not in render(read_record(folder(facts(2))))
    assert "Singular values" not in render(read_record(folder({**facts(2), "spectra": []})))


def test_low_rank_is_called_by_its_name(folder):
    found = {
        **facts(2),
        "spectra": measured(2),
        "allocation": {"parameters": 699, "dense_parameters": 1000},
    }
    found["recipe"] = {"method": "fisher", "pattern": "2:4", "keep": "70%", "dataset": "self"}
    for row in found["linears"]:
        row |= {"format": "lowrank", "sparsity": 0.0, "entry": {"format": "lowrank", "rank": 2}}
    text = render(read_record(folder(found)))
    assert "compress lowrank MODEL" in text
    assert "keep 70% of the linears" in text
    assert "69.90%" in text
    assert "2:4" not in text
    assert ">zeros</span>" not in text
    assert "0.0 %" not in text


def test_zeros_are_those_of_what_was_pruned(folder):
    found = facts(2)
    found["linears"][0] |= {
        "format": "lowrank",
        "sparsity": 0.0,
        "entry": {"format": "lowrank", "rank": 2},
    }
    text = render(read_record(folder(found)))
    assert "50.0%" in text
    assert (
        f"of the weights of the {len(found['linears']) - 1} linears that are not of low rank"
        in text
    )


@pytest.mark.parametrize("most", [1e-9, 0.0999, 0.1, 1, 2.4, 7, 99.9, 1e12])
def test_ticks_are_few_and_reach_the_highest(most):
    ticks = _ticks(most)
    assert ticks[0] == 0
    assert ticks[-1] >= most * (1 - 1e-6)
    assert ticks[-2] < most
    assert 3 <= len(ticks) <= 7


def test_pictures(cli, folder, tmp_path):
    pytest.importorskip("matplotlib")
    made = folder({**facts(4), "spectra": measured(4)})
    cli("report", made, "-o", tmp_path / "a.html", "--png", tmp_path / "png")
    names = {"sizes.png", "block-error.png", "error.png", "spectra.png"}
    assert {path.name for path in (tmp_path / "png").iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "png").iterdir())
    assert (
        "exists already"
        in cli("report", made, "-o", tmp_path / "b.html", "--png", tmp_path / "png", code=1).stderr
    )
    assert not (tmp_path / "b.html").exists()


def test_colours_have_contrast():
    from compressor.plots.colours import DARK, LIGHT

    def luminance(colour):
        parts = [int(part, 16) / 255 for part in re.findall("..", colour[1:])]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted([luminance(one), luminance(other)])
        return (high + 0.05) / (low + 0.05)

    assert LIGHT.keys() == DARK.keys()
    for colours in (LIGHT, DARK):
        for text in ("ink", "label", "link"):
            assert contrast(colours[text], colours["page"]) >= 4.5
        for depth in range(DEPTHS):
            assert contrast(colours[f"d{depth}"], colours["page"]) >= 3
        assert colours["halo"] == colours["page"]
        for step in range(9):
            assert contrast(colours[f"t{step}"], colours[f"r{step}"]) >= 4.5, step


def test_the_template_puts_nothing_in_unescaped():
    template = (ROOT / "compressor" / "page" / "page.html").read_text()
    assert not re.search(r"\|\s*safe|autoescape", template)


def test_losses_of_a_method_are_drawn(folder):
    found = facts(2)
    for number, row in enumerate(found["linears"]):
        row["losses"] = [0.4, 0.04 * (number + 1)]
    record = read_record(folder(found))
    assert record.rows[1].loss == pytest.approx(0.2)
    assert "Loss left by linear" in render(record)
    found["linears"][0]["losses"] = ["x"]
    assert read_record(folder(found)).rows[0].loss is None
