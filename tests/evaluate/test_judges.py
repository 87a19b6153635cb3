"""Judges: a real HTTP server on loopback that misbehaves, calls never paid twice, planted preferences,
faults."""

import json
import math

import pytest
from helpers import loopback
from helpers.loopback import KEY

from pasta_jax.config import Config, with_changes
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges.agreement import measure
from pasta_jax.evaluate.judges.files import FileJudge
from pasta_jax.evaluate.judges.judge import Answer, Pair
from pasta_jax.evaluate.judges.llm import LlmJudge
from pasta_jax.evaluate.judges.local import (
  LocalJudge,
  _key,
  contradicts_length,
  defects,
  preference,
  repetition,
)
from pasta_jax.evaluate.judges.questions import ask_pair, preference_for_first, read_defects, read_grades
from pasta_jax.utils.endpoint import Endpoint, EndpointError
from pasta_jax.utils.records import Records


class Server(loopback.Server):
  """Judges by a rule: the answer with more "good" wins with probability 0.8; A gets `bias` logits on top."""

  bias, with_log_p = 0.0, True

  def answer(self, body, path):
    gemini = path.endswith(":generateContent")
    text = body["contents"][-1]["parts"][0]["text"] if gemini else body["messages"][-1]["content"]
    _, a, b = (text.split(f"{mark}:\n")[-1] for mark in ("request", "Answer A", "Answer B"))
    score = (
      math.log(4)
      * (
        (a.split("Answer B")[0].count("good") > b.count("good"))
        - (a.split("Answer B")[0].count("good") < b.count("good"))
      )
      + self.bias
    )
    p = 1 / (1 + math.exp(-score))
    letter = "A" if p > 0.5 else "B"
    tops = [("A", math.log(0.9 * p)), (" B", math.log(0.9 * (1 - p))), ("C", math.log(0.1))]
    if gemini:
      top = {"candidates": [{"token": t, "logProbability": v} for t, v in tops]}
      return {
        "candidates": [{"content": {"parts": [{"text": letter}]}, "logprobsResult": {"topCandidates": [top]}}]
      }
    log_p = (
      {"content": [{"top_logprobs": [{"token": t, "logprob": v} for t, v in tops]}]}
      if self.with_log_p
      else None
    )
    return {"choices": [{"message": {"content": letter}, "logprobs": log_p}]}


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("GEMINI_API_KEY", KEY)
  s = Server()
  yield s
  s.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
  loopback.without_waiting(monkeypatch)


def pair(i, system, baseline):
  said = [{"role": "user", "content": f"request {i}"}]
  return Pair(str(i), Answer(said, system), Answer(said, baseline), "pasta")


def judged(judge, pairs, folder):
  rows = {}
  judge.compare(pairs, folder, rows.__setitem__)
  return rows


PAIRS = [
  pair(0, "good", "bad"),
  pair(1, "bad", "good good"),
  pair(2, "even", "even one"),
  pair(3, "same", "same "),
]


@pytest.mark.parametrize("kind", ["openai", "gemini"])
@pytest.mark.parametrize("bias", [0.01, 1.0, -3.0])
def test_both_orders_and_confidence(server, tmp_path, kind, bias):
  """A liking for the first place cancels where the pair is even, and confidence is the probability of the
  letter."""
  server.bias = bias
  rows = judged(LlmJudge(Endpoint("m", kind=kind, url=server.url)), PAIRS, tmp_path)
  p = lambda x: 1 / (1 + math.exp(-x))
  for i, lean in enumerate((math.log(4), -math.log(4), 0)):
    orders = [p(lean + bias), 1 - p(-lean + bias)]
    assert rows[i]["orders"] == pytest.approx(orders, abs=1e-6)
    # Both orders are one observation: read differently in both, it is half a win, however sure either reading is.
    contradict = (orders[0] > 0.5) != (orders[1] > 0.5)
    assert rows[i]["preference"] == pytest.approx(0.5 if contradict else sum(orders) / 2, abs=1e-6)
    assert contradict == (abs(bias) > abs(lean)), (
      "a liking for a place that outweighs the answers is found out"
    )
  assert rows[3]["preference"] == 0.5 and len(server.calls) == 6  # equal texts cost nothing
  assert all(KEY in str(h) for h in server.headers)
  assert KEY not in "".join(p.read_text() for p in tmp_path.glob("*"))


def test_without_token_probabilities_the_letter_counts(server, tmp_path):
  server.with_log_p = False
  rows = judged(LlmJudge(Endpoint("m", url=server.url)), PAIRS[:2], tmp_path)
  assert [rows[i]["preference"] for i in (0, 1)] == [1.0, 0.0]
  for said in ("Neither.", "Answer", "Both", ""):
    assert preference_for_first({"log_p": {}, "text": said}) is None
  for said, confidence in (("**A**", 1.0), ("(B)", 0.0), ("T", 0.5), ("B, since it is shorter", 0.0)):
    assert preference_for_first({"log_p": {}, "text": said}) == confidence
  assert preference_for_first({"log_p": {"The": -0.02, "A": -7.0}, "text": "A"}) is None
  assert preference_for_first(
    {"log_p": {"**A": math.log(0.3), "b": math.log(0.1)}, "text": ""}
  ) == pytest.approx(0.75)


def test_no_call_is_paid_twice(server, tmp_path):
  judge = LlmJudge(Endpoint("m", url=server.url))
  first = judged(judge, PAIRS, tmp_path)
  assert len(server.calls) == 6
  again = LlmJudge(Endpoint("m", url=server.url))
  assert judged(again, PAIRS, tmp_path) == first and len(server.calls) == 6
  judged(again, [*PAIRS, pair(9, "new", "good")], tmp_path)
  assert len(server.calls) == 8
  judged(LlmJudge(Endpoint("another", url=server.url)), PAIRS, tmp_path)
  assert len(server.calls) == 14


def test_a_judge_that_gives_up_keeps_what_was_paid(server, tmp_path):
  """A refusal in the middle ends the run with one line; the next run pays for the rest only."""
  server.faults = [None, None, None, 401]
  judge = LlmJudge(Endpoint("m", url=server.url, concurrency=1))
  with pytest.raises(EndpointError, match="refused, status 401") as error:
    judged(judge, PAIRS, tmp_path)
  assert KEY not in str(error.value) and "\n" not in str(error.value)
  paid = len((tmp_path / "calls.jsonl").read_text().splitlines())
  assert 3 <= paid == len(server.calls) - 1  # a call that was under way is kept too
  before = len(server.calls)
  rows = judged(LlmJudge(Endpoint("m", url=server.url, concurrency=1)), PAIRS, tmp_path)
  assert len(rows) == 4 and len(server.calls) - before == 6 - paid


def test_what_passes_is_tried_again(server, tmp_path):
  server.faults = [429, 500, "hang up", b'{"choices": [{"mess', b'{"choices": []}', "slow", 503]
  rows = judged(
    LlmJudge(Endpoint("m", url=server.url, concurrency=1, timeout=0.5, retries=7)), PAIRS[:1], tmp_path
  )
  assert rows[0]["preference"] == pytest.approx(0.8) and len(server.calls) == 9
  server.faults = [500] * 9
  with pytest.raises(EndpointError, match="no answer in 3 attempts; the last one: status 500"):
    judged(LlmJudge(Endpoint("x", url=server.url, concurrency=1, retries=2)), PAIRS[:1], tmp_path)


def test_a_request_that_is_refused_does_not_stop_the_others(server, tmp_path):
  """Filtered content, or an answer without text: no preference, no second payment, and the run goes on."""
  refusal = json.dumps({"promptFeedback": {"blockReason": "SAFETY"}}).encode()
  cut = json.dumps({"candidates": [{"finishReason": "MAX_TOKENS", "content": {}}]}).encode()
  for name, faults_ in (("blocked", [refusal]), ("thinking", [cut])):
    server.faults, server.calls = list(faults_), []
    folder = tmp_path / name
    judge = LlmJudge(Endpoint("m", kind="gemini", url=server.url, concurrency=1))
    assert set(judged(judge, PAIRS, folder)) == {1, 2, 3} and len(server.calls) == 6
    assert set(judged(judge, PAIRS, folder)) == {1, 2, 3} and len(server.calls) == 6
  server.status_body = b'{"error": {"code": "content_filter"}}'
  server.faults, server.calls = [400], []
  judge = LlmJudge(Endpoint("m", url=server.url, concurrency=1))
  assert set(judged(judge, PAIRS, tmp_path / "filtered")) == {1, 2, 3} and len(server.calls) == 6


def test_pairs_without_a_judgement_are_counted_and_said(server, tmp_path, capsys):
  """By cause, with the server's last words; what was paid is not paid again."""
  said = lambda content, finish="stop": json.dumps(
    {"choices": [{"message": {"content": content}, "finish_reason": finish}]}
  ).encode()
  server.status_body = b'{"error": {"message": "your prompt\\nis too long", "code": 400}}'
  server.faults = [said("Neither."), None, said(None, "length"), None, None, 400]
  for calls in (6, 6):
    judge = LlmJudge(Endpoint("m", url=server.url, concurrency=1))
    pairs = [*PAIRS[:3], pair(4, "same", "same")]
    assert set(judged(judge, pairs, tmp_path)) == {3} and len(server.calls) == calls
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("m: 3 of 4 pairs got no judgement (no letter 1, cut off 1, refused 1); cut off: ")
    assert "config.judge.max_tokens" in line and line.endswith("status 400: your prompt is too long")


def test_the_key_of_a_judge_is_asked_for_before_any_work(monkeypatch):
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  with pytest.raises(EndpointError, match=r"\$OPENAI_API_KEY, which is not set"):
    LlmJudge.from_config(with_changes(Config(), {"judge.model": "m"}))


def test_a_key_is_never_shown(server, tmp_path, monkeypatch):
  server.status_body = f'{{"error": "wrong key {KEY}"}}'.encode()
  server.faults = [403]
  with pytest.raises(EndpointError, match="status 403") as error:
    judged(LlmJudge(Endpoint("m", url=server.url, concurrency=1)), PAIRS[:1], tmp_path)
  assert KEY not in str(error.value)
  monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\n")  # as env files have it
  rows = judged(LlmJudge(Endpoint("m", url=server.url)), PAIRS[:1], tmp_path / "b")
  assert rows[0]["preference"] == pytest.approx(0.8)
  for bad in ("clé" + KEY, KEY + "\nx" + KEY):
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(EndpointError, match="characters that no key has") as error:
      judged(LlmJudge(Endpoint("other", url=server.url)), PAIRS[:1], tmp_path / "c")
    assert KEY not in str(error.value)


def test_keys_come_from_the_environment_alone(monkeypatch, tmp_path):
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)
  with pytest.raises(EndpointError, match=r"\$OPENAI_API_KEY, which is not set"):
    judged(LlmJudge(Endpoint("m", concurrency=1)), PAIRS[:1], tmp_path)
  for changes, words in (
    (dict(kind="other"), "judge.kind"),
    (dict(model=""), "name a model"),
    (dict(concurrency=0), "judge: concurrency"),
  ):
    with pytest.raises(EndpointError, match=words):
      Endpoint(**(dict(model="m") | changes))


@pytest.mark.parametrize(
  "said, names",
  [
    ("0", []), ("None.", []), ("2", ["said twice"]), ("4, 1", ["parts do not fit", "mixed markers"]),
    ("[3,3]", ["cut off"]),
    ("8", None), ("two", None), ("", None), ("1 and 2", None), ("12", None),
  ],
)  # fmt: skip
def test_lists_of_defects_are_read_strictly(said, names):
  assert read_defects(said) == names


@pytest.mark.parametrize(
  "said, grades",
  [
    ('{"1": 1, "2": 10}', [0, 1]), ('Here:\n```json\n{"2": 10.0, "1": 5.5}\n```', [0.5, 1]), ("1: 10\n2: 1", [1, 0]),
    ('{"1": 1}', None), ('{"1": 1, "2": 11}', None), ('{"1": true, "2": 3}', None), ("1: 3", None), ("", None),
    ('{"1": "7", "2": 4}', [2 / 3, 1 / 3]),
    ("1: 07, 2: 4", [2 / 3, 1 / 3]), ("I read it at 10:05", None),
    ("{1: 7, 2: 4}", [2 / 3, 1 / 3]), ('{"1": NaN, "2": 3}', None),
  ],
)  # fmt: skip
def test_grades_are_read_strictly(said, grades):
  assert read_grades(said, 2) == (grades and pytest.approx(grades))


def test_what_the_judge_reads():
  said = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "Two?"},
  ]
  p = Pair(
    "x",
    Answer(said, "mine"),
    Answer(said[:1] + [{"role": "assistant", "content": "no"}] + said[2:], "theirs"),
  )
  first, second = (
    ask_pair(*pair).messages[-1]["content"] for pair in ((p.system, p.baseline), (p.baseline, p.system))
  )
  assert first.index("mine") < first.index("theirs") and second.index("theirs") < second.index("mine")
  assert (
    "(turn 1) One?" in first
    and "(turn 2) Two?" in first
    and "(turn 1) yes" in first
    and "(turn 1) no" in first
  )


def test_files_of_preferences(tmp_path):
  lines = tmp_path / "people.jsonl"
  lines.write_text(
    '{"id": 0, "system": "pasta", "preference": 0.25}\n{"id": 1, "system": "apar", "preference": 1}\n'
  )
  assert judged(FileJudge(str(lines), "baseline"), PAIRS, tmp_path) == {0: {"preference": 0.25}}
  theirs = tmp_path / "annotations.json"
  theirs.write_text(
    json.dumps(
      [
        {"instruction": "request 1", "generator_1": "baseline", "generator_2": "pasta", "preference": 1.75},
        {"instruction": "request 2", "generator_2": "pasta", "preference": None},
      ]
    )
  )
  assert judged(FileJudge(str(theirs), "baseline"), PAIRS, tmp_path) == {1: {"preference": 0.75}}
  with pytest.raises(EvalError, match="against 'baseline', not the baseline 'another'"):
    FileJudge(str(theirs), "another")
  lines.write_text('{"id": 0, "system": "pasta", "preference": 3}')
  with pytest.raises(EvalError, match="cannot be used"):
    FileJudge(str(lines), "baseline")


@pytest.mark.parametrize(
  "prompt, text, wrong",
  [
    ("Describe it in two sentences.", "One. Two.", False),
    ("Describe it in two sentences.", "One. Two. Three. Four.", True),
    ("Write at least 10 words.", "too few words", True),
    ("Write at least 10 words.", "word " * 50, False),
    ("In no more than 20 words, please.", "word " * 60, True),
    ("In no more than 20 words, please.", "word", False),
    ("Write a 100-word story.", "word " * 30, True),
    ("Write a 100-word story.", "word " * 110, False),
    ("Write three paragraphs.", "a\n\nb\n\nc", False),
    ("Write three paragraphs.", "a", True),
    ("What are the words of 1984 about?", "anything at all", False),
  ],
)
def test_lengths_that_the_prompt_asks_for(prompt, text, wrong):
  assert contradicts_length(prompt, text) == wrong


def test_defects_and_preferences():
  assert repetition("a b c d " * 5) > 0.5 and repetition("one two three four five six") == 0 == repetition(
    "a b"
  )
  assert defects("x", "", True, []) == ["empty"]
  assert defects("x", "word " * 30, False, [1] * 30) == ["cut off", "loops", "repeats"]
  fine, unlikely, cut = (
    {"log_p": -1.0, "defects": []},
    {"log_p": -2.0, "defects": []},
    {"log_p": -1.0, "defects": ["cut off"]},
  )
  assert preference(fine, fine) == 0.5
  assert preference(fine, unlikely) == pytest.approx(1 - preference(unlikely, fine))
  assert preference(fine, unlikely) > 0.5
  assert preference(cut, fine) < 0.5
  empty = {"log_p": -10.0, "defects": ["empty", "cut off"]}
  loop = {"log_p": -0.1, "defects": ["loops", "repeats"]}  # likely, since it says the same again
  assert preference(empty, fine) < 0.05 and preference(loop, fine) < 0.2 and preference(fine, loop) > 0.8


def test_a_likelihood_that_is_no_number_is_no_judgement(tmp_path, capsys):
  """As damaged weights give it; the file has null."""
  judge = LocalJudge(lambda: None, {})
  for log_p in (math.nan, -1.0):  # read back, and as it was computed
    records = Records(tmp_path / "scores.jsonl", judge.settings)
    for p in PAIRS[:2]:
      for answer in (p.system, p.baseline):
        value = log_p if answer is PAIRS[0].system else -2.0
        records.add({"id": _key(answer), "log_p": value, "tokens": 1, "defects": []})
    assert set(judged(judge, PAIRS[:2], tmp_path)) == ({1} if math.isnan(log_p) else {0, 1})
    said = "local: 1 of 2 pairs got no judgement (likelihood is no number 1)\n"
    assert capsys.readouterr().err == (said if math.isnan(log_p) else "")


def test_agreement_with_labels(server, tmp_path):
  """Against a judge that likes "good" by a known rule: agreement is what the rule gives, by category."""
  rows = [
    {"id": "a", "prompt": "x", "chosen": "good and long", "rejected": "bad", "category": "plain"},
    {"id": "b", "prompt": "x", "chosen": "bad", "rejected": "good", "category": "plain"},
    {"id": "c", "prompt": "x", "chosen": "good", "rejected": "a long bad one", "category": "hard"},
    {"id": "d", "prompt": "x", "chosen": "even", "rejected": "odd", "category": "hard"},
  ]
  path = tmp_path / "labels.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  config = with_changes(Config(), {"eval.judges": "llm", "judge.url": server.url, "judge.model": "m"})
  found = {r["category"]: r for r in measure(config, tmp_path, [str(path)])}
  assert {k: r["agreement"] for k, r in found.items()} == {"all": 62.5, "plain": 50.0, "hard": 75.0}
  assert found["all"]["pairs"] == 4 and found["all"]["longer"] == 50 and found["all"]["on_shorter"] == 50
  calls = len(server.calls)
  measure(config, tmp_path, [str(path)])
  assert len(server.calls) == calls == 8
  path.write_text('{"prompt": "x", "chosen": "y"}')
  with pytest.raises(EvalError, match="row 1: rejected field required"):
    measure(config, tmp_path, [str(path)])
