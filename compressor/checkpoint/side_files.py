"""The files beside the weights: which of them belong to a checkpoint, by a list of those known to.

Whatever else lies in a folder (an adapter, an optimizer's state, indices of other weights) is not
part of what a loader makes of its weights and its config.json, and can keep it from loading.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

TEMPLATES = "additional_chat_templates"  # a folder of *.jinja, the only one that belongs
_KNOWN = (
    # configuration, and what a tokenizer is made of: names of transformers, and of code on the Hub
    "generation_config.json", "*processor_config.json", "tokenizer*.json", "tokenizer.model*",
    "special_tokens_map.json", "added_tokens.json", "tekken.json", "*vocab*.json", "vocab*.txt",
    "vocab.bpe", "merges*.txt", "encoder.json", "bpe.codes", "dict.txt", "emoji.json",
    "normalizer.json", "byte_maps.json", "word_pronunciation.json", "word_shape.json",
    "*.tokenizer", "*.model", "*.spm", "*.vocab", "*.tiktoken", "chat_template*.json", "*.jinja",
)  # fmt: skip
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
PATTERNS = (*_KNOWN, *_LICENCES, *map(str.lower, _LICENCES))  # of all that belongs, as globs
_OURS = {"config.json", "report.json", "recipe.toml", "plan.toml", "SHA256SUMS"}  # made anew
_POINTER = b"version https://git-lfs.github.com/spec/v1"


def is_side_file(name: str, *, code: bool) -> bool:
    """Whether a file that goes with the weights (tokenizer, configuration, licence) has this name.

    Args:
        name: relative to the folder.
        code: whether Python files do.
    """
    folder, _, leaf = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and leaf.endswith(".jinja")
    licence = any(fnmatchcase(leaf.upper(), pattern) for pattern in _LICENCES)
    known = any(fnmatchcase(leaf, pattern) for pattern in _KNOWN) and not leaf.startswith(".")
    return known or licence or (code and leaf.endswith(".py"))


def names(folder: Path) -> list[str]:
    """The files of `folder`, and those of its further chat templates, relative to it."""
    found = [path.name for path in folder.iterdir() if path.is_file()]
    inside = folder / TEMPLATES
    templates = inside.iterdir() if inside.is_dir() else []
    return sorted([*found, *(f"{TEMPLATES}/{path.name}" for path in templates if path.is_file())])


def side_files(folder: Path, *, code: bool) -> list[str]:
    """The tokenizer, licence and further files of `folder` beside config.json, relative to it.

    Args:
        folder: the checkpoint.
        code: its Python files too.
    """
    return [name for name in names(folder) if is_side_file(name, code=code)]


def left_files(folder: Path, used: Collection[str], *, code: bool) -> list[str]:
    """What of `folder` does not go along and is no model card: files, and folders with a / behind.

    Args:
        folder: the checkpoint.
        used: names of its weights.
        code: whether its Python files go along.
    """
    taken = {*used, *_OURS, *side_files(folder, code=code), "README.md"}
    files = [name for name in names(folder) if name not in taken and not name.startswith(".")]
    folders = (path.name for path in folder.iterdir() if path.is_dir())
    return files + sorted(f"{name}/" for name in folders if name[0] != "." and name != TEMPLATES)


def lfs_pointer(path: Path) -> str:
    """A sentence about a file that is only git-lfs's pointer to the file; empty for any other."""
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) != _POINTER:
                return ""
    except OSError:
        return ""
    return f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
