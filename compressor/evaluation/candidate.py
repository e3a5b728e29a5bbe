"""One model to be scored: what it is by content, and the model itself, loaded only when something
about it is not known yet.
"""

from __future__ import annotations

import gc
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import tokens
from compressor.checkpoint.dequantised import open_model
from compressor.checkpoint.digest import checkpoint_digest
from compressor.checkpoint.download import resolve
from compressor.checkpoint.packed_config import stored_modules
from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError, DataError, UsageError
from compressor.formats import form_class
from compressor.formats.headers import check_headers, packed_headers

_BLOCK = re.compile(r"\.\d+\.")  # in the name of a tensor that belongs to a decoder block


def load_model(
    model: str, *, device: str, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[Any, Path]:
    """A plain or compressed checkpoint, ready to be scored, and its folder. Raises
    CheckpointError.
    """
    import compressor.runtime  # makes from_pretrained understand compressed folders

    folder = resolve(model)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    # loaded where it runs: what is loaded on the CPU is unpacked there, and stays dense when it is
    # moved
    place: dict[str, Any] = {} if device == "cpu" else {"device_map": {"": device}}
    return compressor.runtime.load(
        folder, dtype=kind, trust_remote_code=trust_remote_code, **place
    ), folder


@dataclass(frozen=True)
class Text:
    """Token rows to score; `key` says what they are by content, `total` how many there would be
    without a limit.
    """

    rows: list[Tensor]
    key: str
    total: int


@dataclass(eq=False)
class Candidate:
    """A model to be scored, by its folder or Hub id, with how it is to be run.

    Raises:
        CheckpointError: no such model.
    """

    name: str
    device: str = "cpu"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.folder = resolve(self.name)
        self.reader = Reader(self.folder)

    @cached_property
    def digest(self) -> str:
        """What it is by content."""
        return checkpoint_digest(self.reader)

    @cached_property
    def config(self) -> Any:
        """Its transformers config, without its weights. Raises CheckpointError."""
        from transformers import AutoConfig

        import compressor.runtime  # noqa: F401  # makes the config of a compressed folder understood

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            raise CheckpointError(
                f"{self.name} cannot be loaded: {' '.join(str(error).split())[:300]}"
            ) from None

    @cached_property
    def model(self) -> Any:
        """The model, loaded at the first use."""
        return load_model(
            self.name,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )[0]

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return "model" in self.__dict__

    def free(self) -> None:
        """Return the model's memory; it is loaded again if it is needed again."""
        self.__dict__.pop("model", None)
        gc.collect()  # adapters and hooks may hold it in a cycle
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.get_text_config().vocab_size

    @cached_property
    def limit(self) -> int | None:
        """The longest sequence it was made for."""
        return tokens.context_length(self.config)

    def window(self, seq_len: int) -> int:
        """The length of a perplexity window where `seq_len` is asked for, 0 for the default. Raises
        UsageError.
        """
        if seq_len and self.limit and seq_len > self.limit:
            raise UsageError(
                f"`seq_len` {seq_len} is longer than the {self.limit} tokens this model was made "
                f"for"
            )
        return seq_len or min(2048, self.limit or 2048)

    def text(
        self,
        dataset: str,
        seq_len: int,
        limit: int | None,
        *,
        text_column: str = "",
        note: Callable[[str], None] = lambda text: None,
    ) -> Text:
        """The token rows of a file or Hub dataset for this model, at most `limit`; `note` is told
        what of the dataset is not among them. Raises DataError.
        """
        rows = tokens.evaluation_rows(
            dataset,
            self.folder,
            self.vocab_size,
            seq_len=self.window(seq_len),
            text_column=text_column,
            trust_remote_code=self.trust_remote_code,
            note=note,
        )
        total, rows = len(rows), rows[:limit]
        if self.limit and max(map(len, rows)) > self.limit:
            raise DataError(
                f"{dataset} has rows of {max(map(len, rows))} tokens, this model was made for "
                f"{self.limit}"
            )
        found = hashlib.sha256()
        for row in rows:
            found.update(len(row).to_bytes(8, "little") + row.to(torch.int64).numpy().tobytes())
        return Text(rows, found.hexdigest(), total)

    @property
    def nbytes(self) -> int:
        """Of all tensors, as stored."""
        return self.reader.nbytes

    @property
    def linear_bytes(self) -> int:
        """Of the weight matrices inside the decoder blocks, as stored: what compression works
        on.
        """
        return in_blocks(self.reader)

    @property
    def loaded_bytes(self) -> int:
        """What it takes in memory, unpacked, about."""
        kind = (
            self.dtype
            if self.dtype != "auto"
            else str(self.config.dtype or torch.float32).removeprefix("torch.")
        )
        reader = open_model(self.folder)
        modules = stored_modules(reader.config, reader.tensors)
        stored = packed_headers(reader.tensors)
        numbers = sum(
            math.prod(entry.shape)
            for name, entry in reader.tensors.items()
            if name.rpartition(".")[0] not in modules or name.endswith(".bias")
        )
        for name, entry in modules.items():
            rows, columns = check_headers(name, entry, stored.get(name, {})).shape
            numbers += form_class(entry["format"]).parameters(entry, (rows, columns))
        return numbers * getattr(torch, kind).itemsize


def in_blocks(reader: Reader) -> int:
    """Bytes of the weight matrices inside the decoder blocks, as stored."""
    entries = reader.tensors.items()
    return sum(
        entry.nbytes for name, entry in entries if len(entry.shape) >= 2 and _BLOCK.search(name)
    )


@lru_cache(maxsize=1)
def own_text(
    writer: str, window: int, num_samples: int, seed: int, device: str, trust_remote_code: bool
) -> list[Tensor]:
    """Rows that the model `writer` writes itself. Raises DataError."""
    return list(
        tokens.sample_from_model(
            resolve(writer),
            num_samples=num_samples,
            seq_len=window,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    )
