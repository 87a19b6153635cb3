"""The HTTP client: fields from a config, and the limit of calls. For faults see
tests/evaluate/test_judges.py."""

import json

import pytest
from helpers import loopback

from pasta_jax.config import sections
from pasta_jax.utils.calls import Caller
from pasta_jax.utils.endpoint import Endpoint, EndpointError


class Server(loopback.Server):
  """Repeats the last message."""

  def answer(self, body, path):
    return {"choices": [{"message": {"content": body["messages"][-1]["content"]}}]}


@pytest.fixture
def server():
  s = Server()
  yield s
  s.close()


def test_every_field_of_a_section_arrives():
  settings = dict(
    kind="gemini", url="http://u", model="m", key_env="K", max_tokens=7, concurrency=2, retries=3
  )
  judge = sections.Judge(**settings, timeout=1.5, logprobs=False)
  assert Endpoint.from_config(judge, part="judge") == Endpoint(
    **settings, timeout=1.5, logprobs=False, part="judge"
  )
  annotate = sections.Annotate(**settings, timeout=2.5, per_minute=9)
  assert Endpoint.from_config(annotate, part="annotate", logprobs=False) == Endpoint(
    **settings, timeout=2.5, logprobs=False, per_minute=9, part="annotate"
  )
  with pytest.raises(EndpointError, match="^annotate: concurrency"):
    Endpoint("m", retries=-1, part="annotate")


def test_calls_keep_to_a_limit(server, tmp_path, monkeypatch):
  """Call k of n starts k times 60 / per_minute seconds after the first one."""
  paused = loopback.without_waiting(monkeypatch)
  monkeypatch.setattr("pasta_jax.utils.calls.monotonic", lambda: 100.0)
  caller = Caller(Endpoint("m", url=server.url, per_minute=30, concurrency=3), tmp_path / "calls.jsonl")
  caller.map([[{"role": "user", "content": str(i)}] for i in range(5)], lambda i, answer: None)
  assert sorted(p for p in paused if p) == [2.0, 4.0, 6.0, 8.0] and caller.paid == 5


def test_answers_go_to_their_calls(server, tmp_path):
  caller = Caller(Endpoint("m", url=server.url, concurrency=3), tmp_path / "calls.jsonl")
  answers: dict[int, str] = {}
  calls = [[{"role": "user", "content": f"question {i}"}] for i in range(9)]
  caller.map(calls, lambda i, answer: answers.__setitem__(i, answer["text"]))
  assert answers == {i: f"question {i}" for i in range(9)}
  rows = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
  assert len({row["id"] for row in rows}) == 9
