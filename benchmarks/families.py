"""What works with which type of model: the table of docs/families.md, from tiny random
checkpoints.

python -m benchmarks.families                # every type that transformers knows; writes the tables
python -m benchmarks.families llama mixtral  # prints the rows of these
python -m benchmarks.families --go-on FILE   # as the first, with what FILE has already; adds to it
python -m benchmarks.families --wrappers     # the same for the multimodal types
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.causal_types import causal, causal_types
from tests.family_trial import Trial, tried
from tests.wrappers import wrapper, wrapper_types

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
LIMIT = 600  # seconds for one type


def isolated(kind: str, make: Callable[[str], Any]) -> Trial:
    """The trial of a type in a process of its own: what one does to transformers, or takes of the
    memory, is gone with it. `make` gives a tiny random model of a type.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(LIMIT)
        with tempfile.TemporaryDirectory() as place, os.fdopen(writing, "w") as pipe:
            json.dump(asdict(tried(kind, Path(place), make)), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, ended = os.waitpid(child, 0)
    if ended:
        return Trial(kind, "", "wrong", f"the process ended with {ended}")
    return Trial(**json.loads(told))


def table(trials: list[Trial]) -> str:
    """The trials as Markdown: a sentence, what works, and a table of what does not."""
    count = Counter(trial.result for trial in trials)
    working = [f"{trial.kind} ({trial.linears})" for trial in trials if trial.result == "works"]
    rest = [trial for trial in trials if trial.result != "works"]
    lines = [
        f"{len(trials)} types, torch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__}, CPU: {count['works']} work, {count['refused']} are refused, "
        f"{count['not built']} could not be built tiny.",
        "",
        f"Works, in brackets the linears that were compressed: {', '.join(working)}.",
        "",
        "| type | | what is said |",
        "|---|---|---|",
        *(f"| {trial.kind} | {trial.result} | {_cell(trial.line)} |" for trial in rest),
    ]
    return "\n".join(_wrapped(line) for line in lines)


def _cell(line: str) -> str:
    return re.sub(r"`([a-z_]+)='([^']+)'`", r"`--\1 '\2'`", line).replace("|", "\\|")


def _wrapped(line: str, width: int = 100) -> str:
    """A paragraph in lines; rows of a table stay one."""
    if line.startswith("|"):
        return line
    lines = [""]
    for word in line.split(" "):
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return "\n".join(lines)


def write(section: str, text: str) -> None:
    """Put a generated text between its two markers in docs/families.md."""
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->\n"
    before, _, rest = DOCS.read_text().partition(begin)
    DOCS.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")


def every(kinds: list[str], known: Path | None, attempt: Callable[[str], Trial]) -> list[Trial]:
    """The trials of all types; what is in the file `known` is taken from there."""
    found: dict[str, Trial] = {}
    if known and known.exists():
        for line in known.read_text().splitlines():
            trial = Trial(**json.loads(line))
            found[trial.kind] = trial
    for kind in kinds:
        if kind not in found:
            found[kind] = attempt(kind)
            print(_wrapped(f"{kind}: {found[kind].result} {found[kind].line}"), flush=True)
            if known:
                with known.open("a") as file:
                    file.write(json.dumps(asdict(found[kind])) + "\n")
    return [found[kind] for kind in kinds]


def main() -> None:
    """Try the types and print what came of them; all of them: write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--go-on", type=Path, metavar="FILE")
    parser.add_argument("--wrappers", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        tried("llama", Path(place))  # whatever is imported late is imported once
    section, kinds, make = (
        ("multimodal types", wrapper_types, wrapper)
        if asked.wrappers
        else ("causal types", causal_types, causal)
    )
    trials = every(asked.types or kinds(), asked.go_on, lambda kind: isolated(kind, make))
    if not asked.types:
        write(section, table(trials))
    if any(trial.result.startswith("wrong") for trial in trials):
        sys.exit(1)


if __name__ == "__main__":
    main()
