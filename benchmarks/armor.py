"""ARMOR's optimiser: against the paper's own loop, its speed on a large linear, and what it buys on
whole models.

    # proxy loss and CPU time against the paper's loop: half an hour
    python benchmarks/armor.py reference
    python benchmarks/armor.py speed --size 4096         # seconds for one large linear
    python benchmarks/armor.py perplexity MODEL CALIBRATION.jsonl TEST.jsonl --method armor \
        --options overhead=0.0625
    # every linear against NoWag-P, in three dtypes
    python benchmarks/armor.py guarantee MODEL CALIBRATION.jsonl

CALIBRATION and TEST hold one {"input_ids": [...]} a line. Statistics of a block come from the
compressed blocks before it, or with --dense-statistics from the dense model.

Each case writes one JSON line with hardware and versions to standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from importlib import import_module
from types import FunctionType, ModuleType

import torch
from common import emit
from torch import Tensor, nn

from compressor.formats.armor import Armor
from compressor.formats.sparse24 import Sparse24
from compressor.methods import armor, armor_separable, nowag
from compressor.methods.armor_algebra import Factors, eye_blocks
from compressor.pattern import Pattern
from compressor.stats import InputStats, collecting

PAIRS = list(itertools.combinations(range(4), 2))
CASES = [
    ("gauss", 256, 512, 16),
    ("heavy", 256, 512, 16),
    ("gauss", 384, 384, 32),
    ("heavy", 384, 384, 32),
]
CASES += [
    ("gauss", 512, 512, 32),
    ("heavy", 512, 512, 32),
    ("gauss", 512, 512, 16),
    ("heavy", 512, 512, 16),
]
CASES += [
    ("gauss", 256, 512, 32),
    ("heavy", 256, 512, 32),
    ("gauss", 384, 384, 16),
    ("heavy", 384, 384, 16),
]
P24 = Pattern.parse("2:4")


# --- synthetic layers


def gauss(rows: int, columns: int, g: torch.Generator, tokens: int = 4096) -> tuple[Tensor, Tensor]:
    """Gaussian weight; inputs correlated 0.9 between neighbouring channels, with log-normal
    scales.
    """
    weight = torch.randn(rows, columns, generator=g) / columns**0.5
    noise = torch.randn(tokens, columns, generator=g)
    x = noise.clone()
    for j in range(1, columns):
        x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * noise[:, j]
    return weight, x * torch.exp(0.5 * torch.randn(columns, generator=g))


def heavy(rows: int, columns: int, g: torch.Generator, tokens: int = 4096) -> tuple[Tensor, Tensor]:
    """Student-t(4) weight with log-normal row and column scales and a low-rank part; inputs of low
    rank, a few channels x 30.
    """
    t = (
        torch.randn(rows, columns, generator=g)
        / (torch.randn(4, rows, columns, generator=g).square().mean(0)).sqrt()
    )
    t = (
        t
        * torch.exp(0.35 * torch.randn(rows, 1, generator=g))
        * torch.exp(0.35 * torch.randn(1, columns, generator=g))
    )
    rank = max(8, min(rows, columns) // 16)
    low = (
        (torch.randn(rows, rank, generator=g) * torch.linspace(1, 0.1, rank))
        @ torch.randn(rank, columns, generator=g)
        / rank**0.5
    )
    x = torch.randn(tokens, 32, generator=g) @ torch.randn(32, columns, generator=g) / 32**0.5
    x = (x + torch.randn(tokens, columns, generator=g)) * torch.exp(
        0.6 * torch.randn(columns, generator=g)
    )
    x[:, torch.randperm(columns, generator=g)[: max(2, columns // 128)]] *= 30
    return 0.02 * (t + low), x


def layer(kind: str, rows: int, columns: int, seed: int) -> tuple[Tensor, InputStats]:
    g = torch.Generator().manual_seed(seed)
    weight, x = {"gauss": gauss, "heavy": heavy}[kind](rows, columns, g)
    stats = InputStats(columns, gram=True)
    stats.update(x)
    return weight, stats


# --- the paper's loop, from its formulas


def paper_loop(
    target: Tensor, h: Tensor, mask: Tensor, block: int, limit: int = 20_000
) -> tuple[float, int, float]:
    """One Adam step on A, S, B and one re-solved group per block, until 100 iterations in a row
    bring no progress.

    Returns:
        relative proxy loss, iterations, CPU seconds.
    """
    torch.manual_seed(0)
    rows, columns = target.shape
    n0, n1 = rows // block, columns // block
    a, b = (torch.eye(block).repeat(n, 1, 1).requires_grad_() for n in (n0, n1))
    s, mask = target.clone().requires_grad_(), mask.clone()
    optimiser = torch.optim.Adam([a, b, s], lr=1e-4)
    zero = (target.square() * h).sum()

    def product(core: Tensor) -> Tensor:
        half = torch.einsum("rjk,jkl->rjl", core.view(rows, n1, block), b).reshape(rows, columns)
        return torch.bmm(a, half.view(n0, block, columns)).view(rows, columns)

    def loss(core: Tensor) -> Tensor:
        return ((target - product(core)).square() * h).sum() / zero

    started, previous, idle, iteration = time.process_time(), float("inf"), 0, 0
    while iteration < limit and idle < 100:
        iteration += 1
        optimiser.zero_grad()
        loss(s * mask).backward()
        optimiser.step()
        core = (s.detach() * mask).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(core), core)
        with torch.no_grad():
            resolve_groups(target, h, mask, s, a, b, gradient, product(s * mask))
            current = loss(s * mask).item()
        stuck = previous - current <= 1e-6 * previous or previous - current <= 1e-8
        idle, previous = (idle + 1 if stuck else 0), current
    return previous, iteration, time.process_time() - started


def resolve_groups(
    target: Tensor,
    h: Tensor,
    mask: Tensor,
    s: Tensor,
    a: Tensor,
    b: Tensor,
    gradient: Tensor,
    approximation: Tensor,
) -> None:
    """In every block, re-solve one group drawn in proportion to the L1 norm of its gradient, over
    the six pairs.
    """
    (rows, columns), block = target.shape, a.shape[1]
    n0, n1, count = rows // block, columns // block, block // 4
    blocks = (
        gradient.abs().view(n0, block, n1, count, 4).sum(-1).transpose(1, 2).reshape(n0 * n1, -1)
    )
    drawn = torch.multinomial(blocks + 1e-30, 1)[:, 0]
    i, j = torch.arange(n0 * n1) // n1, torch.arange(n0 * n1) % n1
    row, group = drawn // count, drawn % count
    places = (j * block + group * 4)[:, None] + torch.arange(4)
    there = (i * block + row)[:, None]
    column_a = a[i, :, row]
    rows_b = (
        b[j].gather(1, (group[:, None] * 4 + torch.arange(4))[..., None].expand(-1, 4, block))
        * h.sqrt().view(n1, 1, block)[j]
    )
    old = s[there, places] * mask[there, places]
    residual = (
        ((approximation - target) * h.sqrt())
        .view(n0, block, n1, block)
        .transpose(1, 2)
        .reshape(-1, block, block)
    )
    residual = residual - column_a[:, :, None] * torch.einsum("nk,nkl->nl", old, rows_b)[:, None]
    f = torch.einsum("nkl,nrl,nr->nk", rows_b, residual, column_a)
    costs, values = [], []
    for pair in PAIRS:
        half = rows_b[:, list(pair)]
        solution = torch.linalg.solve(
            half @ half.transpose(1, 2) + 1e-9 * torch.eye(2), f[:, list(pair)]
        )
        costs.append(-(f[:, list(pair)] * solution).sum(1))
        values.append(-solution / (column_a.square().sum(1) + 1e-8)[:, None])
    best = torch.stack(costs).argmin(0)
    pair = torch.tensor(PAIRS)[best]
    new, kept = torch.zeros(n0 * n1, 4), torch.zeros(n0 * n1, 4, dtype=torch.bool)
    new.scatter_(1, pair, torch.stack(values)[best, torch.arange(n0 * n1)])
    kept.scatter_(1, pair, True)
    s[there, places], mask[there, places] = new, kept


def ours(
    target: Tensor, h: Tensor, mask: Tensor, block: int, iterations: int
) -> tuple[float, float]:
    """Relative proxy loss and CPU seconds of this project's optimiser on the same problem."""
    started = time.process_time()
    weighted, root = target * h.sqrt(), torch.diag_embed(h.sqrt().view(-1, block))
    start = Factors(eye_blocks(len(target), block, target), target * mask, mask, root)
    factors = armor_separable.fit(
        weighted,
        start,
        iterations=iterations,
        anneal=2.0,
        generator=torch.Generator().manual_seed(0),
        thorough=True,
    )
    seconds = time.process_time() - started
    loss = armor_separable.State.of(weighted, factors).loss
    return (loss / weighted.square().sum()).item(), seconds


def earlier_rows(path: str | None) -> dict[str, tuple[float, int, float]]:
    """The paper's loss, iterations and seconds by case, from the output of an earlier run."""
    if path is None:
        return {}
    with open(path) as lines:
        rows = [json.loads(line) for line in lines]
    return {
        row["case"]: (row["paper"], row["paper_iterations"], row["paper_cpu_s"]) for row in rows
    }


def run_reference(args: argparse.Namespace) -> None:
    earlier = earlier_rows(args.paper)
    for kind, rows, columns, block in CASES:
        if args.case and f"{kind}-{rows}x{columns}-{block}" not in args.case:
            continue
        weight, stats = layer(kind, rows, columns, seed=100)
        r, c = nowag.norms(weight)
        target, h = weight / r / c, stats.norm.square() / stats.tokens
        mask = P24.mask(nowag.score(weight, stats))
        plain = ((target * ~mask).square() * h).sum() / (target.square() * h).sum()
        name = f"{kind}-{rows}x{columns}-{block}"
        loss, iterations, seconds = (
            earlier[name] if name in earlier else paper_loop(target, h, mask, block, args.limit)
        )
        row = {
            "case": name,
            "nowag": plain.item(),
            "paper": loss,
            "paper_iterations": iterations,
            "paper_cpu_s": round(seconds, 1),
        }
        for count in (10, 12, 15, 20, 25, 30, 35, 40, 45):
            reached, spent = ours(target, h, mask, block, count)
            if reached <= loss:
                row |= {
                    "reached_at": count,
                    "reached_cpu_s": round(spent, 3),
                    "reached_speedup": round(seconds / spent),
                }
                break
        final, spent = ours(target, h, mask, block, args.iterations)
        row |= {
            "ours": final,
            "ours_cpu_s": round(spent, 2),
            "loss_ratio": round(final / loss, 3),
            "speedup": round(seconds / spent),
        }
        emit(row)


# --- one large linear


def run_speed(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(args.size, args.size, generator=g, device=device) / args.size**0.5
    stats = InputStats(args.size, gram=True, device=device)
    mix = torch.randn(64, args.size, generator=g, device=device) / 8
    for _ in range(args.size // 256):
        x = torch.randn(512, 64, generator=g, device=device) @ mix + torch.randn(
            512, args.size, generator=g, device=device
        )
        stats.update(x)
    options = parse_options(args.options, armor.compress)
    started, cpu = time.perf_counter(), time.process_time()
    form = armor.compress(
        weight.to(getattr(torch, args.dtype)), stats, P24, block_size=args.block, **options
    )
    shapes = {name: list(tensor.shape) for name, tensor in form.pack().items()}
    seconds = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
    }
    case = {"case": f"{args.size}x{args.size}", "block": args.block, "dtype": args.dtype}
    emit({**case, "options": options, **seconds, **shapes})


# --- whole models


def run_perplexity(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    calibration = token_rows(args.calibration)
    method = None if args.method == "dense" else method_of(args.method)
    started, size, dense_size, wrappers, weights = time.process_time(), 0, 0, 0, 0
    found = (
        block_statistics(model, block, calibration, share=args.share)
        for block in (model.model.layers if method else [])
    )
    for groups in list(found) if args.dense_statistics else found:
        for linears, stats in groups:
            weight = torch.cat([linear.weight.detach() for linear in linears])
            form = method.compress(
                weight, stats, P24, **parse_options(args.options, method.compress)
            )
            for linear, part in zip(
                linears,
                form.dense().split([linear.out_features for linear in linears]),
                strict=True,
            ):
                linear.weight.data.copy_(part)
            if not isinstance(form, Armor):
                form = Sparse24.from_dense(form.dense())
            else:
                wrappers += form.a.numel() + form.b.numel()
            weights += weight.numel()
            size += sum(tensor.nbytes for tensor in form.pack().values())
            dense_size += weight.nbytes
    cpu = round(time.process_time() - started, 1)
    options = " ".join(
        [*args.options, *["share"] * args.share, *["dense statistics"] * args.dense_statistics]
    )
    row = {
        "model": args.model.rstrip("/").rsplit("/", 1)[-1],
        "method": args.method,
        "options": options,
    }
    row |= {
        "perplexity": round(perplexity(model, token_rows(args.test)), 4),
        "overhead": round(wrappers / max(1, weights), 4),
    }
    share = round(size / dense_size, 4) if method else 1.0
    emit({**row, "bytes_of_dense": share, "cpu_s": cpu})


def run_guarantee(args: argparse.Namespace) -> None:
    """ARMOR's loss over NoWag-P's for every linear and dtype, both computed here from what would be
    stored.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    calibration, options = token_rows(args.calibration), parse_options(args.options, armor.compress)
    ratios: dict[torch.dtype, list[float]] = {
        torch.float32: [],
        torch.bfloat16: [],
        torch.float16: [],
    }
    for block in model.model.layers:
        for linears, stats in block_statistics(model, block, calibration, share=False):
            for dtype, found in ratios.items():
                weight = linears[0].weight.detach().to(dtype)
                forms = (
                    armor.compress(weight, stats, P24, **options),
                    nowag.compress(weight, stats, P24),
                )
                ours, plain = (output_loss(weight, form.dense(), stats) for form in forms)
                found.append(ours / plain)
    for dtype, found in ratios.items():
        row = {
            "model": args.model.rstrip("/").rsplit("/", 1)[-1],
            "dtype": str(dtype),
            "options": " ".join(args.options),
        }
        worst = {"worst": round(max(found), 4), "median": round(sorted(found)[len(found) // 2], 4)}
        counts = {"linears": len(found), "not_worse": sum(ratio <= 1 for ratio in found)}
        emit({**row, **counts, **worst})


def output_loss(weight: Tensor, compressed: Tensor, stats: InputStats) -> float:
    """tr(D H Dᵀ), D = W - Ŵ, in float64."""
    assert stats.gram is not None
    difference = weight.double() - compressed.double()
    return ((difference @ stats.gram.double()) * difference).sum().item()


def method_of(name: str) -> ModuleType:
    return import_module(f"compressor.methods.{name}")


def token_rows(path: str) -> Tensor:
    with open(path) as lines:
        return torch.tensor([json.loads(line)["input_ids"] for line in lines])


@torch.no_grad()
def block_statistics(
    model: nn.Module, block: nn.Module, rows: Tensor, *, share: bool
) -> list[tuple[list[nn.Linear], InputStats]]:
    """The linears of one block with the statistics of their inputs, collected by passing all rows
    through the model.

    With `share` those of one input come together (q, k, v; gate, up), to be stacked: one B for all
    of them.
    """
    linears = {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)
    }
    with collecting(linears, gram=True) as stats:
        for batch in rows.split(16):
            model.model(batch)  # without the head
    groups: dict[object, list[nn.Linear]] = {}
    for name, module in linears.items():
        groups.setdefault(stats[name] if share else name, []).append(module)
    return [
        (group, stats[next(name for name, module in linears.items() if module is group[0])])
        for group in groups.values()
    ]


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    total = 0.0
    for batch in rows.split(16):
        logits = model(batch).logits[:, :-1].float()
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / rows[:, 1:].numel())


def parse_options(pairs: list[str], function: FunctionType) -> dict[str, object]:
    """`iterations=40 proxy=full` as the types of the signature's defaults."""
    defaults = function.__kwdefaults__ or {}
    kinds: dict[str, Callable[[str], object]] = {
        name: type(value) for name, value in defaults.items()
    }
    return {name: kinds[name](value) for name, value in (pair.split("=", 1) for pair in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(required=True)
    reference = commands.add_parser("reference")
    reference.add_argument("--case", nargs="*", help="such as gauss-384x384-32; all by default")
    reference.add_argument(
        "--paper",
        help=(
            "rows of an earlier run on this machine, to measure the optimiser again without the "
            "loop"
        ),
    )
    reference.add_argument("--limit", type=int, default=20_000)
    reference.add_argument("--iterations", type=int, default=100)
    reference.set_defaults(run=run_reference)
    speed = commands.add_parser("speed")
    speed.add_argument("--size", type=int, default=4096)
    speed.add_argument("--block", type=int, default=128)
    speed.add_argument("--dtype", default="bfloat16")
    speed.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    speed.add_argument("--options", nargs="*", default=[])
    speed.set_defaults(run=run_speed)
    models = commands.add_parser("perplexity")
    models.add_argument("model")
    models.add_argument("calibration")
    models.add_argument("test")
    models.add_argument("--method", default="armor", help="dense changes nothing")
    models.add_argument("--options", nargs="*", default=[])
    models.add_argument("--share", action="store_true", help="one B for the linears of one input")
    models.add_argument(
        "--dense-statistics",
        action="store_true",
        help="statistics of all blocks from the dense model",
    )
    models.set_defaults(run=run_perplexity)
    guarantee = commands.add_parser("guarantee")
    guarantee.add_argument("model")
    guarantee.add_argument("calibration")
    guarantee.add_argument("--options", nargs="*", default=[])
    guarantee.set_defaults(run=run_guarantee)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
