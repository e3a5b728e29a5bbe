"""`compress eval --server` against a server of one's own, which answers as vLLM does."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from compressor.errors import UsageError
from compressor.evaluation.served import connect

ROWS = [[1, 5, 9, 40, 7, 300, 12, 8], [1, 77, 3, 2, 900, 4, 4, 4], [1, 8, 15, 16, 23, 42, 7, 7]]


@pytest.fixture
def folder(demo_model, tmp_path):
    """A copy, for scores are stored beside what is scored."""
    return shutil.copytree(demo_model, tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS))
    return path


@pytest.fixture
def server(demo_model):
    """Its URL, after which `state` may be changed: what it serves and how it answers."""
    import compressor

    model = compressor.load(demo_model, dtype=torch.float32)
    state = {"models": [{"id": "books", "max_model_len": 64}], "asked": [], "wrong": None}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, body, code=200):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            state["key"] = self.headers.get("Authorization")
            self.reply(
                state["models"] if isinstance(state["models"], bytes) else {"data": state["models"]}
            )

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["asked"].append(asked)
            if state["wrong"] is not None:
                return self.reply(state["wrong"], state.get("code", 200))
            choices = []
            for index, ids in enumerate(asked["prompt"]):
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, :-1]
                own = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).flatten()
                values = {"token_logprobs": [None, *own.tolist()]}
                choices.insert(0, {"index": index, "logprobs": values})  # in any order
            return self.reply({"choices": choices})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    http.server_close()


def arguments(folder, text, url, *more):
    given = ["--dataset", text, "--dtype", "float32", "--server", url, "-q"]
    return ["eval", folder, *given, *more]


def test_a_server_of_the_same_model_has_the_same_perplexity(cli, folder, text, server):
    shown = json.loads(cli(*arguments(folder, text, server["url"] + "/v1/", "--json")).stdout)
    served = shown["served"]["results"]["rows"]["token_perplexity,none"]
    assert shown["served"]["model"] == "books"
    assert served == pytest.approx(shown["results"]["rows"]["token_perplexity,none"], rel=1e-5)
    (asked,) = server["asked"]
    assert asked["prompt"] == ROWS
    assert (asked["max_tokens"], asked["echo"], asked["model"]) == (0, True, "books")


def test_the_table_has_both(cli, folder, text, server):
    lines = cli(*arguments(folder, text, server["url"])).stdout.splitlines()
    own, served = (line for line in lines if "token perplexity" in line)
    assert "rows token perplexity of the server" in served
    assert own.split("|")[2] == served.split("|")[2]


def test_another_model_shows(cli, folder, text, server, tmp_path):
    """A number that the server makes up is shown as it is."""
    server["wrong"] = {"choices": [
        {"index": i, "logprobs": {"token_logprobs": [None] + [-2.0] * 7}} for i in range(3)
    ]}  # fmt: skip
    shown = json.loads(cli(*arguments(folder, text, server["url"], "--json")).stdout)
    served = shown["served"]["results"]["rows"]["token_perplexity,none"]
    assert served == pytest.approx(torch.tensor(2.0).exp().item())


def test_the_served_number_is_not_stored_with_the_scores(cli, folder, text, server, tmp_path):
    cli(*arguments(folder, text, server["url"]))
    assert "served" not in json.loads((tmp_path / "model.eval.json").read_text())


def test_limits_of_the_server_are_seen_before_anything_is_scored(cli, folder, tmp_path, server):
    long = tmp_path / "long.txt"
    long.write_text("word " * 2000)
    said = cli(*arguments(folder, long, server["url"]), code=2).stderr
    said = " ".join(said.split())
    assert "takes 63 tokens and one more, a window of long has 512: give --seq-len 63" in said
    assert not server["asked"]


def test_one_model_and_a_text_are_needed(cli, folder, text, server):
    both = cli("eval", folder, "other", "--dataset", text, "--server", server["url"], code=2)
    assert "one MODEL and --dataset" in " ".join(both.stderr.split())


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ([], "must serve one model; it has none"),
        ([{"id": "a"}, {"id": "b"}], "must serve one model; it has a, b"),
        (b"<html>", "no OpenAI-compatible server answers"),
        ("nonsense", "not OpenAI-compatible"),
    ],
)
def test_what_is_no_server_of_one_model(server, models, reason):
    server["models"] = models
    with pytest.raises(UsageError, match=reason):
        connect(server["url"])


def test_an_adapter_is_not_another_model(server):
    server["models"] = [{"id": "a"}, {"id": "tuned", "parent": "a"}]
    assert connect(server["url"]).model == "a"


def test_the_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    connect(server["url"])
    assert server["key"] == "Bearer secret"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", ""])
def test_what_is_no_url(url):
    with pytest.raises(UsageError, match="accepted: a URL such as http://localhost:8000"):
        connect(url)


def test_nobody_answers(server):
    with pytest.raises(UsageError, match="vllm serve FOLDER"):
        connect("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("wrong", "code", "reason"),
    [
        ({"message": "echo is not allowed"}, 400, "refused completions: 400"),
        ({"choices": []}, 200, "does not give the log probabilities of a prompt"),
        ({"choices": [{"index": 0, "logprobs": None}] * 3}, 200, "does not give the log prob"),
        (
            {"choices": [{"index": i, "logprobs": {"token_logprobs": [-1.0]}} for i in range(3)]},
            200,
            "does not give the log prob",
        ),
    ],
)
def test_answers_without_log_probabilities_are_refused(
    cli, folder, text, server, wrong, code, reason
):
    server |= {"wrong": wrong, "code": code}
    said = cli(*arguments(folder, text, server["url"]), code=2).stderr
    assert reason in " ".join(said.split())
