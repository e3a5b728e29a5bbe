"""`compress export`: what another tool needs to know of a compressed folder, without torch."""

from __future__ import annotations

from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="Compressed folder or Hub id.", show_default=False)],
    trainable: Annotated[
        str,
        typer.Option(
            help="lrc: the factors of the low-rank linears (WeLore's recovery trains these alone)."
        ),
    ] = "lrc",
) -> None:
    """Print the names of the parameters that a recovery fine-tuning trains, one a line.

    [bold]Example[/bold]

    compress export out --trainable lrc
    """
    from compressor.checkpoint.download import resolve
    from compressor.checkpoint.packed_config import stored_modules
    from compressor.checkpoint.reader import Reader
    from compressor.errors import CheckpointError, UsageError
    from compressor.formats import form_class

    if trainable != "lrc":
        raise UsageError(f"trainable is {trainable!r}; accepted: lrc")
    reader = Reader(resolve(model))
    modules = stored_modules(reader.config, reader.tensors)
    names = [
        f"{name}.{suffix}"
        for name, entry in modules.items()
        for suffix in form_class(entry["format"]).TRAINABLE
    ]
    if not names:
        raise CheckpointError(f"{model} holds no low-rank linears: make some with compress lowrank")
    for name in names:
        print(name)
