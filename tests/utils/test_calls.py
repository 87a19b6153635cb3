"""Calls to endpoints: limits of rate, time and size, interrupts, refusals, secrets, and the file of answers."""

import asyncio
import base64
import email.utils
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import loopback
from helpers.loopback import KEY

from pasta_jax.utils import calls
from pasta_jax.utils.calls import Caller
from pasta_jax.utils.endpoint import Endpoint, EndpointError
from pasta_jax.utils.protocols import Call

ROOT = Path(__file__).parents[2]


def completion(text: str) -> dict:
  return {"choices": [{"message": {"content": text}}]}


class Server(loopback.Server):
  """Repeats the last message, and refuses `fields`; "wait N" waits before, "status N" is answered with it."""

  fields: tuple[str, ...] = ()
  words = ""

  def answer(self, body, path):
    said = body["messages"][-1]["content"]
    orders = dict(zip(said.split()[::2], said.split()[1::2]))
    time.sleep(float(orders.get("wait", 0)))
    if "status" in orders:
      raise loopback.Refusal(int(orders["status"]), {})
    if any(f in body for f in self.fields):
      raise loopback.Refusal(400, {"error": {"message": self.words}})
    return completion(said)


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  s = Server()
  yield s
  s.close()


@pytest.fixture
def paused(monkeypatch):
  return loopback.without_waiting(monkeypatch)


def said(*texts) -> list:
  return [Call([{"role": "user", "content": str(t)}]) for t in texts]


def asked(server, path: Path, texts, **settings) -> dict[int, dict]:
  """The answers to calls, and the file they are stored in."""
  answers: dict[int, dict] = {}
  settings = dict(url=server.url, concurrency=1) | settings
  Caller(Endpoint("m", **settings), path).map(said(*texts), answers.__setitem__)
  return answers


def stored(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_calls_keep_to_a_limit(server, tmp_path, monkeypatch, paused):
  """Call k of n starts k times 60 / per_minute seconds after the first one."""
  monkeypatch.setattr("pasta_jax.utils.calls.monotonic", lambda: 100.0)
  answers = asked(server, tmp_path / "calls.jsonl", range(5), per_minute=30, concurrency=3)
  assert sorted(p for p in paused if p) == [2.0, 4.0, 6.0, 8.0] and len(answers) == 5


def test_answers_go_to_their_calls(server, tmp_path):
  """Also to several that ask the same, which is asked once; and inside a running loop, as in a notebook."""
  texts = [f"question {i % 7}" for i in range(9)]

  async def notebook():
    return asked(server, tmp_path / "calls.jsonl", texts, concurrency=3)

  answers = asyncio.run(notebook())
  assert {i: a["text"] for i, a in answers.items()} == dict(enumerate(texts))
  assert len({row["id"] for row in stored(tmp_path / "calls.jsonl")}) == 7 == len(server.calls)


def test_an_attempt_has_a_time_limit_as_a_whole(server, tmp_path, paused):
  """A byte now and then does not prolong it."""

  def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
      handler.wfile.write(b" ")
      time.sleep(0.1)

  server.faults = [drip, drip]
  begin = time.monotonic()
  with pytest.raises(EndpointError, match="2 attempts; the last one: no whole answer in 0.5 seconds"):
    asked(server, tmp_path / "calls.jsonl", ["a"], timeout=0.5, retries=1)
  assert time.monotonic() - begin < 2.5


def test_an_answer_has_a_bound(server, tmp_path, monkeypatch, paused):
  """Of what it unpacks to, too; the other calls go on."""
  monkeypatch.setattr(calls, "MAX_ANSWER", 1 << 20)
  packed = gzip.compress(b" " * (8 << 20))
  large = lambda handler: handler.reply(200, packed, [("Content-Encoding", "gzip")])
  server.faults = [None, large, large]
  answers = asked(server, tmp_path / "calls.jsonl", "abc", retries=1)
  assert [answers[i]["text"] for i in range(3)] == ["a", "", "c"]
  assert answers[1]["refused"] == "a response of more than 1 MB"


def test_an_interrupt_ends_a_run_within_seconds(server, tmp_path):
  """What arrives within a grace period is stored, a silent server is not waited for, nothing new starts."""
  script = (
    "import signal; from pathlib import Path; from pasta_jax.utils.calls import *\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
    f"caller = Caller(Endpoint('m', url={server.url!r}, concurrency=2), Path({str(tmp_path / 'calls.jsonl')!r}))\n"
    "texts = ['wait 1', 'wait 60', 'c', 'd']\n"
    "caller.map([Call([{'role': 'user', 'content': t}]) for t in texts], lambda i, answer: print(i))"
  )
  run = subprocess.Popen(
    [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  while len(server.calls) < 2 and run.poll() is None:
    time.sleep(0.02)
  begin = time.monotonic()
  run.send_signal(signal.SIGINT)
  out, error = run.communicate(timeout=20)
  assert time.monotonic() - begin < 6
  assert error.strip().endswith("KeyboardInterrupt") and out == "" and len(server.calls) == 2
  assert [row["text"] for row in stored(tmp_path / "calls.jsonl")] == ["wait 1"]


def test_after_an_error_calls_in_progress_are_kept(server, tmp_path):
  """Those that wait for their next attempt are not waited for."""
  path = tmp_path / "calls.jsonl"
  begin = time.monotonic()
  with pytest.raises(EndpointError, match="refused, status 401"):
    asked(server, path, ["wait 0.3 status 401", "status 503", "wait 0.6", "wait 0.7", "e"], concurrency=4)
  assert time.monotonic() - begin < 2 and len(server.calls) == 4
  assert sorted(row["text"] for row in stored(path)) == ["wait 0.6", "wait 0.7"]


def test_the_server_says_when_to_ask_again(server, tmp_path, paused):
  """In seconds, or with a date; two minutes at most."""
  busy = lambda when: lambda handler: handler.reply(429, b"{}", [("Retry-After", when)])
  date = email.utils.formatdate(time.time() + 30, usegmt=True)
  server.faults = [busy(when) for when in ("7", date, "9" * 400, "-5", "nan", "soon", "")]
  asked(server, tmp_path / "calls.jsonl", ["a"], retries=7)
  assert paused[0] == 7 and 25 < paused[1] <= 30 and paused[2:4] == [120.0, 0.0]
  assert [16 * 0.75 <= p <= 60 * 1.25 for p in paused[4:]] == [True] * 3


@pytest.mark.parametrize(
  "field, words",
  [
    ("max_tokens", "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
    ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
  ],
)
def test_a_field_that_a_model_refuses_is_left_out(server, tmp_path, field, words):
  """It costs one refused call, not an attempt; the identity of a call stays that of its settings."""
  server.fields, server.words = (field,), words
  path = tmp_path / "calls.jsonl"
  assert [a["text"] for a in asked(server, path, "abc", retries=0).values()] == ["a", "b", "c"]
  assert [field in call for call in server.calls] == [True, False, False, False]
  assert ("max_completion_tokens" in server.calls[-1]) == (field == "max_tokens")
  asked(server, path, "abc")
  assert len(server.calls) == 4


def test_refused_token_probabilities_name_the_setting(server, tmp_path):
  server.fields, server.words = ("logprobs",), "This model does not support logprobs."
  with pytest.raises(EndpointError, match=r"config\.judge\.logprobs=False .*does not support logprobs"):
    asked(server, tmp_path / "calls.jsonl", ["a"])


def test_a_refused_request_is_its_own(server, tmp_path, paused):
  """Reasons of the content or the length are stored; another 400, and responses without an answer, are asked for
  again by the next run."""
  path = tmp_path / "calls.jsonl"
  refusals = [
    b'{"error": {"message": "odd safety_settings"}}',
    b'{"error": {"message": "Your prompt is too long"}}',
    b"<html>Welcome</html>",
  ]
  bad = [lambda handler, raw=raw: handler.reply(400, raw) for raw in refusals[:2]]
  server.faults = [None, *bad, refusals[2], refusals[2]]
  answers = asked(server, path, "abcde", retries=1)
  assert [a["text"] for a in answers.values()] == ["a", "", "", "", "e"]
  words = [answers[i]["refused"] for i in (1, 2, 3)]
  assert "odd safety" in words[0] and "too long" in words[1] and "Welcome" in words[2]
  assert len(stored(path)) == 3
  answers = asked(server, path, "abcde")
  assert [a["text"] for a in answers.values()] == ["a", "", "e", "b", "d"] and len(stored(path)) == 5


@pytest.mark.parametrize("count, made", [(3, 3), (20, calls.TOLERATED)])
def test_settings_that_refuse_everything_end_the_run(server, tmp_path, count, made):
  server.status_body = b'{"error": {"message": "no such response_format"}}'
  server.faults = [400] * 20
  with pytest.raises(
    EndpointError, match="answered none of . requests; the last one: status 400: no such response_format"
  ):
    asked(server, tmp_path / "calls.jsonl", range(count))
  assert len(server.calls) == made and not (tmp_path / "calls.jsonl").exists()


@pytest.mark.parametrize(
  "error, words",
  [
    (
      {"message": "Rate limit exceeded", "code": 429},
      "2 attempts.*status 429 inside a 200: Rate limit exceeded",
    ),
    ({"message": "no such model", "code": 404}, "refused, status 404 inside a 200: no such model"),
    ("busy", "2 attempts.*an error inside a 200: busy"),
  ],
)
def test_an_error_inside_a_200(server, tmp_path, paused, error, words):
  server.faults = [json.dumps({"error": error}).encode()] * 2
  with pytest.raises(EndpointError, match=words):
    asked(server, tmp_path / "calls.jsonl", ["a"], retries=1)
  server.faults = [json.dumps({"error": {"message": "busy", "code": 502}}).encode()]
  assert asked(server, tmp_path / "calls.jsonl", ["b"], retries=1)[0]["text"] == "b"


def test_rows_of_older_versions_that_are_no_answers_are_asked_again(server, tmp_path):
  path = tmp_path / "calls.jsonl"
  asked(server, path, "abc")
  rows = stored(path)
  rows[0]["text"], rows[1]["text"] = [{"type": "text", "text": "a"}], {"a": 1}
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert {i: a["text"] for i, a in asked(server, path, "abc").items()} == dict(enumerate("abc"))
  assert len(server.calls) == 5


def test_a_lone_surrogate_is_paid_for_once(server, tmp_path):
  path = tmp_path / "calls.jsonl"
  assert asked(server, path, ["a \ud83d"])[0]["text"] == "a \ud83d"
  assert asked(server, path, ["a \ud83d"])[0]["text"] == "a \ud83d" and len(server.calls) == 1


# --- secrets ---


@pytest.mark.parametrize("before", range(0, 64, 9))
def test_a_key_at_a_cut_is_not_shown(server, tmp_path, monkeypatch, before):
  """Neither where the bounded body ends, nor where a message does."""
  monkeypatch.setattr(calls, "MAX_ERROR", 32)
  server.status_body = b"x" * before + KEY.encode() + b"y" * 600
  server.faults = [403]
  with pytest.raises(EndpointError, match="status 403: ") as error:
    asked(server, tmp_path / "calls.jsonl", ["a"])
  monkeypatch.setattr(calls, "MAX_ERROR", 4096)
  server.status_body = b"x" * (100 + before) + KEY.encode() + b"y" * 600
  server.faults = [403]
  with pytest.raises(EndpointError, match="status 403: ") as again:
    asked(server, tmp_path / "calls.jsonl", ["a"])
  # Only what the server said: the address before it has a port of any digits.
  shown = [str(e.value).partition("status 403: ")[2] for e in (error, again)]
  assert all(shown)
  for n in range(3, len(KEY)):
    assert not any(KEY[:n] in text or KEY[-n:] in text for text in shown)


def test_a_key_that_a_server_repeats_is_not_stored(server, tmp_path):
  server.faults = [json.dumps(completion(f"your key is {KEY}")).encode()]
  assert asked(server, tmp_path / "calls.jsonl", ["a"])[0]["text"] == "your key is …"
  assert KEY not in (tmp_path / "calls.jsonl").read_text()


def test_a_login_in_the_url(server, tmp_path, monkeypatch):
  """It identifies the caller if there is no key, and is never shown or stored."""
  url = server.url.replace("://", "://me:hunter%40two@")
  server.faults = [b'{"choices": [{"message": {"content": "hunter@two"}}]}']
  asked(server, tmp_path / "calls.jsonl", ["a"], url=url)
  assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
  monkeypatch.delenv("OPENAI_API_KEY")
  asked(server, tmp_path / "calls.jsonl", ["b"], url=url)
  login = base64.b64encode(b"me:hunter@two").decode()
  assert server.headers[-1]["Authorization"] == f"Basic {login}"
  server.status_body = f"no {login} hunter%40two hunter@two".encode()
  server.faults = [401]
  with pytest.raises(EndpointError, match=f"{server.url}.* refused, status 401: no … … …") as error:
    asked(server, tmp_path / "calls.jsonl", ["c"], url=url)
  assert "hunter" not in f"{error.value}{(tmp_path / 'calls.jsonl').read_text()}{Endpoint('m', url=url)}"
  asked(server, tmp_path / "calls.jsonl", ["a", "b"])
  assert len(server.calls) == 3  # the same calls, whatever the login


def test_a_redirect_is_not_followed(server, tmp_path):
  server.faults = [lambda handler: handler.reply(302, b"", [("Location", server.url + "/elsewhere")])]
  with pytest.raises(EndpointError, match="refused, status 302"):
    asked(server, tmp_path / "calls.jsonl", ["a"])
  assert len(server.calls) == 1


def test_a_key_over_plain_http_is_warned_of(tmp_path, capsys):
  Caller(Endpoint("m", url="http://models.example.com"), tmp_path / "a.jsonl")
  assert capsys.readouterr().err == ""  # no key
  os.environ["OPENAI_API_KEY"] = KEY
  try:
    for url in ("http://models.example.com/v1", "http://8.8.8.8:80", "http://me:secret@[2001:4860::1]"):
      Caller(Endpoint("m", url=url), tmp_path / "a.jsonl")
      line = capsys.readouterr().err
      assert line.startswith("warning: the key of judge goes to ") and line.count("\n") == 1
      assert KEY not in line and "secret" not in line
    for host in (
      "localhost:8000",
      "127.0.0.1",
      "192.168.1.5",
      "10.0.0.7",
      "[::1]:80",
      "vllm:8000",
      "gpu.local",
    ):
      Caller(Endpoint("m", url=f"http://{host}/v1"), tmp_path / "a.jsonl")
    Caller(Endpoint("m", url="https://models.example.com/v1"), tmp_path / "a.jsonl")
    assert capsys.readouterr().err == ""
  finally:
    del os.environ["OPENAI_API_KEY"]


def test_proxies_and_certificates_come_from_the_environment(server, tmp_path, monkeypatch):
  for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("all_proxy", "socks5://nowhere")  # not for HTTP
  monkeypatch.setenv("http_proxy", server.url.removeprefix("http://"))
  asked(server, tmp_path / "calls.jsonl", ["a"], url="http://models.local/v1")
  assert server.calls[-1]["path"] == "http://models.local/v1/chat/completions"
  monkeypatch.setenv("http_proxy", "gopher://me:hunter@proxy")
  with pytest.raises(EndpointError, match="^judge: the HTTP client cannot start: .*proxy") as error:
    asked(server, tmp_path / "calls.jsonl", ["b"])
  assert "hunter" not in str(error.value)
  monkeypatch.setenv("no_proxy", "127.0.0.1")
  asked(server, tmp_path / "calls.jsonl", ["b"])
  monkeypatch.setenv("SSL_CERT_FILE", "nowhere.pem")
  with pytest.raises(EndpointError, match="^judge: the HTTP client cannot start: .*No such file"):
    asked(server, tmp_path / "calls.jsonl", ["c"])


def test_the_client_is_loaded_only_where_calls_are_made():
  for path in (ROOT / "pasta_jax").rglob("*.py"):
    loads = re.search(r"^(from|import) (httpx2|tenacity|pasta_jax\.utils\.calls)\b", path.read_text(), re.M)
    assert not loads or path.name == "calls.py", path
