"""The layouts of a packed core: each gives back the stored bytes, and a module that holds one is to
torch and accelerate what a plain linear is.
"""

import copy
import io
import pickle
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import distributed as dist
from torch import nn
from torch.nn.functional import linear

from compressor_kernels import backend, layouts, library
from compressor_kernels.cpu.build import kernels as cpu_kernels
from compressor_kernels.fused_projections import fuse
from compressor_kernels.layouts import Dense, InFragments, InTiles, Stored
from compressor_kernels.linear import ArmorLinear, LowRankLinear, Sparse24Linear
from compressor_kernels.packing import check24, pack24
from compressor_kernels.pivot import row_order
from compressor_kernels.pivot_linear import PivotLinear
from tests.at_once import at_once
from tests.test_packing import sparse

LAYOUTS = [Stored, InFragments, InTiles, Dense]
KINDS = ["2:4", "ARMOR"]
THIN = ["low rank", "pivots"]  # held as they are stored
OUT, IN = 40, 132


def filled(kind, seed=0, dtype=torch.float32, bias=True):
    """A linear 132 -> 40 of `kind`, with random weights, as it is loaded."""
    generator = torch.Generator().manual_seed(seed)
    common = {"bias": bias, "dtype": dtype}
    if kind == "2:4":
        module = Sparse24Linear(IN, OUT, **common)
    elif kind == "ARMOR":
        module = ArmorLinear(IN, OUT, block_a=8, block_b=12, **common)
    elif kind == "pivots":
        module = PivotLinear(IN, OUT, rank=7, **common)
    else:
        module = LowRankLinear(IN, OUT, rank=7, **common)
    state = {
        name: (torch.randn(tensor.shape, generator=generator) / 4).to(dtype)
        for name, tensor in module.state_dict().items()
    }
    if kind == "pivots":
        state["weight_pivots"] = torch.tensor([0, 2, 3, 11, 20, 21, 38], dtype=torch.int32)
    elif kind != "low rank":
        state["weight_values"], state["weight_metadata"] = pack24(sparse(OUT, IN, seed, dtype))
    module.load_state_dict(state)
    return module


def held(kind, layout, seed=0, **options):
    module = filled(kind, seed, **options)
    module.place_(layout)
    assert module.layout is layout
    return module


@pytest.fixture(autouse=True)
def kernels_of_the_layout(request):
    """Those for a CPU are compiled by the machine that runs them, and not by every one."""
    params = getattr(request.node, "callspec", None)
    if params and params.params.get("layout") is InTiles and (problem := cpu_kernels().problem):
        pytest.skip(problem)


def assert_product(y, expected, layout):
    """The same to the bit where torch computes; kernels for a CPU add up in another order."""
    if layout is InTiles:
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)


def x_of(dtype=torch.float32, *shape):
    return torch.randn(*(shape or (3, 5)), IN, generator=torch.Generator().manual_seed(9)).to(dtype)


def equal(a, b):
    assert list(a) == list(b) or set(a) == set(b)
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 132), (16, 64), (1, 4), (5, 36)])
def test_a_layout_gives_back_the_stored_bytes_and_the_product(layout, dtype, shape):
    weight = sparse(*shape, 3, dtype)
    values, metadata = pack24(weight)
    core = layout.prepare(values, metadata)
    again = core.stored()
    assert [tensor.dtype for tensor in again] == [dtype, torch.int16]
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], metadata)
    assert torch.equal(core.dense(), weight)
    assert len(core.names) == len(core.tensors)
    x, bias = torch.randn(2, 3, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    assert_product(core.linear(x, bias), linear(x, weight, bias), layout)
    for wrong in (x[..., :-1], x.double()):
        with pytest.raises((ValueError, RuntimeError)):
            core.linear(wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_does_not_depend_on_the_layout(kind, layout):
    plain, module, x = filled(kind), held(kind, layout), x_of()
    assert equal(module.state_dict(), plain.state_dict())
    assert_product(module(x), plain(x), layout)
    assert torch.equal(module.weight, plain.weight)
    for name in ("weight_values", "weight_metadata"):  # readable, as any tensor of a state is
        bits = [
            tensor.view(torch.uint8) for tensor in (getattr(module, name), getattr(plain, name))
        ]
        assert torch.equal(*bits)
    for other in (Stored, InFragments, Dense, layout):
        module.place_(other)
        assert equal(module.state_dict(), plain.state_dict())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert equal(twin.state_dict(), plain.state_dict())
        assert_product(twin(x), plain(x), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*KINDS, *THIN])
def test_a_copy_computes_in_another_process(kind, layout, tmp_path):
    module, x = filled(kind), x_of()
    if kind in THIN:
        module.prepare_()
    else:
        module.place_(layout)
    torch.save([module, x, module(x)], tmp_path / "copy")
    code = (
        "import torch\n"
        f"module, x, y = torch.load({str(tmp_path / 'copy')!r}, weights_only=False)\n"
        "assert torch.equal(module(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("layout", [InTiles])
@pytest.mark.parametrize("kind", [*KINDS, *THIN])
def test_a_copy_computes_where_the_kernels_of_its_layout_do_not_run(monkeypatch, kind, layout):
    module, plain, x = filled(kind), filled(kind), x_of()
    if kind in THIN:
        module.prepare_()
    else:
        module.place_(layout)
    copied = pickle.dumps(module)
    monkeypatch.setattr(layout, "usable", classmethod(lambda cls: False))
    twin = pickle.loads(copied)
    assert equal(twin.state_dict(), plain.state_dict())
    assert torch.equal(twin(x), plain(x))
    if kind not in THIN:
        assert twin.layout is Dense


def through_a_file(module, state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    module.load_state_dict(torch.load(file))


def by_checkpoint_api(module, state):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    assert equal(get_model_state_dict(module), module.state_dict())
    set_model_state_dict(module, state)


WAYS = {
    "strict": lambda module, state: module.load_state_dict(state),
    "not strict": lambda module, state: module.load_state_dict(state, strict=False),
    "assigned": lambda module, state: module.load_state_dict(state, assign=True),
    "in a parent": lambda module, state: nn.ModuleDict({"a": module}).load_state_dict(
        {f"a.{name}": tensor for name, tensor in state.items()}
    ),
    "a file": through_a_file,
    "torch.distributed.checkpoint": by_checkpoint_api,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_arrives_and_the_layout_stays(kind, layout, way):
    module, other, x = held(kind, layout), filled(kind, seed=1), x_of()
    WAYS[way](module, {name: t.clone() for name, t in other.state_dict().items()})
    assert module.layout is layout
    assert equal(module.state_dict(), other.state_dict())
    assert_product(module(x), other(x), layout)
    assert not any(p.requires_grad for n, p in module.named_parameters() if n.startswith("weight_"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_zeros_is_a_state(kind, layout):
    module = held(kind, layout)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}
    done = module.load_state_dict(zeros, strict=False)
    assert not done.missing_keys + done.unexpected_keys
    assert not module(x_of()).any()
    check24(*(module.state_dict()[name] for name in ("weight_values", "weight_metadata")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind, layout):
    module, x = held(kind, layout), x_of()
    before, y = {n: t.clone() for n, t in module.state_dict().items()}, module(x)
    other = filled(kind, seed=1).state_dict()
    damaged = {**other, "weight_metadata": other["weight_metadata"].clone()}
    damaged["weight_metadata"][2, 1] = 0
    damaged["weight_values"] = damaged["weight_values"] + 1
    with pytest.raises(RuntimeError, match="metadata of row 2, group 4 does not name two columns"):
        module.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        module.load_state_dict({**other, "weight_values": other["weight_values"][:, :8]})
    for name in ("weight_values", "weight_metadata"):
        left = {key: tensor for key, tensor in other.items() if key != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            held(kind, layout).load_state_dict(left)
        assert held(kind, layout).load_state_dict(left, strict=False).missing_keys == [name]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_core"):
        held(kind, layout).load_state_dict({**other, "weight_core": module.weight})
    names = [name for name in before if name in ("weight_values", "weight_metadata")]
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in names)
    module.load_state_dict(before)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("layout", [InFragments, InTiles, Dense])
def test_a_stored_tensor_is_not_set_behind_the_back_of_another_layout(layout):
    module = held("2:4", layout)
    with pytest.raises(AttributeError, match="cannot be set while the core is held as"):
        module.weight_values = nn.Parameter(torch.zeros(OUT, IN // 2))
    state = filled("2:4", seed=1).state_dict()
    with pytest.raises(AttributeError, match="cannot be set while the core is held as"):
        torch.func.functional_call(module, state, (x_of(),))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_takes_the_tensors_away_and_brings_them_back(monkeypatch, kind, layout):
    monkeypatch.setattr(layout, "runs_on", lambda values: True)
    module, plain, x = nn.Sequential(held(kind, layout)), filled(kind), x_of()
    cpu_offload(module, execution_device=torch.device("cpu"))
    assert module[0].weight_values.is_meta
    assert_product(module(x), plain(x), layout)
    assert module[0].weight_values.is_meta, "they are there for the call only"
    remove_hook_from_module(module, recurse=True)
    assert module[0].layout is layout
    assert equal(module[0].state_dict(), plain.state_dict())
    assert_product(module(x), plain(x), layout)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hook_of_its_own(monkeypatch, layout, offload):
    monkeypatch.setattr(layout, "runs_on", lambda values: True)
    module, plain, x = held("2:4", layout), filled("2:4"), x_of()
    hook = AlignDevicesHook(execution_device=torch.device("cpu"), offload=offload)
    add_hook_to_module(module, hook)
    assert (module.layout is layout) != offload or layout is Stored
    assert_product(module(x), plain(x), layout)
    remove_hook_from_module(module)
    assert module.layout is layout
    assert_product(module(x), plain(x), layout)


def as_autocast_computes(kind, module, x):
    """The product of plain torch under autocast, from the dense parts."""
    bias = module.bias
    if kind == "low rank":
        return linear(linear(x, module.weight_v), module.weight_u, bias)
    if kind == "pivots":
        inner = linear(x, module.weight_v)
        stacked = torch.cat([inner, linear(inner, module.weight_c)], -1)
        y = torch.empty_like(stacked)
        y[..., row_order(module.weight_pivots, OUT)] = stacked
        return y + bias.to(y.dtype)
    if kind == "2:4":
        return linear(x, module.weight, bias)
    b, a = torch.block_diag(*module.weight_b), torch.block_diag(*module.weight_a)
    y = linear(linear(linear(x, b), module.core.dense()), a)
    return y + bias.to(y.dtype)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*KINDS, *THIN])
def test_autocast_is_that_of_a_linear(kind, layout, dtype, to):
    module, x = filled(kind, dtype=dtype), x_of(dtype)
    if kind not in THIN:
        module.place_(layout)
    with torch.autocast("cpu", dtype=to):
        expected, y = as_autocast_computes(kind, module, x), module(x)
        assert y.dtype == expected.dtype == (torch.float64 if dtype == torch.float64 else to)
        if kind == "ARMOR":
            torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
        else:
            assert_product(y, expected, layout)
        inner = module(x.to(to)) if dtype != torch.float64 else y  # what a norm before it gave
        assert inner.dtype == y.dtype
        grown = x.clone().requires_grad_()
        module(grown).float().sum().backward()
        twin = x.clone().requires_grad_()
        as_autocast_computes(kind, module, twin).float().sum().backward()
    assert grown.grad.dtype == dtype
    torch.testing.assert_close(grown.grad, twin.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_x_and_the_bias_and_nothing_that_is_packed(kind, layout):
    module, x = held(kind, layout), x_of()
    weight = module.weight.clone()
    module.requires_grad_(True)
    (bias,) = (p for n, p in module.named_parameters() if n == "bias")
    leaf = x.clone().requires_grad_()
    module(leaf).square().sum().backward()
    dense, plain_bias = weight.clone(), bias.detach().clone().requires_grad_()
    twin = x.clone().requires_grad_()
    linear(twin, dense, plain_bias).square().sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, plain_bias.grad, rtol=1e-4, atol=1e-4)
    packed = [p for n, p in module.named_parameters() if n.startswith("weight_")]
    assert packed
    assert all(p.grad is None for p in packed)
    bias.grad = None
    module(x).sum().backward()  # x needs no gradient
    assert bias.grad is not None
    module.freeze_()
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"]


@pytest.mark.parametrize("kind", THIN)
def test_low_rank_factors_train(kind):
    module = filled(kind).requires_grad_(True)
    module(x_of()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A group of one process over gloo."""
    file = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*KINDS, *THIN])
def test_gloo_sends_every_tensor(one_process, monkeypatch, kind, layout):
    module = filled(kind)
    if kind in THIN:
        monkeypatch.setattr(backend, "runs", lambda x: True)
        module.prepare_()
    else:
        with pytest.raises(RuntimeError):
            dist.broadcast(module.weight_metadata, 0)  # as it is in a file
        module.place_(layout)
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), 0)
    frame = nn.Sequential(nn.Linear(IN, IN), module)
    y = nn.parallel.DistributedDataParallel(frame)(x_of())
    y.sum().backward()
    assert frame[0].weight.grad is not None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph_in_every_layout(kind, layout):
    module, x = held(kind, layout, dtype=torch.bfloat16), x_of(torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))


def three(dtype=torch.float32, sizes=(48, 16, 24)):
    """q, k and v in fragment order, fused."""
    found = []
    for size in sizes:
        module = Sparse24Linear(IN, size, bias=size != 16, dtype=dtype)
        values, metadata = pack24(sparse(size, IN, size, dtype))
        state = {"weight_values": values, "weight_metadata": metadata}
        bias = {"bias": torch.arange(size).to(dtype)} if size != 16 else {}
        module.load_state_dict(state | bias)
        module.place_(InFragments)
        found.append(module)
    return nn.ModuleList(found)


@pytest.mark.parametrize("shared", [False, True], ids=["own x", "one x"])
def test_fused_projections_are_right_from_many_threads(shared):
    group = three()
    xs = [torch.randn(1, 2, IN, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    with torch.no_grad():
        expected = [[module(x) for module in group] for x in xs]
        assert fuse(list(group))
    wrong = []
    ready = threading.Barrier(8)

    def work(number):
        place = 0 if shared else number
        with torch.no_grad():
            ready.wait()
            for turn in range(150):
                x = xs[place] if shared else xs[place].clone()
                for one in range(3):
                    one = (one + turn * (number % 3)) % 3
                    if not torch.equal(group[one](x), expected[place][one]):
                        wrong.append((number, turn, one))

    at_once(partial(work, number) for number in range(8))
    assert not wrong


def test_nothing_is_kept_on_a_module_between_two_calls():
    group = three()
    assert fuse(list(group))
    before = [{**vars(module.fused), **vars(module)} for module in group]
    x = torch.randn(2, IN)
    with torch.no_grad():
        group[0](x)
    assert [{**vars(module.fused), **vars(module)} for module in group] == before


def test_a_bias_that_trains_is_the_one_that_fused_projections_add():
    group, x = three(), x_of()
    assert fuse(list(group))
    group[0].bias.requires_grad_(True)
    for module in group:
        module(
            x
        ).sum().backward() if module.bias is not None and module.bias.requires_grad else None
    torch.optim.SGD([group[0].bias], lr=0.5).step()
    with torch.no_grad():
        together, apart = [m(x) for m in group], [m.alone(x) for m in group]
    group[0].bias.requires_grad_(False)
    with torch.no_grad():
        assert all(map(torch.equal, together, apart))
        assert all(torch.equal(m(x), m.alone(x)) for m in group)
    assert group[0].fused is not None
    group[0].bias = nn.Parameter(torch.ones(48))
    assert all(module.fused is None for module in group)


def test_fused_projections_under_autocast_copied_and_reloaded():
    group, x = three(), x_of()
    with torch.no_grad():
        expected = [module(x) for module in group]
        assert fuse(list(group))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(module(x).dtype == torch.bfloat16 for module in group)
        copied = copy.deepcopy(group)
        assert all(module.fused is None for module in copied)
        assert all(torch.equal(m(x), y) for m, y in zip(copied, expected, strict=True))
        state = {name: tensor.clone() for name, tensor in group.state_dict().items()}
        group.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
        assert not any(module(x).any() for module in group)
        group.load_state_dict(state)
        assert all(torch.equal(m(x), y) for m, y in zip(group, expected, strict=True))


def test_an_op_says_what_it_writes_to():
    for name in ("sparse24_stored", "sparse24_fragments", "armor", "lowrank", "pivot"):
        schema = getattr(torch.ops.compressor_kernels, name).default._schema
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert written == ["semaphore"]
    assert library._LIBRARY.ns == "compressor_kernels"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_launch_that_dies_half_way_leaves_no_semaphore_set(error):
    semaphore = torch.zeros(4, dtype=torch.int32)

    class Kernel:
        def __getitem__(self, grid):
            def run(*arguments):
                arguments[1][2] += 1  # one program has arrived
                raise error

            return run

    with pytest.raises(error):
        backend.launch(Kernel(), (2,), torch.zeros(1), semaphore, counter=semaphore)
    assert not semaphore.any()


def test_the_layout_of_a_device_is_asked_for_in_order(monkeypatch):
    values = torch.zeros(4, 8, dtype=torch.bfloat16)
    of_gpus = tuple(one for one in layouts.LAYOUTS if one in (InFragments, Stored))
    monkeypatch.setattr(layouts, "LAYOUTS", of_gpus)
    assert layouts.kernel_layout(values) is None
    monkeypatch.setattr(backend, "runs", lambda x: True)
    monkeypatch.setattr(layouts, "sparse_tensor_cores", lambda device: False)
    assert layouts.kernel_layout(values) is Stored
    monkeypatch.setattr(layouts, "sparse_tensor_cores", lambda device: True)
    assert layouts.kernel_layout(values) is InFragments
