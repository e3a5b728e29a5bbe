"""Token rows for calibration and evaluation, from text or ready token ids.

A dataset is named by
    a file      .txt, .jsonl or .parquet; records have a `text` field, or `input_ids` rows that are
                taken as they are
    a Hub id    org/name, optionally org/name:config:split; its `text` field is streamed
    self        text sampled from the model itself, seeded: needs no file and no network
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 16  # characters of a .txt file that make one document
_MOST_DOCUMENTS = 100_000  # read at most; a calibration set needs a few hundred
_ACCEPTED = (
    "accepted: a .txt, .jsonl or .parquet file, a Hub dataset id such as org/name, or 'self'"
)


def check_dataset(dataset: str) -> None:
    """Everything about a dataset's name that can be known without reading it. Raises DataError."""
    if dataset == "self":
        return
    path = Path(dataset).expanduser()
    if path.is_file():
        if path.suffix not in (".txt", ".jsonl", ".parquet"):
            raise DataError(f"dataset {dataset} is a {path.suffix or 'nameless'} file; {_ACCEPTED}")
        if not path.stat().st_size:
            raise DataError(f"dataset {dataset} is empty")
    elif (
        path.exists()
        or not re.fullmatch(r"[\w.\-]+/[\w.\-]+(:[\w.\-]*){0,2}", dataset)
        or path.suffix in (".txt", ".jsonl", ".parquet")
    ):
        raise DataError(
            f"dataset {dataset} does not exist{did_you_mean(dataset, ['self'])}; {_ACCEPTED}"
        )


def records(dataset: str) -> Iterator[dict[str, Any]]:
    """The records of a file or a Hub dataset, each with `text` or `input_ids`. Raises DataError."""
    check_dataset(dataset)
    path = Path(dataset).expanduser()
    if not path.is_file():
        yield from _hub_records(dataset)
    elif path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is no UTF-8 text: byte {error.start} cannot be decoded"
            ) from None
        yield from ({"text": text[start : start + _PIECE]} for start in range(0, len(text), _PIECE))
    elif path.suffix == ".jsonl":
        yield from _jsonl_records(path)
    else:
        yield from _parquet_records(path)


def _jsonl_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict) or not ("text" in record or "input_ids" in record):
                    raise DataError(
                        f"{path} line {number} is no JSON object with a `text` or `input_ids` field"
                    )
                yield record


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"reading {path} needs pyarrow: pip install 'compress-llm[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in ("input_ids", "text") if name in file.schema_arrow.names][:1]
        if not columns:
            raise DataError(
                f"{path} has no `text` or `input_ids` column; it has "
                f"{', '.join(file.schema_arrow.names)[:200]}"
            )
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}"
        ) from None


def _hub_records(dataset: str) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"reading {dataset} from the Hub needs the datasets package: pip install "
            f"'compress-llm[eval]'"
        ) from None
    name, config, split = [*dataset.split(":"), "", ""][:3]
    try:
        yield from load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the datasets and Hub clients raise dozens of kinds
        raise DataError(
            f"dataset {dataset} could not be read from the Hub: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises DataError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise DataError(
            f"{folder} has no tokenizer that can be loaded: {' '.join(str(error).split())[:200]}; "
            f"give rows of `input_ids`"
        ) from None


def calibration_rows(
    dataset: str,
    folder: Path,
    vocab_size: int,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    trust_remote_code: bool = False,
) -> Tensor:
    """Token ids int64 `[num_samples, seq_len]` from a file or a Hub dataset.

    Rows of `input_ids` are taken in order, the first `seq_len` ids of each. Texts are shuffled by
    `seed`, tokenised, joined and cut into consecutive rows, so that no token is padding.

    Raises:
        DataError: fewer tokens than asked for, ids outside the vocabulary, records without text.
    """
    import torch

    documents = _first(records(dataset))
    if "input_ids" in documents[0]:
        rows = [_ids(dataset, record, vocab_size) for record in documents[:num_samples]]
        if short := next((row for row in rows if len(row) < seq_len), None):
            raise DataError(
                f"{dataset} has rows of {len(short)} input_ids, --seq-len asks for {seq_len}"
            )
        ids = torch.tensor([row[:seq_len] for row in rows])
    else:
        order = torch.randperm(
            len(documents), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        wanted = num_samples * seq_len
        stream = _tokenize(
            dataset, (documents[index] for index in order), tokenizer, vocab_size, wanted
        )
        ids = torch.tensor(stream[: len(stream) // seq_len * seq_len]).reshape(-1, seq_len)
    if len(ids) < num_samples:
        raise DataError(
            f"{dataset} gives {len(ids)} samples of {seq_len} tokens, {num_samples} were asked "
            f"for: "
            "lower --num-samples or --seq-len, or give more text"
        )
    return ids[:num_samples]


def evaluation_rows(
    dataset: str, folder: Path, vocab_size: int, *, seq_len: int, trust_remote_code: bool = False
) -> list[Tensor]:
    """Token rows to score: `input_ids` as they are; text joined, tokenised once and cut into
    windows of `seq_len`.

    As in the papers the records of a text set are joined by blank lines and the last, shorter
    window is dropped.
    """
    import torch

    documents = _first(records(dataset))
    if "input_ids" in documents[0]:
        return [torch.tensor(_ids(dataset, record, vocab_size)) for record in documents]
    joint = "" if dataset.endswith(".txt") else "\n\n"
    text = {"text": joint.join(_text(dataset, record) for record in documents)}
    ids = _tokenize(
        dataset,
        [text],
        load_tokenizer(folder, trust_remote_code=trust_remote_code),
        vocab_size,
        None,
    )
    if len(ids) < seq_len:
        raise DataError(
            f"{dataset} has {len(ids)} tokens, fewer than one window of {seq_len}: lower --seq-len "
            f"or give more text"
        )
    return list(torch.tensor(ids[: len(ids) // seq_len * seq_len]).split(seq_len))


def _first(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    from itertools import islice

    documents = list(islice(found, _MOST_DOCUMENTS))
    if not documents:
        raise DataError("the dataset holds no records")
    return documents


def _ids(dataset: str, record: dict[str, Any], vocab_size: int) -> list[int]:
    row = record.get("input_ids")
    if (
        not isinstance(row, list)
        or len(row) < 2
        or not all(type(token) is int and 0 <= token < vocab_size for token in row)
    ):
        raise DataError(
            f"{dataset}: input_ids must be rows of two or more integers in 0..{vocab_size - 1}, "
            f"the model's vocabulary"
        )
    return row


def _text(dataset: str, record: dict[str, Any]) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"{dataset}: a record has no `text`; its fields are {', '.join(map(str, record))[:200]}"
        )
    return text


def _tokenize(
    dataset: str,
    documents: Iterable[dict[str, Any]],
    tokenizer: Any,
    vocab_size: int,
    wanted: int | None,
) -> list[int]:
    """Joined token ids of `documents`, at least `wanted` where there are as many."""
    stream: list[int] = []
    for record in documents:
        stream += tokenizer(_text(dataset, record), verbose=False)["input_ids"]
        if wanted is not None and len(stream) >= wanted:
            break
    if not stream:
        raise DataError(f"{dataset} is empty: its text has no tokens")
    if max(stream) >= vocab_size:
        raise DataError(
            f"the tokenizer gives id {max(stream)}, the model's vocabulary ends at "
            f"{vocab_size - 1}: they do not belong together"
        )
    return stream


@lru_cache(maxsize=1)
def sample_from_model(
    folder: Path,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    device: str,
    trust_remote_code: bool = False,
) -> Tensor:
    """`[num_samples, seq_len]` token ids that the model itself writes: plain sampling at
    temperature 1.

    Raises:
        DataError: the model does not fit into free memory, so that sampling would take days.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _require_memory(folder, device)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds on a folder it cannot load
        raise DataError(
            f"{folder} cannot be loaded to sample from it: {' '.join(str(error).split())[:200]}"
        ) from None
    model = model.to(device).eval()
    start = model.config.get_text_config().bos_token_id
    first = torch.full((num_samples, 1), start if isinstance(start, int) else 0, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.cat(
        [
            _write(model, rows, seq_len, generator)
            for rows in first.split(_rows_at_once(model.config, seq_len))
        ]
    )


def _write(model: Any, ids: Tensor, seq_len: int, generator: Any) -> Tensor:
    """Continue the rows of `ids` `[rows, 1]` to `seq_len` tokens.

    A text that ends is followed by the next, as in training. The next token is the argmax of logits
    + Gumbel noise, which is a draw from their softmax; on a CPU that is three times faster than
    `generate`, which sorts and normalises.
    """
    import torch

    tokens, past = [ids], None
    with torch.no_grad():
        while len(tokens) < seq_len:
            output = model(input_ids=tokens[-1], past_key_values=past, use_cache=True)
            past, logits = output.past_key_values, output.logits[:, -1].float()
            noise = torch.empty_like(logits).exponential_(generator=generator).log_()
            tokens.append((logits - noise).argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1).cpu()


def _rows_at_once(config: Any, seq_len: int) -> int:
    """Rows whose keys and values fit into a gigabyte, counting four bytes a number and no sharing
    between heads.
    """
    text = config.get_text_config(decoder=True)
    row = 8 * seq_len * text.num_hidden_layers * text.hidden_size
    return max(1, min(128, 10**9 // row))


def _require_memory(folder: Path, device: str) -> None:
    import psutil
    import torch

    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.startswith("cuda")
        else psutil.virtual_memory().available
    )
    if needed * 1.2 > free:
        raise DataError(
            f"'self' needs the whole model in memory to sample from it: {needed / 1e9:.1f} GB of "
            f"weights, "
            f"{free / 1e9:.1f} GB free on {device}; "
            "give a text with --dataset"
        )


def context_length(config: Any) -> int | None:
    """The longest sequence a model was made for, None where its config does not say."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return length
    return None
