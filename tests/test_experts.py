"""Experts of a mixture: linears with statistics, names and forms of their own; routers stay dense,
nothing is left unsaid.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import compressor
from compressor.calibration import capture
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.engine.observe import FEW_TOKENS
from compressor.errors import CheckpointError, UsageError
from compressor.formats.pivot import Pivot
from compressor.model.experts import (
    Matrix,
    attach,
    expert_modules,
    matrices,
    run_experts,
    seeing_all_tokens,
)
from compressor.model.skeleton import Skeleton
from compressor.run.check import plan_run
from compressor.run.pipeline import prune
from compressor.stats import collecting
from compressor.tools.pack import pack
from compressor.tools.verify import verify

IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def recipe(folder, rows, **settings):
    return Recipe(
        str(folder), **{"dataset": str(rows), "num_samples": 8, "seq_len": 32, **settings}
    )


def entering_block(folder, index=0):
    """A skeleton, its block with the weights loaded, and the states and arguments that enter it."""
    skeleton = Skeleton(Reader(folder), dtype=torch.float32)
    states = capture.capture(skeleton, IDS, CPU)
    return skeleton, skeleton.load_block(index, CPU), states


def literal(weights, module, hidden, index):
    """Rows that reach each expert's matrices, token by token: those routed to it, and its inner
    activations of them.
    """
    inputs = {}
    for token, chosen in enumerate(index.tolist()):
        for expert in chosen:
            x = hidden[token]
            inner = module.act_fn(weights[f"{expert}.gate"] @ x) * (weights[f"{expert}.up"] @ x)
            inputs.setdefault(f"{expert}.gate", []).append(x)
            inputs.setdefault(f"{expert}.down", []).append(inner)
    return {name: torch.stack(rows) for name, rows in inputs.items()}


@pytest.mark.parametrize(
    ("family", "names"),
    [("mixtral", ("w1", "w3", "w2")), ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"))],
)
def test_statistics_are_those_of_each_expert(family, names, tiny):
    skeleton, block, states = entering_block(tiny(family))
    linears = {linear.name: linear for linear in skeleton.linears(0) if linear.experts}
    prefix = next(iter(linears)).split(".experts.")[0] + ".experts"
    weights = {
        f"{e}.{part}": linears[f"{prefix}.{e}.{name}"].get()
        for e in range(4)
        for part, name in zip(("gate", "up", "down"), names, strict=True)
    }
    module = expert_modules(block)[0][1]
    caught = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args))
    with collecting({name: linear.module for name, linear in linears.items()}, gram=True) as stats:
        capture.run(block, states.hidden[0], states.arguments[0])
    handle.remove()
    hidden, index, _ = caught[0]
    for name, rows in literal(weights, module, hidden, index).items():
        expert, part = name.split(".")
        ours = stats[f"{prefix}.{expert}.{names[0] if part == 'gate' else names[2]}"]
        assert ours.tokens == len(rows)
        torch.testing.assert_close(ours.norm, rows.norm(dim=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    first = next(name for name in stats if name.endswith(names[0]))
    assert (
        stats[first] is stats[first.replace(names[0], names[1])]
    )  # gate and up read the same tokens


def test_all_tokens_reach_every_expert_and_the_output_stays(tiny):
    skeleton, block, states = entering_block(tiny("qwen3_moe"))
    linears = {linear.name: linear.module for linear in skeleton.linears(0) if linear.experts}
    exact = capture.run(block, states.hidden[0], states.arguments[0]).hidden
    with seeing_all_tokens(block), collecting(linears) as stats:
        output = capture.run(block, states.hidden[0], states.arguments[0]).hidden
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)
    assert {inputs.tokens for inputs in stats.values()} == {IDS.numel()}
    assert stats.keys() == linears.keys()
    assert (
        len({id(stats[name]) for name in stats if not name.endswith("down_proj")}) == 1
    )  # one statistic for all that read the block's input
    assert torch.equal(capture.run(block, states.hidden[0], states.arguments[0]).hidden, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_run_experts_is_what_transformers_computes(dtype, implementation):
    from transformers import AutoConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    generator = torch.Generator().manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=48, num_local_experts=5
    )
    config._experts_implementation = "eager"
    module = MixtralExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    hidden = torch.randn(20, 32, generator=generator).to(dtype)
    index = torch.stack(
        [torch.randperm(4, generator=generator)[:2] for _ in range(20)]
    )  # nothing for the fifth
    weights = torch.rand(20, 2, generator=generator).to(dtype)
    pieces = {
        "gate_up_proj": [
            Matrix(f"{e}.{part}", "", None, e, slice(48 * n, 48 * n + 48))
            for e in range(5)
            for n, part in enumerate("gu")
        ],
        "down_proj": [Matrix(f"{e}.d", "", None, e, slice(0, 32)) for e in range(5)],
    }
    attach(module, pieces)
    with torch.no_grad():
        ours = run_experts(module, module.experts, hidden, index, weights)
        everything = run_experts(module, module.experts, hidden, index, weights, everything=True)
        theirs = ALL_EXPERTS_FUNCTIONS[implementation](module, hidden, index, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    torch.testing.assert_close(everything, theirs, rtol=0, atol=tolerance)


def test_layouts_that_are_not_understood_give_none():
    names = [(f"a.{e}.{part}.weight", f"*.{part}") for e in range(2) for part in ("up", "gate")]
    shapes = {name: (3, 8) for name, _ in names}
    found = matrices((2, 6, 8), False, names, shapes, ["*.gate", "*.up"])
    assert [(m.name, m.expert, m.rows.start) for m in found] == [
        ("a.0.gate", 0, 0),
        ("a.0.up", 0, 3),
        ("a.1.gate", 1, 0),
        ("a.1.up", 1, 3),
    ]
    assert (
        matrices((2, 7, 8), False, names, shapes, ["*.gate", "*.up"]) is None
    )  # rows do not add up
    assert (
        matrices((3, 6, 8), False, names, shapes, ["*.gate", "*.up"]) is None
    )  # an expert is missing
    assert matrices((2, 6, 9), False, names, shapes, ["*.gate", "*.up"]) is None
    assert (
        matrices((2, 6, 8), False, names, shapes, ["*.gate"]) is None
    )  # a tensor of another conversion
    assert matrices((2, 6, 8), True, names, shapes, ["*.gate", "*.up"]) is None
    assert (
        matrices((2, 6, 8), False, [("a.weight", None)], {"a.weight": (2, 6, 8)}, [])[1].name
        == "a.1"
    )
    assert matrices((2, 6, 8), False, [("a.weight", None)], {"a.weight": (6, 8)}, []) is None


def never_route(folder):
    """Let a qwen3_moe checkpoint send each token to one expert, never to expert 3: one of two
    opposite logits beats its 0.
    """
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
            tensors[name][1] = -tensors[name][0]
            tensors[name][3] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))


def test_an_expert_with_hardly_a_token_is_calibrated_on_all_of_them_and_listed(
    tiny, rows, tmp_path
):
    shutil.copytree(tiny("qwen3_moe"), tmp_path / "model")
    never_route(tmp_path / "model")
    report = prune(
        recipe(tmp_path / "model", rows, expert_tokens="routed", method="sparsegpt"),
        tmp_path / "out",
    )
    idle = {
        row.name
        for row in report.linears
        if row.note == f"fewer than {FEW_TOKENS} tokens were routed to it: calibrated on all"
    }
    assert "model.layers.1.mlp.experts.3.down_proj" in idle
    assert len(idle) < len(report.linears) / 2
    assert all(
        row.tokens == 256
        for row in report.linears
        if row.name in idle or ".experts." not in row.name
    )
    few = [row.tokens for row in report.linears if ".experts." in row.name and row.name not in idle]
    assert FEW_TOKENS <= min(few) <= max(few) <= 256
    compressor.load(tmp_path / "out")
    everything = prune(recipe(tmp_path / "model", rows, expert_tokens="all"), tmp_path / "all")
    assert {row.tokens for row in everything.linears} == {256}
    assert not any(row.note for row in everything.linears)


@pytest.mark.parametrize(
    ("family", "routers"),
    [
        ("qwen2_moe", ["mlp.gate.weight", "mlp.shared_expert_gate.weight"]),
        ("phimoe", ["block_sparse_moe.gate.weight"]),
    ],
)
def test_routers_and_gates_stay_dense_and_are_listed(family, routers, tiny, rows):
    job = plan_run(recipe(tiny(family), rows), None)
    reasons = {left.name: left.reason for left in job.left_dense}
    for router in routers:
        assert reasons[f"model.layers.0.{router}"] == "router"
    assert not any("gate.weight" in task.linear.tensor for task in job.every)


def test_experts_are_packed_together_or_not_at_all(cli, tiny, rows, tmp_path):
    report = prune(
        recipe(tiny("qwen3_moe"), rows, ignore=["model.layers.1.mlp.experts.2.*"]), tmp_path / "out"
    )
    forms = {row.name: (row.format, row.note) for row in report.linears}
    assert forms["model.layers.0.mlp.experts.1.up_proj"] == ("sparse24", "")
    assert forms["model.layers.1.mlp.experts.1.up_proj"] == (
        "dense",
        "zeros in place: other experts of the block are not packed",
    )
    assert forms["model.layers.1.self_attn.q_proj"] == ("sparse24", "")
    left = {entry.name: entry.reason for entry in report.left_dense}
    assert left["model.layers.1.mlp.experts.2.up_proj"] == "--ignore model.layers.1.mlp.experts.2.*"
    plan = cli(
        "prune", tiny("qwen3_moe"), "--dry-run", "--ignore", "model.layers.1.mlp.experts.2.*"
    ).stdout
    assert (
        f"{len(report.linears)} linears in 3 blocks would be pruned, {len(report.linears) - 9} "
        f"stored packed 2:4, 9 dense" in plan
    )
    cli("unpack", tmp_path / "out", "-o", tmp_path / "dense")
    with torch.no_grad():
        ours = compressor.load(tmp_path / "out", dtype=torch.float32)(IDS).logits
        plain = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
            .eval()(IDS)
            .logits
        )
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("family", "settings", "match"),
    [
        (
            "qwen3_moe",
            {"method": "armor", "ignore": ["*experts.2.*"]},
            "has some experts that stay dense, or a norm: factors cannot",
        ),
        (
            "gpt_oss",
            {"method": "armor", "ignore": ["*experts.2.down_proj"]},
            r"has some experts that stay dense.* leave them all dense with `ignore='\*experts\*'`",
        ),
        ("qwen3_moe", {"pattern": "2:5"}, "in_features 64 of"),
    ],
)
def test_what_experts_cannot_do_is_said_before_any_work(family, settings, match, tiny, rows):
    with pytest.raises(UsageError, match=match):
        plan_run(recipe(tiny(family), rows, **settings), None)


@pytest.mark.parametrize(
    ("family", "ignore"),
    [("qwen3_moe", []), ("qwen3_moe", ["*experts.2.up_proj"]), ("gpt_oss", [])],
)
def test_tuning_trains_experts_and_keeps_their_zeros(family, ignore, tiny, rows, tmp_path):
    plain = prune(recipe(tiny(family), rows, ignore=ignore), tmp_path / "plain")
    tuned = prune(recipe(tiny(family), rows, ignore=ignore, tune=1), tmp_path / "tuned")
    assert tuned.totals()["sparsity"] == plain.totals()["sparsity"]
    assert tuned.totals()["bytes"] == plain.totals()["bytes"]
    assert tuned.blocks[0].error < plain.blocks[0].error
    errors = [
        {row.name: row.error for row in report.linears if ".0.mlp.experts" in row.name}
        for report in (plain, tuned)
    ]
    assert all(
        errors[0][name] != errors[1][name] for name in errors[0]
    )  # every expert's matrix was trained
    compressor.load(tmp_path / "tuned")


def test_experts_in_one_tensor_are_pruned_in_place_where_some_stay_dense(tiny, rows, tmp_path):
    settings = {"ignore": ["*experts.1.down_proj"]}
    report = prune(recipe(tiny("gpt_oss"), rows, **settings), tmp_path / "out")
    notes = [row.note for row in report.linears if ".experts." in row.name]
    assert all("zeros in place: other experts of the block are not packed" in n for n in notes)
    assert not verify(tmp_path / "out")["problems"]
    before, after = (
        {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
        for folder in (tiny("gpt_oss"), tmp_path / "out")
    )
    for stack in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{stack}"
        old, new = before[name], after[name]  # [experts, in, out]
        assert old.dtype == new.dtype
        groups = (new.transpose(1, 2).reshape(4, new.shape[2], -1, 4) != 0).sum(-1)
        for expert in range(4):
            if (stack, expert) == ("down_proj", 1):
                assert torch.equal(new[expert], old[expert])
            else:
                assert int(groups[expert].max()) == 2
                kept = new[expert] != 0
                assert torch.equal(new[expert][kept], old[expert][kept])


def test_pack_takes_experts_together_or_lists_them(tiny, tmp_path):
    prune(Recipe(str(tiny("qwen3_moe")), method="magnitude", format="dense"), tmp_path / "dense")
    prune(Recipe(str(tiny("qwen3_moe")), method="magnitude"), tmp_path / "packed")
    done = pack(tmp_path / "dense", tmp_path / "out")
    assert {left.reason for left in done.left_dense} == {"router"}
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tmp_path / "packed" / "config.json"
    ).read_bytes()
    prune(
        Recipe(
            str(tiny("qwen3_moe")),
            method="magnitude",
            format="dense",
            ignore=["*.0.mlp.experts.1.up_proj"],
        ),
        tmp_path / "part",
    )
    done = pack(tmp_path / "part", tmp_path / "out2")
    left = {entry.name: entry.reason for entry in done.left_dense}
    assert "more than two non-zeros" in left["model.layers.0.mlp.experts.1.up_proj"]
    assert (
        left["model.layers.0.mlp.experts.0.up_proj"] == "other experts beside it that are not 2:4"
    )
    assert "model.layers.1.mlp.experts.0.up_proj" in done.packed
    compressor.load(tmp_path / "out2")


OFFLOAD = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("device_map", ["auto", OFFLOAD], ids=["auto", "disk"])
def test_packed_experts_generate_and_are_offloaded(tiny, tmp_path, device_map):
    prune(Recipe(str(tiny("qwen3_moe")), method="magnitude"), tmp_path / "out")
    plain = compressor.load(tmp_path / "out", dtype=torch.float32)
    moved = compressor.load(
        tmp_path / "out",
        dtype=torch.float32,
        device_map=device_map,
        offload_folder=tmp_path / "offload",
    )
    expected = plain.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
    assert torch.equal(moved.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False), expected)


def test_a_table_with_some_experts_only_is_refused(tiny, tmp_path):
    prune(Recipe(str(tiny("mixtral")), method="magnitude"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    modules = config["quantization_config"]["modules"]
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    entry = modules.pop(name)
    path.write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError,
        match=(
            r"matrices of model\.layers\.0\.mlp\.experts as packed, but not those of all its "
            r"experts"
        ),
    ):
        compressor.load(tmp_path / "out")
    modules[name], modules[name.replace("experts.1", "experts.9")] = entry, entry
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="not those of all its experts"):
        compressor.load(tmp_path / "out")


def with_products(folder, factored, experts, leaves):
    """The model of `folder` in float32, with the product in place of every weight that
    `factored` has of low rank.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored, original = Reader(factored), Reader(folder)

    def weight(name):
        if f"{name}.weight_pivots" not in stored.tensors:
            return original.read(f"{name}.weight").float()
        parts = {key: stored.read(f"{name}.weight_{key}") for key in ("v", "c", "pivots")}
        return Pivot.product(parts["v"].float(), parts["c"].float(), parts["pivots"])

    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.self_attn, leaf).weight.copy_(
                    weight(f"model.layers.{index}.self_attn.{leaf}")
                )
            for number in range(4):
                gate, up, down = (
                    weight(f"model.layers.{index}.{experts}.{number}.{leaf}") for leaf in leaves
                )
                block.mlp.experts.gate_up_proj[number] = torch.cat([gate, up])
                block.mlp.experts.down_proj[number] = down
    return model


@pytest.mark.parametrize("method", ["svd_llm", "fisher"])
@pytest.mark.parametrize(
    ("family", "experts", "leaves"),
    [
        ("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_factored_experts_reload_with_the_same_logits(
    family, experts, leaves, method, cli, tiny, rows, tmp_path
):
    out = tmp_path / "out"
    report = prune(recipe(tiny(family), rows, method=method, keep="60%"), out)
    forms = {row.name: row.format for row in report.linears}
    left = {one.name: one.reason for one in report.left_dense}
    every = [
        linear for index in range(3) for linear in Skeleton(Reader(tiny(family))).linears(index)
    ]
    assert {linear.name for linear in every} <= forms.keys() | left.keys()
    assert all(left.values())
    for module in {linear.experts for linear in every} - {
        ""
    }:  # all the matrices of a module, or none
        own = [linear.name for linear in every if linear.experts == module]
        assert {forms.get(name, "dense") for name in own} in ({"pivot"}, {"dense"})
    assert "pivot" in forms.values()
    assert report.allocation["parameters"] <= report.allocation["budget"]
    packed = compressor.load(out, dtype=torch.float32, runtime="packed")
    logits = packed(IDS).logits
    packed.save_pretrained(tmp_path / "saved")
    again = compressor.load(tmp_path / "saved", dtype=torch.float32, runtime="packed")
    assert torch.equal(again(IDS).logits, logits)
    torch.testing.assert_close(
        with_products(tiny(family), out, experts, leaves)(IDS).logits, logits, rtol=1e-4, atol=1e-4
    )
    cli("verify", out)
    cli("unpack", out, "-o", tmp_path / "dense")
    assert Reader(tmp_path / "dense").tensors == Reader(tiny(family)).tensors
