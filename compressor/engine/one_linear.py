"""One linear: what method and refinement make of its weight, and what of that is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from compressor.engine.plan import Plan
from compressor.engine.task import Task
from compressor.errors import NumericalError, about
from compressor.formats import Form, notes
from compressor.formats.dense import Dense
from compressor.formats.sparse24 import Sparse24
from compressor.stats import InputStats, all_finite, error_on, output_error
from compressor.text import to_ignore


@dataclass(frozen=True)
class Seen:
    """What the calibration showed of a linear.

    Attributes:
        tokens: of its input.
        error: of its output, as `output_error` measures it.
        held_out_error: the same on samples that nothing is fitted to; None where it saw none.
        note: what the report says of its input, if anything.
    """

    tokens: int
    error: float
    note: str
    held_out_error: float | None = None


Compressed = tuple[Form, Seen | None]
"""What became of a linear; nothing was seen where there is no calibration."""


def compress_weight(plan: Plan, task: Task, weight: Tensor, stats: InputStats | None) -> Form:
    """What method and refinement make of `weight` `[out, in]`."""
    with about(task.linear.name):
        form: Form = task.method.compress(weight, stats, task.chosen, **task.options)
        if plan.refine and task.refined:
            refined = plan.refine.refine(
                weight, form.dense(), stats, task.target, **plan.refine_options
            )
            form = Dense(refined)
    return form


def finish(
    plan: Plan, task: Task, weight: Tensor, form: Form, stats: InputStats | None
) -> Compressed:
    """What is stored of a linear, packed where it can be, and its error against `weight` `[out,
    in]`.

    Raises:
        NumericalError: it is not finite, whatever made it: method, refinement, factors or tuning.
    """
    weight_now = form.dense()
    if not all_finite(weight_now):
        method = task.method.__name__.rpartition(".")[2]
        raise NumericalError(
            f"{task.linear.name}: what {method} makes of it is not finite (NaN or Inf) as "
            f"{str(weight_now.dtype).removeprefix('torch.')}: try another method or other options, "
            f"or leave it dense with {to_ignore(task.linear.name)}"
        )
    if not plan.packed and not isinstance(form, Dense):
        form = _multiplied(form)
    if plan.packs(task) and isinstance(form, Dense):
        form = replace(Sparse24.from_dense(form.weight), **notes(form))
    if stats is None:
        return form, None
    other = None
    if stats.held_out is not None and len(stats.held_out):
        other = error_on(stats.held_out, weight, weight_now)
    return form, Seen(stats.tokens, output_error(weight, weight_now, stats), stats.note, other)


def _multiplied(form: Form) -> Dense:
    """The weight that a form stands for, as every tool reads it."""
    carried = notes(form)
    if len(form.factors()) > 1:
        said = [carried.get("note", ""), "format dense: its factors are multiplied"]
        carried["note"] = "; ".join(filter(None, said))
    return Dense(form.dense(), **carried)
