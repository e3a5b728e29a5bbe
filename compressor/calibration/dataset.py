"""Records of a dataset, one after the other: ready token ids, a text, or a chat.

A dataset is named by
    a file      .txt, .jsonl or .parquet
    a Hub id    org/name, optionally org/name:config:split; streamed
    self        text sampled from the model itself (calibration/tokens.py); it has no records

A record of the latter two kinds is what the first of these fields has that it has:
    input_ids       token ids; an `attention_mask` beside them says which of them are padding
    text            a text
    messages        a chat, `{"role": …, "content": …}` each; `conversations` in the same way, or
                    with `from` and `value`. `tools` beside it go through the template too.
`text_column` names another field that has the text or the chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.calibration.chat import Message, messages_of
from compressor.checkpoint.side_files import lfs_pointer
from compressor.errors import DataError, did_you_mean
from compressor.text import home_path

_PIECE = 1 << 16  # characters of a .txt file that make one record
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_ACCEPTED = (
    "accepted: a .txt, .jsonl or .parquet file, a Hub dataset id such as org/name, or 'self'"
)
_FIELDS = ("input_ids", "text", "messages", "conversations")
_BESIDE = ("attention_mask", "tools")  # read along with the field that counts
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """One record: `ids`, a `text` or a chat's `messages`, the other two None.

    Attributes:
        where: names it in messages to people: the dataset and a line or a number.
        ids: token ids without those that are masked.
        text: without halves of surrogate pairs.
        messages: of a chat; `tools` are those it may call.
    """

    where: str
    ids: list[int] | None = None
    text: str | None = None
    messages: list[Message] | None = None
    tools: list[Any] | None = None


def check_dataset(dataset: str, text_column: str = "") -> None:
    """Everything about a dataset's name that can be known without reading it. Raises DataError."""
    if text_column and not has_columns(dataset):
        raise DataError(
            f"dataset {dataset} has no columns, `text_column` {text_column!r} is for .jsonl, "
            ".parquet and Hub datasets: leave it out, or name such a dataset with `dataset`"
        )
    if dataset == "self":
        return
    path = home_path(dataset)
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"dataset {dataset} is a {path.suffix or 'nameless'} file; {_ACCEPTED}")
        if not path.stat().st_size:
            raise DataError(f"dataset {dataset} is empty")
        if pointer := lfs_pointer(path):
            raise DataError(f"dataset {pointer}")
    elif path.exists():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise DataError(f"dataset {dataset} is {kind}; {_ACCEPTED}")
    elif (
        not re.fullmatch(r"[\w.\-]+/[\w.\-]+(:[\w.\-]*){0,2}", dataset) or path.suffix in _SUFFIXES
    ):
        hint = did_you_mean(dataset, ["self"])
        raise DataError(f"dataset {dataset} does not exist{hint}; {_ACCEPTED}")


def has_columns(dataset: str) -> bool:
    """Whether the records of `dataset` have fields, of which one can be named."""
    return dataset != "self" and not dataset.endswith(".txt")


def on_hub(dataset: str) -> bool:
    """Whether `dataset` is streamed from the Hub; `check_dataset` has passed."""
    return dataset != "self" and not home_path(dataset).is_file()


def records(dataset: str, text_column: str = "") -> Iterator[Record]:
    """The records of a file or a Hub dataset. Raises DataError."""
    check_dataset(dataset, text_column)
    path = home_path(dataset)
    if not path.is_file():
        yield from _hub_records(dataset, text_column)
    elif path.suffix == ".txt":
        yield from _pieces(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl_records(path, text_column)
    else:
        yield from _parquet_records(path, text_column)


def _pieces(path: Path) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: byte {error.start} cannot be decoded") from None
    for number, start in enumerate(range(0, len(text), _PIECE), 1):
        yield Record(f"{path} piece {number}", text=text[start : start + _PIECE])


def _jsonl_records(path: Path, text_column: str) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    fields = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    fields = None
                where = f"{path} line {number}"
                known = isinstance(fields, dict) and _column(fields, text_column)
                if not isinstance(fields, dict) or not known:
                    expected = f"a `{text_column}` field" if text_column else _EXPECTED_FIELDS
                    raise DataError(f"{where} is no JSON object with {expected}{_has(fields)}")
                yield _record(where, fields, known)


_EXPECTED_FIELDS = "a `text` or `input_ids` field, `messages` or `conversations`"


def _has(fields: Any) -> str:
    """What there is in place of what was looked for, and what to do."""
    names = ", ".join(map(str, fields))[:200] if isinstance(fields, Mapping) else ""
    return f"; it has {names}: `text_column` names another" if names else ""


def _column(fields: Mapping[str, Any], text_column: str) -> str:
    """The field that counts; empty where there is none. One that is null is none if there is
    another.
    """
    if text_column:
        return text_column if text_column in fields else ""
    there = [name for name in _FIELDS if name in fields]
    return next((name for name in there if fields[name] is not None), there[0] if there else "")


def _parquet_records(path: Path, text_column: str) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"reading {path} needs pyarrow: pip install 'compress-llm[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = _column(dict.fromkeys(names, ""), text_column)
        if not column:
            missing = f"`{text_column}` column" if text_column else _EXPECTED_COLUMNS
            raise DataError(f"{path} has no {missing}{_has(dict.fromkeys(names))}")
        number = 0
        for batch in file.iter_batches(
            columns=[column, *(name for name in _BESIDE if name in names)]
        ):
            for fields in batch.to_pylist():
                number += 1
                yield _record(f"{path} record {number}", fields, column)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as parquet: {said}") from None


_EXPECTED_COLUMNS = "`text` or `input_ids` column, no `messages` or `conversations`"


def _hub_records(dataset: str, text_column: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset
    except ImportError:
        needed = "needs the datasets package: pip install 'compress-llm[eval]'"
        raise DataError(f"reading {dataset} from the Hub {needed}") from None
    name, config, split = [*dataset.split(":"), "", ""][:3]
    try:
        streamed = load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, fields in enumerate(streamed, 1):
            column = _column(fields, text_column)
            if not column:
                missing = f"`{text_column}` column" if text_column else _EXPECTED_COLUMNS
                raise DataError(f"{dataset} record {number} has no {missing}{_has(fields)}")
            yield _record(f"{dataset} record {number}", fields, column)
    except DataError:
        raise
    except Exception as error:  # the datasets and Hub clients raise dozens of kinds
        said = " ".join(str(error).split())[:300]
        raise DataError(f"dataset {dataset} could not be read from the Hub: {said}") from None


def _record(where: str, fields: Mapping[str, Any], column: str) -> Record:
    """The record that `fields[column]` is. Raises DataError where it is of another kind."""
    value = fields[column]
    if column == "input_ids":
        return Record(where, ids=_unpadded(where, value, fields.get("attention_mask")))
    chat = column in ("messages", "conversations")
    if isinstance(value, str) and not chat:
        return Record(where, text=mended(value))
    if isinstance(value, list) and (chat or (value and isinstance(value[0], dict))):
        tools = fields.get("tools")
        return Record(
            where,
            messages=messages_of(f"{where}: `{column}`", mended(value)),
            tools=mended(tools) if isinstance(tools, list) and tools else None,
        )
    expected = "a list of messages" if chat else "a text (or a list of messages)"
    raise DataError(f"{where}: `{column}` is {_kind(value)}, {expected} is expected")


def _unpadded(where: str, row: Any, mask: Any) -> list[int]:
    """The ids of a row without its padding: what `attention_mask` has 0 for, at either end."""
    whole = isinstance(row, list) and all(type(token) is int for token in row)
    if not whole:
        raise DataError(f"{where}: `input_ids` must be a list of integers")
    if mask is None:
        return row
    if (
        not isinstance(mask, list)
        or len(mask) != len(row)
        or any(one not in (0, 1) for one in mask)
    ):
        raise DataError(
            f"{where}: `attention_mask` must hold a 0 or 1 for each of the {len(row)} input_ids"
        )
    first, count = mask.index(1) if 1 in mask else 0, sum(map(int, mask))
    if not all(mask[first : first + count]):
        raise DataError(
            f"{where}: `attention_mask` is 0 between tokens; padding at either end is left out, "
            "nothing else: give the row without the tokens that do not count"
        )
    return row[first : first + count]


def mended(value: Any) -> Any:
    """`value`, a text or JSON value, with U+FFFD for each half of a surrogate pair that is alone.

    Text that was scraped or cut has them, and no tokenizer takes them.
    """
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [mended(item) for item in value]
    if isinstance(value, dict):
        return {mended(key): mended(item) for key, item in value.items()}
    return value


def _kind(value: Any) -> str:
    """What kind of JSON value it is, for people."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        dict: "an object",
        str: "a text",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
