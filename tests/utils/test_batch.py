"""Calls by file: a provider that shuffles, drops, repeats and garbles answers, and runs that stop anywhere."""

import json
import random
from pathlib import Path

import pytest
from fuzz.endpoint_kinds import VALID, damaged

from pasta_jax.utils import protocols
from pasta_jax.utils.batch import read_line
from pasta_jax.utils.callers import caller_of
from pasta_jax.utils.endpoint import BATCH, Endpoint, EndpointError
from pasta_jax.utils.json_io import parse_json, to_json
from pasta_jax.utils.protocols import Call, Malformed
from pasta_jax.utils.waiting import Waiting

ENDPOINT = Endpoint("reader", kind=BATCH, max_tokens=8, logprobs=False)


def calls(texts) -> list[Call]:
  return [Call([{"role": "user", "content": str(t)}]) for t in texts]


def answered(folder: Path, texts) -> dict[int, dict]:
  """The answers to calls; raises Waiting where they are not there yet."""
  answers: dict[int, dict] = {}
  caller_of(ENDPOINT, folder / "calls.jsonl").map(calls(texts), answers.__setitem__)
  return answers


def requests(folder: Path) -> dict[str, str]:
  """The text of each request, by its custom_id, in the file's order."""
  rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
  assert all(r["method"] == "POST" and r["url"] == "/v1/chat/completions" for r in rows)
  assert all(r["body"]["model"] == "reader" and r["body"]["max_tokens"] == 8 for r in rows)
  return {r["custom_id"]: r["body"]["messages"][-1]["content"] for r in rows}


def openai(key: str, text: str) -> dict:
  """As OpenAI's batches and vLLM's run_batch have it."""
  body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
  response = {"status_code": 200, "request_id": "r", "body": body}
  return {"id": "batch_1", "custom_id": key, "response": response, "error": None}


def gemini(key: str, text: str) -> dict:
  candidate = {"content": {"parts": [{"text": text}], "role": "model"}, "finishReason": "STOP"}
  return {"key": key, "response": {"candidates": [candidate]}}


def plain(key: str, text: str) -> dict:
  return {"custom_id": key, "text": text}


def write(folder: Path, rows, extra=()) -> None:
  lines = [json.dumps(r) for r in rows] + list(extra)
  random.Random(0).shuffle(lines)
  (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("form", [openai, gemini, plain])
def test_answers_in_any_order_go_to_their_calls(tmp_path, form):
  """Also to calls that ask the same; a run that has all answers needs no file of them any more."""
  texts = [*range(40), 3, 7]
  with pytest.raises(
    Waiting, match=r"40 requests to reader wait in .*requests.jsonl: .*answers.jsonl, and run"
  ):
    answered(tmp_path, texts)
  asked = requests(tmp_path)
  assert sorted(asked.values(), key=int) == [str(i) for i in range(40)] != [*asked.values()]
  write(tmp_path, [form(key, f"answer to {text}") for key, text in asked.items()])
  for _ in range(2):
    found = answered(tmp_path, texts)
    assert {i: a["text"] for i, a in found.items()} == {i: f"answer to {t}" for i, t in enumerate(texts)}
    (tmp_path / "answers.jsonl").unlink(missing_ok=True)


def test_a_provider_that_drops_repeats_and_garbles(tmp_path, capsys):
  """What can be read is used; the rest is counted, said, written down, and used by the next run if it comes."""
  with pytest.raises(Waiting):
    answered(tmp_path, range(20))
  key_of = {text: key for key, text in requests(tmp_path).items()}
  good = [openai(key_of[str(i)], f"answer to {i}") for i in range(12)]
  failed = openai(key_of["12"], "") | {
    "response": {"status_code": 500, "body": {"error": {"message": "busy"}}}
  }
  expired = {
    "custom_id": key_of["13"],
    "response": None,
    "error": {"code": "batch_expired", "message": "too late"},
  }
  filtered = {
    "custom_id": key_of["14"],
    "response": {"status_code": 400, "body": {"error": {"code": "content_filter"}}},
  }
  empty = {"custom_id": key_of["15"], "response": {"status_code": 200, "body": {"choices": []}}}
  others = [
    openai("of somebody else", "x"),
    good[3],
    failed,
    expired,
    filtered,
    empty,
    ["no object"],
    {"text": "no id"},
  ]
  write(tmp_path, [*good, *others], extra=['{"custom_id": "cut of', "", "\xff\x00"])
  found = answered(tmp_path, range(20))
  assert {i: a["text"] for i, a in found.items() if a["text"]} == {i: f"answer to {i}" for i in range(12)}
  assert protocols.cause_of(found[14], "") == "refused"
  lost = [12, 13, *range(15, 20)]
  assert all(protocols.cause_of(found[i], "") == "no answer" for i in lost)
  said = capsys.readouterr().err
  for part in ("an error 2", "no JSON 2", "no custom_id 2", "no answer in it 1",
               "a second answer to the same request 1", "an answer to another request 1",
               "the first error: status 500: busy",
               "7 calls have no readable answer and are given up"):  # fmt: skip
    assert part in said, part
  rows = [json.loads(line) for line in (tmp_path / "unanswered.jsonl").read_text().splitlines()]
  assert {r["custom_id"] for r in rows} == {key_of[str(i)] for i in lost}
  # The same command again: nothing waits, and nothing is lost.
  assert answered(tmp_path, range(20)) == found
  write(tmp_path, [plain(r["custom_id"], "late") for r in rows])
  late = answered(tmp_path, range(20))
  assert all(late[i]["text"] == "late" for i in lost) and late[0] == found[0]
  assert not (tmp_path / "unanswered.jsonl").exists()


def test_what_was_given_up_is_not_waited_for_again(tmp_path):
  """New calls make a batch of their own; while it waits, nothing is taken out of it; late answers are used."""
  with pytest.raises(Waiting):
    answered(tmp_path, range(4))
  write(tmp_path, [plain(key, text) for key, text in requests(tmp_path).items() if text != "2"])
  assert answered(tmp_path, range(4))[2]["missing"]
  for _ in range(3):
    assert answered(tmp_path, range(4))[2]["missing"], "while another stage waits"
    with pytest.raises(Waiting, match="2 requests"):
      answered(tmp_path, [*range(4), 8, 9])
    asked = requests(tmp_path)
    assert sorted(asked.values()) == ["8", "9"]
  [lost] = [json.loads(line) for line in (tmp_path / "unanswered.jsonl").read_text().splitlines()]
  write(tmp_path, [plain(lost["custom_id"], "late")])
  with pytest.raises(Waiting, match="2 requests"):
    answered(tmp_path, [*range(4), 8, 9])
  write(tmp_path, [plain(key, text) for key, text in asked.items()])
  found = answered(tmp_path, [*range(4), 8, 9])
  assert [found[i]["text"] for i in range(6)] == ["0", "1", "late", "3", "8", "9"]


@pytest.mark.parametrize("never", [[], ["b1"], ["a0", "a1", "b0", "c1"]])
def test_stages_reach_their_end_whatever_is_lost(tmp_path, never):
  """As annotation has them: each run makes the calls of every stage again, and stops at the first that waits."""
  stages = [["a0", "a1", "a2"], ["b0", "b1"], ["c0", "c1"]]
  waits = 0
  while waits < 9:
    try:
      found = [answered(tmp_path, stage) for stage in stages]
      break
    except Waiting:
      waits += 1
      asked = requests(tmp_path)
      rows = [
        openai(k, t) if t not in never else {"custom_id": k, "error": {"message": "busy"}}
        for k, t in asked.items()
      ]
      write(tmp_path, rows)
  assert waits == 3
  texts = [a.get("text") for of in found for _, a in sorted(of.items())]
  assert texts == ["" if t in never else t for stage in stages for t in stage]


def test_a_batch_whose_every_request_failed_is_not_asked_for_ever(tmp_path):
  with pytest.raises(Waiting):
    answered(tmp_path, "a")
  write(tmp_path, [{"custom_id": key, "error": {"message": "no such model"}} for key in requests(tmp_path)])
  assert answered(tmp_path, "a")[0]["missing"]


def test_runs_that_share_a_folder_wait_side_by_side(tmp_path):
  for text in "ab":
    with pytest.raises(Waiting):
      answered(tmp_path, text)
  asked = requests(tmp_path)
  assert sorted(asked.values()) == ["a", "b"]
  write(tmp_path, [plain(key, text) for key, text in asked.items()])
  assert answered(tmp_path, "ba")[0]["text"] == "b"


def test_nothing_but_the_question_is_in_a_request(tmp_path):
  """A repetition is a call of its own, with the same content."""
  twice = [Call(calls("a")[0].messages, repeat=n) for n in (0, 1)]
  with pytest.raises(Waiting):
    caller_of(ENDPOINT, tmp_path / "calls.jsonl").map(twice, lambda *_: None)
  rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
  assert (
    len(rows) == 2 and rows[0]["body"] == rows[1]["body"] and rows[0]["custom_id"] != rows[1]["custom_id"]
  )


@pytest.mark.parametrize("at", range(1, 6))
def test_a_run_that_is_killed_while_it_reads_answers(tmp_path, at, monkeypatch):
  with pytest.raises(Waiting):
    answered(tmp_path, range(6))
  asked = requests(tmp_path)
  write(tmp_path, [plain(key, text) for key, text in asked.items() if text != "5"])
  from pasta_jax.utils.answers import Answers

  add, left = Answers.add, [at]

  def killed(self, key, answer):
    left[0] -= 1
    if not left[0]:
      raise KeyboardInterrupt
    add(self, key, answer)

  monkeypatch.setattr(Answers, "add", killed)
  with pytest.raises(KeyboardInterrupt):
    answered(tmp_path, range(6))
  monkeypatch.setattr(Answers, "add", add)
  found = answered(tmp_path, range(6))
  assert [found[i]["text"] for i in range(6)] == ["0", "1", "2", "3", "4", ""]


def test_damaged_lines_are_an_answer_or_a_cause():
  """Every line can be stored and read back, or has one of a few causes."""
  rng = random.Random(3)
  causes = set()
  valid = [openai("k", "A"), gemini("k", "B"), plain("k", "C")]
  valid += [{"custom_id": "k", "response": {"status_code": 200, "body": body}} for body in VALID.values()]
  for n in range(3000):
    line = damaged(valid[n % len(valid)], rng).decode("utf-8", "replace").replace("\n", " ")
    try:
      key, answer = read_line(line)
    except Malformed as fault:
      causes.add(str(fault))
      continue
    assert isinstance(key, str) and protocols.stored_answer(parse_json(to_json(answer))) == answer
  assert causes == {"no JSON", "no custom_id", "an error", "no answer in it"}


def test_a_batch_has_no_address_and_needs_no_key(monkeypatch):
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  ENDPOINT.require_key()
  with pytest.raises(EndpointError, match="judge.kind=batch has no address"):
    Endpoint("m", kind=BATCH, url="http://localhost:8000")
