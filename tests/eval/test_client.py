"""What is refused of a server's answers, with a stand-in for the server; tests/integration has the real one."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import eval.client as client_module
from eval.answers import EvalError, LmEvalClient, Question
from eval.client import ServeError, Server, _completion, attach, sample, score, tokenize
from eval.source import KEY_VARIABLE, ModelSource

CHOICE = {
    "prompt_token_ids": [5, 6],
    "token_ids": [7, 1],
    "logprobs": {"token_logprobs": [-0.5, -0.25]},
    "finish_reason": "stop",
}
Fake = Callable[[dict[str, Any]], str]


@pytest.fixture
def fake_endpoint() -> Iterator[Fake]:
    """Starts a server that gives each path its answer (an object, or raw text) to whoever has the key "secret"."""
    started: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, Any]) -> str:
        class FakeServer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = answers.get(self.path)
                known = self.headers.get("Authorization") == "Bearer secret"
                self.send_response(401 if not known else 404 if answer is None else 200)
                self.end_headers()
                self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

            do_POST = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (as it is overridden)
                pass

        started.append(ThreadingHTTPServer(("127.0.0.1", 0), FakeServer))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}/v1"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def models(*names: str) -> dict[str, Any]:
    return {"/v1/models": {"data": [{"id": name, "max_model_len": 128} for name in names]}}


def test_a_completion_must_add_up() -> None:
    """As many log-probs as tokens, all of them log-probs, and of the prompt that was sent."""
    completion = _completion(0, (5, 6), CHOICE)
    assert (completion.token_ids, completion.logprobs, completion.finish_reason) == ((7, 1), (-0.5, -0.25), "stop")
    with pytest.raises(ServeError, match="prompt 4: 2 token ids but 1 log-probs"):
        _completion(4, (5, 6), CHOICE | {"logprobs": {"token_logprobs": [-0.5]}})
    with pytest.raises(ServeError, match="prompt 4: not log-probs"):
        _completion(4, (5, 6), CHOICE | {"logprobs": {"token_logprobs": [-0.5, 0.25]}})
    with pytest.raises(ServeError, match="another prompt"):
        _completion(4, (5, 7), CHOICE)
    with pytest.raises(ServeError, match="does not return token ids"):
        _completion(4, (5, 6), CHOICE | {"token_ids": None})


def test_the_key_is_not_printed() -> None:
    """A server in a log line or a traceback shows everything but its key."""
    assert "secret" not in repr(Server("http://127.0.0.1:1/v1", "secret", "m", 1, 0.0))


def test_attach_picks_the_model_or_says_why_not(fake_endpoint: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only model, or the one that is named; two without a name, and a name that is not served, are refused."""
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    one, two = fake_endpoint(models("m")), fake_endpoint(models("m", "n"))
    server = attach(ModelSource.parse(one))
    assert (server.model, server.max_model_len, server.pid, server.kernels) == ("m", 128, None, None)
    assert attach(ModelSource.parse(f"{two}#n")).model == "n"
    with pytest.raises(ServeError, match=r"it serves 'm', 'n'; say which: http://.*/v1#NAME"):
        attach(ModelSource.parse(two))
    with pytest.raises(ServeError, match="it serves 'm', not 'other'"):
        attach(ModelSource.parse(f"{one}#other"))


def test_attach_names_what_is_wrong_with_an_endpoint(fake_endpoint: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, no key, a wrong key (which is not repeated), no such path, another kind of answer: one line each."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    url = fake_endpoint(models("m"))
    for key in (None, "wr0ng"):
        if key is not None:
            monkeypatch.setenv(KEY_VARIABLE, key)
        with pytest.raises(ServeError, match=r"HTTP 401 .* does not take the key in BORESIGHT_API_KEY") as refused:
            attach(ModelSource.parse(url))
        assert "wr0ng" not in str(refused.value)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    for answers, said in (({}, "HTTP 404"), ({"/v1/models": "<html>"}, "not JSON"), ({"/v1/models": {}}, "no list")):
        with pytest.raises(ServeError, match=said):
            attach(ModelSource.parse(fake_endpoint(answers)))
    with pytest.raises(ServeError, match=r"no answer from http://127.0.0.1:9/v1/models"):
        attach(ModelSource.parse("http://127.0.0.1:9/v1"))


def test_an_endpoint_without_vllms_additions_is_refused_by_name(fake_endpoint: Fake) -> None:
    """A server that answers completions alone cannot be sampled with ids, scored or asked for its tokenization."""
    plain = {"choices": [{"text": "hi", "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0]}}]}
    server = Server(fake_endpoint({"/v1/completions": plain}), "secret", "m", None, 0.0)
    with pytest.raises(ServeError, match="prompt 0: the server does not return token ids"):
        sample(server, [[5]], max_tokens=1, temperature=1.0, seed=0, concurrency=1)
    with pytest.raises(ServeError, match=r"sequence 0: .* gives no log-probs of prompts"):
        score(server, [[5, 6]], [1], concurrency=1)
    with pytest.raises(ServeError, match="tokenize: HTTP 404"):
        tokenize(server, "hi")


def test_sampling_leaves_nothing_to_the_servers_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server fills what a request leaves unsaid from the model's own generation_config.json (top_k 20, say)."""
    asked: list[Any] = []

    def fake_answer(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments[3])
        return {"choices": [CHOICE]}

    monkeypatch.setattr(client_module, "_answer", fake_answer)
    server = Server("http://127.0.0.1:1/v1", "", "m", None, 0.0)
    sample(server, [[5, 6], [5, 6]], max_tokens=2, temperature=0.7, seed=3, concurrency=1)
    for body in asked:
        said = {key: body[key] for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        assert said == {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert [body["seed"] for body in asked] == [3, 4]


def test_scores_are_of_the_tokens_that_were_sent(fake_endpoint: Fake) -> None:
    """Log-probs are taken from `first` on, by token id; of other tokens they are refused, and so is index 0."""
    held = [None, {"6": {"logprob": -0.5}}, {"7": {"logprob": -0.25}}]
    url = fake_endpoint({"/v1/completions": {"choices": [{"prompt_logprobs": held}]}})
    server = Server(url, "secret", "m", None, 0.0)
    assert score(server, [[5, 6, 7], [9, 8, 7]], [1, 2], concurrency=2) == [(-0.5, -0.25), (-0.25,)]
    with pytest.raises(ServeError, match="other tokens than the ones sent"):
        score(server, [[5, 6, 8]], [1], concurrency=1)
    with pytest.raises(ValueError, match="from 1"):
        score(server, [[5, 6, 7]], [0], concurrency=1)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_server_that_hangs_is_one_error_after_its_time(silent_port: int) -> None:
    """Nothing is heard for half a second: sampling and lm-eval's client both stop there, name the address, and do not
    wait again."""
    server = Server(f"http://127.0.0.1:{silent_port}/v1", "", "m", None, 0.0, request_seconds=0.5)
    started = time.monotonic()
    with pytest.raises(ServeError, match=rf"prompt 0: no answer from http://127.0.0.1:{silent_port}.*ReadTimeout"):
        sample(server, [[5]], max_tokens=1, temperature=1.0, seed=0, concurrency=1)
    client = LmEvalClient(server, chat=False, tokenizer=None, concurrency=1, special_tokens=False)
    with pytest.raises(EvalError, match=rf"no answer from http://127.0.0.1:{silent_port}/v1/completions within 0.5 s"):
        client.answers([Question("1+1=", {"max_gen_toks": 1, "temperature": 0.0}, seed=0)])
    assert time.monotonic() - started < 10.0
