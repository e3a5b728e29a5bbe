"""Plan files: written, edited, read back, and refused in one line when they are not what they
should be.
"""

import json
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import UsageError
from compressor.model.skeleton import Skeleton
from compressor.run import plan_file
from compressor.run.check import plan_run

Q = "model.layers.0.self_attn.q_proj"
COMMON = ("--num-samples", 8, "--seq-len", 32, "-q")


@pytest.fixture(scope="module")
def linears(tiny):
    skeleton = Skeleton(Reader(tiny("llama")))
    return [linear for index in range(3) for linear in skeleton.linears(index)]


def write(path, entries, head="version = 1\n"):
    lines = [f'"{name}" = {entry}' for name, entry in entries.items()]
    path.write_text(head + "[linears]\n" + "\n".join(lines))
    return path


@pytest.fixture(scope="module")
def job(tiny):
    return plan_run(Recipe(str(tiny("llama")), pattern="2:4"), None)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_is_written_is_read_back(tmp_path_factory, job, data):
    goals = {}
    for task in job.every:
        kind = data.draw(st.sampled_from(["dense", "2:4", "50%", "exact"]))
        zeros = data.draw(st.integers(1, task.linear.size))
        goals[task.linear.name] = (
            None if kind == "dense"
            else plan_file.Pattern.exact(zeros,
            task.linear.size) if kind == "exact" else plan_file.Pattern.parse(kind)
        )  # fmt: skip
    assigned = job.with_targets(goals, 'because of "this" # and\nthat')
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    path.write_text(plan_file.dumps(assigned))
    assert plan_file.fit(plan_file.read(path), [task.linear for task in job.every], {}) == goals


def test_globs_stand_for_the_linears_without_an_entry_of_their_own(tmp_path, linears):
    entries = {
        Q: "{ dense = true }",
        "*.[qk]_proj": '{ keep = "50%" }',
        "*.0.mlp.*": "{ zeros = 7 }",
        "*": '{ pattern = "2:4" }',
    }
    goals = plan_file.fit(
        plan_file.read(write(tmp_path / "plan.toml", entries)), linears, {"lm_head": "outside"}
    )
    assert goals[Q] is None
    for linear in linears:
        if linear.name.endswith(("q_proj", "k_proj")) and linear.name != Q:
            rank, (rows, columns) = goals[linear.name], linear.shape
            price = {r: r * (rows + columns - r) for r in (rank, rank + 1)}
            assert price[rank] <= rows * columns / 2 < price[rank + 1]  # tiny: steps of one
    assert goals["model.layers.0.mlp.up_proj"].zeros == 7
    assert (
        str(goals["model.layers.1.mlp.up_proj"])
        == str(goals["model.layers.0.self_attn.v_proj"])
        == "2:4"
    )


HOSTILE = [
    ("", "has version 'None'"),
    ("version = 2\n[linears]\na = 1", "has version '2'; version = 1 is accepted"),
    ("version = true\n[linears]\na = 1", "has version 'True'"),
    ("version = 1", "has no [linears]"),
    ("version = 1\nlinears = 3", "has no [linears]"),
    ("version = 1\n[linears]", "has no [linears]"),
    ("version = 1\nextra = 1\n[linears]\na = 1", "unknown key 'extra'; known: version, linears"),
    ("version = 1\n[linears]\na = 1", "the entry of 'a' is 1; accepted"),
    ("version = 1\n[linears]\na = { dense = false }", "accepted: "),
    ("version = 1\n[linears]\na = { zeros = true }", "accepted: "),
    ("version = 1\n[linears]\na = { zeros = 1.5 }", "accepted: "),
    ("version = 1\n[linears]\na = { zeros = 1, dense = true }", "accepted: "),
    ("version = 1\n[linears]\na = { pattern = 24 }", "accepted: "),
    ("version = 1\n[linears]\na = { pattern = '4:2' }", "'a': pattern '4:2' keeps 4 of every 2"),
    ("version = 1\n[linears]\na = {}", "accepted: "),
    ("version = 1\n[linears]\na = { keep = 0.5 }", "accepted: "),
    ('version = 1\n[linears]\na = { keep = "170%" }', "'a': keep is '170%'"),
    ("[[[[", "is not readable TOML"),
    ("a = " + "[" * 100_000, "is not readable TOML"),
    ("\x00", "is not readable TOML"),
]


@pytest.mark.parametrize(("text", "match"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_files_get_one_line(tmp_path, text, match):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        plan_file.read(tmp_path / "plan.toml")
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_folder_bytes_and_a_huge_file_are_no_plans(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 30)
    for name, match in {
        ".": "not readable",
        "bytes": "not readable",
        "huge": "has 1073741824 bytes",
        "none": "does not exist",
    }.items():
        with pytest.raises(UsageError, match=match):
            plan_file.read(tmp_path / name)


@pytest.mark.parametrize(("change", "match"), [
    ({Q: None}, f"lacks 1 linears of this model, {Q} among them"),
    ({f"{Q}x": "{ dense = true }"},
    f"names '{Q}x', which is no linear of this model; did you mean '{Q}'"),
    ({Q: "{ zeros = 4097 }"}, f"asks for 4097 zeros in {Q}, which has 4096 weights"),
    ({Q: "{ zeros = -1 }"}, f"asks for -1 zeros in {Q}"),
    ({"*.z_proj": "{ dense = true }"}, "the plan's '*.z_proj' matches no linear; names look like"),
    ({Q: '{ keep = "0.1%" }'},
    f"the plan keeps 0.1% of {Q}, which has 4096 weights: that is less than rank 1"),
    ({Q: '{ pattern = "2:5" }'}, f"in_features 64 of {Q} is not a multiple of 5"),
])  # fmt: skip
def test_a_plan_that_does_not_fit_the_model(tmp_path, linears, change, match):
    entries = dict.fromkeys((linear.name for linear in linears), "{ zeros = 7 }") | change
    path = write(tmp_path / "plan.toml", {name: entry for name, entry in entries.items() if entry})
    with pytest.raises(UsageError) as caught:
        plan_file.fit(plan_file.read(path), linears, {})
    assert match in str(caught.value)


def test_ignored_linears_are_dense_in_a_plan(tmp_path, linears):
    entries = plan_file.read(
        write(
            tmp_path / "plan.toml",
            dict.fromkeys((linear.name for linear in linears), "{ zeros = 7 }"),
        )
    )
    with pytest.raises(UsageError, match="stays dense \\(--ignore x\\); make one of the two agree"):
        plan_file.fit(entries, linears[1:], {Q: "--ignore x"})
    entries[Q] = {"dense": True}
    assert Q not in plan_file.fit(entries, linears[1:], {Q: "--ignore x"})


# --- the command line


def test_a_plan_is_made_edited_used_and_the_output_makes_itself_again(cli, tiny, rows, tmp_path):
    file = tmp_path / "plan.toml"
    asked = ["--pattern", "60%", "--ratios", "owl", "--ignore", "*.2.*v_proj"]
    done = cli("plan", tiny("llama"), "-o", file, *asked, "--dataset", rows, *COMMON[:-1])
    assert "q_proj" in done.stdout
    assert "KL to the dense model" in done.stdout
    assert done.stdout.rstrip().endswith(str(file))
    lines = file.read_text().splitlines()
    names = [line for line in lines if line.startswith('"model.')]
    assert len(names) == 21
    assert '"model.layers.2.self_attn.v_proj" = { dense = true }  # --ignore *.2.*v_proj' in names
    edited = [
        f'"{Q}" = {{ pattern = "2:4" }}' if Q in line
        else '"model.layers.1.mlp.up_proj" = { dense = true }' if "1.mlp.up_proj" in line
        else line
        for line in lines
    ]  # fmt: skip
    file.write_text("\n".join(edited))
    cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "a",
        "--plan",
        file,
        "--method",
        "sparsegpt",
        "--dataset",
        rows,
        *COMMON,
    )
    cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "b",
        "--recipe",
        tmp_path / "a" / "recipe.toml",
        "-q",
    )
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"plan.toml", "recipe.toml"} <= written
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in written
    )
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    found = {row["name"]: row for row in report["linears"]}
    assert found[Q]["format"] == "sparse24"
    assert {"model.layers.1.mlp.up_proj", "model.layers.2.self_attn.v_proj"} <= {
        left["name"] for left in report["left_dense"]
    }
    goals = plan_file.fit(
        plan_file.read(file),
        [t.linear for t in plan_run(Recipe(str(tiny("llama"))), None).every],
        {},
    )
    for name, row in found.items():
        assert Fraction(row["sparsity"]).limit_denominator(10**6) == goals[
            name
        ].sparsity.limit_denominator(10**6)


def test_plan_draws_a_picture(cli, tiny, rows, tmp_path):
    pytest.importorskip("matplotlib")
    cli(
        "plan",
        tiny("gpt2"),
        "-o",
        tmp_path / "p.toml",
        "--plot",
        tmp_path / "p.png",
        "--pattern",
        "2:4",
        *COMMON,
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "p.toml").read_text().count('pattern = "2:4"') == 12


@pytest.mark.parametrize("width", [48, 80, 120])
def test_experts_of_a_block_are_one_column(cli, tiny, rows, tmp_path, monkeypatch, width):
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True, width=width)
    monkeypatch.setattr(sys.modules["compressor.cli.plan"], "out", console)
    file = tmp_path / "plan.toml"
    settings = ("--pattern", "60%", "--ratios", "curve", "--dataset", rows, *COMMON[:-1])
    with console.capture() as captured:
        cli("plan", tiny("qwen2_moe"), "-o", file, *settings)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= max(width, 77)  # the last line is a sentence
    assert "of experts the lowest and the highest" in lines[0]
    heads = [
        name for line in lines[1:] for name in line.split() if name in ("experts", "shared_expert")
    ]
    assert sorted(heads) == ["experts"] * 3 + ["shared_expert"] * 3
    entries = plan_file.read(file)
    assert sum(".mlp.experts." in name for name in entries) == 3 * 3 * 4
    linears = {
        linear.name: linear
        for index in range(3)
        for linear in Skeleton(Reader(tiny("qwen2_moe"))).linears(index)
    }
    zeros = [
        100 * entry.get("zeros", 0) / linears[name].size
        for name, entry in entries.items()
        if name.startswith("model.layers.1.mlp.experts.") and name.endswith("down_proj")
    ]
    shown = [f"{value:.1f}" if value else "dense" for value in (min(zeros), max(zeros))]
    assert next(line for line in reversed(lines) if line.startswith(" 1 ")).split()[-1] == "–".join(
        dict.fromkeys(shown)
    )


def test_headings_say_which_module_where_the_last_word_does_not():
    from compressor.plots.plan_map import headings

    names = ["attn.q", "attn.o", "mlp.up", "mlp.shared.up", "mlp.experts.*.up", "moe.experts.*.w1"]
    assert headings(names) == ["q", "o", "mlp\nup", "shared\nup", "experts\nup", "experts\nw1"]


def test_dry_run_shows_the_plan(cli, tiny, tmp_path, linears):
    entries = dict.fromkeys((linear.name for linear in linears), "{ zeros = 1024 }") | {
        Q: "{ dense = true }"
    }
    done = cli(
        "prune", tiny("llama"), "--dry-run", "--plan", write(tmp_path / "plan.toml", entries)
    )
    assert "25%  model.layers.0.self_attn.k_proj" not in done.stdout
    assert "50%  model.layers.0.self_attn.k_proj" in done.stdout
    assert f"{Q}  [64, 64]  the plan" in done.stdout


@pytest.mark.parametrize(("arguments", "code", "match"), [
    (["--pattern", "50%", "--ratios", "owl", "-o", "{tmp}/there"], 1, "there exists already"),
    (["--pattern", "50%", "-o", "{tmp}/none/p.toml"], 1, "the folder of"),
    (["-o", "{tmp}/p.toml", "--plot", "{tmp}/p.bmp"], 2,
    "ends in '.bmp'; accepted: .png, .svg, .pdf"),
    (["-o", "{tmp}/p.toml", "--pattern", "4:2"], 2, "keeps 4 of every 2"),
])  # fmt: skip
def test_plan_refuses_before_any_work(cli, tiny, rows, tmp_path, arguments, code, match):
    (tmp_path / "there").write_text("")
    done = cli(
        "plan",
        tiny("llama"),
        "--dataset",
        rows,
        *COMMON,
        *(part.format(tmp=tmp_path) for part in arguments),
        code=code,
    )
    assert match in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


@pytest.mark.parametrize(("text", "match"), [
    ('plan = "/etc/passwd"', "is not inside its folder"), ('plan = "../p.toml"',
    "is not inside its folder"),
    ("plan = 3", "plan is 3"),
    ('plan = "none.toml"', "does not exist"),
    ('plan = "p.toml"\nratios = "owl"', "give one of them"),
])  # fmt: skip
def test_the_plan_of_a_recipe(cli, tiny, tmp_path, text, match, linears):
    write(tmp_path / "p.toml", dict.fromkeys((linear.name for linear in linears), "{ zeros = 7 }"))
    (tmp_path / "recipe.toml").write_text(text)
    done = cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "out",
        "--recipe",
        tmp_path / "recipe.toml",
        "-q",
        code=2,
    )
    assert match in done.stderr


def test_a_plan_that_leaves_everything_dense(cli, tiny, tmp_path, linears):
    path = write(
        tmp_path / "p.toml", dict.fromkeys((linear.name for linear in linears), "{ dense = true }")
    )
    done = cli("prune", tiny("llama"), "-o", tmp_path / "out", "--plan", path, "-q", code=2)
    assert "leaves every linear dense" in done.stderr
