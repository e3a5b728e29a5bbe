"""The ops without a GPU: layouts, the twin behind each op, gradients, errors, torch.compile, and
the choice of a kernel.
"""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor_kernels import backend, kernel_config, layouts, reference
from compressor_kernels.armor import armor
from compressor_kernels.fragments import from_fragments, to_fragments
from compressor_kernels.fused_projections import fuse
from compressor_kernels.linear import ArmorLinear, LowRankLinear, Sparse24Linear
from compressor_kernels.lowrank import lowrank
from compressor_kernels.packing import pack24
from compressor_kernels.sparse24 import new_semaphore, sparse24, sparse24_fragments
from tests.test_packing import sparse

BF16 = torch.bfloat16


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([torch.float16, torch.bfloat16]))
def test_fragments_are_lossless(rows, groups, dtype):
    packed = pack24(sparse(rows, 4 * groups, rows + groups, dtype))
    again = from_fragments(to_fragments(*packed), rows, 4 * groups)
    assert torch.equal(again[0], packed[0])
    assert torch.equal(again[1], packed[1])


def test_fragments_are_placed_as_documented():
    """Lane by lane, in plain Python, from the table in fragments.py."""
    weight = sparse(24, 96, 0, torch.float16)
    values, metadata = pack24(weight)
    fragments = to_fragments(values, metadata)
    values = torch.nn.functional.pad(values, (0, 16, 0, 8))
    metadata = torch.nn.functional.pad(metadata, (0, 2, 0, 8), value=0x4444).int()
    for tile in range(2):
        for ktile in range(2):
            for lane in range(32):
                gid, tig = divmod(lane, 4)
                for step in range(2):
                    place = [(gid, tig), (gid + 8, tig), (gid, tig + 4), (gid + 8, tig + 4)]
                    pairs = [
                        values[16 * tile + row, 2 * g : 2 * g + 2]
                        for row, g in ((row, 16 * ktile + 8 * step + group) for row, group in place)
                    ]
                    assert torch.equal(fragments.values[tile, ktile, step, lane], torch.cat(pairs))
                low, high = (
                    int(metadata[16 * tile + row, 4 * ktile + tig]) & 0xFFFF
                    for row in (gid, gid + 8)
                )
                assert int(fragments.words[tile, ktile, lane]) & 0xFFFFFFFF == low | high << 16


def test_the_metadata_of_two_tiles_is_what_cutlass_reads():
    """PyTorch's own reordering for CUTLASS holds the same words for the same lanes."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    kept = (
        torch.rand(32, 16, 4, generator=torch.Generator().manual_seed(0)).argsort(-1) < 2
    )  # two in every group
    weight = (torch.full((32, 16, 4), 3.0) * kept).view(32, 64).to(BF16)
    words = to_fragments(*pack24(weight)).words.view(2, 8, 4)  # tile, gid, step and half
    theirs = (
        sparse_semi_structured_from_dense_cutlass(weight)[1].reshape(2, 8, 2, 2, 2).int() & 0xFFFF
    )
    joined = theirs[..., 0] | theirs[..., 1] << 16  # step, gid, tile, half of the step
    assert torch.equal(joined.permute(2, 1, 0, 3).reshape(2, 8, 4), words)


def case(dtype=BF16):
    torch.manual_seed(0)
    weight, bias, x = (
        sparse(40, 132, 0, dtype),
        torch.randn(40).to(dtype),
        torch.randn(2, 3, 132).to(dtype),
    )
    return x, weight, pack24(weight), bias


def test_on_the_cpu_the_twin_computes():
    x, weight, packed, bias = case()
    expected = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(sparse24(x, *packed, bias), expected)
    assert torch.equal(
        sparse24_fragments(x, to_fragments(*packed), 40, bias, new_semaphore(40, "cpu")), expected
    )
    assert sparse24(x[:0], *packed, bias).shape == (0, 3, 40)
    a, b = torch.randn(5, 8, 8).to(BF16), torch.randn(11, 12, 12).to(BF16)
    expected = reference.armor(x, *packed, a, b, bias)
    assert torch.equal(armor(x, packed, a, b, bias), expected)
    assert torch.equal(armor(x, to_fragments(*packed), a, b, bias), expected)
    u, v = torch.randn(40, 7).to(BF16), torch.randn(7, 132).to(BF16)
    assert torch.equal(lowrank(x, u, v, bias), reference.lowrank(x, u, v, bias))


def test_gradients_reach_x():
    x, weight, packed, bias = case(torch.float32)
    for run in (sparse24, lambda x, *_: sparse24_fragments(x, to_fragments(*packed), 40, bias)):
        leaf = x.clone().requires_grad_()
        run(leaf, *packed, bias).square().sum().backward()
        expected = 2 * torch.nn.functional.linear(x, weight, bias) @ weight
        torch.testing.assert_close(leaf.grad, expected)


def test_torch_accepts_the_ops():
    x, _, packed, bias = case()
    semaphore = new_semaphore(40, "cpu")
    a, b = torch.randn(5, 8, 8).to(BF16), torch.randn(11, 12, 12).to(BF16)
    for op, arguments in (
        ("sparse24_stored", (x, *packed, bias, semaphore)),
        ("sparse24_fragments", (x, *to_fragments(*packed), 40, None, semaphore)),
        ("armor", (x, *to_fragments(*packed), a, b, bias, semaphore)),
        ("lowrank", (x, torch.randn(40, 7).to(BF16), torch.randn(7, 132).to(BF16), bias, None)),
    ):
        torch.library.opcheck(getattr(torch.ops.compressor_kernels, op).default, arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda x, v, m, b: (x[..., :128], v, m, b),
            r"x is torch.bfloat16 (2, 3, 128), not torch.bfloat16 [..., 132]",
        ),
        (lambda x, v, m, b: (x.float(), v, m, b), "x is torch.float32"),
        (lambda x, v, m, b: (x, v, m, b[:39]), "bias is torch.bfloat16 (39,)"),
        (lambda x, v, m, b: (x, v, m[:, :8], b), "need metadata int16 (40, 9)"),
        (lambda x, v, m, b: (x, v.T.contiguous().T, m, b), "values is not contiguous"),
        (lambda x, v, m, b: (x, v.to("meta"), m, b), "values is on meta, x on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    x, _, packed, bias = case()
    with pytest.raises(ValueError, match=re.escape(match)):
        sparse24(*change(x, *packed, bias))


def test_fragments_factors_and_blocks_that_do_not_fit_are_refused():
    x, _, packed, _ = case()
    fragments = to_fragments(*packed)
    with pytest.raises(ValueError, match="are not those of 50 outputs"):
        sparse24_fragments(x, fragments, 50)
    with pytest.raises(ValueError, match="x has 128 features; the fragments hold 132 to 192"):
        sparse24_fragments(x[..., :128], fragments, 40)
    with pytest.raises(ValueError, match="not the factors of one weight"):
        lowrank(x, torch.zeros(40, 7, dtype=BF16), torch.zeros(8, 132, dtype=BF16))
    with pytest.raises(ValueError, match=r"a is \(5, 8, 4\), not a stack of square blocks"):
        armor(x, packed, torch.zeros(5, 8, 4, dtype=BF16), torch.zeros(11, 12, 12, dtype=BF16))
    with pytest.raises(ValueError, match="are not those of 80 outputs"):
        armor(x, fragments, torch.zeros(10, 8, 8, dtype=BF16), torch.zeros(11, 12, 12, dtype=BF16))


def linears(monkeypatch, bias=True, prepared=True):
    """One of each kind, 132 -> 40, prepared as on a GPU; the ops themselves run on the CPU."""
    torch.manual_seed(0)
    made = [
        Sparse24Linear(132, 40, bias=bias, dtype=BF16),
        ArmorLinear(132, 40, block_a=8, block_b=12, bias=bias, dtype=BF16),
        LowRankLinear(132, 40, rank=7, bias=bias, dtype=BF16),
    ]
    for module in made:
        state = {
            name: torch.randn(tensor.shape).to(tensor.dtype)
            for name, tensor in module.state_dict().items()
        }
        if "weight_values" in state:
            state["weight_values"], state["weight_metadata"] = pack24(sparse(40, 132, 1, BF16))
        module.load_state_dict(state)
        if prepared:
            with monkeypatch.context() as patch:
                patch.setattr(backend, "runs", lambda x: True)
                patch.setattr(layouts, "sparse_tensor_cores", lambda device: True)
                module.prepare_()
    return made


def test_prepared_modules_keep_their_state_and_results(monkeypatch):
    x = torch.randn(4, 132).to(BF16)
    for plain, prepared in zip(
        linears(monkeypatch, prepared=False), linears(monkeypatch), strict=True
    ):
        assert prepared.semaphore is not None
        assert torch.equal(prepared(x), plain(x))
        assert torch.equal(prepared.weight, plain.weight)
        before, after = plain.state_dict(), prepared.state_dict()
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        prepared.unpack_()
        assert torch.equal(prepared(x), plain(x))
        assert all(
            torch.equal(before[name], tensor) for name, tensor in prepared.state_dict().items()
        )


@pytest.mark.parametrize("prepared", [False, True])
def test_compiles_into_one_graph(monkeypatch, prepared):
    for module in linears(monkeypatch, prepared=prepared):
        x = torch.randn(2, 5, 132).to(BF16)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), module(x))


def three(monkeypatch):
    made = []
    for size, bias in ((48, True), (16, False), (24, True)):
        module = Sparse24Linear(132, size, bias=bias, dtype=BF16)
        values, metadata = pack24(sparse(size, 132, size, BF16))
        state = {"weight_values": values, "weight_metadata": metadata}
        module.load_state_dict({**state, "bias": torch.randn(size).to(BF16)} if bias else state)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "runs", lambda x: True)
            patch.setattr(layouts, "sparse_tensor_cores", lambda device: True)
            module.prepare_()
        made.append(module)
    return torch.nn.ModuleList(made)


def test_fused_projections_compute_once_for_one_input(monkeypatch):
    group = three(monkeypatch)
    x, other = torch.randn(2, 132).to(BF16), torch.randn(2, 132).to(BF16)
    expected = {id(t): [module(t) for module in group] for t in (x, other)}
    state = {name: tensor.clone() for name, tensor in group.state_dict().items()}
    assert fuse(list(group))
    assert all(torch.equal(tensor, state[name]) for name, tensor in group.state_dict().items())
    launches = []
    plain = layouts.fragments_op
    monkeypatch.setattr(
        layouts,
        "fragments_op",
        lambda x, v, w, n, *rest: (launches.append(n), plain(x, v, w, n, *rest))[1],
    )
    for t in (x, other, x):
        assert all(
            torch.equal(module(t), y) for module, y in zip(group, expected[id(t)], strict=True)
        )
    assert launches == [88, 88, 88]
    assert not vars(x), "nothing is kept once all have been served"
    # any order and number of calls
    assert torch.equal(group[1](x), expected[id(x)][1])
    assert torch.equal(group[1](x), expected[id(x)][1])
    assert torch.equal(group[0](other), expected[id(other)][0])
    x += 1
    assert torch.equal(group[2](other), expected[id(other)][2])
    changed = x.clone()
    group[0](x)
    x -= 1  # in place, between two projections
    assert torch.equal(group[1](x), group[1].alone(x))
    assert not torch.equal(changed, x)
    with torch.inference_mode():
        inner = x.clone()
        assert torch.equal(group[0](inner), group[0].alone(inner))
    group.to(torch.float16)  # moving or casting parts them
    assert all(module.fused is None for module in group)
    assert group[0](x.half()).dtype == torch.float16


def test_fused_projections_compile_into_one_graph(monkeypatch):
    group = three(monkeypatch)

    def run(x):
        return [module(x) for module in group]

    x = torch.randn(2, 132).to(BF16)
    expected = run(x)
    assert fuse(list(group))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert all(map(torch.equal, compiled(x), expected))


def test_linears_that_do_not_fit_stay_apart(monkeypatch):
    q, k, v = three(monkeypatch)
    assert not fuse([v, q])  # 24 rows are no full tiles
    k.unpack_()
    assert not fuse([q, k, v])
    assert q.fused is None


def test_import_touches_neither_triton_nor_cuda():
    code = (
        "import sys, torch, compressor_kernels.linear, compressor_kernels.fused_projections\n"
        "assert not [n for n in sys.modules if n.startswith('compressor_kernels.') and "
        "n.split('.')[1] in ('mma', 'decompress')]\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_nothing_can_be_launched_torch_computes():
    backend.works.cache_clear()
    with pytest.warns(
        UserWarning,
        match="the kernels of compress-llm do not run on cuda:0, which computes with torch: ",
    ):
        assert not backend.works(torch.device("cuda", 0))
    backend.works.cache_clear()


def test_the_table_is_asked_first(monkeypatch):
    row = {
        "device": "interpreter",
        "op": "fragments",
        "out": 64,
        "in": 128,
        "kernel": "mma",
        "speedup": 1.5,
    }
    rows = [{**row, "rows": 4, "split": 9}, {**row, "rows": 16, "split": 7}]
    monkeypatch.setattr(
        kernel_config, "table", lambda: {("interpreter", "fragments", 64, 128): rows}
    )
    kernel_config.choose.cache_clear()
    cpu = torch.device("cpu")
    assert kernel_config.choose("fragments", cpu, 64, 128, 3)["split"] == 9
    assert kernel_config.choose("fragments", cpu, 64, 128, 5)["split"] == 7
    assert kernel_config.choose("fragments", cpu, 64, 128, 17)["kernel"] == "mma"
    assert kernel_config.measured("fragments", cpu, 64, 128, 17) is None
    assert kernel_config.choose("fragments", cpu, 64, 128, 200) == {"kernel": "dense"}
    kernel_config.choose.cache_clear()


def test_the_shipped_table_is_well_formed():
    for (_, op, _, _), rows in kernel_config.table().items():
        assert op in ("fragments", "stored", "armor", "skinny")
        assert all(
            row["kernel"] in ("mma", "gemv", "dot", "dense") and row["rows"] > 0 for row in rows
        )


@given(
    st.sampled_from(["fragments", "stored", "armor", "skinny"]),
    st.integers(1, 40000),
    st.integers(1, 40000),
    st.integers(1, 96),
)
def test_the_rule_fits_every_shape(op, out_features, in_features, rows):
    config = kernel_config.rule(op, out_features, in_features, rows, 132)
    if config["kernel"] != "dense":
        assert 1 <= config["split"] <= max(1, in_features // 256)
        assert config["kernel"] == ("mma" if op in ("fragments", "armor") else "dot")
