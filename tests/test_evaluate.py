"""Scores of one model and of many: what they are of, what is known already, where they are stored,
how they are shown.
"""

import json
import re
import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.calibration import tokens
from compressor.checkpoint.digest import checkpoint_digest
from compressor.checkpoint.reader import Reader
from compressor.errors import CheckpointError, UsageError
from compressor.evaluation import (
    DIVERGENCE,
    METRIC,
    candidate,
    evaluate,
    evaluate_all,
    lmeval,
    table,
    windows,
)
from compressor.evaluation.speed import measure_speed
from compressor.records.scores import read_scores, scores_path


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copy(demo_model, tmp_path):
    """A copy of the demo model that is a little worse."""
    shutil.copytree(demo_model, tmp_path / "worse")
    worsen(tmp_path / "worse")
    return tmp_path / "worse"


def worsen(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 0.7
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that are loaded."""
    loaded, real = [], candidate.load_model

    def load(name, **options):
        loaded.append(name)
        return real(name, **options)

    monkeypatch.setattr(candidate, "load_model", load)
    return loaded


@pytest.fixture
def choice_task(tmp_path):
    """The folder of a little task of three questions."""
    questions = [
        {"question": f"The {animal} is", "choices": [" an animal", " zzz qqq"], "label": 0}
        for animal in ("dog", "cat", "cow")
    ]
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions)
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'data.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return tmp_path / "tasks"


# --- one model


def test_text_is_joined_and_cut_into_windows(demo_model, tmp_path):
    text = "It was a bright cold day in spring, and the clocks of the old town were striking. " * 30
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": part}) + "\n" for part in (text[:500], text[500:]))
    )
    found = evaluate(
        str(demo_model), datasets=[str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], seq_len=64
    )
    from compressor.calibration.tokens import load_tokenizer

    for name, whole in (("a", text), ("b", text[:500] + "\n\n" + text[500:])):
        tokens = len(load_tokenizer(demo_model)(whole)["input_ids"])
        assert found["n-samples"][name]["effective"] == tokens // 64
        assert 1 < found["results"][name][METRIC] < 4096


def test_self_is_reproducible_and_written_by_the_baseline(demo_model, copy):
    options = dict(datasets=["self"], num_samples=2, seq_len=64, dtype="float32")
    first = evaluate(str(demo_model), **options)
    candidate.own_text.cache_clear()
    tokens.sample_from_model.cache_clear()
    again = evaluate(str(demo_model), **options, cached=False)
    assert first["results"] == again["results"]
    (_, before), (_, after) = evaluate_all([str(copy)], baseline=str(demo_model), **options)
    assert before["results"] == first["results"]
    assert after["results"]["self"][METRIC] > before["results"]["self"][METRIC]
    assert after["results"]["self"][DIVERGENCE] > 0


def test_tasks_run_offline_through_lm_eval(demo_model, choice_task):
    pytest.importorskip("lm_eval")
    steps = []

    def progress(step, done, total):
        steps.append((step, done, total))

    found = evaluate(
        str(demo_model),
        tasks=["local_choice"],
        include_path=choice_task,
        batch_size=4,
        progress=progress,
    )
    assert steps == [("local_choice", *count) for count in ((0, 1), (4, 6), (6, 6), (1, 1))]
    assert found["results"]["local_choice"]["acc,none"] == 1.0
    assert {"results", "configs", "versions", "n-samples", "config", "lm_eval_version"} <= set(
        found
    )
    json.dumps(found)
    assert "local_choice acc ↑" in table({"model": found})


def test_two_data_sets_of_one_name_stay_apart(demo_model, rows, tmp_path):
    shutil.copy(rows, tmp_path / rows.name)
    (tmp_path / rows.name).write_text("\n".join(rows.read_text().splitlines()[:3]))
    found = evaluate(str(demo_model), datasets=[str(rows), str(tmp_path / rows.name)])
    assert {name: count["effective"] for name, count in found["n-samples"].items()} == {
        str(rows): 8,
        str(tmp_path / rows.name): 3,
    }


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"seq_len": 1}, "`seq_len` is 1"),
        ({"seq_len": 513}, "longer than the 512 tokens"),
        ({"limit": 0}, "`limit` is 0"),
        ({"seed": -1}, "`seed` is -1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"num_fewshot": -1}, "`num_fewshot` is -1"),
    ],
)
def test_bad_settings(demo_model, rows, settings, match):
    with pytest.raises(UsageError, match=match):
        evaluate(str(demo_model), datasets=[str(rows)], **settings)


def test_bytes_of_the_linears_are_those_of_the_headers(demo_model, rows, tmp_path):
    from compressor.config.recipe import Recipe
    from compressor.run.pipeline import prune
    from compressor.tools.describe import describe

    prune(Recipe(str(demo_model), method="magnitude"), tmp_path / "out")
    for folder in (demo_model, tmp_path / "out"):
        found = [
            row["bytes"] for row in describe(Reader(folder))["linears"] if ".layers." in row["name"]
        ]
        assert candidate.Candidate(str(folder)).linear_bytes == sum(found)


# --- what is known


def test_what_is_known_is_not_computed_again(demo_model, copy, rows, loads, tmp_path):
    first = evaluate(str(copy), baseline=str(demo_model), datasets=[str(rows)])
    assert loads == [str(copy), str(demo_model)]
    again = evaluate(str(copy), baseline=str(demo_model), datasets=[str(rows)])
    alone = evaluate(str(copy), datasets=[str(rows)])
    assert loads == [str(copy), str(demo_model)]
    assert again["results"] == first["results"]
    assert alone["results"]["rows"][METRIC] == first["results"]["rows"][METRIC]
    shutil.copytree(copy, tmp_path / "elsewhere")
    evaluate(str(tmp_path / "elsewhere"), datasets=[str(rows)])
    assert len(loads) == 2
    evaluate(str(copy), datasets=[str(rows)], cached=False)
    evaluate(str(copy), datasets=[str(rows)], limit=3)
    evaluate(str(copy), datasets=[str(rows)], dtype="float32")
    assert len(loads) == 5
    worsen(copy)
    assert (
        evaluate(str(copy), datasets=[str(rows)])["results"]["rows"][METRIC]
        != first["results"]["rows"][METRIC]
    )
    assert len(loads) == 6


def test_other_text_under_the_same_name_is_scored(demo_model, rows, tmp_path):
    (tmp_path / "x.jsonl").write_text(rows.read_text())
    first = evaluate(str(demo_model), datasets=[str(tmp_path / "x.jsonl")])
    (tmp_path / "x.jsonl").write_text(rows.read_text().replace(" 3,", " 4,").replace(" 5,", " 6,"))
    assert (
        evaluate(str(demo_model), datasets=[str(tmp_path / "x.jsonl")])["results"]
        != first["results"]
    )


def test_a_task_is_known_by_its_documents(demo_model, choice_task, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    ran, real = [], lmeval.run_task
    monkeypatch.setattr(
        lmeval,
        "run_task",
        lambda *arguments, **options: (ran.append(1), real(*arguments, **options))[1],
    )
    ask = dict(tasks=["local_choice"], include_path=choice_task)
    first = evaluate(str(demo_model), **ask)
    lmeval.task_digest.cache_clear()
    assert evaluate(str(demo_model), **ask, batch_size=1)["results"] == first["results"]
    assert len(ran) == 1
    (tmp_path / "data.jsonl").write_text(
        (tmp_path / "data.jsonl").read_text().replace('"label": 0', '"label": 1')
    )
    lmeval.task_digest.cache_clear()
    assert evaluate(str(demo_model), **ask)["results"]["local_choice"]["acc,none"] == 0.0
    assert len(ran) == 2


def test_an_interrupted_evaluation_goes_on(demo_model, copy, rows, monkeypatch, loads):
    monkeypatch.setattr(windows, "_BATCH_TOKENS", 32)
    uninterrupted = dict(
        evaluate_all([str(copy)], baseline=str(demo_model), datasets=[str(rows)], cached=False)
    )
    shutil.rmtree(scores_path(copy).parent / "cache")
    loads.clear()
    steps = []

    def interrupt(step, done, total):
        steps.append(done)
        if len(steps) > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(
            evaluate_all(
                [str(copy)], baseline=str(demo_model), datasets=[str(rows)], progress=interrupt
            )
        )
    progress = []
    found = dict(
        evaluate_all(
            [str(copy)],
            baseline=str(demo_model),
            datasets=[str(rows)],
            progress=lambda step, done, total: progress.append(done),
        )
    )
    assert {name: result["results"] for name, result in found.items()} == {
        name: result["results"] for name, result in uninterrupted.items()
    }
    assert progress == [
        8,
        0,
        3,
        4,
        5,
        6,
        7,
        8,
        8,
    ]  # the baseline is known, and two of the eight windows of the model


def test_a_damaged_cache_is_no_harm(demo_model, rows, tmp_path):
    first = evaluate(str(demo_model), datasets=[str(rows)])
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text('{"done": 3}' if "windows" in str(path) else "nonsense")
    assert evaluate(str(demo_model), datasets=[str(rows)])["results"] == first["results"]


# --- against a baseline


def test_divergence_needs_the_same_windows(demo_model, tiny, rows, tmp_path):
    notes = []
    options = dict(datasets=[str(rows)], note=notes.append)
    found = evaluate(str(tiny("llama")), baseline=str(demo_model), **options)
    assert DIVERGENCE not in found["results"]["rows"]
    assert any("it has 128 tokens" in note and "has 4096" in note for note in notes)
    notes.clear()
    found = evaluate(str(demo_model), baseline=str(demo_model), **options, divergence=False)
    assert DIVERGENCE not in found["results"]["rows"]
    assert not any("no KL divergence" in note for note in notes)


def test_divergence_needs_room_for_both(demo_model, copy, rows, monkeypatch):
    notes = []
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6})()
    )
    found = evaluate(str(copy), baseline=str(demo_model), datasets=[str(rows)], note=notes.append)
    assert DIVERGENCE not in found["results"]["rows"]
    assert re.search(r"both models in memory take \d+\.\d\d MB more, 1\.00 MB are free", notes[0])


def test_one_model_is_in_memory_unless_both_are_compared(
    demo_model, copy, rows, choice_task, monkeypatch
):
    import gc
    import weakref

    alive, most, real = weakref.WeakSet(), [], candidate.load_model

    def load(name, **options):
        model, folder = real(name, **options)
        gc.collect()
        alive.add(model)
        most.append(len(alive))
        return model, folder

    monkeypatch.setattr(candidate, "load_model", load)
    ask = dict(baseline=str(demo_model), include_path=choice_task)
    list(evaluate_all([str(copy)], tasks=["local_choice"], **ask))
    list(evaluate_all([str(copy)], datasets=[str(rows)], divergence=False, **ask))
    assert most == [1, 1, 1, 1]
    list(evaluate_all([str(copy)], datasets=[str(rows)], **ask))
    assert max(most) == 2


# --- many models


def test_scores_are_stored_beside_the_folder_with_the_baselines(
    demo_model, copy, rows, choice_task
):
    options = dict(baseline=str(demo_model))
    list(evaluate_all([str(copy)], datasets=[str(rows)], **options))
    list(evaluate_all([str(copy)], tasks=["local_choice"], include_path=choice_task, **options))
    found = read_scores(copy, checkpoint_digest(Reader(copy)))
    assert set(found["results"]) == set(found["baseline"]["results"]) == {"rows", "local_choice"}
    assert found["results"]["rows"][METRIC] != found["baseline"]["results"]["rows"][METRIC]
    assert found["results"]["rows"][DIVERGENCE] > 0
    assert not scores_path(demo_model).exists()


def test_where_nothing_can_be_stored_a_note_says_so(copy, rows):
    notes = []
    scores_path(copy).mkdir()
    (found,) = evaluate_all([str(copy)], datasets=[str(rows)], note=notes.append)
    assert found[1]["results"]["rows"][METRIC] > 1
    assert "could not be stored beside" in notes[-1]


def test_every_model_is_there_before_the_first_is_scored(demo_model, rows, loads, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        list(evaluate_all([str(demo_model), str(tmp_path / "none")], datasets=[str(rows)]))
    assert not loads


def test_command_line(cli, demo_model, copy, rows, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(copy, tmp_path / "worst")
    worsen(tmp_path / "worst")
    files = ["-o", tmp_path / "all.json", "--plot", tmp_path / "q.svg"]
    done = cli(
        "eval", copy, tmp_path / "worst", "--baseline", demo_model, "--dataset", rows, *files
    )
    head, _, *lines = done.stdout.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["", "books-1m", "worse", "worst"]
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
    }
    assert cells["checkpoint (MB)"] == ["2.62"] * 3
    assert cells["linears (MB)"] == ["1.57"] * 3
    assert cells["rows KL divergence ↓"][0] == "-"
    assert float(cells["rows KL divergence ↓"][1]) < float(cells["rows KL divergence ↓"][2])
    assert f"{copy}: rows token perplexity" in done.stderr
    scored = json.loads((tmp_path / "all.json").read_text())
    assert set(scored["models"]) == {str(copy), str(tmp_path / "worst")}
    assert (
        "books-1m" in (tmp_path / "q.svg").read_text() or "<svg" in (tmp_path / "q.svg").read_text()
    )
    single = json.loads(cli("eval", copy, "--dataset", rows, "--json", "-q").stdout)
    assert (
        single["results"]["rows"][METRIC] == scored["models"][str(copy)]["results"]["rows"][METRIC]
    )


def test_the_card_has_the_numbers_that_eval_stored(cli, demo_model, rows, tmp_path):
    from compressor.publish.files import prepare

    out = tmp_path / "out"
    cli("prune", demo_model, "-o", out, "--method", "magnitude", "-q")
    cli("eval", out, "--baseline", demo_model, "--dataset", rows, "-q")
    stored = json.loads(scores_path(out).read_text())["results"]["rows"]
    card = prepare(out, "org/name", "", lambda name: (False, None)).card
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "token_perplexity": stored[METRIC],
        "kl_divergence": stored[DIVERGENCE],
    }
    assert f"{stored[METRIC]:.4g}" in card.text


# --- showing


def test_table_marks_what_is_missing():
    def result(**values):
        return {
            "results": {"text": values},
            "config": {"model_bytes": 10**6},
            "higher_is_better": {},
        }

    lines = table(
        {
            "a/x": result(**{METRIC: 12.345}),
            "b/y": result(**{"acc,none": 0.5, "acc_stderr,none": 0.1}),
        }
    ).splitlines()
    assert lines[0].split("|")[2].strip() == "x"
    assert [cell.strip() for cell in lines[3].split("|")[1:4]] == [
        "text token perplexity ↑",
        "12.35",
        "-",
    ]
    assert len(lines) == 5


def scored(*values):
    return {
        f"m/{index}": {
            "results": {"text": {METRIC: value}, "arc": {"acc,none": 1 / value}},
            "config": {"model_bytes": 10**9 * (index + 1)},
            "higher_is_better": {"text": {"token_perplexity": False}, "arc": {"acc": True}},
        }
        for index, value in enumerate(values)
    }


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_is_the_same_bytes_for_the_same_scores(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from compressor.plots.quality_over_size import draw

    for name in ("a", "b"):
        draw(scored(5.0, 70.0, 7.0), tmp_path / f"{name}{suffix}", baseline="m/0")
    draw(scored(5.0, 70.0, 8.0), tmp_path / f"c{suffix}", baseline="m/0")
    first, again, other = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "abc")
    assert first == again != other
    assert first.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in first


def test_plot_is_refused_before_any_work(cli, copy, rows, tmp_path, monkeypatch):
    def refuse(path, code):
        done = cli("eval", copy, "--dataset", rows, "-q", "--plot", path, code=code)
        assert not scores_path(copy).exists()
        return done.stderr

    assert "accepted: .png, .svg" in refuse(tmp_path / "x.pdf", 2)
    assert "is not a folder" in refuse(tmp_path / "none" / "x.png", 1)
    (tmp_path / "x.png").touch()
    assert "exists already" in refuse(tmp_path / "x.png", 1)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install 'compress-llm[plot]'" in refuse(tmp_path / "y.png", 2)


@pytest.mark.gpu
def test_speed_is_measured_on_a_gpu(demo_model, rows):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = evaluate(str(demo_model), datasets=[str(rows)], device="cuda")
    assert found["speed"]["decode_tokens_per_second"] > 0
    assert "written tokens/s" in table({"m": found})


def test_speed_counts_tokens(demo_model):
    model = candidate.load_model(str(demo_model), device="cpu")[0]
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    hooked = measure_speed(model, limit=40, prompt=512, written=8)
    assert hooked["prompt"] == 32
    assert hooked["decode_tokens_per_second"] > 0
    assert lengths.count(32) == 12  # six of each kind, the first of which warms up
    assert lengths.count(1) == 6 * 8
