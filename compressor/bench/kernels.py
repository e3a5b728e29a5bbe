"""One linear at a time: our ops against dense cuBLAS and PyTorch's semi-structured product, at the
same shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compressor.bench.timing import copies, measure
from compressor.formats import FORMATS, PACKED

SHAPES = (
    (4096, 4096),
    (6144, 4096),
    (4096, 14336),
    (14336, 4096),
    (28672, 4096),
    (8192, 8192),
    (8192, 28672),
    (28672, 8192),
)
ROWS = (1, 4, 16, 32, 64, 96, 256, 2048)
OPS = PACKED  # that are timed, where one has an example of the shape


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers from a generator of their own: that of the device is out of order after a
    capture that failed.
    """
    return torch.randn(
        *shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0)
    )


def random24(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A random weight with the two largest of each group of four kept."""
    weight = (
        random(out_features, in_features // 4, 4, dtype=dtype, device=device) / in_features**0.5
    )
    kept = weight.abs().topk(2, dim=-1).indices
    return (
        torch.zeros_like(weight)
        .scatter_(-1, kept, weight.gather(-1, kept))
        .view(out_features, in_features)
    )


def module(op: str, weight: Tensor) -> Any:
    """A prepared module of the form `op` and of the shape of the 2:4 `weight`, or None: see
    `Form.example`.
    """
    form = FORMATS[op].example(weight)
    if form is None:
        return None
    common = {"bias": False, "dtype": weight.dtype, "device": weight.device}
    made: Any = form.module(form.entry, weight.shape[1], weight.shape[0], **common)
    made.load_state_dict(form.pack())
    made.prepare_()
    return made


def nbytes(made: Any) -> int:
    """Bytes of the weight that one call reads."""
    tensors = (*made.parameters(), *made.buffers())
    return sum(
        tensor.nbytes for tensor in tensors if tensor is not getattr(made, "semaphore", None)
    )


@torch.no_grad()
def measure_shape(
    shape: tuple[int, int],
    rows: Iterable[int],
    ops: Iterable[str],
    dtype: torch.dtype,
    device: torch.device,
    copied: float,
) -> list[dict[str, Any]]:
    """Result rows for one shape `(out, in)`. `copied` is the bandwidth of a copy in GB/s."""
    n, k = shape
    weight = random24(n, k, dtype, device)
    count = copies(weight.nbytes // 2, device)
    dense = [weight.clone() for _ in range(count)]
    packed = {
        op: modules
        for op in ops
        if None not in (modules := [module(op, weight) for _ in range(count)])
    }
    inputs = {m: random(m, k, dtype=dtype, device=device) for m in rows}
    found, times = [], {}
    for m, x in inputs.items():
        base = _base(weight, x)
        times[m] = measure(_calls(dense, lambda w, x=x: linear(x, w)))
        found.append(
            _row(
                {**base, "op": "dense"},
                times[m],
                times[m].median,
                weight.nbytes + x.nbytes + 2 * m * n,
                copied,
            )
        )
        for op, modules in packed.items():
            time = measure(_calls(modules, lambda made, x=x: made(x)))
            size = nbytes(modules[0]) + x.nbytes + 2 * m * n
            found.append(_row({**base, "op": op}, time, times[m].median, size, copied))
    return found + _semi_structured(
        weight, inputs, count, {m: time.median for m, time in times.items()}, copied
    )


def _base(weight: Tensor, x: Tensor) -> dict[str, Any]:
    return {
        "out": len(weight),
        "in": weight.shape[1],
        "rows": len(x),
        "dtype": str(x.dtype).removeprefix("torch."),
    }


def _calls(weights: list[Any], call: Callable[[Any], Any]) -> list[Callable[[], Any]]:
    return [lambda weight=weight: call(weight) for weight in weights]


def _row(
    base: dict[str, Any], time: Any, dense_us: float, size: int, copied: float
) -> dict[str, Any]:
    speed = size / time.median / 1e3
    return {
        **base,
        "us_median": round(time.median, 2),
        "us_p20": round(time.p20, 2),
        "us_p80": round(time.p80, 2),
        "gb_per_s": round(speed),
        "percent_of_copy": round(100 * speed / copied, 1),
        "ratio": round(dense_us / time.median, 3),
    }


def _semi_structured(
    weight: Tensor, inputs: dict[int, Tensor], count: int, dense_us: dict[int, float], copied: float
) -> list[dict[str, Any]]:
    """PyTorch's own 2:4 product with its default algorithm; from where it fails on, why. Last, as a
    failed capture lingers.
    """
    found, weights, reason = [], [], ""
    for m, x in inputs.items():
        row = {**_base(weight, x), "op": "torch semi-structured"}
        try:
            if not reason:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    weights = weights or [
                        torch.sparse.to_sparse_semi_structured(weight) for _ in range(count)
                    ]
                    time = measure(_calls(weights, lambda w, x=x: linear(x, w)))
                size = weight.nbytes * 9 // 16 + x.nbytes + 2 * m * len(weight)
                found.append(_row(row, time, dense_us[m], size, copied))
        except (
            Exception
        ) as error:  # a backend that is not there, a capture it does not allow: it is not ours
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason:
            found.append({**row, "note": reason})
    return found
