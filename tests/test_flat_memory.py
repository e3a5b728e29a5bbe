"""Peak memory does not grow with the number of blocks, whatever the method and the allocator, and
it is counted before a run begins.
"""

import ctypes
import gc
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.allocation.rank import largest_rank
from compressor.calibration import capture
from compressor.checkpoint.work_state import work_path
from compressor.config.recipe import Recipe
from compressor.engine.factor_store import Factored
from compressor.engine.memory import factoring_bytes, hidden_bytes
from compressor.engine.task import Rank, Task
from compressor.errors import OutputError, UsageError
from compressor.methods import method_module
from compressor.model.skeleton import Skeleton
from compressor.run import pipeline, room
from compressor.run.check import plan_run
from compressor.stats import InputStats
from tests.test_resume import stop_after

SHARES = {"method": "wanda", "pattern": "50%"}
CASES = {
    "wanda": {"method": "wanda"},
    "svd_llm": {"method": "svd_llm", "keep": "0.5"},
    "fisher": {"method": "fisher", "keep": "0.5"},
    "owl": {**SHARES, "ratios": "owl"},
    "ecoflap": {**SHARES, "ratios": "ecoflap"},
    "magnitude": {"method": "magnitude"},
    "sparsegpt": {"method": "sparsegpt"},
    "nowag": {"method": "nowag"},
    "armor": {"method": "armor", "options": {"iterations": 2, "finish": 1, "block_size": 16}},
    "dsnot": {**SHARES, "refine": "dsnot"},
    "admm": {"method": "wanda", "refine": "admm"},
    "svd": {"method": "svd", "keep": "0.5"},
    "welore": {"method": "welore", "keep": "0.7"},
    "asvd": {"method": "asvd", "keep": "0.5"},
    "spectra": {"method": "svd_llm", "keep": "0.5", "ranks": "threshold"},
    "uniform": {**SHARES, "ratios": "uniform"},
    "zeroth": {**SHARES, "ratios": "ecoflap", "ratio_options": {"score": "zeroth"}},
    "curve": {**SHARES, "ratios": "curve"},
    "left dense": {"method": "wanda", "dense_fraction": "10%"},
    "tuned": {"method": "wanda", "tune": 1},
    "matched": {"method": "sparsegpt", "match": "0.5"},
}
CORE = [
    "wanda",
    "svd_llm",
    "fisher",
    "owl",
    "ecoflap",
    "matched",
]  # in every run; the others are slow
SEQ_LEN, SAMPLES, BATCH_TOKENS = 128, 8, 256
RECORDS = 300_000  # what a run of a few blocks keeps beside tensors
glibc = pytest.mark.skipif(sys.platform != "linux", reason="counts what glibc has given out")


class _Info(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@cache
def _mallinfo():
    """Opened once: a library that is opened is memory too, and lies in a cycle."""
    function = ctypes.CDLL("libc.so.6").mallinfo2
    function.restype = _Info
    return function


def given_out():
    """Bytes that malloc has given out and not got back."""
    info = _mallinfo()()
    return info.uordblks + info.hblkhd


class Peak(TorchDispatchMode):
    """The most that is given out at once inside the `with`, beyond what was before: looked at after
    every operation of torch, so that it is the same in every run.
    """

    def __enter__(self):
        gc.collect()
        self.before = self.most = given_out()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, given_out())
        return result

    @property
    def bytes(self):
        return self.most - self.before


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A function: number of blocks -> folder of a random Llama of that depth."""
    made = {}

    def make(blocks):
        if blocks not in made:
            made[blocks] = tmp_path_factory.mktemp(f"blocks{blocks}")
            torch.manual_seed(0)
            config = LlamaConfig(
                hidden_size=128, intermediate_size=256, vocab_size=256, num_hidden_layers=blocks,
                num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
            )  # fmt: skip
            LlamaForCausalLM(config).bfloat16().save_pretrained(made[blocks])
        return made[blocks]

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    ids = torch.randint(3, 256, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("".join(f'{{"input_ids": {row}}}\n' for row in ids.tolist()))
    return path


@pytest.fixture(autouse=True)
def four_batches(monkeypatch):
    monkeypatch.setattr(capture, "_BATCH_TOKENS", BATCH_TOKENS)


@pytest.fixture(scope="module")
def fresh():
    """A process of its own: what `mallinfo2` walks through grows with all that ran before in one,
    and each look at it would take longer than what is looked at.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def recipe(folder, text, case):
    return Recipe(
        model=str(folder), dataset=str(text), num_samples=SAMPLES, seq_len=SEQ_LEN, **CASES[case]
    )


def needs_of(plan):
    """Tokens of the calibration with what is held out beside it, and what is counted for them."""
    tokens = (SAMPLES + plan.further(SAMPLES)) * SEQ_LEN
    return tokens, room.passes(plan, tokens, BATCH_TOKENS)


def peaks(first, models, text, case, output):
    """Peak bytes of a run over each of `models`, after one over `first`: what is loaded once."""
    capture._BATCH_TOKENS = BATCH_TOKENS
    pipeline.prune(recipe(first, text, case), output / "first")
    found = []
    for model in models:
        with Peak() as peak:
            pipeline.prune(recipe(model, text, case), output / model.name, max_memory="9GB")
        found.append(peak.bytes)
    return found


@glibc
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in CORE)) for case in CASES]
)
def test_memory_is_flat_in_depth_and_counted(case, deep, text, tmp_path, fresh):
    depths = (2, 8) if case in CORE else (4, 24)
    models = [deep(depth) for depth in depths]
    few, many = fresh.submit(peaks, deep(1), models, text, case, tmp_path).result()
    records = 20_000 * (depths[1] - depths[0])  # modules and rows of the report, a block
    assert many <= 1.05 * few + records
    plan = plan_run(recipe(models[0], text, case), None)
    tokens, needs = needs_of(plan)
    counted = max(each.work + each.states for each in needs)
    hidden = hidden_bytes(plan, tokens)
    print(f"{case}: {few / 1e6:.2f} MB, x{many / few:.3f}, counted {counted / few:.2f}")
    assert few <= counted + hidden + RECORDS


def factored(name, shape, rank):
    """The most that is held at once, beyond the weight and its statistics, while it is factored.
    The second time: torch keeps what its products are made in.
    """
    torch.manual_seed(0)
    rows, columns = shape
    weight, inputs, outputs = (torch.randn(*of) for of in (shape, (columns,) * 2, (rows,) * 2))
    stats = InputStats(columns, gram=True)
    stats.update(inputs)
    outputs, method = outputs.T @ outputs, method_module(name)
    for _ in range(2):
        with Peak() as peak:
            if method.NEEDS_GRADIENTS:
                found = method.decompose(weight, rank, stats.gram, outputs)[0].form(torch.bfloat16)
            else:
                found = method.compress(weight, stats, rank)
            del found
    return peak.bytes


@glibc
@pytest.mark.parametrize("shape", [(256, 256), (128, 512), (1024, 64)])
@pytest.mark.parametrize("name", ["asvd", "svd_llm", "fisher"])
def test_what_factoring_holds_is_counted(name, shape, fresh):
    method, largest = method_module(name), largest_rank(shape)
    for rank in (largest // 8, largest // 2, largest):
        counted = factoring_bytes(Task(SimpleNamespace(shape=shape), method, {}, Rank(rank)))
        held = fresh.submit(factored, name, shape, rank).result()
        print(f"{name} {shape} rank {rank}: {held / 1e6:.2f} MB, counted {counted / held:.2f}")
        assert held <= counted
        # nothing sees what LAPACK takes inside one operation: of low ranks that is most
        assert counted <= (1.4 if rank >= largest // 2 else 2) * held


FISHER = "the inputs and gradients of a block and the libraries take about"


def test_what_does_not_fit_is_refused_before_work_and_costs_no_state(
    monkeypatch, deep, text, tmp_path
):
    monkeypatch.setattr("compressor.allocation.rank.fisher_factors.TOKENS", 1 << 40)
    one, output = replace(recipe(deep(2), text, "fisher"), num_samples=1 << 16), tmp_path / "out"
    with pytest.raises(UsageError, match=f"`max_memory` 4GB is too little: {FISHER} .* GB; take"):
        pipeline.prune(one, output, max_memory="4GB")
    monkeypatch.setattr("compressor.engine.memory.free_memory", lambda: 10**9)
    with pytest.raises(UsageError, match=f"the free memory, .* GB, is too little: {FISHER} .* say"):
        pipeline.prune(one, output)
    assert not list(tmp_path.iterdir())
    small = recipe(deep(2), text, "wanda")
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(small, output, progress=stop_after(1))
    state = sorted(path.name for path in work_path(output).iterdir())
    monkeypatch.setattr("compressor.engine.memory.free_memory", lambda: 1)
    with pytest.raises(UsageError, match="is too little: one block and the libraries take about"):
        pipeline.prune(small, output)
    assert sorted(path.name for path in work_path(output).iterdir()) == state


def test_a_disk_that_is_too_small_is_refused_before_work(monkeypatch, deep, text, tmp_path):
    one, output = recipe(deep(4), text, "fisher"), tmp_path / "out"
    plan = plan_run(one, output)
    tokens, needs = needs_of(plan)
    needed = plan.reader.nbytes + room.disk_bytes(plan, needs, tokens)
    assert needed > plan.reader.nbytes + 4 * SAMPLES * SEQ_LEN * 128 * 4  # the inputs of each block
    for free, fits in ((needed - 1, False), (needed, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if fits:
            pipeline.prune(one, output)
        else:
            with pytest.raises(OutputError, match=r"kept on disk meanwhile may need .*MB; .* free"):
                pipeline.prune(one, output)
            assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["fisher", "zeroth", "matched"])
def test_no_more_is_on_disk_than_was_counted(monkeypatch, deep, text, tmp_path, case):
    one, output, most = recipe(deep(4), text, case), tmp_path / "out", [0]
    monkeypatch.setattr(
        pipeline, "choose_home", lambda job, tokens, device, limit, folder, beside: folder
    )

    def look(real):
        def looking(*given, **keywords):
            files = [path for path in work_path(output).rglob("*") if path.is_file()]
            most[0] = max(most[0], sum(path.stat().st_size for path in files))
            return real(*given, **keywords)

        return looking

    monkeypatch.setattr(Skeleton, "free_block", look(Skeleton.free_block))
    monkeypatch.setattr(Factored, "drop", look(Factored.drop))
    pipeline.prune(one, output)
    plan = plan_run(one, None)
    tokens, needs = needs_of(plan)
    counted = plan.reader.nbytes + room.disk_bytes(plan, needs, tokens)
    print(f"{case}: {most[0]} on disk, counted {counted / most[0]:.2f}")
    assert 0 < most[0] <= counted
