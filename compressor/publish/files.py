"""What of a compressed folder is published: its checkpoint, records and card, by a list of what may
go, never of what may not.

Whatever else lies in the folder stays at home: hidden files, states of work under way, subfolders.
The copies of recipe.toml and report.json that go up do not tell where on this machine the model and
the text lay.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from compressor.checkpoint.digest import checkpoint_digest
from compressor.checkpoint.packed_config import packed_modules
from compressor.checkpoint.reader import INDEX, Reader, read_json
from compressor.checkpoint.side_files import is_side_file, names
from compressor.errors import CheckpointError
from compressor.publish.card import EVAL_RESULTS, Facts, eval_results_file, make_card
from compressor.publish.licence import Licence, from_file, from_folder
from compressor.records.read_report import is_number, read_record
from compressor.records.scores import read_scores, scores_path
from compressor.text import home_path

CARD, RECIPE, REPORT, PLAN = "README.md", "recipe.toml", "report.json", "plan.toml"
_PICTURES = (".png", ".svg", ".html")


@dataclass(frozen=True)
class File:
    """One file to publish: its name in the repository, and a path or, where it was made for the
    purpose, its bytes.
    """

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass(frozen=True)
class Publication:
    """Everything that would go up.

    Attributes:
        files: the shards first.
        stays: names in the folder that are not published.
        card: `huggingface_hub.ModelCard`.
        notes: what the user should know before it happens.
    """

    files: list[File]
    stays: list[str]
    card: Any
    notes: list[str]


def prepare(
    folder: Path,
    repo: str,
    base: str,
    published_licence: Callable[[str], tuple[bool, Licence | None]],
) -> Publication:
    """Choose the files of `folder` and write the card for the repository `repo`.

    Args:
        folder: made by `compress prune` or `compress lowrank`.
        base: Hub id of the base model; empty: the recipe's model, where the Hub knows it.
        published_licence: Hub id -> whether there is such a model, and the licence its card names.

    Raises:
        CheckpointError: no such folder, or a link leads out of it.
    """
    reader = Reader(folder)
    recipe, report, kept = _records(folder)
    notes: list[str] = []
    base, licence = _base(recipe, base, published_licence)
    if not base:
        notes.append(
            f"the base model {recipe['model']!r} is not on the Hub; `base_model` (ORG/NAME) lets "
            f"the card name it"
        )
    licence = licence or from_file(folder)
    if licence is None:
        notes.append("the licence of the base model is not known; the card says so")
    digest = checkpoint_digest(reader)
    scores = read_scores(folder, digest)
    if scores is None:
        stale = scores_path(folder).is_file()
        notes.append(
            f"{scores_path(folder).name} is about other bytes than these: its scores are left out; "
            f"run `compressor.evaluate` again"
            if stale
            else "no scores are stored: run `compressor.evaluate` first, and the card has them"
        )
    public = {
        **recipe,
        "model": base or Path(recipe["model"]).name,
        "dataset": _without_path(recipe["dataset"]),
    }
    recipe_text = tomli_w.dumps(public)
    facts = Facts(
        repo, base, public, report, bool(packed_modules(reader.config)), kept, scores, licence
    )
    card = make_card(facts, recipe_text)
    public_report = {
        **report,
        "recipe": {**report["recipe"], "model": public["model"], "dataset": public["dataset"]},
    }
    made = {CARD: str(card), RECIPE: recipe_text, REPORT: json.dumps(public_report, indent=1)}
    if scores and (entries := eval_results_file(scores)):
        made[EVAL_RESULTS] = entries
    if (folder / CARD).is_file():
        del made[CARD]
        card = _own_card(folder / CARD)
        notes.append(f"{CARD} of the folder is published as it is, no card was made")
    return Publication(
        *_choose(reader, made, code=bool(recipe.get("trust_remote_code"))), card, notes
    )


def _own_card(path: Path) -> Any:
    from huggingface_hub import ModelCard

    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # of YAML, mostly
        raise CheckpointError(
            f"{path} is no model card: {' '.join(str(error).split())[:200]}"
        ) from None


def _records(folder: Path) -> tuple[dict[str, Any], dict[str, Any], float | None]:
    """The recipe, the report, and the part of the parameters that was kept, where ranks were shared
    out.
    """
    try:
        recipe = tomllib.loads((folder / RECIPE).read_text(encoding="utf-8"))
        report = read_json(folder / REPORT)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {RECIPE}: push publishes the folders that `compress prune` and "
            f"`compress lowrank` make"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / RECIPE} is not readable TOML: {str(error)[:200]}"
        ) from None
    needed = {
        "recipe": dict,
        "architecture": str,
        "totals": dict,
        "linears": list,
        "left_dense": list,
        "versions": dict,
    }
    if not all(isinstance(report.get(key), kind) for key, kind in needed.items()):
        raise CheckpointError(f"{folder / REPORT} is no report of this package")
    known = is_number(report["totals"].get("ratio")) and isinstance(
        report["versions"].get("compress-llm"), str
    )
    record = read_record(folder)  # checks every value
    if not known:
        raise CheckpointError(
            f"{folder / REPORT} is no report of this package: a version or a ratio is missing"
        )
    if not all(
        isinstance(recipe.get(key), str) for key in ("model", "method", "pattern", "dataset")
    ):
        raise CheckpointError(
            f"{folder / RECIPE} is no complete recipe: model, method, pattern and dataset are "
            f"expected in it"
        )
    return recipe, report, record.kept


def _base(
    recipe: Mapping[str, Any], given: str, published: Callable[[str], tuple[bool, Licence | None]]
) -> tuple[str, Licence | None]:
    """The Hub id of the base model, empty if it has none, and its licence."""
    local = home_path(recipe["model"])
    own = from_folder(local) if local.is_dir() else None
    name = given or ("" if local.is_dir() else recipe["model"])
    if not name:
        return "", own
    known, licence = (
        published(name)
        if name.count("/") == 1 and not name.startswith((".", "/", "~"))
        else (False, None)
    )
    return (name if known or given else ""), licence or own


def _choose(reader: Reader, made: Mapping[str, str], *, code: bool) -> tuple[list[File], list[str]]:
    folder = reader.folder
    chosen = list(reader.shards)
    ours = {"config.json", CARD, PLAN, *([INDEX] if reader.index is not None else [])}
    for name in names(folder):
        pictures = name.endswith(_PICTURES) and not name.startswith(".")
        wanted = is_side_file(name, code=code) or pictures or name in ours
        if wanted and name not in (*chosen, *made):
            chosen.append(name)
    for name in chosen:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{folder / name} is a link that leads out of the folder; put a copy of the file "
                f"in its place"
            )
    goes = {name.partition("/")[0] for name in (*chosen, *made)}
    stays = sorted(path.name for path in folder.iterdir() if path.name not in goes)
    files = [File(name, folder / name) for name in chosen]
    return files + [File(name, text.encode()) for name, text in made.items()], stays


def _without_path(dataset: str) -> str:
    return Path(dataset).name if dataset.endswith((".txt", ".jsonl", ".parquet")) else dataset
