"""Damaged responses of endpoints: what the client, the judge and the annotator make of them.

    PYTHONPATH=tests python -m fuzz.endpoint_kinds --count=5000 --seed=1

Each outcome is an answer that can be stored, read back and used, or one error of one line.
"""

import argparse
import asyncio
import collections
import copy
import functools
import itertools
import json
import random
from pathlib import Path
from typing import Any

import httpx2

from fuzz.harness import Kind
from pasta_jax.data.annotate import plan, prompts
from pasta_jax.evaluate.judges import questions
from pasta_jax.utils import calls, protocols
from pasta_jax.utils.endpoint import Endpoint, EndpointError
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.utils.text import printable

RESPONSE = "There are two ways. Take the train. It is slow. Take the plane. It is fast. Choose one."
PLAN = (
  '{"chunks": [{"from": 2, "to": 3, "topic": "train"}, {"from": 4, "to": 5, "topic": "plane"}], "syncs": [6]}'
)
TOPS = [{"token": "A", "logprob": -0.1}, {"token": " B", "logprob": -2.5}]
VALID: dict[str, dict] = {
  "openai": {
    "choices": [
      {
        "index": 0, "finish_reason": "stop",
        "message": {"role": "assistant", "content": PLAN, "refusal": None, "reasoning_content": None},
        "logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": TOPS}]},
      }
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 3},
  },
  "openai parts": {"choices": [{"message": {"content": [{"type": "thinking"}, {"type": "text", "text": "YES"}]}}]},
  "openai thought": {"choices": [{"message": {"content": "<think>B</think>A"}, "finish_reason": "length"}]},
  "openai error": {"error": {"message": "upstream is busy", "code": 502, "type": "x", "innererror": {"code": "y"}}},
  "gemini": {
    "candidates": [
      {
        "content": {"parts": [{"text": "B?", "thought": True}, {"text": PLAN}]}, "finishReason": "STOP",
        "logprobsResult": {
          "topCandidates": [{"candidates": [{"token": "A", "logProbability": -0.1}]}],
          "chosenCandidates": [{"token": "A", "logProbability": -0.1}],
        },
      }
    ],
    "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 3},
  },
  "gemini blocked": {"promptFeedback": {"blockReason": "SAFETY"}},
}  # fmt: skip
ODD: list[Any] = [
  None, True, False, 0, -1, 3.5, 10**30, 10**400, 1e308, float("nan"), float("inf"), float("-inf"), 1e6, "", "A", "429",
  "\ud83d", "\x1b]0;x\x07", "\0", "x" * 10_000, "<think>", "</think>", "content_filter", "length", [], [[]], {}, [None],
  {"text": 5}, {"message": {"content": {}}}, json.loads("[" * 90 + "]" * 90),
]  # fmt: skip
STATUSES = (*(200,) * 12, 302, 400, 401, 413, 422, 429, 500)


def _places(value: Any, found: list) -> list:
  """(container, key) of everything inside a value."""
  for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
    found.append((value, key))
    _places(value[key], found)
  return found


def damaged(valid: dict, rng: random.Random) -> bytes:
  """A response with one to three values changed, dropped, doubled or moved; perhaps cut, or with other bytes."""
  value = copy.deepcopy(valid)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    if not (places := _places(value, [])):
      break
    container, key = rng.choice(places)
    how = rng.randrange(5)
    if how == 0:
      del container[key]
    elif how == 1:
      other, at = rng.choice(places)
      container[key] = copy.deepcopy(other[at]) if isinstance(other, dict) or at < len(other) else None
    elif how == 2 and isinstance(container, list):
      container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
    else:
      container[key] = copy.deepcopy(rng.choice(ODD))
  text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
  text = f"data: {text}\n\n" + rng.choice(("", "data: [DONE]\n\n")) if rng.random() < 0.1 else text
  raw = bytearray(text.encode("utf-8", "surrogatepass"))
  if rng.random() < 0.1:
    del raw[rng.randrange(len(raw)) :]
  if raw and rng.random() < 0.1:
    for _ in range(rng.choice((1, 5))):
      raw[rng.randrange(len(raw))] = rng.randrange(256)
  return bytes(raw)


def used(answer: dict) -> str:
  """Stores an answer and uses it as the judge and the annotator do; returns what it is."""
  assert protocols.stored_answer(parse_json(to_json(answer))) == answer
  confidence = questions.preference_for_first(answer)
  assert confidence is None or 0 <= confidence <= 1
  verdict = prompts.says_yes(answer["text"])
  try:
    plan.read(answer["text"], RESPONSE)
    found = "a plan"
  except plan.PlanError as error:
    found = (
      "an answer"
      if confidence is not None or verdict is not None
      else protocols.cause_of(answer, error.cause)
    )
  return found


@functools.cache
def _client(kind: str) -> calls._Client:
  return calls._Client(Endpoint("m", kind=kind, url="http://localhost", retries=0))


async def outcome(kind: str, raw: bytes, status: int) -> str:
  """What a response is: an answer, a plan, or why there is none. Raises EndpointError and _Refused."""
  client = _client(kind)
  client._without.clear()

  async def post(body):
    return status, httpx2.Headers(), raw.decode("utf-8", "replace")

  client._post = post  # type: ignore[method-assign]
  return used(await client.call(protocols.Call([{"role": "user", "content": "x"}])))


async def outcomes(count: int, seed: int) -> collections.Counter[str]:
  """What became of `count` damaged responses, by kind."""
  rng, found = random.Random(seed), collections.Counter[str]()
  for n, name in zip(range(count), itertools.cycle(VALID)):
    raw, status = damaged(VALID[name], rng), rng.choice(STATUSES)
    try:
      what = await outcome(name.split()[0], raw, status)
    except (EndpointError, calls._Refused) as error:
      what = type(error).__name__
      line = str(error)
      assert len(line) < 450 and "\n" not in line and printable(line) == line, line
    except Exception as error:
      raise AssertionError(f"{name}, mutation {n} of seed {seed}, status {status}: {raw[:2000]!r}") from error
    found[f"{name}: {what}"] += 1
  return found


# --- as files, for `harness` ---


def _make(folder: Path) -> None:
  for name, response in VALID.items():
    if "error" not in name:
      (folder / f"{name}.json").write_text(json.dumps(response))


def _load(folder: Path) -> None:
  for path in sorted(folder.iterdir()):
    try:
      asyncio.run(outcome(path.stem.split()[0], path.read_bytes(), 200))
    except (EndpointError, calls._Refused) as error:
      raise ValueError(f"{path}: {error}") from error


KINDS = {"endpoint": Kind(_make, _load, ["*.json"])}


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--count", type=int, default=5000)
  parser.add_argument("--seed", type=int, default=1)
  given = parser.parse_args()
  for kind, number in sorted(asyncio.run(outcomes(given.count, given.seed)).items()):
    print(f"{number:6,}  {kind}")
