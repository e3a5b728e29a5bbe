"""The licence of a base model, taken over for what is made of it: from its card, or from a LICENSE
file that is recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what the beginning of a licence file says, in lower case -> the Hub's identifier; the first that
# is found counts
_TEXTS = {
    "llama 3.3 community license": "llama3.3",
    "llama 3.2 community license": "llama3.2",
    "llama 3.1 community license": "llama3.1",
    "llama 3 community license": "llama3",
    "llama 2 community license": "llama2",
    "gemma terms of use": "gemma",
    "apache license version 2.0": "apache-2.0",
    "permission is hereby granted, free of charge": "mit",
    "redistributions in binary form must reproduce": "bsd-3-clause",
    "creative commons attribution-sharealike 4.0": "cc-by-sa-4.0",
    "creative commons attribution 4.0": "cc-by-4.0",
}
_BEGINNING = 2000  # characters in which a licence names itself


@dataclass(frozen=True)
class Licence:
    """`id` is the Hub's identifier, empty where nothing is known; `name` and `link` go with the
    identifier `other`.
    """

    id: str = ""
    name: str = ""
    link: str = ""
    source: str = ""


def from_card(metadata: Mapping[str, Any], source: str) -> Licence | None:
    """The licence that the metadata of a model card names, None where it names none."""
    licence = metadata.get("license")
    licence = licence[0] if isinstance(licence, list) and licence else licence
    if not isinstance(licence, str) or not licence:
        return None
    name, link = (str(metadata.get(key) or "") for key in ("license_name", "license_link"))
    return Licence(licence, name, link, source)


def from_folder(folder: Path) -> Licence | None:
    """The licence of a local base model: its README.md's metadata, then its LICENSE."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if card.is_file():
        try:
            metadata = ModelCard(
                card.read_text(encoding="utf-8"), ignore_metadata_errors=True
            ).data.to_dict()
        except Exception:  # whatever a foreign README holds
            metadata = {}
        if found := from_card(metadata, f"{folder.name}/README.md"):
            return found
    return from_file(folder)


def from_file(folder: Path) -> Licence | None:
    """The licence that a LICENSE file in `folder` names; `other`, with a link to it, where it is
    not recognised.
    """
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.name.upper().startswith(("LICENSE", "LICENCE")) and path.is_file()
    )
    if not paths:
        return None
    name = paths[0].name
    text = " ".join(
        paths[0].read_text(encoding="utf-8", errors="replace")[:_BEGINNING].lower().split()
    )
    found = next((licence for says, licence in _TEXTS.items() if says in text), None)
    return (
        Licence(found, source=name)
        if found
        else Licence("other", "see-the-licence-file", name, name)
    )
