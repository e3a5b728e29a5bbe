"""Token rows for calibration and evaluation, from the records of a dataset or the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.calibration import chat
from compressor.calibration.dataset import Record, on_hub, records
from compressor.calibration.dataset import check_dataset as check_dataset
from compressor.checkpoint.dequantised import DequantisedReader, open_model
from compressor.checkpoint.side_files import lfs_pointer, side_files
from compressor.errors import CompressError, DataError
from compressor.free_memory import free_memory
from compressor.model.whole import load_dequantised
from compressor.text import size

if TYPE_CHECKING:
    from torch import Tensor

MOST_RECORDS = 100_000  # of a Hub dataset that are read; of a file that are in memory at once


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer. Raises DataError where there is none."""
    from transformers import AutoTokenizer

    pointers = (lfs_pointer(folder / name) for name in side_files(folder, code=False))
    if pointer := next(filter(None, pointers), ""):
        raise DataError(pointer)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"{folder} has no tokenizer that can be loaded: {said}; give rows of `input_ids`"
        ) from None


def calibration_rows(
    dataset: str,
    folder: Path,
    vocab_size: int,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    further: int = 0,
    text_column: str = "",
    trust_remote_code: bool = False,
) -> Tensor:
    """Token ids int64 `[num_samples, seq_len]` from a file or a Hub dataset, and after them up to
    `further` rows, as many as there are.

    Rows of `input_ids` are taken in order, the first `seq_len` ids of each that has as many without
    its padding. Texts and chats of the whole file (of a Hub dataset, of its first 100,000 records)
    are shuffled by `seed`, tokenised, joined and cut into consecutive rows, so that no token is
    padding; those without any text are left out.

    Raises:
        DataError: fewer tokens than asked for, ids outside the vocabulary, records without text.
    """
    import torch

    first, every = _opened(dataset, text_column)
    if first.ids is not None:
        return torch.tensor(_whole_rows(dataset, every, vocab_size, num_samples, further, seq_len))
    shuffled = _shuffled(every, lambda: records(dataset, text_column), seed)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    wanted = (num_samples + further) * seq_len
    stream = _stream(dataset, shuffled, tokenizer, vocab_size, wanted)
    ids = torch.tensor(stream[: len(stream) // seq_len * seq_len]).reshape(-1, seq_len)
    if len(ids) < num_samples:
        raise _too_few(dataset, len(ids), seq_len, num_samples)
    return ids[: num_samples + further]


def evaluation_rows(
    dataset: str,
    folder: Path,
    vocab_size: int,
    *,
    seq_len: int,
    text_column: str = "",
    trust_remote_code: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[Tensor]:
    """Token rows to score, int64 `[seq]` each.

    Rows of `input_ids` as they are, without padding. Texts are joined, tokenised once and cut into
    windows of `seq_len`: as in the papers the records are joined by blank lines and the last,
    shorter window is dropped. Chats are tokenised each by its template, joined and cut. A file is
    read whole, of a Hub dataset the first 100,000 records; `note` is told where that is not all.

    Raises:
        DataError: fewer tokens than one window, ids outside the vocabulary, records without text.
    """
    import torch

    first, every = _opened(dataset, text_column)
    documents = list(every)
    if on_hub(dataset) and len(documents) > MOST_RECORDS:
        documents = documents[:MOST_RECORDS]
        note(
            f"{dataset} has more than {MOST_RECORDS:,} records: the first {MOST_RECORDS:,} are "
            "scored; a file is scored whole"
        )
    if first.ids is not None:
        return [torch.tensor(_ids(record, vocab_size)) for record in documents]
    if first.messages is not None:
        parts: Iterable[Record] = documents
    else:
        joint = "" if dataset.endswith(".txt") else "\n\n"
        parts = [Record(dataset, text=joint.join(_text(record) for record in documents))]
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = _stream(dataset, parts, tokenizer, vocab_size, None)
    if len(ids) < seq_len:
        short = f"{len(ids)} tokens, fewer than one window of {seq_len}"
        raise DataError(f"{dataset} has {short}: lower `seq_len` or give more text")
    return list(torch.tensor(ids[: len(ids) // seq_len * seq_len]).split(seq_len))


def _opened(dataset: str, text_column: str) -> tuple[Record, Iterator[Record]]:
    """The first record, and all of them: of a Hub dataset one more than are read, to know of it."""
    every = records(dataset, text_column)
    if on_hub(dataset):
        every = islice(every, MOST_RECORDS + 1)
    first = next(every, None)
    if first is None:
        raise DataError(f"dataset {dataset} holds no records")
    return first, chain([first], every)


def _shuffled(
    every: Iterator[Record], again: Callable[[], Iterator[Record]], seed: int
) -> Iterator[Record]:
    """All records in an order drawn by `seed`; so many at a time are in memory.

    Args:
        every: the records.
        again: reads them once more, for a file that has more than are held.
        seed: of the order.
    """
    import torch

    held = list(islice(every, MOST_RECORDS))
    total = len(held) + sum(1 for _ in every)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if total == len(held):
        yield from (held[index] for index in order.tolist())
        return
    del held
    for part in order.split(MOST_RECORDS):
        places = part.tolist()
        wanted = set(places)
        chosen = {place: record for place, record in enumerate(again()) if place in wanted}
        yield from (chosen[place] for place in places)


def _whole_rows(
    dataset: str,
    every: Iterable[Record],
    vocab_size: int,
    num_samples: int,
    further: int,
    seq_len: int,
) -> list[list[int]]:
    """The first `seq_len` ids of the first `num_samples` rows that have as many, and of up to
    `further` rows after them.
    """
    rows: list[list[int]] = []
    short, longest = 0, 0
    for record in every:
        row = _ids(record, vocab_size)
        if len(row) >= seq_len:
            rows.append(row[:seq_len])
        else:
            short, longest = short + 1, max(longest, len(row))
        if len(rows) == num_samples + further:
            return rows
    if len(rows) >= num_samples:
        return rows
    if not short:
        raise _too_few(dataset, len(rows), seq_len, num_samples)
    raise DataError(
        f"{dataset} has rows of {longest} input_ids, `seq_len` asks for {seq_len}: {len(rows)} of "
        f"{len(rows) + short} rows have as many without padding, {num_samples} were asked for; "
        "lower `seq_len` or `num_samples`"
    )


def _too_few(dataset: str, found: int, seq_len: int, num_samples: int) -> DataError:
    return DataError(
        f"{dataset} gives {found} samples of {seq_len} tokens, {num_samples} were asked for: "
        "lower `num_samples` or `seq_len`, or give more text"
    )


def _ids(record: Record, vocab_size: int) -> list[int]:
    row = record.ids
    if row is None:
        raise DataError(f"{record.where} has no `input_ids`, the records before it do")
    if len(row) < 2 or not all(0 <= token < vocab_size for token in row):
        raise DataError(
            f"{record.where}: input_ids must be rows of two or more integers in "
            f"0..{vocab_size - 1}, the model's vocabulary; what attention_mask leaves out is no "
            "part of them"
        )
    return row


def _text(record: Record) -> str:
    if record.text is None:
        raise DataError(f"{record.where} is no text, the records before it are")
    return record.text


def _stream(
    dataset: str,
    documents: Iterable[Record],
    tokenizer: Any,
    vocab_size: int,
    wanted: int | None,
) -> list[int]:
    """Joined token ids of `documents`, at least `wanted` where there are as many."""
    stream: list[int] = []
    for record in documents:
        if record.messages is not None:
            stream += chat.token_ids(tokenizer, record.messages, record.tools, record.where)
        elif (text := _text(record)).strip():
            stream += tokenizer(text, verbose=False)["input_ids"]
        if wanted is not None and len(stream) >= wanted:
            break
    if set(stream) <= set(tokenizer.all_special_ids):
        raise DataError(f"{dataset} is empty: its text has no tokens, or only special ones")
    if max(stream) >= vocab_size:
        raise DataError(
            f"the tokenizer gives id {max(stream)}, the model's vocabulary ends at "
            f"{vocab_size - 1}: they do not belong together"
        )
    return stream


def first_token(config: Any, folder: Path) -> int:
    """The token that texts of the model begin with, 0 where its config names none.

    Raises:
        DataError: it is outside the vocabulary.
    """
    text = config.get_text_config(decoder=True)
    start = text.bos_token_id
    if isinstance(start, list) and start:
        start = start[0]
    if type(start) is not int:
        return 0
    if not 0 <= start < text.vocab_size:
        raise DataError(
            f"{folder}/config.json has bos_token_id {start}, the model's vocabulary is "
            f"0..{text.vocab_size - 1}: correct it (null begins with token 0), or give a text "
            "with `dataset`"
        )
    return start


@lru_cache(maxsize=1)
def sample_from_model(
    folder: Path,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    device: str,
    further: int = 0,
    trust_remote_code: bool = False,
) -> Tensor:
    """`[num_samples + further, seq_len]` token ids that the model itself writes: plain sampling at
    temperature 1. The first `num_samples` are the same whatever `further` is.

    Raises:
        DataError: the model does not fit into free memory, so that sampling would take days, or
            its first token is outside its vocabulary.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    require_memory(folder, device)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        start = first_token(config, folder)
        reader, options = open_model(folder), {"trust_remote_code": trust_remote_code}
        model: Any
        if isinstance(reader, DequantisedReader):
            model = load_dequantised(reader, dtype="auto", **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    except CompressError:
        raise
    except Exception as error:  # transformers raises many kinds on a folder it cannot load
        raise DataError(
            f"{folder} cannot be loaded to sample from it: {' '.join(str(error).split())[:200]}"
        ) from None
    model = model.to(device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    at_once = _rows_at_once(model.config, seq_len)
    return torch.cat(
        [
            _write(model, rows, seq_len, generator)
            for count in (num_samples, further)
            for rows in torch.full((count, 1), start, device=device).split(at_once)
            if count
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


def require_memory(folder: Path, device: str) -> None:
    """Raise DataError where the whole model does not fit: into the host's memory, where it is read,
    and into that of the device.
    """
    import torch

    needed = open_model(folder).nbytes
    free = {"cpu": free_memory()}
    if device.startswith("cuda"):
        free[device] = torch.cuda.mem_get_info(device)[0]
    for where, room in free.items():
        if needed * 1.2 > room:
            raise DataError(
                f"'self' needs the whole model in memory to sample from it: {size(needed)} "
                f"of weights, {size(room)} free on {where}; give a text with `dataset`"
            )


def context_length(config: Any) -> int | None:
    """The longest sequence a model was made for, None where its config does not say."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(length := getattr(text, name, None), int) and length > 0:
            return length
    return None
