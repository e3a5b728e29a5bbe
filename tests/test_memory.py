"""A run stays within the memory it may use, and the bytes of its result are the same."""

import shutil
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor import free_memory
from compressor.calibration.hidden_states import Batches
from compressor.config.recipe import Recipe
from compressor.engine import memory, observe
from compressor.engine.memory import gram_bytes, in_groups
from compressor.errors import UsageError
from compressor.run import pipeline
from compressor.stats import collecting
from tests.test_experts import never_route
from tests.test_resume import contents


def task(width, name=""):
    return SimpleNamespace(linear=SimpleNamespace(shape=(1, width), name=name))


@given(
    st.lists(
        st.tuples(st.sampled_from([16, 64, 2048]), st.integers(0, 5)), min_size=1, max_size=30
    ),
    st.integers(0, 1 << 26),
)
def test_groups_are_in_order_and_as_large_as_the_room_allows(linears, room):
    tasks = [task(width, f"linear{number}") for number, (width, _) in enumerate(linears)]
    inputs = {
        one.linear.name: 10_000 * one.linear.shape[1] + read
        for one, (_, read) in zip(tasks, linears, strict=True)
        if read
    }
    groups = in_groups(tasks, room, inputs)
    assert [one for group in groups for one in group] == tasks

    def sizes(group):
        return {inputs.get(one.linear.name, id(one)): gram_bytes(one) for one in group}.values()

    assert all(len(sizes(group)) == 1 or sum(sizes(group)) <= room for group in groups)
    assert all(sum(sizes([*group, after[0]])) > room for group, after in pairwise(groups))


CASES = {
    "sparsegpt": {"method": "sparsegpt"},
    "armor": {"method": "armor", "options": {"iterations": 2, "finish": 1, "block_size": 16}},
    "lsq": {"method": "wanda", "refine": "lsq"},
    "tuned": {"method": "sparsegpt", "tune": 1},
    "experts": {"method": "sparsegpt", "expert_tokens": "routed"},
    "wanda": {"method": "wanda"},
    "svd_llm": {"method": "svd_llm", "keep": "0.5"},
    "asvd": {"method": "asvd", "keep": "0.5", "ranks": "threshold"},
    "fisher": {"method": "fisher", "keep": "0.5"},
    "owl": {"pattern": "50%", "ratios": "owl"},
    "ecoflap": {"pattern": "50%", "ratios": "ecoflap"},
    "zeroth": {"pattern": "50%", "ratios": "ecoflap", "ratio_options": {"score": "zeroth"}},
    "curve": {"pattern": "50%", "ratios": "curve"},
    "direct": {"pattern": "50%", "ratios": "curve", "ratio_options": {"direct": True}},
}


SLOW = ["direct"]  # a pass over the rest of the model for every linear and level


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_too_little_memory_gives_the_same_bytes(monkeypatch, tiny, rows, tmp_path, case):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    settings = {"num_samples": 8, "seq_len": 32, **CASES[case]}
    shutil.copytree(tiny("qwen3_moe" if case == "experts" else "llama"), tmp_path / "model")
    if case == "experts":
        never_route(tmp_path / "model")
    recipe = Recipe(model=str(tmp_path / "model"), dataset=str(rows), **settings)
    homes, grams = [], []

    class Home(Batches):
        def __init__(self, device, home, name="hidden"):
            homes.append(home)
            super().__init__(device, home, name)

    def counting(linears, *, gram=False, **others):
        grams.append(len(linears) if gram else 0)
        return collecting(linears, gram=gram, **others)

    monkeypatch.setattr(pipeline, "Batches", Home)
    monkeypatch.setattr(observe, "collecting", counting)
    pipeline.prune(recipe, tmp_path / "whole", max_memory="100GB")
    most = max(grams)
    assert {str(home) for home in homes} == {"cpu"}
    homes.clear()
    grams.clear()
    monkeypatch.setattr(memory, "_left", lambda job, device, limit: 100)
    report = pipeline.prune(recipe, tmp_path / "out", max_memory="100GB")
    assert set(homes) == {tmp_path / ".out.partial"}
    assert max(grams) == min(most, 3)  # q, k and v read one tensor
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if case == "experts":
        assert any("tokens were routed to it" in row.note for row in report.linears)


def test_groups_are_as_large_as_what_max_memory_leaves(monkeypatch, tiny, rows, tmp_path):
    recipe = Recipe(
        model=str(tiny("llama")), dataset=str(rows), num_samples=8, seq_len=32, method="sparsegpt"
    )
    seen = []
    monkeypatch.setattr(
        observe, "in_groups", lambda *given: seen.append(in_groups(*given)) or seen[-1]
    )
    monkeypatch.setattr(memory, "_left", lambda job, device, limit: gram_bytes(task(64)) * 2)
    pipeline.prune(recipe, tmp_path / "out", max_memory="100GB")
    names = [[one.linear.name.rpartition(".")[2] for one in group] for group in seen[0]]
    assert names == [
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]  # down_proj is wider
    assert len(seen) == 3


def test_a_limit_that_one_block_breaks_is_refused(tiny, rows, tmp_path):
    recipe = Recipe(
        model=str(tiny("llama")), dataset=str(rows), num_samples=8, seq_len=32, method="sparsegpt"
    )
    with pytest.raises(
        UsageError,
        match="`max_memory` 1MB is too little: one block and the libraries take about "
        r"\d+\.\d\d [GM]B",
    ):
        pipeline.prune(recipe, tmp_path / "out", max_memory="1MB")
    assert not list(tmp_path.iterdir())


def groups(root, own, version, limit, used, cache):
    """A control group two levels deep, of which the outer one has the limit."""
    names = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    outer = root / ("memory" if version == 1 else "") / "jobs"
    (outer / "mine").mkdir(parents=True)
    own.write_text("9:cpu:/x\n4:memory:/jobs/mine\n" if version == 1 else "0::/jobs/mine\n")
    for folder, most in ((outer, limit), (outer / "mine", "max")):
        (folder / names[0]).write_text(f"{most}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_control_groups_leave(tmp_path, version, monkeypatch):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    assert free_memory._left_by_groups(root, own) == []
    groups(root, own, version, 10**6, 700_000, 200_000)
    assert free_memory._left_by_groups(root, own) == [500_000]
    monkeypatch.setattr(free_memory, "_ROOT", root)
    monkeypatch.setattr(free_memory, "_OWN", own)
    assert free_memory.free_memory() == 500_000
