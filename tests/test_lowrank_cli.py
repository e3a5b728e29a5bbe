"""`compress lowrank` end to end: folder, report, plan, load, generate, save, unpack, verify, train,
resume.
"""

import json

import pytest
import torch

import compressor
from compressor.allocation.rank import largest_rank
from compressor.checkpoint.manifest import problems
from compressor.checkpoint.reader import Reader
from compressor.model.skeleton import Skeleton

SMALL = ("--num-samples", 8, "--seq-len", 32, "-q")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def lowrank(cli, model, out, rows, *options, method="fisher", keep="60%"):
    cli(
        "lowrank",
        model,
        "-o",
        out,
        "--method",
        method,
        "--keep",
        keep,
        "--dataset",
        rows,
        *SMALL,
        *options,
    )
    return json.loads((out / "report.json").read_text())


def counted(folder):
    """Numbers in the tensors of a folder, and their bytes."""
    tensors = Reader(folder).tensors
    return sum(torch.Size(entry.shape).numel() for entry in tensors.values()), sum(
        entry.nbytes for entry in tensors.values()
    )


@pytest.mark.parametrize("method", ["svd", "welore", "asvd", "svd-llm", "fisher"])
def test_round_trip(method, cli, demo_model, rows, tmp_path):
    out = tmp_path / "out"
    report = lowrank(cli, demo_model, out, rows, method=method)
    found = report["allocation"]
    assert found["parameters"] <= found["budget"] <= 0.6 * found["dense_parameters"]
    assert found["parameters"] >= 0.55 * found["dense_parameters"]
    for row in report["linears"]:
        assert row["format"] == "pivot"
        assert row["bytes"] < row["dense_bytes"]
        assert 1 <= row["entry"]["rank"] <= largest_rank(tuple(row["shape"]))
    numbers, size = counted(out)
    before, dense = counted(demo_model)
    gone = found["dense_parameters"] - found["parameters"]
    pivots = sum(row["entry"]["rank"] for row in report["linears"])  # four bytes each
    assert before - numbers == gone - pivots
    assert size == report["output_bytes"] == dense - 2 * gone + 4 * pivots
    shown = json.loads(cli("inspect", out, "--json").stdout)
    assert {row["format"] for row in shown["linears"]} <= {"dense"} | {
        f"pivot {r['entry']['rank']}" for r in report["linears"]
    }
    assert all(
        row["sparsity"] is None for row in shown["linears"] if row["format"].startswith("pivot")
    )
    assert not problems(out)
    cli("verify", out)
    model = compressor.load(out, dtype=torch.float32)
    ids = torch.arange(3, 19)[None]
    logits = model(ids).logits
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 20)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(compressor.load(tmp_path / "saved", dtype=torch.float32)(ids).logits, logits)
    cli("unpack", out, "-o", tmp_path / "dense")
    torch.testing.assert_close(
        compressor.load(tmp_path / "dense", dtype=torch.float32)(ids).logits,
        logits,
        rtol=0.1,
        atol=0.15,
    )
    assert counted(tmp_path / "dense") == (before, dense)


def test_no_table_speaks_of_zeros_in_factors(cli, demo_model, tmp_path):
    done = cli("lowrank", demo_model, "-o", tmp_path / "out", "--method", "svd", "--keep", "60%")
    for text in (done.stdout, cli("inspect", tmp_path / "out").stdout):
        rows = [line for line in text.splitlines() if " pivot " in line]
        assert len(rows) == 28
        assert not [line for line in rows if "%" in line]


def test_the_data_free_methods_read_no_text(cli, demo_model, tmp_path):
    report = lowrank(cli, demo_model, tmp_path / "out", "self", method="welore")
    assert report["calibration_tokens"] == 0


def test_spectra_that_ranks_were_chosen_from_are_reported(cli, demo_model, rows, tmp_path):
    report = lowrank(
        cli, demo_model, tmp_path / "out", rows, "--set", "ranks.energy=0", method="welore"
    )
    ranks = {row["name"]: row["entry"]["rank"] for row in report["linears"]}
    linears = {
        linear.name: linear
        for index in range(4)
        for linear in Skeleton(Reader(demo_model)).linears(index)
    }
    assert len(report["spectra"]) == len(linears)
    for found in report["spectra"]:
        name = f"model.layers.{found['block']}.{found['linear']}"
        weight = linears[name].read(Reader(demo_model)).double()
        values = torch.linalg.svdvals(weight)
        assert found["index"][0] == 0
        assert found["index"][-1] == len(values) - 1
        assert len(found["index"]) <= 48
        torch.testing.assert_close(
            torch.tensor(found["values"]).double(),
            (values / values.norm())[found["index"]],
            rtol=1e-3,
            atol=1e-8,
        )
        assert found["rank"] == ranks.get(name)
        assert found["largest_rank"] == largest_rank(tuple(weight.shape))
    assert (
        lowrank(cli, demo_model, tmp_path / "even", rows, method="svd")["spectra"] == []
    )  # only shapes were looked at
    cli("report", tmp_path / "out", "-o", tmp_path / "out.html")
    assert "Singular values by linear" in (tmp_path / "out.html").read_text()


def test_the_plan_of_a_run_gives_the_same_bytes(cli, demo_model, rows, tmp_path):
    first = lowrank(cli, demo_model, tmp_path / "a", rows)
    assert first["allocation"]["taken"] in ("threshold", "uniform")
    assert set(first["allocation"]["divergence"]) == {"uniform", "threshold"}
    plan = tmp_path / "a" / "plan.toml"
    assert "rank = " in plan.read_text()
    cli("lowrank", demo_model, "-o", tmp_path / "b", "--plan", plan, "--dataset", rows, *SMALL)
    for shard in Reader(tmp_path / "a").shards:
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_a_plan_has_the_ranks_that_lowrank_would_choose(cli, demo_model, rows, tmp_path):
    lowrank(cli, demo_model, tmp_path / "out", rows)
    plan, again = tmp_path / "plan.toml", tmp_path / "again.toml"
    found = json.loads(
        cli(
            "plan", demo_model, "-o", plan, "--keep", "60%", "--dataset", rows, *SMALL, "--json"
        ).stdout
    )
    assert plan.read_bytes() == (tmp_path / "out" / "plan.toml").read_bytes()
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())["allocation"]
    shown = cli(
        "plan",
        demo_model,
        "-o",
        again,
        "--keep",
        "60%",
        "--ranks",
        "uniform",
        "--method",
        "svd-llm",
    ).stdout
    assert "Rank of every linear" in shown
    assert "by uniform" in shown
    assert again.read_text().count("rank = ") == 28
    for keep in (["--keep", "60%"], ["--recipe", "lowrank-70"]):
        assert (
            "give one of them"
            in cli(
                "plan", demo_model, "-o", tmp_path / "x", *keep, "--pattern", "2:4", code=2
            ).stderr
        )


def test_a_dry_run_says_what_would_be_done(cli, demo_model, tmp_path):
    found = json.loads(cli("lowrank", demo_model, "--dry-run", "--keep", "60%", "--json").stdout)
    assert (found["method"], found["keep"], len(found["linears"])) == ("fisher", "60%", 28)
    assert {row["goal"] for row in found["linears"]} == {"keep 60%"}
    found = json.loads(
        cli("lowrank", demo_model, "--dry-run", "--recipe", "mixed", "--json").stdout
    )
    goals = {row["name"].rpartition(".")[2]: row["goal"] for row in found["linears"]}
    assert (goals["q_proj"], goals["up_proj"]) == ("rank 28", "2:4")
    assert [left["name"] for left in found["left_dense"]]
    assert (
        "sparsegpt 2:4  model.layers.0.mlp.up_proj"
        in cli("lowrank", demo_model, "--dry-run", "--recipe", "mixed").stdout
    )
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_cut_off_gives_the_same_bytes(cli, demo_model, rows, tmp_path):
    settings = dict(
        method="fisher", keep="60%", dataset=rows, num_samples=8, seq_len=32, device="cpu"
    )
    compressor.lowrank(demo_model, tmp_path / "a", **settings)

    def stop(step, done, total, block=None, **_):
        if step == "blocks" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressor.lowrank(demo_model, tmp_path / "b", progress=stop, **settings)
    report = compressor.lowrank(demo_model, tmp_path / "b", **settings)
    assert report.run["resumed_at_block"] == 2
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        path.name for path in (tmp_path / "b").iterdir()
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt"])
def test_biases_stay(family, cli, tiny, rows, tmp_path):
    lowrank(cli, tiny(family), tmp_path / "out", rows, keep="70%")
    before, after = Reader(tiny(family)), Reader(tmp_path / "out")
    biases = [name for name in before.tensors if name.endswith(".bias")]
    assert biases
    for name in biases:
        assert torch.equal(before.read(name), after.read(name))
    model = compressor.load(tmp_path / "out")
    ids = torch.arange(3, 19)[None]
    cli("unpack", tmp_path / "out", "-o", tmp_path / "dense")
    torch.testing.assert_close(
        model(ids).logits, compressor.load(tmp_path / "dense")(ids).logits, rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("command", ["prune", "lowrank"])
def test_a_plan_mixes_formats(command, cli, demo_model, rows, tmp_path):
    entries = {
        name: "{ dense = true }"
        if ".0." in name
        else "{ rank = 24 }"
        if "mlp" in name
        else '{ pattern = "2:4" }'
        for layer in range(4)
        for name in (
            *(f"model.layers.{layer}.{linear}" for linear in LINEARS),
            *(f"model.layers.{layer}.mlp.{linear}_proj" for linear in ("gate", "up", "down")),
        )
    }
    plan = tmp_path / "plan.toml"
    plan.write_text(
        "version = 1\n[linears]\n"
        + "".join(f'"{name}" = {entry}\n' for name, entry in entries.items())
    )
    out = tmp_path / "out"
    cli(command, demo_model, "-o", out, "--plan", plan, "--dataset", rows, *SMALL)
    report = json.loads((out / "report.json").read_text())
    assert {(row["format"], "mlp" in row["name"]) for row in report["linears"]} == {
        ("pivot", True),
        ("sparse24", False),
    }
    cli("verify", out)
    assert torch.isfinite(compressor.load(out)(torch.arange(3, 19)[None]).logits).all()


def test_tuning_trains_the_factors(cli, demo_model, rows, tmp_path):
    plain = lowrank(cli, demo_model, tmp_path / "plain", rows, method="svd_llm")
    tuned = lowrank(cli, demo_model, tmp_path / "tuned", rows, "--tune", 24, method="svd_llm")
    assert [row["entry"] for row in plain["linears"]] == [row["entry"] for row in tuned["linears"]]
    assert tuned["blocks"][0]["error"] < plain["blocks"][0]["error"]


def test_training_the_exported_parameters_lowers_the_loss(cli, demo_model, rows, tmp_path):
    lowrank(cli, demo_model, tmp_path / "out", rows, method="welore", keep="50%")
    names = cli("export", tmp_path / "out", "--trainable", "lrc").stdout.split()
    model = compressor.load(tmp_path / "out", dtype=torch.float32)
    parameters = dict(model.named_parameters())
    assert set(names) == {name for name in parameters if name.endswith((".weight_v", ".weight_c"))}
    frozen = {
        name: parameter.clone() for name, parameter in parameters.items() if name not in names
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    ids = torch.tensor([json.loads(line)["input_ids"] for line in rows.read_text().splitlines()])
    optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    for name, before in frozen.items():
        assert torch.equal(before, parameters[name])


def test_what_does_not_belong_together_is_refused_in_one_line(cli, demo_model, rows, tmp_path):
    out, plan = tmp_path / "out", tmp_path / "plan.toml"

    def refused(*arguments):
        done = cli(*arguments, "-q", code=2)
        assert not out.exists()
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "use compress lowrank" in refused("prune", demo_model, "-o", out, "--method", "svd_llm")
    assert "use compress prune" in refused(
        "lowrank", demo_model, "-o", out, "--method", "wanda", "--keep", "70%"
    )
    assert "give --keep" in refused("lowrank", demo_model, "-o", out)
    assert "keep" in refused("lowrank", demo_model, "-o", out, "--keep", "170%")
    assert "raise --keep" in refused(
        "lowrank", demo_model, "-o", out, "--keep", "0.1%", "--method", "svd"
    )
    assert "unknown ranks 'x'" in refused(
        "lowrank", demo_model, "-o", out, "--keep", "70%", "--ranks", "x"
    )
    wrong = ("--keep", "70%", "--ranks", "welore", "--set", "ranks.energy=2")
    assert "energy is 2" in refused("lowrank", demo_model, "--dry-run", *wrong)
    plan.write_text('version = 1\n[linears]\n"*" = { rank = 0 }\n')
    assert "rank 0 of model.layers.0.self_attn.q_proj" in refused(
        "lowrank", demo_model, "-o", out, "--plan", plan
    )
    assert "align is -1" in refused(
        "lowrank", demo_model, "-o", out, "--keep", "70%", "--set", "ranks.align=-1"
    )
    plan.write_text('version = 1\n[linears]\n"model.layers.0.mlp.up_proj" = { rank = 3 }\n')
    assert "give one of them" in refused(
        "lowrank", demo_model, "-o", out, "--keep", "70%", "--plan", plan
    )
    assert "the plan lacks" in refused("lowrank", demo_model, "-o", out, "--plan", plan)


def test_a_plan_cannot_make_a_linear_larger(cli, demo_model, rows, tmp_path):
    lowrank(cli, demo_model, tmp_path / "a", rows, method="svd")
    plan = tmp_path / "plan.toml"
    text = (tmp_path / "a" / "plan.toml").read_text().splitlines()
    plan.write_text(
        "\n".join(
            line.replace("rank = ", "rank = 9") if "0.self_attn.q" in line else line
            for line in text
        )
    )
    done = cli("lowrank", demo_model, "-o", tmp_path / "out", "--plan", plan, "-q", code=2)
    assert "factors are smaller than it from rank 1 to 112" in done.stderr


def test_what_cannot_be_kept_is_refused_before_any_work(cli, demo_model, tmp_path):
    for command in (
        ("lowrank", demo_model, "--dry-run"),
        ("plan", demo_model, "-o", tmp_path / "plan.toml"),
    ):
        done = cli(*command, "--keep", "1%", code=2)
        assert (
            "so few parameters leave model.layers.0.self_attn.o_proj without a rank" in done.stderr
        )
        assert "calibration" not in done.stderr


def test_the_plan_of_a_mixed_recipe_speaks_of_both(cli, demo_model, tmp_path):
    shown = cli("plan", demo_model, "-o", tmp_path / "plan.toml", "--recipe", "mixed").stdout
    assert "Parameters removed of every linear" in shown
    assert "parameters removed: 399760 of 786432, 50.83%" in shown
    assert "then: compress lowrank MODEL" in (tmp_path / "plan.toml").read_text()
    assert "zeros: 393216 of 786432" in cli("plan", demo_model, "-o", tmp_path / "b.toml").stdout


def test_the_old_name_of_fisher_is_accepted(cli, demo_model, rows, tmp_path):
    """On the command line, in a recipe and in the recipe of a folder."""
    lowrank(cli, demo_model, tmp_path / "new", rows, method="fisher")
    lowrank(cli, demo_model, tmp_path / "old", rows, method="kfac")
    text = (tmp_path / "new" / "recipe.toml").read_text()
    assert 'method = "fisher"' in text
    old = tmp_path / "old.toml"
    old.write_text(text.replace('"fisher"', '"kfac"'))
    cli("lowrank", demo_model, "-o", tmp_path / "again", "--recipe", old, "-q")
    for name in ("model.safetensors", "recipe.toml", "plan.toml"):
        expected = (tmp_path / "new" / name).read_bytes()
        assert (tmp_path / "old" / name).read_bytes() == expected
        assert (tmp_path / "again" / name).read_bytes() == expected
    cli("prune", demo_model, "--recipe", old, "--dry-run", code=2)
