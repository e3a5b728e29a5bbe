"""The model card of a compressed checkpoint: what was done, how to load it, what it scores, where
its limits are.

Everything in it is read from recipe.toml, report.json and the stored scores; a number that is in
none of them is not in the card. Scores go into the card's `model-index` and into `.eval_results/`,
its newer form, for data sets that the Hub knows by their id.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.formats import form_class
from compressor.methods import command, counterpart
from compressor.publish.licence import Licence
from compressor.records.scores import arrow, label, metrics
from compressor.text import size

EVAL_RESULTS = ".eval_results/compress.yaml"
_TEXT_FILES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Facts:
    """What a card is made from.

    Attributes:
        repo: the Hub id it is for.
        base: the Hub id of the base model, empty where it has none.
        recipe, report: contents of recipe.toml and report.json, without the paths of this machine.
        packed: whether a linear is stored in a form of ours.
        kept: fraction of the parameters of the linears, where ranks were shared out.
        scores: what `compress eval` stored, None without.
    """

    repo: str
    base: str
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]
    packed: bool
    kept: float | None
    scores: Mapping[str, Any] | None
    licence: Licence | None


def make_card(facts: Facts, recipe_text: str) -> Any:
    """The card, a `huggingface_hub.ModelCard`."""
    from huggingface_hub import ModelCard

    metadata = _metadata(facts).to_yaml()
    name = facts.repo.partition("/")[2]
    parts = [
        f"---\n{metadata}\n---",
        f"# {name}",
        _introduction(facts),
        _what_was_done(facts),
        _scores(facts),
    ]
    parts += [
        _how_to_load(facts),
        _limits(facts),
        _licence(facts),
        _how_to_repeat(facts, recipe_text),
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def eval_results_file(scores: Mapping[str, Any]) -> str | None:
    """The scores on data sets of the Hub as `.eval_results/*.yaml`, None where there are none."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    entries, seen = [], set()
    for task, metric, value in metrics(scores):
        config = scores["configs"].get(task, {})
        dataset, subset = config.get("dataset_path"), config.get("dataset_name") or "default"
        if not _is_hub_dataset(dataset) or (dataset, subset) in seen:
            continue
        seen.add(
            (dataset, subset)
        )  # one value for each: the first metric of a task is its main one
        shots = f"{scores['n-shot'].get(task, 0)}-shot"
        notes = (
            f"{metric.split(',')[0]}, {shots}, {_how_many(scores, task)}, task {task} of compress "
            f"eval"
        )
        entries.append(
            EvalResultEntry(
                dataset.partition(":")[0], subset, value, date=scores.get("date"), notes=notes
            )
        )
    return yaml_dump(eval_result_entries_to_yaml(entries)) if entries else None


def _how_many(scores: Mapping[str, Any], task: str) -> str:
    count = scores["n-samples"].get(task) or {}
    if count.get("effective", 0) < count.get("original", 0):
        return f"first {count['effective']} of {count['original']} samples"
    return f"{count['effective']} samples" if "effective" in count else "all samples"


def _is_hub_dataset(name: Any) -> bool:
    plain = isinstance(name, str) and name.count("/") == 1
    return plain and not name.startswith((".", "~", "/")) and not name.endswith(_TEXT_FILES)


def _metadata(facts: Facts) -> Any:
    from huggingface_hub import ModelCardData

    pattern, method = str(facts.recipe["pattern"]), str(facts.recipe["method"])
    given: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    factored, pruned = _kinds(facts)
    given["tags"] = ["compress-llm", *["pruned"] * pruned, *["low-rank"] * factored, method]
    given["tags"] += ["2:4"] if pattern == "2:4" and pruned else []
    if facts.base:
        given |= {
            "base_model": facts.base,
            "base_model_relation": "quantized",
        }  # the Hub's word for every kind of compression
    if facts.licence:
        pairs = {
            "license": facts.licence.id,
            "license_name": facts.licence.name,
            "license_link": facts.licence.link,
        }
        given |= {key: value for key, value in pairs.items() if value}
    if facts.scores and (results := _eval_results(facts.scores)):
        given |= {"model_name": facts.repo.partition("/")[2], "eval_results": results}
    return ModelCardData(**given)


def _eval_results(scores: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    found = []
    for task, metric, value in metrics(scores):
        config = scores["configs"].get(task, {})
        dataset = config.get("dataset_path")
        known = _is_hub_dataset(dataset)
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=str(dataset).partition(":")[0] if known else task,
                dataset_name=task,
                dataset_config=str(config["dataset_name"])
                if known and config.get("dataset_name")
                else None,
                metric_type=metric.split(",")[0],
                metric_name=f"{label(metric)}, {_how_many(scores, task)}",
                metric_value=value,
            )
        )
    return found


def _introduction(facts: Facts) -> str:
    base = (
        f"[{facts.base}](https://huggingface.co/{facts.base})"
        if facts.base
        else f"A {facts.report['architecture']} model"
    )
    refined = f" and refined by {facts.recipe['refine']}" if facts.recipe.get("refine") else ""
    tuned = (
        f", its blocks tuned for {facts.recipe['tune']} epochs" if facts.recipe.get("tune") else ""
    )
    matched = ", its linears matched to the dense model" if facts.recipe.get("match") else ""
    version = facts.report["versions"]["compress-llm"]
    goal = f"pruned to {facts.recipe['pattern']}"
    if facts.recipe.get("keep"):
        goal = f"its linears factored to {facts.recipe['keep']} of their parameters"
    elif facts.recipe.get("plan"):
        goal = "compressed as its plan.toml says"
    how = f"{goal} with {' and '.join(_methods(facts))}{refined}{matched}{tuned}"
    return f"{base}, {how}, by compress-llm {version}."


def _kinds(facts: Facts) -> tuple[bool, bool]:
    """Whether there are linears without zeros, which are factors, and linears with."""
    sparse = {form_class(row["format"]).SPARSE for row in facts.report["linears"]}
    return False in sparse, True in sparse


def _methods(facts: Facts) -> list[str]:
    """What made the linears: the recipe's method, its counterpart where a plan asks for the other
    form, or both.
    """
    method, (factored, pruned) = str(facts.recipe["method"]), _kinds(facts)
    own, other = (factored, pruned) if command(method) == "lowrank" else (pruned, factored)
    return [method] * own + [counterpart(method)] * other or [method]


def _what_was_done(facts: Facts) -> str:
    recipe, report = facts.recipe, facts.report
    totals, left = report["totals"], report["left_dense"]
    inside = sum(entry["reason"] != "outside the decoder blocks" for entry in left)
    tokens = report["calibration_tokens"]
    source = (
        "text that the model wrote itself"
        if recipe["dataset"] == "self"
        else f"`{recipe['dataset']}`"
    )
    rows = {
        "method": "; ".join(_summary("methods", method) for method in _methods(facts)),
        "refinement": _summary("refine", recipe["refine"]) if recipe.get("refine") else "",
        "calibration": f"{tokens} tokens of {source}" if tokens else "none",
        "compressed": _forms(report["linears"]),
        "their bytes": f"{size(totals['dense_bytes'])} → {size(totals['bytes'])} "
        f"({totals['ratio']:.4f} of dense)",
        "parameters kept": ""
        if facts.kept is None
        else f"{facts.kept:.1%} of those of all linears in the decoder blocks",
        "checkpoint": f"{size(report['input_bytes'])} → {size(report['output_bytes'])}",
        "left dense": f"{_counted(len(left), 'weight')}, {inside or 'none'} inside the decoder "
        "blocks: report.json has reasons",
    }
    return "## What was done\n\n| | |\n|---|---|\n" + "\n".join(
        f"| {name} | {text} |" for name, text in rows.items() if text
    )


def _forms(linears: list[Mapping[str, Any]]) -> str:
    """How many linears are of each form, and what it leaves of a weight: ranks of factors, zeros of
    the others.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in linears:
        found.setdefault(row["format"], []).append(row)
    count = _counted(len(linears), "linear")
    if len(found) == 1:
        name, rows = found.popitem()
        return f"{count}, {form_class(name).told(rows)}"
    each = [f"{len(rows)} {form_class(name).told(rows)}" for name, rows in sorted(found.items())]
    return f"{count}: {'; '.join(each)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _summary(room: str, name: str) -> str:
    """The first paragraph of a method's docstring, which names the paper; read without importing
    it, for that takes torch.
    """
    path = Path(__file__).parents[1] / room / f"{name}.py"
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None
    if not doc:
        return f"`{name}`"
    first = " ".join(doc.partition("\n\n")[0].split()).rstrip(".")
    return f"`{name}`. {first}".replace("|", "\\|")


def _scores(facts: Facts) -> str:
    scores = facts.scores
    if not scores or not scores["results"]:
        return (
            "## Scores\n\nNone were measured. Score the model on the text you care about before "
            "you use it."
        )
    baseline = scores.get("baseline")
    head, rule = ["", "this model"], ["---", "---:"]
    if baseline:
        head.insert(1, "before")
        rule.insert(1, "---:")
    lines = [head, rule]
    for task, metric, value in metrics(scores):
        before = baseline["results"].get(task, {}).get(metric) if baseline else None
        known = f"{before:.4g}" if isinstance(before, float) else "–"
        cells = [known, f"{value:.4g}"] if baseline else [f"{value:.4g}"]
        heading = (
            f"{task}, {label(metric)} {arrow(scores, task, metric)}, {_how_many(scores, task)}"
        )
        lines.append([heading, *cells])
    where = scores["config"]
    versions = ", ".join(
        f"{name} {version}" for name, version in scores.get("versions_of", {}).items()
    )
    note = f"Measured by `compress eval` on {where['device']} in {where['dtype']} ({versions})."
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    explained = (
        "Token perplexity is exp of the mean cross-entropy over non-overlapping windows, as in the "
        "papers on pruning; it is not "
        "the word perplexity of lm-eval."
        if any("token_perplexity" in metric for _, metric, _ in metrics(scores))
        else ""
    )
    return "\n\n".join(part for part in ("## Scores", table, note, explained) if part)


def _how_to_load(facts: Facts) -> str:
    plug_in = (
        "import compressor.runtime  # teaches transformers the packed format\n"
        if facts.packed
        else ""
    )
    install = "```\npip install compress-llm\n```\n\n" if facts.packed else ""
    code = (
        f"```python\n{plug_in}from transformers import AutoModelForCausalLM, AutoTokenizer\n\nname "
        f'= "{facts.repo}"\n'
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")\n```'
    )
    serve = (
        f"\n\nvLLM serves it where this package is installed as well:\n\n"
        f"```\npip install vllm compress-llm\nvllm serve {facts.repo}\n```"
        if facts.packed
        else ""
    )
    return f"## How to load it\n\n{install}{code}{serve}"


def _limits(facts: Facts) -> str:
    totals = facts.report["totals"]
    limits = []
    if facts.packed:
        limits.append(
            "The weights are stored in a packed form. Without `import compressor.runtime` "
            "transformers refuses the checkpoint; without this package vLLM refuses it, and other "
            "tools do not read it. `compress unpack` makes a plain dense checkpoint of it."
        )
        limits.append(
            "It takes fewer bytes. Nothing is said here about its speed, which depends on the GPU: "
            "`compress bench` measures it."
        )
    if totals["bytes"] >= totals["dense_bytes"]:
        limits.append(
            "The zeros are stored in place: this checkpoint is not smaller than the original, and "
            "no faster by itself."
        )
    limits += [
        "Compression costs quality, more on text unlike that of the calibration. The scores above "
        "are all that was measured.",
        "Nobody has checked how it changed the model's safety, bias or languages. All limits of "
        "the base model remain.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _licence(facts: Facts) -> str:
    if facts.licence is None:
        return (
            "## Licence\n\nThat of the base model. It was not known when this card was made: read "
            "the base model's own card first."
        )
    named = facts.licence.name or facts.licence.id
    linked = f"[{named}]({facts.licence.link})" if facts.licence.link else named
    return f"## Licence\n\n{linked}, taken over from the base model ({facts.licence.source})."


def _how_to_repeat(facts: Facts, recipe_text: str) -> str:
    line = f"`compress {command(str(facts.recipe['method']))} MODEL -o OUT --recipe recipe.toml`"
    plan = ", `plan.toml` beside it" if facts.recipe.get("plan") else ""
    return (
        f"## How to make it again\n\n{line}{plan}, with this recipe's model and "
        f"text:\n\n```toml\n{recipe_text.strip()}\n```"
    )
