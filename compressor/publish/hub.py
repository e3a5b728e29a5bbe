"""Publishing on the Hub: one commit that has everything or does not happen.

Large files go up first, one after the other; they belong to nothing until the commit names them. A
push that was cut off is simply repeated: the Hub keeps what has arrived, files that are there
already are compared by hash and not sent again. Tokens are huggingface_hub's business alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compressor.checkpoint.digest import file_sha256
from compressor.errors import HubError, UsageError
from compressor.publish.files import File, Publication
from compressor.publish.licence import Licence, from_card

_WEIGHTS = re.compile(r"model[^/]*\.safetensors(\.index\.json)?")
_AGAIN = "nothing was published; run the same command again, what has arrived is not sent twice"


@dataclass(frozen=True)
class Pushed:
    """What a push did: the commit's URL (and the pull request's), files sent and left, weights of
    before that were removed.
    """

    url: str
    pull_request: str | None
    sent: list[str]
    unchanged: list[str]
    removed: list[str]


def check_repo(name: str) -> None:
    """Raise UsageError where `name` cannot be a repository, ORG/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        accepted = "ORG/NAME of letters, digits, '-', '_' and '.', at most 96 characters"
        raise UsageError(f"{name!r} is no Hub repository; accepted: {accepted}") from None
    if "/" not in name:
        raise UsageError(f"{name!r} names no owner; give ORG/NAME, such as your-name/{name}")


def published_licence(name: str) -> tuple[bool, Licence | None]:
    """Whether the Hub has the model `name`, and the licence its card names; (False, None) where it
    cannot be asked.
    """
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(name, timeout=10).card_data
    except Exception:  # not there, no connection, offline, gated: all the same to the card
        return False, None
    return True, from_card(card.to_dict() if card else {}, f"the card of {name}")


def push(
    what: Publication,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    message: str,
    progress: Callable[[str, int, int], None] = lambda name, number, total: None,
) -> Pushed:
    """Publish `what` as the model `repo`, made if it is not there; with `create_pr` as a pull
    request to one that is.

    Args:
        progress: told the name of each large file before it is sent, its number and how many there
            are.

    Raises:
        HubError: the Hub refused something or the connection broke; nothing is published then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _explained(repo, "checking the model card"):
        what.card.validate()
    with _explained(repo, "asking for the repository"):
        if not create_pr:
            api.create_repo(repo, private=private or None, exist_ok=True)
        before = api.model_info(repo, files_metadata=True)
    if private and not before.private:
        raise HubError(
            f"{repo} exists already and is public; make it private in its settings on the Hub, or "
            f"choose another name"
        )
    there = {sibling.rfilename: sibling for sibling in before.siblings or []}
    changed = [file for file in what.files if not _same(file, there.get(file.name))]
    names = {file.name for file in what.files}
    stale = sorted(name for name in there if _WEIGHTS.fullmatch(name) and name not in names)
    unchanged = [file.name for file in what.files if file not in changed]
    if not changed and not stale:
        return Pushed(f"{api.endpoint}/{repo}", None, [], unchanged, [])
    additions = [CommitOperationAdd(file.name, file.source) for file in changed]
    large = [
        operation for operation in additions if operation.path_in_repo.endswith(".safetensors")
    ]
    for number, operation in enumerate(large, 1):
        progress(operation.path_in_repo, number, len(large))
        with _explained(repo, f"sending {operation.path_in_repo}"):
            api.preupload_lfs_files(repo, [operation], create_pr=create_pr, free_memory=False)
    with _explained(repo, "making the commit"):
        operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
        commit = api.create_commit(
            repo, operations, commit_message=message, create_pr=create_pr, parent_commit=before.sha
        )
    _check_arrival(api, repo, commit.oid, what)
    return Pushed(
        commit.commit_url, commit.pr_url, [file.name for file in changed], unchanged, stale
    )


def _check_arrival(api: Any, repo: str, revision: str, what: Publication) -> None:
    """Every file is there, byte for byte by its hash; only then is it said to be published."""
    with _explained(repo, "looking at what was published"):
        after = api.model_info(repo, revision=revision, files_metadata=True)
    there = {sibling.rfilename: sibling for sibling in after.siblings or []}
    if wrong := [file.name for file in what.files if not _same(file, there.get(file.name))]:
        raise HubError(
            f"{repo} does not hold {wrong[0]} as it is here, though the Hub took it: run the same "
            f"command again"
        )


def _same(file: File, remote: Any) -> bool:
    """Whether the Hub's file has the same content: by SHA-256 for large files, by git's blob hash
    for the others.
    """
    if remote is None or remote.size != file.size:
        return False
    if remote.lfs:
        own = (
            hashlib.sha256(file.source).hexdigest()
            if isinstance(file.source, bytes)
            else file_sha256(file.source)
        )
        return own == remote.lfs.sha256
    content = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
    return (
        hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        == remote.blob_id
    )


@contextmanager
def _explained(repo: str, step: str) -> Iterator[None]:
    """Turn whatever the client raises into one line that says what to do."""
    try:
        yield
    except HubError:
        raise
    except (
        Exception
    ) as error:  # the Hub client raises a dozen kinds, some of them wrapped in others
        raise HubError(f"{step} failed: {_reason(repo, error)}") from None


def _reason(repo: str, error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while (
        cause is not None
        and not isinstance(cause, HfHubHTTPError)
        and not type(cause).__module__.startswith("httpx")
    ):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        said = " ".join((cause.server_message or "").split())[:200]
        owner = repo.partition("/")[0]
        advice = {
            401: (
                "the Hub does not accept your token; log in with `hf auth login`, or set HF_TOKEN "
                "to a token that may write"
            ),
            403: f"your token may not write there; use one with write access to {owner}",
            404: (
                f"there is no {repo} on the Hub that your token may see; without `create_pr` it is "
                f"made"
            ),
            409: f"{repo} is being changed by somebody else; {_AGAIN}",
            412: f"somebody has changed {repo} meanwhile; {_AGAIN}",
            429: f"the Hub asks you to slow down; wait a few minutes; {_AGAIN}",
        }
        text = advice.get(status, _AGAIN if status >= 500 else "")
        return ": ".join(part for part in (f"HTTP {status}", said, text) if part)
    if isinstance(error, LocalTokenNotFoundError):
        return (
            "no token was found; log in with `hf auth login`, or set HF_TOKEN to a token that may "
            "write"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if cause is not None:
        said = " ".join(str(cause).split())[:120] or type(cause).__name__
        return f"the connection to {constants.ENDPOINT} broke ({said}); {_AGAIN}"
    return " ".join(str(error).split())[:300] or type(error).__name__
