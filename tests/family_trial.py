"""One model type, tried whole: a tiny random checkpoint through streaming, `prune`, `load`,
`verify`, `inspect` and `unpack`, as a user calls them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import compressor
from compressor.calibration import capture
from compressor.checkpoint.dequantised import open_model
from compressor.errors import CompressError
from compressor.model.skeleton import Skeleton
from tests.causal_types import causal

IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
_TWO, _ONE = 32, 64  # tokens of a batch: two batches of two rows, one of four
_NEAR = 1e-4  # of the largest number, in float32


@dataclass(frozen=True)
class Trial:
    """What came of one type.

    Attributes:
        kind: the model type; `model` is its class, empty where it could not be built.
        result: works, refused, not built, or wrong (which it must never be).
        line: of the refusal, why it was not built, or what is wrong.
        linears: how many were compressed.
    """

    kind: str
    model: str
    result: str
    line: str = ""
    linears: int = 0


class WrongError(Exception):
    """Something that must not happen."""


def tried(kind: str, place: Path, make: Callable[[str], Any] | None = None) -> Trial:
    """Try a type.

    Args:
        kind: the model type.
        place: an empty folder.
        make: gives a tiny random model of a type; a causal one if not given.
    """
    source = place / "model"
    try:
        model = (make or causal)(kind)
        randomise(model)
        with suppress(TypeError, ValueError):  # it wants more than text: that is ours to say
            logits(model)
        model.save_pretrained(source, max_shard_size="400KB")
    except Exception as error:
        return Trial(kind, "", "not built", _line(error))
    name = type(model).__name__
    del model
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in IDS.tolist()))
    try:
        streams_alike(source)
        return Trial(kind, name, "works", linears=round_trip(source, rows, place))
    except CompressError as error:
        found = _hinted(source, rows, place, str(error))
        return Trial(kind, name, found, str(error).replace(f"{place}/", ""))
    except WrongError as error:
        return Trial(kind, name, "wrong", str(error))
    except Exception as error:
        return Trial(kind, name, "wrong", f"traceback: {_line(error)}")


@torch.no_grad()
def randomise(model: Any) -> None:
    """Every parameter becomes random: fresh norms are all ones, fresh biases zeros."""
    for parameter in model.parameters():
        parameter.nan_to_num_(0, 0, 0)  # some are made from empty memory
        parameter.clamp_(-1, 1)
        parameter.add_(torch.randn_like(parameter) * 0.05)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # which experts a token goes to
            buffer.copy_(torch.randint(4, buffer.shape))


def streams_alike(source: Path) -> None:
    """Hidden states entering and leaving every block are the whole model's, with two batches and
    with one. Raises WrongError.
    """
    for tokens in (_TWO, _ONE):
        with _batches_of(tokens):
            _stream(source, IDS.split(tokens // IDS.shape[1]))


@torch.no_grad()
def _stream(source: Path, batches: tuple[Tensor, ...]) -> None:
    skeleton, cpu = Skeleton(open_model(source)), torch.device("cpu")
    states = capture.capture(skeleton, IDS, cpu)
    whole = type(skeleton.model).from_pretrained(source).eval()
    seen = [_watched(block) for block in whole.get_submodule(skeleton.path)]
    for ids in batches:
        whole(input_ids=ids, use_cache=False)
    for index, arguments in enumerate(states.arguments):
        entering, leaving = seen[index]
        _alike([batch.hidden for batch in states.hidden], entering, f"what enters block {index}")
        block = skeleton.load_block(index, cpu)
        states.hidden = [capture.run(block, batch, arguments) for batch in states.hidden]
        skeleton.free_block(index)
        _alike([batch.hidden for batch in states.hidden], leaving, f"what leaves block {index}")


def _watched(block: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Lists that what enters and leaves a block is put into, call by call."""
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def note(_: Any, positional: Any, keywords: Any, output: Any) -> None:
        entering.append(positional[0] if positional else keywords["hidden_states"])
        leaving.append(output[0] if isinstance(output, tuple | list) else output)

    block.register_forward_hook(note, with_kwargs=True)
    return entering, leaving


def _alike(found: list[Tensor], exact: list[Tensor], what: str) -> None:
    if len(found) != len(exact):
        raise WrongError(f"{what}: {len(found)} batches, {len(exact)} in the whole model")
    for number, (one, other) in enumerate(zip(found, exact, strict=True)):
        if one.shape != other.shape or (one - other).abs().max() > _NEAR * other.abs().max():
            raise WrongError(f"{what} in batch {number} is not what it is in the whole model")


def round_trip(source: Path, rows: Path, place: Path, ignore: Sequence[str] = ()) -> int:
    """Prune, load, verify, inspect, unpack; returns the number of linears. Raises WrongError."""
    out, dense = place / "out", place / "dense"
    with _batches_of(_TWO):
        report = compressor.prune(
            source, out, dataset=str(rows), num_samples=len(IDS), seq_len=IDS.shape[1],
            ignore=ignore,
        )  # fmt: skip
    if forgotten := _unnamed(source, report):
        raise WrongError(f"{forgotten[0]} is neither compressed nor in the report")
    if problems := compressor.verify(out)["problems"]:
        raise WrongError(f"verify: {problems[0]}")
    if not compressor.inspect(out):
        raise WrongError("inspect shows nothing")
    packed = logits(compressor.load(out))
    compressor.unpack(out, dense)
    if (names := _names(dense)) != _names(source):
        raise WrongError(f"unpack: other tensors, {min(names ^ _names(source))} among them")
    plain = type(Skeleton(open_model(dense)).model)
    model, info = plain.from_pretrained(dense, output_loading_info=True)
    if info["unexpected_keys"] or set(info["missing_keys"]) - _missing(plain, source):
        raise WrongError("transformers does not find all weights of the unpacked folder")
    _alike([packed], [logits(model)], "what the packed model gives")
    if not torch.isfinite(packed).all():
        raise WrongError("the packed model gives numbers that are not finite")
    return len(report.linears)


def _hinted(source: Path, rows: Path, place: Path, line: str) -> str:
    """`refused`; `wrong` where the line gives a pattern to ignore that does not make it work."""
    if hints := re.findall(r"ignore='([^']+)'", line):
        try:
            round_trip(source, rows, place, hints)
        except Exception as error:
            return f"wrong: with ignore={hints}: {_line(error)}"
    return "refused"


def _missing(model: Any, source: Path) -> set[str]:
    """What transformers does not find in the original either."""
    return set(model.from_pretrained(source, output_loading_info=True)[1]["missing_keys"])


def _names(folder: Path) -> set[str]:
    return set(open_model(folder).tensors)


def _unnamed(source: Path, report: Any) -> list[str]:
    """Matrices on disk that the report does not mention."""
    told = {row.name for row in [*report.linears, *report.left_dense]}
    told |= {row.entry.get("tensor") for row in report.linears}
    return [
        name
        for name, entry in open_model(source).tensors.items()
        if len(entry.shape) >= 2 and not {name, name.removesuffix(".weight")} & told
    ]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of IDS."""
    return model.eval()(input_ids=IDS, use_cache=False).logits


@contextmanager
def _batches_of(tokens: int) -> Iterator[None]:
    with patch.object(capture, "_BATCH_TOKENS", tokens):
        yield


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
