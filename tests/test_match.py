"""Matched targets: the weight that aims at the dense model's outputs, and runs that compress it."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compressor.config.recipe import Recipe
from compressor.engine import match, pairs
from compressor.engine.match import compress_matched, correction, matched, missed
from compressor.engine.memory import hidden_bytes
from compressor.errors import CheckpointError, DataError, NumericalError, UsageError
from compressor.methods import method_module
from compressor.pattern import Pattern
from compressor.run import pipeline, room
from compressor.run.check import plan_run
from compressor.stats import InputStats
from compressor.tools.verify import verify
from tests.families import build
from tests.test_distributed import in_processes
from tests.test_held_out import tensors
from tests.test_resume import contents, stop_after

# --- the formula


def case(seed=0, tokens=600, columns=24, rows=10):
    """A weight, inputs in the dense model, those in the compressed one, and statistics of these."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, columns, generator=generator) + 0.3
    seen = dense + 0.3 * torch.randn(tokens, columns, generator=generator) + 0.2 * dense.roll(1, 1)
    return torch.randn(rows, columns, generator=generator), dense, seen, statistics(seen, dense)


def statistics(seen, dense):
    stats = InputStats(seen.shape[1], gram=True, cross=True)
    for x, there in zip(seen.split(100), dense.split(100), strict=True):
        stats.update(x)
        stats.add_cross(x, there)
    return stats


def literal(weight, dense, seen, strength, damping):
    """W*, row by row and token by token, in float64."""
    gram = sum(torch.outer(x, x) for x in seen.double())
    ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    target = torch.empty_like(weight, dtype=torch.float64)
    for number, row in enumerate(weight.double()):
        wanted = sum(
            x * ((there - x) @ row) for x, there in zip(seen.double(), dense.double(), strict=True)
        )
        target[number] = row + strength * torch.linalg.solve(gram + ridge, wanted)
    return target


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_literal_twin(strength, dtype):
    weight, dense, seen, stats = case()
    weight = weight.to(dtype)
    found = matched(weight, correction(weight, stats), strength)
    expected = literal(weight, dense, seen, strength, 0.01)
    assert found.dtype == dtype
    within = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 0}
    torch.testing.assert_close(found.double(), expected, **within)


def test_without_damping_it_is_the_least_squares_weight_of_the_dense_outputs():
    weight, dense, seen, stats = case()
    expected = torch.linalg.lstsq(seen.double(), dense.double() @ weight.double().T).solution.T
    found = matched(weight, correction(weight, stats, damping=0.0), 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_error_against_the_dense_model_differs_by_a_constant():
    weight, dense, seen, _ = (one.double() if torch.is_tensor(one) else one for one in case())
    target = literal(weight, dense, seen, 1, 0.0)
    generator = torch.Generator().manual_seed(1)
    gaps = []
    for _ in range(3):
        other = weight * (torch.rand(weight.shape, generator=generator) < 0.5)
        gaps.append(
            (dense @ weight.T - seen @ other.T).square().sum()
            - (seen @ (target - other).T).square().sum()
        )
    assert gaps[0] > 0
    torch.testing.assert_close(gaps[0], gaps[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(gaps[0], gaps[2], rtol=1e-10, atol=0)


def test_nothing_to_correct_and_inputs_that_are_zero_leave_the_weight():
    weight, _, seen, _ = case()
    for x in (seen, torch.zeros_like(seen)):
        assert torch.equal(matched(weight, correction(weight, statistics(x, x)), 1), weight)


def test_a_gram_matrix_without_rank_needs_damping():
    weight, dense, seen, _ = case(tokens=5)
    stats = statistics(seen, dense)
    assert bool(torch.isfinite(correction(weight, stats)).all())
    stats.gram.zero_()
    with pytest.raises(NumericalError, match="leave out `match`"):
        correction(weight, stats, damping=0.0)


# --- the choice of a strength


@pytest.mark.parametrize("moved", [-1, 0.4, 0.6, 1])
def test_auto_takes_what_is_nearest_to_the_dense_outputs_on_what_is_held_out(moved):
    """Held-out rows that differ from those of the calibration: the other way, less, or not."""
    weight, dense, seen, stats = case(rows=16)
    _, other, changed, _ = case(seed=1)
    stats.held_out, stats.held_out_dense = other + moved * (changed - other), other
    method, pattern = method_module("sparsegpt"), Pattern.parse("2:4")
    task = SimpleNamespace(
        linear=SimpleNamespace(name="x"), method=method, chosen=pattern, options={}, refined=False
    )
    plan = SimpleNamespace(strengths=(0.0, 0.25, 0.5, 0.75), refine=None)
    form = compress_matched(plan, task, weight, stats)
    errors, pruned = {}, {}
    for strength in plan.strengths:
        target = weight + strength * (literal(weight, dense, seen, 1, 0.01).float() - weight)
        pruned[strength] = method.compress(target, stats, pattern).weight
        outputs = stats.held_out.double() @ pruned[strength].double().T
        errors[strength] = (other.double() @ weight.double().T - outputs).square().sum().item()
    best = min(errors, key=errors.get)
    assert best == {-1: 0, 0.4: 0.25, 0.6: 0.5, 1: 0.75}[moved]
    assert form.note == f"matched with strength {best:g}"
    assert missed(weight, form.weight, stats) == pytest.approx(errors[best], rel=1e-4)
    torch.testing.assert_close(form.weight, pruned[best], rtol=1e-3, atol=1e-4)


# --- whole runs

RUNS = {
    "pruned": {"method": "sparsegpt", "match": "0.5"},
    "auto": {"method": "sparsegpt", "match": "auto", "num_samples": 6, "held_out": "25%"},
    "refined": {"method": "wanda", "refine": "lsq", "match": "1", "refine_only": ["*mlp*"]},
    "lowrank": {"method": "svd_llm", "keep": "60%", "match": "0.5"},
    "tuned": {"method": "sparsegpt", "match": "0.5", "tune": 1},
    "experts": {"method": "sparsegpt", "match": "0.5", "family": "qwen3_moe"},
}


@pytest.fixture(autouse=True)
def batches_of_two_rows(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)


@pytest.fixture
def recipe(tiny, rows):
    def make(case="pruned", **more):
        settings = {"num_samples": 8, "seq_len": 32, **RUNS[case], **more}
        model = settings.pop("model", None) or tiny(settings.pop("family", "llama"))
        return Recipe(str(model), **{"dataset": str(rows), **settings})

    return make


@torch.no_grad()
def reads(model, ids, name):
    """What the linear reads when the whole model runs on `ids`, `[tokens, in]` in float64."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: found.append(args[0].flatten(0, -2).double())
    )
    model(ids)
    handle.remove()
    return torch.cat(found)


def order_of(block, names, model, ids):
    """The names of the block's linears in the order in which the model calls them."""
    called = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: called.append(n))
        for name in names
        if name.startswith(block)
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize(
    ("family", "path", "settings"),
    [
        ("llama", "model.layers", RUNS["pruned"]),
        ("llama", "model.layers", RUNS["auto"]),
        ("llama", "model.layers", RUNS["lowrank"]),
        ("gpt2", "transformer.h", RUNS["pruned"]),
        ("qwen3_moe", "model.layers", RUNS["pruned"]),
    ],
    ids=["llama", "auto", "lowrank", "gpt2", "experts"],
)
def test_each_linear_aims_at_the_dense_model_with_those_before_it_compressed(
    monkeypatch, recipe, rows, tmp_path, family, path, settings
):
    """Against copies of the whole model, of which the part before a linear is compressed."""
    from transformers import AutoModelForCausalLM

    folder, targets, held_out, real = tmp_path / "model", {}, {}, match.compress_weight
    build(family, folder, torch.float32)

    def keeping(plan, task, weight, stats):
        name = task.linear.path or task.linear.name
        targets[name], held_out[name] = weight, (stats.held_out, stats.held_out_dense)
        return real(plan, task, weight, stats)

    monkeypatch.setattr(match, "compress_weight", keeping)
    asked = recipe(model=str(folder), format="dense", **settings)
    report = pipeline.prune(asked, tmp_path / "out")
    dense, compressed = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval()
        for one in (folder, tmp_path / "out")
    )
    ids = torch.tensor([json.loads(line)["input_ids"] for line in rows.read_text().splitlines()])
    ids, others = ids[: asked.num_samples], ids[asked.num_samples :]
    strength = 0.75 if asked.match == "auto" else float(asked.match)  # auto tries it last
    mixed = copy.deepcopy(dense)
    for index in range(len(dense.get_submodule(path))):
        block = f"{path}.{index}."
        for name in order_of(block, targets, dense, ids):
            linear = dense.get_submodule(name)
            weight = linear.weight.T if family == "gpt2" else linear.weight
            x, there = reads(mixed, ids, name), reads(dense, ids, name)
            shift = torch.linalg.solve(
                x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(x.shape[1]),
                x.T @ (there - x) @ weight.double().T,
            )
            expected = weight.double() + strength * shift.T
            gap = (targets[name].double() - expected).norm() / shift.norm()
            first = index == 0 and torch.equal(x, there)
            assert first or gap < 1e-3, name
            if len(others):
                for model, seen in zip((mixed, dense), held_out[name], strict=True):
                    expected = reads(model, others, name).float()
                    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
            mixed.get_submodule(name).weight.data = compressed.get_submodule(name).weight.data
        mixed.get_submodule(block[:-1]).load_state_dict(
            compressed.get_submodule(block[:-1]).state_dict()
        )
    unmatched = [row.name for row in report.linears if row.note == pairs.UNMATCHED]
    assert len(targets) + len(unmatched) == len(report.linears)
    assert all(".experts." in name for name in unmatched)
    assert bool(unmatched) == (family == "qwen3_moe")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_products_that_nobody_reads_are_not_missed(monkeypatch, recipe, tmp_path, family):
    asked = recipe(family=family)
    pipeline.prune(asked, tmp_path / "spared")
    monkeypatch.setattr(pairs, "not_computed", lambda _: nullcontext())
    pipeline.prune(asked, tmp_path / "whole")
    assert contents(tmp_path / "spared") == contents(tmp_path / "whole")


def test_it_comes_nearer_to_the_dense_model(demo_model, tmp_path):
    """On rows that the demo's model wrote, held out and not."""
    from transformers import AutoModelForCausalLM

    asked = {"num_samples": 16, "seq_len": 64, "method": "sparsegpt", "dtype": "float32"}
    for strength in ("0", "0.5", "auto"):
        recipe = Recipe(str(demo_model), match=strength, format="dense", **asked)
        pipeline.prune(recipe, tmp_path / strength)
    ids = pipeline.tokens.sample_from_model(
        demo_model, device="cpu", num_samples=16, seq_len=64, seed=3
    )

    @torch.no_grad()
    def outputs(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(ids).logits.log_softmax(-1)

    exact = outputs(demo_model)
    lost = {
        strength: (exact.exp() * (exact - outputs(tmp_path / strength))).sum(-1).mean().item()
        for strength in ("0", "0.5", "auto")
    }
    assert lost["0.5"] < lost["0"]
    assert lost["auto"] < lost["0"]


def test_the_command_line_takes_it_and_zero_is_off(cli, recipe, tmp_path):
    asked = recipe()
    given = (asked.model, "--dataset", asked.dataset, "--num-samples", 6, "--seq-len", 32)
    for name, more in {
        "plain": (), "zero": ("--match", 0), "half": ("--match", 0.5),
        "auto": ("--match", "auto", "--held-out", "25%"),
    }.items():  # fmt: skip
        cli("prune", *given, "-o", tmp_path / name, "--method", "sparsegpt", *more)
    cli("lowrank", *given, "-o", tmp_path / "low", "--method", "svd_llm", "--keep", "60%",
        "--match", "0.25")  # fmt: skip
    assert contents(tmp_path / "zero") == contents(tmp_path / "plain")
    assert len({str(tensors(tmp_path / name)) for name in ("plain", "half", "auto")}) == 3
    report = json.loads((tmp_path / "auto" / "report.json").read_text())
    notes = {row["note"] for row in report["linears"]}
    assert notes <= {f"matched with strength {one}" for one in ("0", "0.25", "0.5", "0.75")}
    for name in ("half", "auto", "low"):
        verify(tmp_path / name)


@pytest.mark.parametrize("case", ["pruned", "auto", "refined", "tuned", "experts"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_a_run_that_was_cut_off_goes_on(monkeypatch, case, on_disk, recipe, tmp_path):
    whole = pipeline.prune(recipe(case), tmp_path / "whole")
    if on_disk:
        monkeypatch.setattr(
            pipeline, "choose_home", lambda plan, tokens, device, limit, folder, beside: folder
        )
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe(case), tmp_path / "out", progress=stop_after(1))
    report = pipeline.prune(recipe(case), tmp_path / "out")
    assert report.run["resumed_at_block"] == 1
    assert report.linears == whole.linears
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("case", ["auto", "lowrank", "experts"])
def test_two_processes_write_the_bytes_of_one(case, recipe, tmp_path):
    job = recipe(case)
    codes, said = in_processes(2, lambda rank: pipeline.prune(job, tmp_path / "two"))
    assert codes == [0, 0], said
    pipeline.prune(job, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_shared_zeros_are_tried_without_it(recipe, tmp_path):
    asked = recipe("auto", pattern="50%", ratios="owl")
    report = pipeline.prune(asked, tmp_path / "out")
    plain = pipeline.prune(replace(asked, match=""), tmp_path / "plain")
    assert report.allocation == plain.allocation
    assert tensors(tmp_path / "out") != tensors(tmp_path / "plain")


def test_the_second_stream_and_the_dense_weights_are_counted(recipe):
    asked = recipe()
    plan, plain = plan_run(asked, None), plan_run(replace(asked, match=""), None)
    assert hidden_bytes(plan, 100) == 2 * hidden_bytes(plain, 100)
    ours, theirs = (room.passes(each, 256, 64)[-1].work for each in (plan, plain))
    assert ours > theirs + 4 * max(task.linear.shape[1] for task in plan.every) ** 2


# --- what is refused


@pytest.mark.parametrize("text", ["2", "-0.1", "nan", "strong", "50%"])
def test_what_is_no_strength_is_refused(text, recipe):
    with pytest.raises(UsageError, match=f"`match` is '{text}'; accepted: a strength from 0 to 1"):
        plan_run(recipe(match=text), None)


@pytest.mark.parametrize(
    "asked",
    [
        {"method": "magnitude"},
        {"method": "wanda"},
        {"method": "wanda", "refine": "dsnot"},
        {"method": "svd", "keep": "60%"},
        {"method": "fisher", "keep": "60%"},
    ],
    ids=str,
)
def test_what_has_no_gram_matrix_is_refused(asked, recipe):
    with pytest.raises(UsageError, match=r"`match` is for methods .* lsq, swap or admm; .* not$"):
        plan_run(recipe(**asked), None)


def test_auto_without_held_out_rows_is_refused(recipe, tmp_path):
    with pytest.raises(UsageError, match="`held_out` 0 of 6 leaves none: raise it, or give a"):
        pipeline.prune(recipe("auto", held_out="0"), tmp_path / "out")
    with pytest.raises(DataError, match=r"the text has none left .* lower `num_samples`, or a"):
        pipeline.prune(recipe("auto", num_samples=8), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inputs_that_are_no_pairs_are_refused(monkeypatch, recipe, tmp_path):
    real, passes = pairs._read, []

    def fewer(*given):
        passes.append(given)
        return real(*given)[: len(passes)]

    monkeypatch.setattr(pairs, "_read", fewer)
    with pytest.raises(CheckpointError, match="q_proj reads 2 tokens in the dense model and 1 in"):
        pipeline.prune(recipe(), tmp_path / "out")
