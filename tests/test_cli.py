"""The command line as a user meets it: results, and one clear line for everything that cannot
work.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint.reader import INDEX


@pytest.fixture
def refuse(cli, tmp_path):
    """Run a command that must fail: one line on stderr, no traceback, nothing left behind."""

    def run(*arguments, code=1):
        before = sorted(tmp_path.rglob("*"))
        done = cli(*arguments, code=code)
        assert "Traceback" not in done.stderr
        message = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(message) == 1, done.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return message[0]

    return run


@pytest.fixture
def copy(tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    return tmp_path / "model"


def test_prune_inspect_eval_unpack(cli, demo_model, rows, tmp_path):
    out = tmp_path / "out"
    done = cli(
        "prune",
        demo_model,
        "-o",
        out,
        "--method",
        "sparsegpt",
        "--dataset",
        rows,
        "--num-samples",
        8,
        "--seq-len",
        32,
    )
    assert done.stdout.rstrip().endswith(str(out))
    assert "0.5625" in done.stdout
    assert "block 4/4" in done.stderr
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["run"]["peak_memory"]["host_bytes"] > 0
    assert {left["reason"] for left in report["left_dense"]} == {"outside the decoder blocks"}
    inside = json.loads((out / "report.json").read_text())
    assert {key: value for key, value in report.items() if key != "run"} == inside
    assert all(0 < row["error"] < 1 for row in inside["linears"])
    found = json.loads(cli("inspect", out, "--json").stdout)
    linears = [row for row in found["linears"] if row["format"] == "sparse24"]
    assert len(linears) == inside["totals"]["linears"] == 28
    assert (
        sum(row["bytes"] for row in linears) / sum(row["dense_bytes"] for row in linears) == 0.5625
    )
    assert found["bytes"] == inside["output_bytes"]
    table = cli("eval", out, "--baseline", demo_model, "--dataset", rows, "-q").stdout
    assert table.splitlines()[0].split("|")[2:4] != []
    assert "token perplexity" in table
    cli("unpack", out, "-o", tmp_path / "dense")
    assert cli("inspect", tmp_path / "dense").stdout.count("sparse24") == 0


def test_recipe_reproduces_the_output(cli, demo_model, rows, tmp_path):
    common = ["--dataset", rows, "--num-samples", 8, "--seq-len", 32, "-q"]
    cli(
        "prune",
        demo_model,
        "-o",
        tmp_path / "a",
        "--method",
        "sparsegpt",
        "--set",
        "damp=0.1",
        "--ignore",
        "*k_proj",
        *common,
    )
    cli("prune", demo_model, "-o", tmp_path / "b", "--recipe", tmp_path / "a" / "recipe.toml", "-q")
    for name in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_dry_run_writes_nothing(cli, tiny, tmp_path):
    done = cli("prune", tiny("llama"), "-o", tmp_path / "out", "--dry-run", "--ignore", "*q_proj")
    assert "18 linears in 3 blocks" in done.stdout
    assert "--ignore *q_proj" in done.stdout
    plan = json.loads(cli("prune", tiny("llama"), "--dry-run", "--json").stdout)
    assert len(plan["linears"]) == 21
    assert not list(tmp_path.iterdir())


def test_unstructured_says_that_the_size_stays(cli, tiny, rows, tmp_path):
    done = cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "out",
        "--pattern",
        "60%",
        "--dataset",
        rows,
        "--num-samples",
        4,
        "--seq-len",
        32,
    )
    assert "no packed form" in done.stdout
    assert not {"quantization_config", "transformers_weights"} & set(
        json.loads((tmp_path / "out" / "config.json").read_text())
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--pattern", "abc"], "pattern 'abc' is not understood"),
        (["--pattern", "4:2"], "keeps 4 of every 2"),
        (["--pattern", "0:4"], "keeps 0 of every 4"),
        (["--pattern", "1.5"], "sparsity of 1.5"),
        (["--pattern=-0.2"], "sparsity of -0.2"),
        (
            ["--pattern", "2:5"],
            "in_features 64 of model.layers.0.self_attn.q_proj is not a multiple of 5 (pattern "
            "2:5)",
        ),
        (["--method", "wandaa"], "did you mean 'wanda'"),
        (["--method", "WANDA"], "did you mean 'wanda'"),
        (["--set", "damp=1"], "method wanda has no option 'damp'"),
        (["--method", "sparsegpt", "--set", "dmap=1"], "did you mean 'damp'"),
        (["--method", "sparsegpt", "--set", "damp=high"], "a value of type float is expected"),
        (["--method", "sparsegpt", "--set", "damp"], "not of the form name=value"),
        (["--format", "zip"], "format is 'zip'; accepted: packed, dense"),
        (["--ignore", "nothing*"], "--ignore 'nothing*' matches no linear"),
        (["--ignore", "*"], "there is nothing to compress"),
        (["--seq-len", "512"], "seq-len 512 is longer than the 256 tokens"),
        (["--num-samples", "0"], "num-samples is 0"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--recipe", "nowhere.toml"], "recipe nowhere.toml does not exist"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_options(refuse, tiny, tmp_path, arguments, match):
    assert match in refuse("prune", tiny("llama"), "-o", tmp_path / "out", "-q", *arguments, code=2)


def test_bad_output(refuse, copy, tmp_path):
    (tmp_path / "there").mkdir()
    assert "exists already" in refuse("prune", copy, "-o", tmp_path / "there", "-q")
    assert "is the input folder" in refuse("prune", copy, "-o", copy, "-q")
    for nameless in ("", ".", "/"):
        assert "names no folder to make" in refuse("prune", copy, "-o", nameless, "-q")
    assert "is inside the input folder" in refuse("prune", copy, "-o", copy / "out", "-q")
    (tmp_path / "file").touch()
    assert "is not a folder you may write to" in refuse(
        "prune", copy, "-o", tmp_path / "file" / "x", "-q"
    )
    assert "give the folder" in refuse("prune", copy, "-q", code=2)


def test_bad_models(refuse, copy, tmp_path):
    def prune():
        return refuse("prune", copy, "-o", tmp_path / "out", "--method", "magnitude", "-q")

    assert "does not exist" in refuse("prune", tmp_path / "none", "-o", tmp_path / "out", "-q")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"llama"', '"lamma"'))
    assert "architecture 'lamma' cannot be used with transformers" in prune()
    for field, value, message in [
        ("hidden_size", 128, "a llama model with this config.json has"),
        ("vocab_size", 7, "a llama model with this config.json has"),
        ("num_hidden_layers", 10**9, "config.json has 1000000000 layers"),
        ("num_hidden_layers", -1, "no stack of -1 decoder blocks"),
        ("num_hidden_layers", "three", "cannot be used with transformers"),
        ("quantization_config", "nonsense", "quantised or compressed already"),
        ("dtype", "int8", "config.json has dtype int8, in which no model computes"),
        ("auto_map", {"AutoConfig": "evil.Config"}, None),
    ]:
        (copy / "config.json").write_text(json.dumps({**json.loads(config), field: value}))
        if message:
            assert message in prune()
    (copy / "config.json").write_text(
        json.dumps(
            {**json.loads(config), "model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
        )
    )
    assert "add --trust-remote-code if you trust it" in prune()
    (copy / "config.json").write_text(
        json.dumps({**json.loads(config), "quantization_config": {"quant_method": "gptq"}})
    )
    assert "quantised or compressed already (gptq)" in prune()
    (copy / "config.json").write_text(config)
    index = json.loads((copy / INDEX).read_text())
    shard = copy / index["weight_map"]["model.layers.2.mlp.down_proj.weight"]
    tensors = load_file(shard)
    for bad, word in [(float("nan"), "NaN"), (float("inf"), "Inf")]:
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = bad
        save_file(tensors, shard, metadata={"format": "pt"})
        assert f"model.layers.2.mlp.down_proj.weight holds {word}" in prune()
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "truncated" in prune()


def test_bad_data(refuse, tiny, rows, tmp_path):
    def prune(name, text, *more):
        (tmp_path / name).write_text(text)
        return refuse(
            "prune",
            tiny("llama"),
            "-o",
            tmp_path / "out",
            "-q",
            "--dataset",
            tmp_path / name,
            "--num-samples",
            2,
            "--seq-len",
            32,
            *more,
        )

    assert "is empty" in prune("a.txt", "")
    assert "is a .csv file" in prune("a.csv", "x")
    assert "no tokenizer" in prune("a.txt", "words")
    assert "line 2 is no JSON object" in prune("a.jsonl", '{"input_ids": [1, 2]}\nnonsense\n')
    assert "rows of 2 input_ids, --seq-len asks for 32" in prune(
        "a.jsonl", '{"input_ids": [1, 2]}\n'
    )
    assert "integers in 0..127" in prune("a.jsonl", json.dumps({"input_ids": [500] * 32}))
    assert "1 samples of 32 tokens, 2 were asked for" in prune(
        "a.jsonl", json.dumps({"input_ids": [5] * 32})
    )
    assert "cannot be read as parquet" in prune("a.parquet", "nonsense")
    assert "does not exist" in refuse(
        "prune", tiny("llama"), "-o", tmp_path / "out", "-q", "--dataset", "none.txt"
    )
    assert "did you mean 'self'" in refuse(
        "prune", tiny("llama"), "-o", tmp_path / "out", "-q", "--dataset", "slef"
    )


def test_eval_says_what_is_missing(refuse, tiny, rows):
    assert "give something to score" in refuse("eval", tiny("llama"), code=2)
    assert "longer than the 256 tokens" in refuse(
        "eval", tiny("llama"), "--dataset", rows, "--seq-len", 999, "-q", code=2
    )


def test_recipes_are_checked(refuse, tiny, tmp_path):
    for text, match in [
        ("method = 3", "method is 3; a value of type str"),
        ("metod = 'wanda'", "did you mean 'method'"),
        ("x = [", "not readable TOML"),
    ]:
        (tmp_path / "recipe.toml").write_text(text)
        assert match in refuse(
            "prune",
            tiny("llama"),
            "-o",
            tmp_path / "out",
            "--recipe",
            tmp_path / "recipe.toml",
            "-q",
            code=2,
        )


def test_infinite_activations_are_named(refuse, copy, rows, tmp_path):
    shards = {path: load_file(path) for path in copy.glob("*.safetensors")}
    for path, tensors in shards.items():
        for name in tensors:
            if "layernorm" in name:
                tensors[name] = torch.full_like(tensors[name], 3e38)
        save_file(tensors, path, metadata={"format": "pt"})
    message = refuse(
        "prune",
        copy,
        "-o",
        tmp_path / "out",
        "-q",
        "--dataset",
        rows,
        "--num-samples",
        4,
        "--seq-len",
        32,
    )
    assert "are not finite (NaN or Inf activations)" in message


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "wanda", "--refine", "lsq", "--set", "lsq.iterations=20"],
        ["--method", "magnitude", "--refine", "dsnot"],
        ["--method", "sparsegpt", "--refine", "admm", "--tune", "1"],
        ["--method", "wanda", "--pattern", "50%", "--tune", "1"],
    ],
    ids=lambda options: "-".join(options),
)
def test_refinement_and_tuning_lower_the_error(cli, demo_model, rows, tmp_path, options):
    common = ["--dataset", rows, "--num-samples", 8, "--seq-len", 32, "-q"]
    plain = [option for option in options if option in ("wanda", "magnitude", "sparsegpt")]
    pattern = options[2:4] if "--pattern" in options else []
    cli("prune", demo_model, "-o", tmp_path / "plain", "--method", *plain, *pattern, *common)
    cli("prune", demo_model, "-o", tmp_path / "better", *options, *common)
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "better")
    ]
    assert reports[0]["totals"]["bytes"] == reports[1]["totals"]["bytes"]
    assert reports[1]["totals"]["sparsity"] == pytest.approx(
        reports[0]["totals"]["sparsity"], abs=0.01
    )
    if "dsnot" not in options:  # it works on the mean of the outputs, not on their square
        assert reports[1]["blocks"][-1]["error"] < (reports[0]["blocks"][-1]["error"] or 1)


def test_armor_is_stored_loads_and_unpacks(cli, demo_model, rows, tmp_path):
    import compressor

    common = [
        "--dataset",
        rows,
        "--num-samples",
        8,
        "--seq-len",
        32,
        "-q",
        "--set",
        "iterations=3",
        "--set",
        "finish=1",
    ]
    cli("prune", demo_model, "-o", tmp_path / "out", "--method", "armor", *common)
    found = json.loads(cli("inspect", tmp_path / "out", "--json").stdout)
    linears = [row for row in found["linears"] if row["format"] == "armor"]
    assert linears
    assert all(0.5625 < row["ratio"] <= 0.5625 + 0.125 + 1e-6 for row in linears)
    model = compressor.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    cli("unpack", tmp_path / "out", "-o", tmp_path / "dense")
    for folder, tolerance in (
        ("again", 0),
        ("dense", 0.2),
    ):  # the dense weight is rounded to bfloat16 once more
        with torch.no_grad():
            torch.testing.assert_close(
                compressor.load(tmp_path / folder, dtype=torch.float32)(ids).logits,
                logits,
                rtol=0,
                atol=tolerance,
            )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--refine", "lsqq"], "did you mean 'lsq'"),
        (["--refine", "lsq", "--set", "swap.rounds=2"], "is for 'swap', but --refine is lsq"),
        (["--refine", "lsq", "--set", "lsq.rounds=2"], "has no option 'rounds'"),
        (["--refine", "swap", "--pattern", "50%"], "swap"),
        (["--method", "armor", "--refine", "lsq"], "method armor stores another form"),
        (["--method", "armor", "--pattern", "4:8"], "armor stores a 2:4 core"),
        (["--method", "armor", "--set", "proxy=nothing"], "accepted: diagonal, block, full"),
        (["--method", "sparsegpt", "--set", "damp=0"], "needs damp > 0"),
        (["--tune", "-1"], "tune is -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_combinations_are_refused_before_any_work(refuse, demo_model, tmp_path, options, match):
    assert match in refuse("prune", demo_model, "-o", tmp_path / "out", "-q", *options, code=2)


def test_layers_that_the_config_does_not_know_are_listed(cli, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    plan = json.loads(cli("prune", copy, "--dry-run", "--json").stdout)
    left = {entry["name"]: entry["reason"] for entry in plan["left_dense"]}
    assert (
        left["model.layers.2.mlp.up_proj.weight"]
        == "not part of the model that config.json describes"
    )


def test_what_lies_beside_an_earlier_folder_goes_with_it(cli, refuse, tiny, tmp_path):
    beside = [tmp_path / f"out.{kind}" for kind in ("report.json", "eval.json", "report.html")]
    asked = [tiny("llama"), "-o", tmp_path / "out", "--method", "magnitude", "-q"]
    beside[0].mkdir()
    assert "out.report.json is a folder" in refuse("prune", *asked)
    beside[0].rmdir()
    for command in (["prune", *asked], ["unpack", tmp_path / "packed", "-o", tmp_path / "out"]):
        for path in beside:
            path.write_text("of an earlier folder")
        cli(*command)
        assert [path.exists() for path in beside] == [command[0] == "prune", False, False]
        if command[0] == "prune":
            assert json.loads(beside[0].read_text())["run"]["device"] == "cpu"
            (tmp_path / "out").rename(tmp_path / "packed")
