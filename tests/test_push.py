"""`compress push` against a Hub on this machine, with the real client in processes of their own."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from compressor.checkpoint.reader import INDEX, Reader
from tests.conftest import DEMO
from tests.hub_server import TOKEN, Fault, Repo, card_data, running

# waits between the client's attempts are not waited out
MAIN = "import time; time.sleep = lambda seconds: None\nfrom compressor.cli import main; main()"
SHARD = "model.safetensors"


@pytest.fixture
def hub():
    with running() as hub:
        files = {
            path.name: path.read_bytes() for path in DEMO.iterdir() if path.name != "README.md"
        }
        files["README.md"] = b"---\nlicense: cc-by-4.0\n---\nA base."
        hub.repos["tester/base"] = Repo()
        hub.repos["tester/base"].commits[0]["files"] = files
        yield hub


@pytest.fixture
def child(hub, tmp_path):
    """Run Python code against the Hub; returns what it prints."""

    def run(code, *arguments, exit=0, **changes):
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            **changes,
        }
        env = {key: value for key, value in os.environ.items() if "OFFLINE" not in key} | own
        command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
        done = subprocess.run(
            command,
            env={key: value for key, value in env.items() if value},
            capture_output=True,
            text=True,
        )
        assert done.returncode == exit, f"{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def push(child):
    def run(*arguments, exit=0, **changes):
        done = child(MAIN, "push", *arguments, exit=exit, **changes)
        if exit:
            (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert "Traceback" not in done.stderr
            return line
        return done

    return run


def test_push_then_again_then_load_by_hub_id(hub, child, push, out):
    for name in (".spool", "journal"):
        (out / name).mkdir()
        (out / name / "state.safetensors").write_bytes(b"x")
    for name in (".hidden.json", "model.safetensors.partial", "notes.tmp", "id_rsa"):
        (out / name).write_bytes(b"secret")
    done = push(out, "tester/packed", "--private")
    repo = hub.repos["tester/packed"]
    assert repo.private
    assert done.stdout.strip() == f"{hub.url}/tester/packed/commit/{repo.commits[-1]['sha']}"
    named = {
        "README.md",
        ".eval_results/compress.yaml",
        "config.json",
        "recipe.toml",
        "report.json",
        "tokenizer.json",
        SHARD,
    }
    assert named <= set(repo.files)
    assert not any(
        name.endswith((".partial", ".tmp", "id_rsa")) or "state" in name or "hidden" in name
        for name in repo.files
    )
    assert repo.files[SHARD] == (out / SHARD).read_bytes()
    assert len(repo.commits) == 2

    assert "everything is there already" in push(out, "tester/packed", "--private").stderr
    assert len(repo.commits) == 2
    assert hub.sent("PUT", "/objects/") == 1

    load = (
        "import torch, compressor, compressor.runtime\nfrom transformers import "
        "AutoModelForCausalLM, AutoTokenizer\n"
        "a = AutoModelForCausalLM.from_pretrained('tester/packed').eval()\nb = "
        "compressor.load('tester/packed')\n"
        f"c = compressor.load({str(out)!r})\n"
        "ids = AutoTokenizer.from_pretrained('tester/packed')('It was a dark', "
        "return_tensors='pt')\n"
        "with torch.no_grad(): x, y, z = (model(**ids).logits for model in (a, b, c))\n"
        "assert type(a.model.layers[0].mlp.up_proj).__name__ == 'Sparse24Linear'\nassert "
        "torch.equal(x, y) and torch.equal(y, z)"
    )
    child(load)
    found = json.loads(child(MAIN, "inspect", "tester/packed", "--json").stdout)
    assert sum(row["format"] == "sparse24" for row in found["linears"]) == 28


def test_prune_and_eval_take_hub_ids(child, rows, tmp_path):
    out = tmp_path / "out"
    child(MAIN, "prune", "tester/base", "-o", out, "--method", "magnitude", "-q")
    assert 'model = "tester/base"' in (out / "recipe.toml").read_text()
    done = child(MAIN, "eval", "tester/base", "--dataset", rows, "--json", "-q")
    assert json.loads(done.stdout)["results"]["rows"]["token_perplexity,none"] > 1


def test_the_card_says_what_was_stored_and_nothing_else(hub, push, out):
    push(out, "tester/packed")
    files = hub.repos["tester/packed"].files
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "tester/base"
    assert card.data.license == "cc-by-4.0"
    measured = {
        (result.dataset_name, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }
    assert measured == {
        ("books", "token_perplexity"): 121.9375,
        ("arc_easy", "acc"): 0.25,
        ("arc_easy", "acc_norm"): 0.5,
    }
    assert "| books, token perplexity ↓, first 7 of 9 samples | 60.97 | 121.9 |" in card.text
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/compress.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "ARC-Easy", 0.25)
    assert 'from_pretrained(name, dtype="auto")' in card.text
    assert "import compressor.runtime" in card.text
    assert "1.57 MB → 884.74 kB (0.5625 of dense)" in card.text
    assert "| compressed | 28 linears, packed 2:4 (50.0% zeros) |" in card.text
    assert "| left dense | 1 weight, none inside the decoder blocks:" in card.text


def test_a_card_of_ones_own_is_kept(hub, push, out):
    (out / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    assert "published as it is" in push(out, "tester/packed").stderr
    assert hub.repos["tester/packed"].files["README.md"] == b"---\nlicense: mit\n---\nMine."
    (out / "README.md").write_text("---\nlicense: [\n---\nMine.")
    assert "is no model card" in push(out, "tester/packed", exit=1)


def test_scores_of_other_bytes_are_left_out(hub, push, out):
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    assert "is about other bytes than these" in push(out, "tester/packed").stderr
    files = hub.repos["tester/packed"].files
    assert "model-index" not in card_data(files)
    assert "None were measured" in files["README.md"].decode()
    assert ".eval_results/compress.yaml" not in files


def test_dry_run_lists_and_sends_nothing(hub, push, out):
    (out / "journal.tmp").touch()
    done = push(out, "tester/new", "--dry-run")
    assert "1.94 MB" in done.stdout
    assert "stays here: journal.tmp" in done.stdout
    plan = json.loads(push(out, "tester/new", "--dry-run", "--json").stdout)
    assert plan["bytes"] == sum(file["bytes"] for file in plan["files"])
    assert {file["name"]: file["bytes"] for file in plan["files"]}[SHARD] == (
        out / SHARD
    ).stat().st_size
    assert ModelCard(plan["card"]).data.license == "cc-by-4.0"
    assert "tester/new" not in hub.repos
    assert all(method == "GET" for method, _ in hub.requests)
    push(out, "tester/new", "--dry-run", HF_HUB_OFFLINE="1")


def test_nothing_about_this_machine_goes_up(hub, push, out):
    for name in ("recipe.toml", "report.json"):
        text = (out / name).read_text().replace(str(DEMO), "tester/base")
        text = text.replace("tester/base", "/home/me/models/base").replace(
            '"self"', '"/home/me/texts/mine.jsonl"'
        )
        (out / name).write_text(text)
    push(out, "tester/packed", "--base-model", "tester/base")
    published = b"".join(
        content for name, content in hub.repos["tester/packed"].files.items() if name != SHARD
    )
    assert b"/home/me" not in published
    assert b'dataset = "mine.jsonl"' in published
    assert b'model = "tester/base"' in published


def test_pull_request(hub, push, out):
    assert "without --create-pr it is made" in push(out, "tester/none", "--create-pr", exit=1)
    hub.repos["tester/theirs"] = Repo()
    done = push(out, "tester/theirs", "--create-pr")
    assert done.stdout.strip() == f"{hub.url}/tester/theirs/discussions/1"
    assert not hub.repos["tester/theirs"].files
    assert hub.repos["tester/theirs"].pulls[0]["files"][SHARD] == (out / SHARD).read_bytes()


def test_weights_of_before_are_removed(hub, push, out):
    hub.repos["tester/packed"] = Repo()
    before = {
        INDEX: b"{}",
        "model-00001-of-00002.safetensors": b"old",
        "extra.safetensors": b"theirs",
        "notes.md": b"theirs",
    }
    hub.repos["tester/packed"].commits[0]["files"] = before
    done = push(out, "tester/packed")
    assert f"removed from the Hub: {INDEX}" in done.stderr
    kept = set(hub.repos["tester/packed"].files)
    assert {"extra.safetensors", "notes.md", SHARD} <= kept
    assert not {INDEX, "model-00001-of-00002.safetensors"} & kept


def test_a_connection_that_breaks_once_is_survived(hub, push, out):
    hub.faults = [Fault("PUT", "/objects/", cut=1 << 20, times=1)]
    push(out, "tester/packed")
    assert hub.sent("PUT", "/objects/") == 2
    assert hub.repos["tester/packed"].files[SHARD] == (out / SHARD).read_bytes()


def test_a_connection_that_stays_broken_publishes_nothing_and_is_taken_up_again(hub, push, out):
    sharded = out / "model-00002-of-00002.safetensors"
    data = Reader(out)
    shutil.move(out / SHARD, out / "model-00001-of-00002.safetensors")
    sharded.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    (out / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(data.tensors, "model-00001-of-00002.safetensors")})
    )
    index = json.loads((out / INDEX).read_text())
    sharded.write_bytes(_one_tensor("extra"))
    (out / INDEX).write_text(
        json.dumps({"weight_map": {**index["weight_map"], "extra": sharded.name}})
    )
    second = hashlib.sha256(sharded.read_bytes()).hexdigest()
    hub.faults = [Fault("PUT", f"/objects/{second}", cut=20)]
    line = push(out, "tester/packed", exit=1)
    assert line.startswith(
        f"error: sending {sharded.name} failed: the connection to {hub.url} broke"
    )
    assert "nothing was published; run the same command again" in line
    assert not hub.repos["tester/packed"].files
    assert second not in hub.objects
    sent = hub.sent("PUT", "/objects/")
    hub.faults = []
    push(out, "tester/packed")
    assert hub.sent("PUT", "/objects/") == sent + 1  # the first shard was there already
    assert hub.repos["tester/packed"].files[sharded.name] == sharded.read_bytes()


def _one_tensor(name):
    header = json.dumps({name: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST", "/commit/", 409), "is being changed by somebody else"),
        (Fault("POST", "/commit/", 412), "somebody has changed tester/packed meanwhile"),
        (
            Fault("POST", "/commit/", 500),
            "making the commit failed: HTTP 500: as asked: 500: nothing was published",
        ),
        (Fault("POST", "/commit/", cut=0), "making the commit failed: the connection to"),
        (
            Fault("POST", "/preupload/", 403),
            "your token may not write there; use one with write access to tester",
        ),
        (Fault("PUT", "/objects/", 500), f"sending {SHARD} failed: HTTP 500"),
        (Fault("POST", "/repos/create", 500), "asking for the repository failed: HTTP 500"),
        (Fault("GET", "/api/models/tester/packed", 404), "there is no tester/packed on the Hub"),
        (Fault("POST", "/validate-yaml", 500), "checking the model card failed: HTTP 500"),
    ],
    ids=lambda value: (
        f"{value.path.strip('/')}-{value.status or 'cut'}" if isinstance(value, Fault) else ""
    ),
)
def test_every_refusal_is_one_line_and_nothing_is_published(hub, push, out, fault, message):
    hub.faults = [fault]
    assert message in push(out, "tester/packed", exit=1)
    assert "tester/packed" not in hub.repos or not hub.repos["tester/packed"].files


def test_wrong_rights(hub, push, out):
    assert "log in with `hf auth login`" in push(out, "tester/packed", exit=1, HF_TOKEN="hf_wrong")
    assert "log in with `hf auth login`" in push(out, "tester/packed", exit=1, HF_TOKEN="")
    assert "use one with write access to another" in push(out, "another/packed", exit=1)
    hub.repos["tester/open"] = Repo()
    assert "exists already and is public" in push(out, "tester/open", "--private", exit=1)
    assert not hub.repos["tester/open"].files
    assert "the connection to http://127.0.0.1:9 broke" in push(
        out, "tester/packed", exit=1, HF_ENDPOINT="http://127.0.0.1:9"
    )


def test_an_upload_that_was_changed_on_the_way_is_noticed(hub, push, out, monkeypatch):
    def damage(self, oid, **_):
        self.hub.objects[oid] = b"x"
        self.answer(200)

    monkeypatch.setattr("tests.hub_server.Handler.store", damage)
    assert f"does not hold {SHARD} as it is here" in push(out, "tester/packed", exit=1)


def test_bad_arguments(push, out, tmp_path):
    assert "names no owner" in push(out, "packed", exit=2)
    assert "is no Hub repository; accepted: ORG/NAME" in push(out, "a/b/c", exit=2)
    assert "has no recipe.toml" in push(DEMO, "tester/packed", exit=1)
    (out / "tokenizer.json").unlink()
    (tmp_path / "secret").touch()
    (out / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert "is a link that leads out of the folder" in push(out, "tester/packed", exit=1)
    (out / "recipe.toml").write_text("method = 3")
    assert "is no complete recipe" in push(out, "tester/packed", exit=1)
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1])
    assert "truncated" in push(out, "tester/packed", exit=1)


def test_the_card_of_a_low_rank_model_calls_it_that(push, tmp_path):
    from compressor.config.recipe import Recipe
    from compressor.run.pipeline import prune

    prune(Recipe(str(DEMO), method="welore", keep="60%"), tmp_path / "out")
    found = json.loads(push(tmp_path / "out", "tester/thin", "--dry-run", "--json").stdout)
    assert {"plan.toml", "recipe.toml"} <= {file["name"] for file in found["files"]}
    card = ModelCard(found["card"])
    assert "its linears factored to 60% of their parameters with welore" in card.text
    assert "`compress lowrank MODEL -o OUT --recipe recipe.toml`" in card.text
    assert "low-rank" in card.data.tags
    assert "zeros" not in card.text
    assert re.search(
        r"\| compressed \| \d+ linears, of low rank \(ranks \d+ to \d+, \d\d\.\d% of their "
        r"parameters\) \|",
        card.text,
    )
    assert re.search(
        r"\| parameters kept \| 60\.0% of those of all linears in the decoder blocks \|",
        card.text,
    )
    assert not {"pruned", "2:4"} & set(card.data.tags)
