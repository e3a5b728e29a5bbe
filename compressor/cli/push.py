"""`compress push`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.options import as_flags
from compressor.cli.show import err, out, size, table

if TYPE_CHECKING:
    from compressor.publish.files import Publication


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder that prune or lowrank made.", show_default=False
        ),
    ],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="ORG/NAME", help="The model on the Hub; made if need be.", show_default=False
        ),
    ],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead.")
    ] = False,
    base_model: Annotated[
        str,
        typer.Option(
            metavar="ORG/NAME", help="The original on the Hub.", show_default="the recipe's model"
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go up, send nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> None:
    """Publish a compressed folder on the Hub, with a model card made from its records and its
    stored scores.

    Log in once with `hf auth login`, or set HF_TOKEN. A push that was cut off is repeated: what has
    arrived is not sent twice.

    [bold]Examples[/bold]

    compress push out org/model-2-4 --dry-run

    compress push out org/model-2-4 --private --base-model org/model
    """
    from compressor.publish import hub
    from compressor.publish.files import prepare

    progress = _progress(quiet)
    for name in (repo, *([base_model] if base_model else [])):
        hub.check_repo(name)
    what = prepare(folder, repo, base_model, hub.published_licence)
    if not quiet:
        for note in what.notes:
            text = as_flags(note, {"base_model": "--base-model"})
            err.print(f"note: {text}", markup=False, soft_wrap=True)
    if dry_run:
        _show_plan(what, repo, as_json)
        return
    message = f"{folder.resolve().name}, by compress-llm"
    pushed = hub.push(
        what, repo, private=private, create_pr=create_pr, message=message, progress=progress
    )
    if as_json:
        print(json.dumps({"repo": repo, **vars(pushed)}, indent=1))
        return
    if not quiet:
        sizes = {file.name: file.size for file in what.files}
        sent = (
            f"{len(pushed.sent)} files, {size(sum(sizes[name] for name in pushed.sent))}, are "
            f"published"
        )
        err.print(sent if pushed.sent else "nothing to do: everything is there already")
        for name in pushed.removed:
            err.print(f"removed from the Hub: {name}, weights of before", markup=False)
    print(pushed.pull_request or pushed.url)


def _show_plan(what: Publication, repo: str, as_json: bool) -> None:
    total = sum(file.size for file in what.files)
    if as_json:
        files = [{"name": file.name, "bytes": file.size} for file in what.files]
        print(
            json.dumps(
                {
                    "repo": repo,
                    "files": files,
                    "bytes": total,
                    "stays": what.stays,
                    "card": str(what.card),
                },
                indent=1,
            )
        )
        return
    rows = table("", "file >size")
    for file in what.files:
        rows.add_row(file.name, size(file.size))
    out.print(rows)
    for name in what.stays:
        out.print(f"stays here: {name}", markup=False)
    out.print(f"{len(what.files)} files, {size(total)}, would go to {repo}; nothing was sent")


def _progress(quiet: bool) -> Callable[[str, int, int], None]:
    """Names each large file before it is sent; on a terminal huggingface_hub's own bars show its
    bytes.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # it tries again by itself; the last failure is told by us
    if quiet or not err.is_terminal:
        disable_progress_bars()
    if quiet:
        return lambda name, number, total: None
    return lambda name, number, total: err.print(f"sending {name} ({number}/{total})", markup=False)
