"""Layer ratios on tiny models: scores against the whole model, exact totals, the guard, plans
through the command line.
"""

import json
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from compressor.allocation.guard import Trial, better
from compressor.allocation.sparsity import curve, ecoflap, leave_dense, owl
from compressor.allocation.sparsity.choose import share_zeros
from compressor.allocation.sparsity.direct import divergence_curves
from compressor.allocation.sparsity.fisher import error_curves, sampled_label_loss
from compressor.allocation.sparsity.uniform import uniform
from compressor.calibration import capture
from compressor.calibration.gradients import next_token_loss
from compressor.config.recipe import Recipe
from compressor.engine.plan import Prepared
from compressor.errors import NumericalError
from compressor.pattern import Pattern
from compressor.progress import silent
from compressor.run.check import plan_run
from compressor.run.pipeline import prune

CPU = torch.device("cpu")
IDS = torch.randint(
    3, 128, (8, 32), generator=torch.Generator().manual_seed(1)
)  # those of the fixture `rows`


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)


def begin(folder, rows, **settings):
    """A plan and its calibration states."""
    job = plan_run(
        Recipe(
            **{
                "model": str(folder),
                "pattern": "50%",
                "dataset": str(rows),
                "seq_len": 32,
                **settings,
            }
        ),
        None,
    )
    return job, capture.capture(job.skeleton, IDS, CPU)


def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- scores


def test_first_order_scores_are_those_of_automatic_differentiation(tiny, rows):
    job, states = begin(tiny("llama"), rows)
    skeleton, part = ecoflap.in_float32(job.skeleton, states, 10_000, CPU)
    found = ecoflap.first_order(job, skeleton, part, CPU, silent)
    weighted = ecoflap.first_order(job, skeleton, part, CPU, silent, weighted=True)
    model, norms, products = whole(tiny("llama")), {}, {}
    for batch in IDS.split(2):
        model.zero_grad()
        (next_token_loss(model(input_ids=batch).logits, batch) / batch.numel()).backward()
        for task in job.every:
            weight = model.get_submodule(task.linear.name).weight
            norms[task.linear.name] = norms.get(task.linear.name, 0) + weight.grad.norm().item() / 4
            products[task.linear.name] = (
                products.get(task.linear.name, 0)
                + (weight.abs() * weight.grad.abs()).sum().item() / 4
            )
    assert found == pytest.approx(norms, rel=1e-4)
    assert weighted == pytest.approx(products, rel=1e-4)


def test_zeroth_order_scores_estimate_the_norm_of_the_gradient(tiny, rows):
    job, states = begin(tiny("llama"), rows)
    skeleton, part = ecoflap.in_float32(job.skeleton, states, 1, CPU)  # one batch: one gradient
    evaluations = 64
    halves = ecoflap.zeroth_order(job, skeleton, part, CPU, silent, evaluations, 1e-3)
    exact = ecoflap.first_order(job, skeleton, part, CPU, silent)
    tokens, predicted = part.ids[0].numel(), part.ids[0][:, 1:].numel()
    for name, both in halves.items():
        estimate = sum(both) / evaluations / (tokens / predicted)
        assert estimate == pytest.approx(
            math.sqrt(2 / math.pi) * exact[name], rel=4 * 0.756 / math.sqrt(evaluations)
        ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_moved_weight_comes_back_bit_for_bit(tiny, rows, dtype):
    job, _ = begin(tiny("llama"), rows)
    skeleton = job.skeleton.in_dtype(dtype)
    skeleton.load_block(0, CPU)
    linear = skeleton.linears(0)[0]
    before, state = linear.get().clone(), torch.get_rng_state()
    moved = [
        linear.get().clone()
        for _ in ecoflap.there_and_back(linear, 1e-3, torch.Generator().manual_seed(0))
    ]
    assert torch.equal(linear.get(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(moved[0], before)
    if dtype is torch.float32:
        torch.testing.assert_close((moved[0] + moved[1]) / 2, before)
    steps = ecoflap.there_and_back(linear, 1e-3, torch.Generator().manual_seed(0))
    next(steps)
    steps.close()  # given up half-way
    assert torch.equal(linear.get(), before)


def test_noise_is_called_noise():
    steady = ecoflap._steadiness({f"l{n}": (float(n), n + 0.1) for n in range(8)}, 4)
    assert steady["rank_correlation"] == pytest.approx(1)
    assert "warning" not in steady
    noise = ecoflap._steadiness({f"l{n}": (float(n), float(n * 5 % 8)) for n in range(8)}, 4)
    assert "mostly noise" in noise["warning"]
    assert "one evaluation" in ecoflap._steadiness({"l": (1.0, 0.0)}, 1)["warning"]


def test_outlier_ratios_are_their_definition(tiny, rows):
    job, states = begin(tiny("llama"), rows, dtype="float32")
    found = owl._outlier_ratios(job, states, CPU, silent, 2.0)
    model, norms = whole(tiny("llama")), {}
    for task in job.every:
        model.get_submodule(task.linear.name).register_forward_pre_hook(
            lambda _, args, name=task.linear.name: norms.__setitem__(
                name, args[0].flatten(0, 1).norm(dim=0)
            )
        )
    model(input_ids=IDS)
    for tasks, ratio in zip(job.tasks, found, strict=True):
        scores = torch.cat(
            [
                (model.get_submodule(t.linear.name).weight.abs() * norms[t.linear.name]).flatten()
                for t in tasks
            ]
        )
        assert ratio == pytest.approx((scores > 2 * scores.mean()).float().mean().item(), abs=2e-4)


def test_error_curves_are_their_formula(tiny, rows):
    job, states = begin(tiny("llama"), rows)
    goal = Pattern.parse("2:4")
    found = error_curves(job, lambda _: [goal], states, CPU, silent, tokens=10_000, sampled=False)
    model, inputs, gradients, expected = whole(tiny("llama")), {}, {}, {}
    for task in job.every:
        module = model.get_submodule(task.linear.name)
        module.register_forward_pre_hook(
            lambda _, args, name=task.linear.name: inputs.__setitem__(name, args[0].detach())
        )
        module.register_full_backward_hook(
            lambda _, __, out, name=task.linear.name: gradients.__setitem__(name, out[0])
        )
    next_token_loss(model(input_ids=IDS).logits, IDS).backward()
    for name, x in inputs.items():
        weight = model.get_submodule(name).weight.detach()
        change = weight * goal.mask(weight.abs() * x.flatten(0, 1).norm(dim=0)) - weight
        along = torch.einsum("sti,oi,sto->st", x, change, gradients[name])
        expected[name] = along.square().sum().item() / (2 * IDS.numel())
    assert {name: errors[0] for name, errors in found.items()} == pytest.approx(expected, rel=2e-3)


def test_divergence_curves_are_those_of_the_whole_model(tiny, rows):
    job, states = begin(tiny("llama"), rows)
    goals = [Pattern.parse("2:4"), Pattern.parse("70%")]
    found = divergence_curves(job, lambda _: goals, states, CPU, silent, tokens=10_000)
    model = whole(tiny("llama"))
    with torch.no_grad():
        p = model(input_ids=IDS).logits.log_softmax(-1).flatten(0, 1)
        for name in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.k_proj"):
            weight, seen = model.get_submodule(name).weight, []
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            model(input_ids=IDS)
            handle.remove()
            original = weight.detach().clone()
            for goal, value in zip(goals, found[name], strict=True):
                weight.copy_(
                    original * goal.mask(original.abs() * seen[0].flatten(0, 1).norm(dim=0))
                )
                q = model(input_ids=IDS).logits.log_softmax(-1).flatten(0, 1)
                assert value == pytest.approx(
                    kl_div(q, p, log_target=True, reduction="sum").item() / IDS.numel(), rel=1e-3
                )
            weight.copy_(original)


def test_labels_of_the_model_follow_its_predictions():
    logits = torch.tensor([[[0.0, 3.0, 1.0]]]).expand(1, 4000, 3).clone().requires_grad_()
    sampled_label_loss(0)(logits, torch.zeros(1, 4000, dtype=torch.long)).backward()
    drawn = (
        (logits.grad - logits.detach().softmax(-1) < -1e-6).float().mean((0, 1))
    )  # softmax - one-hot
    assert drawn == pytest.approx(logits[0, 0].detach().softmax(-1), abs=0.03)


# --- plans


@pytest.mark.parametrize("pattern", ["50%", "61.7%"])
@pytest.mark.parametrize("settings", [
    {"ratios": "uniform"}, {"ratios": "owl"}, {"ratios": "ecoflap"}, {"ratios": "ecoflap",
    "ratio_options": {"score": "zeroth"}},
    {"ratios": "curve"}, {"ratios": "curve", "ratio_options": {"granularity": "block",
    "labels": "model"}},
    {"ratios": "curve", "ratio_options": {"direct": True, "tokens": 64}},
], ids=str)  # fmt: skip
def test_every_allocator_gives_exactly_the_zeros_asked_for(tiny, rows, settings, pattern):
    job, states = begin(tiny("llama"), rows, pattern=pattern, **settings)
    before = [batch.hidden.clone() for batch in states.hidden]
    weights = sum(task.linear.size for task in job.every)
    zeros = int(Pattern.parse(pattern).sparsity * weights)
    shares = job.choice.allocator.allocate(job, zeros, states, CPU, silent, **job.choice.options)[0]
    assert sum(shares.values()) == zeros
    assert all(0 <= shares[task.linear.name] <= task.linear.size for task in job.every)
    if settings["ratios"] == "ecoflap":
        most = zeros / weights + 0.1
        blocks = [
            (sum(shares[t.linear.name] for t in tasks), sum(t.linear.size for t in tasks))
            for tasks in job.tasks
        ]
        assert all(count <= most * size + 1 for count, size in blocks)
    assert all(torch.equal(was, now.hidden) for was, now in zip(before, states.hidden, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "falcon"])
def test_other_families(tiny, rows, family):
    job, states = begin(tiny(family), rows)
    zeros = sum(task.linear.size for task in job.every) // 2
    zeroth = ecoflap.allocate(job, zeros, states, CPU, silent, score="zeroth")[0]
    plans = [
        zeroth,
        *(module.allocate(job, zeros, states, CPU, silent)[0] for module in (owl, ecoflap, curve)),
    ]
    assert [sum(plan.values()) for plan in plans] == [zeros] * 4
    assert len({tuple(plan.values()) for plan in plans}) == 4


@pytest.mark.parametrize("module", [ecoflap, curve])
def test_no_group_is_sparser_than_allowed(tiny, rows, module):
    job, states = begin(tiny("llama"), rows)
    zeros = sum(task.linear.size for task in job.every) // 2
    shares, _ = module.allocate(
        job, zeros, states, CPU, silent, granularity="linear", max_sparsity=0.55
    )
    assert sum(shares.values()) == zeros
    assert all(shares[task.linear.name] <= 0.55 * task.linear.size + 1 for task in job.every)


def test_dense_fraction_stays_within_its_budget(tiny, rows):
    job, states = begin(tiny("llama"), rows, pattern="2:4", dense_fraction="20%")
    kept, facts = leave_dense.select(job, Fraction(1, 5), states, CPU, silent)
    sizes = {task.linear.name: task.linear.size for task in job.every}
    assert kept
    assert sum(sizes[name] for name in kept) <= sum(sizes.values()) / 5
    assert set(facts["errors"]) == set(sizes)


# --- the guard


@pytest.mark.parametrize(
    ("second", "taken"), [(0.1, "curve"), (0.3, "uniform"), (0.2, "uniform"), (math.nan, "uniform")]
)
def test_only_a_better_plan_is_taken(tiny, rows, second, taken):
    even, _ = begin(tiny("llama"), rows)
    other, _ = begin(tiny("llama"), rows)
    trial = SimpleNamespace(
        tokens=7, divergence=lambda job, progress: 0.2 if job is even else second
    )
    choice = better(trial, {"uniform": even, "curve": other}, {"by": "curve"}, silent)
    assert choice.plan is (other if taken == "curve" else even)
    assert choice.measured["taken"] == taken
    assert set(choice.measured["divergence"]) == {"uniform", "curve"}


def test_a_trial_is_the_divergence_of_the_model_that_prune_writes(tiny, rows, tmp_path):
    job, states = begin(tiny("llama"), rows, dtype="float32", method="sparsegpt")
    found = Trial(job, states, CPU).divergence(job)
    settings = dict(
        method="sparsegpt",
        pattern="50%",
        dtype="float32",
        dataset=str(rows),
        num_samples=8,
        seq_len=32,
    )
    prune(Recipe(str(tiny("llama")), **settings), tmp_path / "out")
    with torch.no_grad():
        p, q = (
            whole(path)(input_ids=IDS).logits.log_softmax(-1).flatten(0, 1)
            for path in (tiny("llama"), tmp_path / "out")
        )
    assert found == pytest.approx(
        kl_div(q, p, log_target=True, reduction="sum").item() / IDS.numel(), rel=1e-3
    )


def test_a_plan_that_is_refused_leaves_the_uniform_one(tiny, rows, monkeypatch):
    job, states = begin(tiny("llama"), rows, ratios="owl")
    monkeypatch.setattr(
        Trial,
        "divergence",
        lambda self, job, progress: float(len({str(t.target) for t in job.every}) > 1),
    )
    chosen = share_zeros(job, job.choice, states, CPU, Prepared(), silent)
    zeros = sum(task.linear.size for task in job.every) // 2
    assert {task.linear.name: task.target.zeros for task in chosen.plan.every} == uniform(
        job, zeros
    )
    assert chosen.measured["taken"] == "uniform"


# --- the command line


COMMON = ("--num-samples", 8, "--seq-len", 32, "-q")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "nowag", "sparsegpt"])
@pytest.mark.parametrize("refine", ["", "dsnot", "admm"])
def test_the_total_is_exact_to_one_weight(cli, tiny, rows, tmp_path, method, refine):
    refining = ["--refine", refine] if refine else []
    cli("prune", tiny("llama"), "-o", tmp_path / "out", "--method", method, "--pattern", "57.3%",
    "--ratios", "uniform",
        *refining, "--dataset", rows, *COMMON)  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    zeros = sum(
        round(row["sparsity"] * row["shape"][0] * row["shape"][1]) for row in report["linears"]
    )
    assert (
        zeros
        == int(Fraction(573, 1000) * report["totals"]["weights"])
        == report["allocation"]["zeros"]
    )


def test_both_divergences_are_printed_and_reported_and_the_output_reproduces(
    cli, tiny, rows, tmp_path
):
    done = cli("prune", tiny("llama"), "-o", tmp_path / "a", "--pattern", "60%", "--ratios",
    "curve", "--max-sparsity", "75%",
               "--dataset", rows, *COMMON[:-1])  # fmt: skip
    assert "KL to the dense model on 256 calibration tokens: uniform " in done.stdout
    assert ", curve " in done.stdout
    allocation = json.loads((tmp_path / "a" / "report.json").read_text())["allocation"]
    assert set(allocation["divergence"]) == {"uniform", "curve"}
    assert allocation["sparsities"][-1] == 0.75
    cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "b",
        "--recipe",
        tmp_path / "a" / "recipe.toml",
        "-q",
    )
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "plan.toml" in names
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in names
    )


def test_dense_fraction_leaves_linears_dense_and_says_so(cli, tiny, rows, tmp_path):
    cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "out",
        "--dense-fraction",
        "20%",
        "--dataset",
        rows,
        *COMMON,
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    if report["allocation"]["taken"] == "dense-fraction":
        left = [row["name"] for row in report["left_dense"] if row["reason"] == "--dense-fraction"]
        assert sorted(left) == report["allocation"]["dense"] != []
    assert all(row["format"] == "sparse24" for row in report["linears"])


@pytest.mark.parametrize(("arguments", "match"), [
    (["--ratios", "owl"], "--ratios shares out zeros, and 2:4 leaves none to share"),
    (["--pattern", "50%", "--ratios", "ecoflop"], "did you mean 'ecoflap'"),
    (["--pattern", "50%", "--dense-fraction", "10%"], "--dense-fraction is for n:m patterns"),
    (["--pattern", "50%", "--dense-fraction", "10%", "--ratios", "owl"],
    "--dense-fraction is for n:m patterns"),
    (["--dense-fraction", "110%"],
    "dense-fraction is '110%'; accepted: a fraction between 0 and 1 such as 10%"),
    (["--pattern", "50%", "--set", "ratios.tokens=9"],
    "ratios.tokens is an option of --ratios or --dense-fraction"),
    (["--pattern", "50%", "--ratios", "curve", "--set", "ratios.tokens=0"], "ratios.tokens is 0"),
    (["--pattern", "50%", "--ratios", "curve", "--set", "ratios.labels=x"],
    "ratios.labels is 'x'; accepted: text, model"),
    (["--pattern", "50%", "--ratios", "ecoflap", "--set", "ratios.score=x"],
    "ratios.score is 'x'; accepted: first, product"),
    (["--pattern", "50%", "--ratios", "ecoflap", "--set", "ratios.granularity=x"],
    "granularity is 'x'; accepted: block, linear"),
    (["--pattern", "50%", "--ratios", "owl", "--set", "ratios.spread=1"],
    "ratios.spread is 1.0; accepted: 0 or more"),
    (["--pattern", "50%", "--ratios", "owl", "--max-sparsity", "40%"],
    "max_sparsity 0.4 is below the sparsity asked for"),
    (["--pattern", "50%", "--ratios", "uniform", "--max-sparsity", "80%"],
    "ratios uniform has no option 'max_sparsity'"),
    (["--refine-only", "*q_proj"], "--refine-only '*q_proj' is for --refine, which is not given"),
    (["--refine", "lsq", "--refine-only", "*x"], "--refine-only '*x' matches no linear"),
    (["--plan", "nowhere.toml", "--pattern", "2:4"], "--pattern 2:4 would not be used"),
    (["--plan", "nowhere.toml"], "plan nowhere.toml does not exist"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused(cli, tiny, rows, tmp_path, arguments, match):
    done = cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "out",
        "--dataset",
        rows,
        *COMMON,
        *arguments,
        code=2,
    )
    assert match in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_refine_only_leaves_the_others_as_pruned(cli, tiny, rows, tmp_path):
    from safetensors.torch import load_file

    read = {}
    for name, more in {
        "plain": [],
        "all": ["--refine", "lsq"],
        "some": ["--refine", "lsq", "--refine-only", "*self_attn*"],
    }.items():
        cli(
            "prune",
            tiny("llama"),
            "-o",
            tmp_path / name,
            "--pattern",
            "50%",
            "--dataset",
            rows,
            *COMMON,
            *more,
        )
        read[name] = {
            key: value
            for file in (tmp_path / name).glob("*.safetensors")
            for key, value in load_file(file).items()
        }
    q, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(read["some"][q], read["all"][q])
    assert torch.equal(read["some"][gate], read["plain"][gate])
    assert not torch.equal(read["some"][q], read["plain"][q])


def test_uniform_ratios_of_magnitude_need_no_calibration(cli, tiny, tmp_path):
    cli(
        "prune",
        tiny("llama"),
        "-o",
        tmp_path / "out",
        "--method",
        "magnitude",
        "--pattern",
        "50%",
        "--ratios",
        "uniform",
        "-q",
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration_tokens"] == 0


def test_a_trial_tunes_where_the_run_does(cli, tiny, rows, tmp_path):
    asked = ["--pattern", "50%", "--ratios", "owl", "--tune", 1]
    cli("prune", tiny("llama"), "-o", tmp_path / "out", *asked, "--dataset", rows, *COMMON)
    divergence = json.loads((tmp_path / "out" / "report.json").read_text())["allocation"][
        "divergence"
    ]
    cli("prune", tiny("llama"), "-o", tmp_path / "bare", *asked[:-2], "--dataset", rows, *COMMON)
    assert (
        divergence["uniform"]
        < json.loads((tmp_path / "bare" / "report.json").read_text())["allocation"]["divergence"][
            "uniform"
        ]
    )


@pytest.mark.parametrize("module", [ecoflap, owl, curve])
def test_a_linear_that_nothing_reaches_is_named(tiny, rows, module, monkeypatch):
    job, states = begin(tiny("llama"), rows)
    lost = job.tasks[1][0].linear
    silent_module = torch.nn.Linear(64, 64, bias=False, dtype=lost.module.weight.dtype)
    real = type(job.skeleton).linears

    def linears(self, index):
        return [
            replace(one, module=silent_module) if one.name == lost.name else one
            for one in real(self, index)
        ]

    monkeypatch.setattr(type(job.skeleton), "linears", linears)
    silenced = replace(job.tasks[1][0], linear=replace(lost, module=silent_module))
    job = replace(job, tasks=(job.tasks[0], (silenced, *job.tasks[1][1:]), job.tasks[2]))
    with pytest.raises(NumericalError, match=f"{lost.name} saw no"):
        module.allocate(job, 40_000, states, CPU, silent)
