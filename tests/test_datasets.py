"""What people have for data: chats, padded rows, other columns, broken texts, long files."""

import json
import os
import shutil

import pytest
import torch

from compressor.calibration import dataset as datasets
from compressor.calibration import tokens
from compressor.calibration.dataset import check_dataset, mended, records
from compressor.calibration.tokens import (
    calibration_rows,
    evaluation_rows,
    first_token,
    load_tokenizer,
)
from compressor.errors import DataError, UsageError

TEXT = (
    "The ship came slowly round the point, and every soul on the quay knew her by the brown sail. "
)
TEMPLATE = (
    "{% for message in messages %}<|begin_of_text|>{{ message['role'] }}: {{ message['content'] }}"
    "<|end_of_text|>{% endfor %}"
)


def jsonl(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def parquet(path, columns):
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table(columns), path)
    return str(path)


@pytest.fixture
def chat_model(demo_model, tmp_path):
    """A folder with the tokenizer of the demo's model and a chat template."""
    folder = tmp_path / "chat-model"
    folder.mkdir()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "config.json",
    ):
        (folder / name).write_bytes((demo_model / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def rows(dataset, folder, **change):
    asked = {"num_samples": 4, "seq_len": 32, "seed": 0, **change}
    return calibration_rows(dataset, folder, 4096, **asked)


# --- padded rows


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("mask", [int, bool, float])
def test_padded_rows_are_the_rows_without_padding(demo_model, tmp_path, side, mask):
    ids = torch.randint(5, 4000, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()
    before = 0 if side == "right" else 7
    after = 0 if side == "left" else 40 - before
    padded = [
        {
            "input_ids": [3] * before + row + [3] * after,
            "attention_mask": list(map(mask, [0] * before + [1] * 24 + [0] * after)),
        }
        for row in ids
    ]
    plain = jsonl(tmp_path / "plain.jsonl", [{"input_ids": row} for row in ids])
    with_mask = jsonl(tmp_path / "padded.jsonl", padded)
    for length in (24, 10):
        assert torch.equal(
            rows(with_mask, demo_model, seq_len=length), rows(plain, demo_model, seq_len=length)
        )
    with pytest.raises(
        DataError, match=r"rows of 24 input_ids, `seq_len` asks for 25: 0 of 8 rows"
    ):
        rows(with_mask, demo_model, seq_len=25)
    scored = evaluation_rows(with_mask, demo_model, 4096, seq_len=64)
    assert [row.tolist() for row in scored] == ids


def test_all_ones_masks_pass_in_both_file_types(demo_model, tmp_path):
    ids = [list(range(5 + row, 37 + row)) for row in range(4)]
    plain = rows(jsonl(tmp_path / "plain.jsonl", [{"input_ids": row} for row in ids]), demo_model)
    masked = [{"input_ids": row, "attention_mask": [1] * 32} for row in ids]
    assert torch.equal(plain, rows(jsonl(tmp_path / "masked.jsonl", masked), demo_model))
    columns = {"input_ids": ids, "attention_mask": [[1] * 32] * 4}
    assert torch.equal(plain, rows(parquet(tmp_path / "masked.parquet", columns), demo_model))
    columns = {
        "input_ids": [row + [0] * 8 for row in ids],
        "attention_mask": [[True] * 32 + [False] * 8] * 4,
        "labels": [[1]] * 4,
    }
    assert torch.equal(plain, rows(parquet(tmp_path / "padded.parquet", columns), demo_model))


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        ([1] * 31, "a 0 or 1 for each of the 32 input_ids"),
        ([1] * 31 + [2], "a 0 or 1 for each"),
        ([[1]] * 32, "a 0 or 1 for each"),
        ("1" * 32, "a 0 or 1 for each"),
        ([1] * 10 + [0] + [1] * 21, "is 0 between tokens"),
        ([0] * 32, "two or more integers"),
        ([0] * 31 + [1], "two or more integers"),
    ],
    ids=lambda value: str(value)[-24:],
)
def test_masks_that_say_something_else_are_refused(demo_model, tmp_path, mask, match):
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [5] * 32, "attention_mask": mask}])
    for read in (
        lambda: rows(path, demo_model),
        lambda: evaluation_rows(path, demo_model, 4096, seq_len=32),
    ):
        with pytest.raises(DataError, match=match) as caught:
            read()
        assert "line 1" in str(caught.value)


def test_rows_that_are_too_short_are_passed_over(demo_model, tmp_path):
    lengths = [40, 8, 32, 16, 50]
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [5 + n] * n} for n in lengths])
    assert rows(path, demo_model, num_samples=3).tolist() == [[5 + n] * 32 for n in (40, 32, 50)]
    with pytest.raises(DataError, match=r"rows of 16 input_ids, .*: 3 of 5 rows have as many"):
        rows(path, demo_model, num_samples=4)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "armor"])
def test_padding_changes_no_bit_of_what_is_made(cli, tiny, tmp_path, method):
    ids = torch.randint(5, 120, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
    plain = jsonl(tmp_path / "plain.jsonl", [{"input_ids": row} for row in ids])
    padded = jsonl(
        tmp_path / "padded.jsonl",
        [{"input_ids": row + [0] * 16, "attention_mask": [1] * 32 + [0] * 16} for row in ids],
    )
    few = ["--set", "iterations=2", "--set", "finish=0"] if method == "armor" else []
    for name, data in (("a", plain), ("b", padded)):
        common = ["--num-samples", 8, "--seq-len", 32, "-q", "--method", method, *few]
        cli("prune", tiny("llama"), "-o", tmp_path / name, "--dataset", data, *common)
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


# --- chats


def test_chats_go_through_the_models_own_template(chat_model, tmp_path):
    tokenizer = load_tokenizer(chat_model)
    chats = [
        [{"role": "user", "content": f"{n} {TEXT}"}, {"role": "assistant", "content": TEXT * 2}]
        for n in range(9)
    ]
    known = {
        tuple(tokenizer.apply_chat_template(chat, return_dict=False)): number
        for number, chat in enumerate(chats)
    }
    found = rows(jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats]), chat_model)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = found.flatten().tolist()
    assert stream[0] == begin
    assert stream.count(end) > 1
    whole, taken = [], []
    for token in stream:  # chat by chat: each begins and ends where the template says
        whole.append(token)
        if whole.count(end) == 2:
            taken.append(known[tuple(whole)])
            whole = []
    assert len(set(taken)) == len(taken) > 0
    sharegpt = [
        {
            "conversations": [
                {
                    "from": {"user": "human", "assistant": "gpt"}[one["role"]],
                    "value": one["content"],
                }
                for one in chat
            ]
        }
        for chat in chats
    ]
    assert torch.equal(found, rows(jsonl(tmp_path / "b.jsonl", sharegpt), chat_model))
    column = jsonl(tmp_path / "c.jsonl", [{"turns": chat} for chat in chats])
    assert torch.equal(found, rows(column, chat_model, text_column="turns"))
    columns = {"messages": chats, "id": list(range(9))}
    assert torch.equal(found, rows(parquet(tmp_path / "d.parquet", columns), chat_model))
    scored = evaluation_rows(str(tmp_path / "b.jsonl"), chat_model, 4096, seq_len=16)
    joined = [
        token for chat in chats for token in tokenizer.apply_chat_template(chat, return_dict=False)
    ]
    assert torch.cat(scored).tolist() == joined[: len(joined) // 16 * 16]


def test_parts_system_tools_and_null_fields_are_understood(chat_model, tmp_path):
    (chat_model / "chat_template.jinja").write_text(
        "{{ tools | length }} tools"
        "{% for m in messages %}<|begin_of_text|>{{ m | tojson }}{% endfor %}"
    )
    chat = [
        {"from": "system", "value": "Be brief."},
        {
            "role": "User",
            "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}], "refusal": None},
        {"from": "observation", "value": "found \ud83d it"},
    ]
    (record,) = records(
        jsonl(tmp_path / "a.jsonl", [{"messages": chat, "tools": [{"name": "look"}]}])
    )
    assert record.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two"},
        {"role": "assistant", "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "found \ufffd it"},
    ]
    tokenizer = load_tokenizer(chat_model)
    ids = tokens.chat.token_ids(tokenizer, record.messages, record.tools, "x")
    assert tokenizer.decode(ids).startswith("1 tools")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"messages": "hello"}, "`messages` is a text, a list of messages is expected"),
        ({"messages": None}, "`messages` is null"),
        ({"messages": ["hello"]}, "entry 1 is no object with `role` and `content`"),
        ({"messages": [{"content": "x"}]}, "entry 1 has no `role`"),
        ({"messages": [{"role": "user"}]}, "entry 1 has no text in `content`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not all text"),
        ({"conversations": [{"from": "human", "value": 7}]}, "entry 1 has no text"),
        ({"messages": []}, "no tokens"),
        ({"messages": [{"role": "user", "content": " "}]}, "no tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_chats_that_are_none_are_refused_in_one_line(chat_model, tmp_path, entry, match):
    with pytest.raises(DataError, match=match):
        rows(jsonl(tmp_path / "a.jsonl", [entry]), chat_model)


def test_a_model_without_a_template_says_so(demo_model, chat_model, tmp_path):
    chats = [{"messages": [{"role": "tool", "content": TEXT}]}] * 9
    path = jsonl(tmp_path / "a.jsonl", chats)
    with pytest.raises(
        DataError, match=r"line \d is a chat, but the model's tokenizer has no chat template"
    ):
        rows(path, demo_model)
    (chat_model / "chat_template.jinja").write_text(
        "{{ raise_exception('only users speak here') }}"
    )
    with pytest.raises(
        DataError, match=r"not taken by the model's chat template: only users speak"
    ):
        rows(path, chat_model)


def test_templates_that_write_the_date_give_the_same_tokens_every_day(chat_model, tmp_path):
    (chat_model / "chat_template.jinja").write_text(
        "{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}"
        f"Today: {{{{ date }}}} {TEMPLATE}"
    )
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": TEXT * 3}]}])
    ids = rows(path, chat_model, num_samples=1)
    assert load_tokenizer(chat_model).decode(ids[0]).startswith("Today: 26 Jul 2024")


def test_mixed_records_are_refused(chat_model, tmp_path):
    chat = {"messages": [{"role": "user", "content": TEXT}]}
    for first, second, match in [
        ({"text": TEXT}, {"input_ids": [5] * 40}, "is no text"),
        ({"input_ids": [5] * 40}, {"text": TEXT}, "has no `input_ids`"),
    ]:
        with pytest.raises(DataError, match=match):
            evaluation_rows(
                jsonl(tmp_path / "a.jsonl", [first, second]), chat_model, 4096, seq_len=8
            )
    both = jsonl(tmp_path / "b.jsonl", [{"text": TEXT, **chat}])
    assert [record.text for record in records(both)] == [TEXT]  # the first that is known counts


# --- other columns


def test_a_text_column_of_another_name(demo_model, tmp_path):
    texts = [f"{number} {TEXT}" for number in range(9)]
    expected = rows(jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]), demo_model)
    other = jsonl(tmp_path / "b.jsonl", [{"text": "x", "content": text} for text in texts])
    assert torch.equal(rows(other, demo_model, text_column="content"), expected)
    columns = parquet(tmp_path / "c.parquet", {"text": ["x"] * 9, "content": texts})
    assert torch.equal(rows(columns, demo_model, text_column="content"), expected)
    with pytest.raises(
        DataError, match=r"no JSON object with a `body` field; it has text, content: `text_column`"
    ):
        rows(other, demo_model, text_column="body")
    with pytest.raises(DataError, match="no `body` column; it has text, content: `text_column`"):
        rows(columns, demo_model, text_column="body")
    unnamed = jsonl(tmp_path / "d.jsonl", [{"content": TEXT}])
    with pytest.raises(
        DataError, match=r"line 1 is no JSON object .*; it has content: `text_column`"
    ):
        rows(unnamed, demo_model)
    for dataset in ("self", "a.txt"):
        with pytest.raises(DataError, match="has no columns"):
            check_dataset(dataset, "content")


def test_the_option_is_one_of_every_command_that_reads_data(cli, demo_model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", [{"content": TEXT * 9}] * 4)
    common = ["--dataset", data, "--text-column", "content", "--seq-len", 32]
    cli("prune", demo_model, "-o", tmp_path / "out", *common, "--num-samples", 4, "-q")
    assert 'text_column = "content"' in (tmp_path / "out" / "recipe.toml").read_text()
    again = ["--recipe", tmp_path / "out" / "recipe.toml", "-q"]
    cli("prune", demo_model, "-o", tmp_path / "again", *again)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert "a perplexity" in cli("eval", tmp_path / "out", *common, "--no-cache").stderr.replace(
        "token ", ""
    )


# --- broken texts


def test_halves_of_surrogate_pairs_become_the_replacement_character(demo_model, tmp_path):
    assert mended({"a\ud83d": ["\udc00", 3, "\U0001f600"]}) == {
        "a\ufffd": ["\ufffd", 3, "\U0001f600"]
    }
    broken = [{"text": f"{n} {TEXT}\ud83d broken \udc00 {TEXT}"} for n in range(9)]
    clean = [
        {"text": entry["text"].replace("\ud83d", "\ufffd").replace("\udc00", "\ufffd")}
        for entry in broken
    ]
    first, second = jsonl(tmp_path / "a.jsonl", broken), jsonl(tmp_path / "b.jsonl", clean)
    assert torch.equal(rows(first, demo_model), rows(second, demo_model))
    windows = [evaluation_rows(path, demo_model, 4096, seq_len=32) for path in (first, second)]
    assert torch.equal(torch.stack(windows[0]), torch.stack(windows[1]))


@pytest.mark.parametrize("text", ["", "  \n ", "<|end_of_text|>"], ids=repr)
def test_nothing_but_special_tokens_is_no_text(demo_model, tmp_path, text):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text}] * 600)
    with pytest.raises(DataError, match="is empty: its text has no tokens, or only special ones"):
        rows(path, demo_model)
    if text.strip():
        return
    some = [{"text": text}, {"text": TEXT * 9}] * 3
    alone = [{"text": TEXT * 9}] * 3
    found = rows(jsonl(tmp_path / "b.jsonl", some), demo_model, num_samples=2)
    assert torch.equal(found, rows(jsonl(tmp_path / "c.jsonl", alone), demo_model, num_samples=2))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (7, "a number"),
        (1.5, "a number"),
        (["x"], "a list"),
        ({"a": 1}, "an object"),
        (None, "null"),
        (True, "true or false"),
    ],
)
def test_a_text_that_is_none_says_what_it_is(demo_model, tmp_path, value, kind):
    path = jsonl(tmp_path / "a.jsonl", [{"text": TEXT}, {"text": value}])
    for read in (
        lambda: rows(path, demo_model),
        lambda: evaluation_rows(path, demo_model, 4096, seq_len=8),
    ):
        with pytest.raises(DataError, match=f"line 2: `text` is {kind}, a text .* is expected"):
            read()


# --- long files


def test_calibration_draws_from_the_whole_file(demo_model, tmp_path, monkeypatch):
    texts = [f"{number} {TEXT}" for number in range(50)]
    path = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    whole = rows(path, demo_model, num_samples=20)
    monkeypatch.setattr(tokens, "MOST_RECORDS", 7)  # so many are in memory at once
    assert torch.equal(rows(path, demo_model, num_samples=20), whole)


def test_all_of_a_file_is_scored(demo_model, tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [{"text": f"{number} {TEXT}"} for number in range(50)])
    before = evaluation_rows(path, demo_model, 4096, seq_len=32)
    monkeypatch.setattr(tokens, "MOST_RECORDS", 7)
    notes = []
    after = evaluation_rows(path, demo_model, 4096, seq_len=32, note=notes.append)
    assert not notes
    assert torch.equal(torch.stack(before), torch.stack(after))


def test_what_is_not_read_of_a_hub_dataset_is_said(cli, demo_model, tmp_path, monkeypatch):
    made = [datasets.Record(f"x record {number}", text=f"{number} {TEXT}") for number in range(9)]
    monkeypatch.setattr(datasets, "_hub_records", lambda *_: iter(made))
    notes = []
    every = evaluation_rows("org/name", demo_model, 4096, seq_len=16, note=notes.append)
    assert not notes
    monkeypatch.setattr(tokens, "MOST_RECORDS", 4)
    some = evaluation_rows("org/name", demo_model, 4096, seq_len=16, note=notes.append)
    assert notes == [
        "org/name has more than 4 records: the first 4 are scored; a file is scored whole"
    ]
    assert torch.equal(torch.stack(every)[: len(some)], torch.stack(some))
    shutil.copytree(demo_model, tmp_path / "model")  # scores are stored beside it
    said = cli("eval", tmp_path / "model", "--dataset", "org/name", "--seq-len", 16).stderr
    assert notes[0] in said


# --- names, pointers, special ids


def test_pointers_of_git_lfs_are_named(demo_model, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(DataError, match=f"{name} is a git-lfs pointer, .*git lfs pull"):
            check_dataset(str(tmp_path / name))
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(DataError, match=r"tokenizer\.json is a git-lfs pointer"):
        load_tokenizer(tmp_path)


def test_paths_of_nobodys_home_are_refused():
    with pytest.raises(UsageError, match="there is no such user"):
        check_dataset("~nobody-of-that-name/a.txt")


@pytest.mark.parametrize(
    ("start", "expected"), [(5, 5), (None, 0), ([7, 8], 7), (127, 127), (0, 0)]
)
def test_texts_of_the_model_begin_with_its_first_token(tmp_path, start, expected):
    from transformers import PreTrainedConfig

    class Config(PreTrainedConfig):  # of code on the Hub: those of transformers check their types
        vocab_size = 128

    assert first_token(Config(bos_token_id=start), tmp_path) == expected
    with pytest.raises(DataError, match=r"bos_token_id 128, .* 0\.\.127"):
        first_token(Config(bos_token_id=[128, 1]), tmp_path)


@pytest.mark.parametrize("start", [128, 50256, -1])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "phi3"])
def test_a_first_token_outside_the_vocabulary_is_refused_before_work(
    cli, tiny, tmp_path, start, family
):
    folder = tmp_path / "model"
    shutil.copytree(tiny(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": start}))
    for arguments in (
        ["prune", folder, "-o", tmp_path / "out", "-q"],
        ["eval", folder, "--dataset", "self"],
    ):
        printed = cli(*arguments, code=1)
        assert f"bos_token_id {start}, the model's vocabulary is 0..127" in printed.stderr
    assert not (tmp_path / "out").exists()


def test_ids_of_a_task_outside_the_vocabulary_end_in_one_line(cli, demo_model, tmp_path):
    pytest.importorskip("lm_eval")
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    (tmp_path / "tasks").mkdir()
    jsonl(tmp_path / "data.jsonl", [{"question": TEXT, "answer": "a sail"}])
    (tmp_path / "tasks" / "words.yaml").write_text(
        "task: words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'data.jsonl'}\noutput_type: loglikelihood\ntest_split: test\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    asked = ["--tasks", "words", "--include-path", tmp_path / "tasks", "-q", "--no-cache"]
    assert "vocabulary ends at 99" in cli("eval", folder, *asked, code=1).stderr


@pytest.mark.parametrize(("make", "said"), [(os.mkdir, "a folder"), (os.mkfifo, "no regular file")])
def test_what_is_no_file_is_not_called_missing(demo_model, tmp_path, make, said):
    make(tmp_path / "text.jsonl")
    with pytest.raises(DataError, match=rf"text.jsonl is {said}; accepted: a .txt"):
        rows(tmp_path / "text.jsonl", demo_model)
