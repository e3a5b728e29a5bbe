"""Perplexity of what a server says, over the OpenAI-compatible completions that vLLM and others
have.

The prompt is a window of token ids, echoed with the log probability of each; nothing is written
after it. It is the number that windows.py computes from a model in memory, so the two show whether
serving has changed a model.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from compressor.errors import UsageError
from compressor.evaluation.run import Settings, evaluate_all, rows_of, text_of
from compressor.evaluation.windows import METRIC, Sums

_BATCH = 8  # windows in one request
_SECONDS = 600  # to wait for an answer


@dataclass(frozen=True)
class Server:
    """A server that answers, and the model it serves.

    Attributes:
        url: without `/v1`.
        model: what it calls its model.
        limit: tokens that it takes at most, None where it does not say.
    """

    url: str
    model: str
    limit: int | None


def connect(url: str) -> Server:
    """The server at `url`, with or without `/v1`. An API key is taken from OPENAI_API_KEY.

    Raises:
        UsageError: nothing that is OpenAI-compatible answers there, or it serves several models.
    """
    url = url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"`server` is {url!r}; accepted: a URL such as http://localhost:8000")
    answer = _ask(url, "models")
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise UsageError(f"the server at {url} is not OpenAI-compatible: it does not list models")
    served = [one for one in models if not one.get("parent")]  # adapters have one
    if len(served) != 1:
        names = ", ".join(str(one.get("id")) for one in served) or "none"
        raise UsageError(f"the server at {url} must serve one model; it has {names}")
    limit = served[0].get("max_model_len")
    return Server(url, str(served[0].get("id")), limit if type(limit) is int else None)


def score(
    models: Sequence[str],
    *,
    baseline: str | None = None,
    server: str | None = None,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """All that `evaluate_all` yields, by name; with the URL of a `server` of the one model also
    what that says, as `served` among its scores.
    """
    asked = Settings(**settings)
    answering = check_server(server, models, asked) if server else None
    scored = dict(evaluate_all(models, baseline=baseline, **settings))
    if answering:
        scored[models[0]]["served"] = score_server(answering, models[0], baseline, asked)
    return scored


def check_server(url: str, models: Sequence[str], asked: Settings) -> Server:
    """The server at `url`, before anything is scored. Raises UsageError where what it serves cannot
    be compared with `models`.
    """
    if len(models) != 1 or not asked.datasets:
        raise UsageError("`server` is compared with one model, on texts: one MODEL and `dataset`")
    server, candidate = connect(url), asked.candidate(models[0])
    if server.limit is None:
        return server
    for dataset in asked.datasets:
        rows = text_of(candidate, None, dataset, asked).rows  # those of `self` are not written yet
        longest = max(map(len, rows), default=candidate.window(asked.seq_len))
        if longest >= server.limit:  # vLLM wants room for a token, also where none is asked for
            raise UsageError(
                f"the server at {server.url} takes {server.limit - 1} tokens and one more, a "
                f"window of {asked.name_of(dataset)} has {longest}: give "
                f"`seq_len={server.limit - 1}`, or start the server with a larger max_model_len"
            )
    return server


def score_server(
    server: Server, model: str, baseline: str | None, asked: Settings
) -> dict[str, Any]:
    """Perplexities of what the server says to the rows that `model` was scored on, by data set."""
    candidate = asked.candidate(model)
    writer = asked.candidate(baseline) if baseline else candidate
    found: dict[str, Any] = {"url": server.url, "model": server.model, "results": {}}
    for dataset in asked.datasets:
        name = asked.name_of(dataset)
        text = text_of(candidate, writer if baseline else None, dataset, asked)
        progress = partial(asked.progress, f"{name} by the server")
        sums = score_rows(server, rows_of(candidate, text, writer, asked), progress)
        found["results"][name] = {METRIC: sums.perplexity}
    return found


def score_rows(
    server: Server,
    rows: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sums:
    """The sums over `rows`, int64 `[seq]` each, of the log probabilities that the server gives.

    Raises:
        UsageError: it refuses the request or does not give log probabilities of a prompt.
    """
    sums = Sums()
    for start in range(0, len(rows), _BATCH):
        batch = [row.tolist() for row in rows[start : start + _BATCH]]
        asked = {"model": server.model, "prompt": batch, "max_tokens": 0, "echo": True}
        answer = _ask(server.url, "completions", {**asked, "logprobs": 0, "temperature": 0})
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            losses = [_loss(choice, ids) for choice, ids in zip(choices, batch, strict=True)]
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"the server at {server.url} does not give the log probabilities of a prompt: "
                "completions with echo, logprobs and max_tokens 0 are needed"
            ) from None
        tokens = sum(len(ids) - 1 for ids in batch)
        sums = Sums(sums.done + len(batch), sums.tokens + tokens, sums.loss + sum(losses))
        progress(sums.done, len(rows))
    return sums


def _loss(choice: dict[str, Any], ids: list[int]) -> float:
    """Of one window; its first token is context only. Raises ValueError for another number of
    log probabilities than there are tokens.
    """
    values = choice["logprobs"]["token_logprobs"]
    if len(values) != len(ids):
        raise ValueError(f"{len(values)} log probabilities of {len(ids)} tokens")
    return -sum(float(value) for value in values[1:])


def _ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that the server answers with. Raises UsageError."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(f"{url}/v1/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(2000).decode(errors="replace").split())
        raise UsageError(f"the server at {url} refused {path}: {error.code} {said}") from None
    except (OSError, ValueError) as error:  # no connection, or no JSON
        reason = getattr(error, "reason", error)
        raise UsageError(
            f"no OpenAI-compatible server answers at {url} ({reason}); `vllm serve FOLDER` is one"
        ) from None
