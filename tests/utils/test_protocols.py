"""Responses of endpoints as they are: each is text and finite numbers, or one fault."""

import asyncio
import json

import pytest
from fuzz import endpoint_kinds

from pasta_jax.utils import protocols
from pasta_jax.utils.json_io import to_json
from pasta_jax.utils.protocols import LIMIT, LOG_P, TEMPERATURE, Fault, Malformed


def openai(content="A", finish="stop", logprobs=None, usage=None, **message) -> dict:
  choice = {"finish_reason": finish, "message": {"content": content, **message}, "logprobs": logprobs}
  return {"choices": [choice], "usage": usage}


def gemini(*parts: dict, **candidate) -> dict:
  return {"candidates": [{"content": {"parts": list(parts)}, **candidate}]}


def read(kind: str, response: dict) -> dict:
  """As the client reads what arrives; and what it returns can be stored and read back."""
  found = protocols.parse(json.dumps(response))
  assert protocols.fault_in(found) is None
  answer = protocols.read_answer(kind, found)
  assert json.loads(to_json(answer)) == answer == protocols.stored_answer(answer)
  return answer


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "B?"}]}


@pytest.mark.parametrize(
  "response, text, cause",
  [
    (openai("A"), "A", "other"),
    (openai([THOUGHT, {"type": "text", "text": "A"}, {"type": "text", "text": "!"}]), "A!", "other"),
    (openai(["A", 5, None, {"text": 7}]), "A", "other"),
    (openai({"text": "A"}), "A", "other"),
    (openai(5), "", "no text"),
    (openai(None), "", "no text"),
    (openai(None, reasoning_content="I think so."), "", "no text"),
    (openai(None, "length", reasoning="Let me think"), "", "cut off"),
    (openai("<think>\nB?\n</think>\n\nA"), "A", "other"),
    (openai("B?</think>A"), "A", "other"),
    (openai("<think>B, or", "length"), "", "cut off"),
    (openai("Write <think> and </think>."), "Write <think> and </think>.", "other"),
    (openai("\ud83d A"), "\ud83d A", "other"),
    (openai(None, refusal="I cannot."), "", "refused"),
    (openai("", "content_filter"), "", "refused"),
    (openai("A", "content_filter"), "A", "other"),
    ({"choices": [{"text": "A"}]}, "A", "other"),
    ({"choices": [{"message": None}]}, "", "no text"),
    ({"choices": [{"message": "A"}]}, "", "no text"),
    ({"choices": [{"finish_reason": "length"}]}, "", "cut off"),
  ],
)
def test_texts_of_openai(response, text, cause):
  answer = read("openai", response)
  assert (answer["text"], protocols.cause_of(answer, "other")) == (text, cause)


@pytest.mark.parametrize(
  "response, text, cause",
  [
    (gemini({"text": "B?", "thought": True}, {"text": "A"}, {"text": "!"}), "A!", "other"),
    (gemini({"text": None}, {}, finishReason="STOP"), "", "no text"),
    (gemini(finishReason="MAX_TOKENS"), "", "cut off"),
    (gemini(finishReason="SAFETY"), "", "refused"),
    ({"candidates": [{"content": None, "finishReason": 5}]}, "", "no text"),
    ({"promptFeedback": {"blockReason": "SAFETY"}}, "", "refused"),
  ],
)
def test_texts_of_gemini(response, text, cause):
  answer = read("gemini", response)
  assert (answer["text"], protocols.cause_of(answer, "other")) == (text, cause)


@pytest.mark.parametrize(
  "response",
  [{}, {"choices": []}, {"choices": None}, {"choices": {}}, {"choices": ["A"]}, {"choices": [{}]},
   {"candidates": []}, {"candidates": {"a": 1}}],
)  # fmt: skip
def test_without_an_answer(response):
  for kind in ("openai", "gemini"):
    with pytest.raises(Malformed):
      protocols.read_answer(kind, response)


@pytest.mark.parametrize(
  "raw, words",
  [
    (b"", "an empty response"),
    (b"<html>Welcome</html>", "not JSON .*: <html>Welcome"),
    (b"[]", "no object"),
    (b'"A"', "no object"),
    (b"[" * 10_000, "nested too deeply"),
    (b'{"usage": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
    (b'{"mess\xff', "not JSON"),
    (b'data: {"choices": [{"delta": {"content": "A"}}]}\n\n', "ends early"),
    (b"data: {\n\n", "not JSON"),
  ],
)
def test_what_is_no_response(raw, words):
  with pytest.raises(Malformed, match=words):
    protocols.parse(raw)


def test_streams_and_byte_order_marks():
  parts = [{"choices": [{"delta": {"role": "assistant", "content": c}}]} for c in "A\u2028!"]
  last = {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"prompt_tokens": 3}}
  for end in ([last], [{"choices": []}, "[DONE]"]):
    lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in parts + end]
    found = protocols.parse(": hello\n\n" + "".join(f"data: {line}\r\n\r\n" for line in lines))
    answer = protocols.read_answer("openai", found)
    assert answer["text"] == "A\u2028!" and answer.get("cut", False) == (end == [last])
  fault = protocols.fault_in(protocols.parse('data: {"error": {"message": "busy", "code": 502}}\n\n'))
  assert fault is not None and fault.status == 502
  assert protocols.parse(b"\xef\xbb\xbf" + json.dumps(openai()).encode()) == openai()


@pytest.mark.parametrize(
  "tops, token, found",
  [
    ({"A": -0.1, "B": -2}, "A", {"A": -0.1, "B": -2.0}),
    ({"A": -0.1, "B": float("-inf")}, "A", {"A": -0.1}),  # impossible: not said, as is right
    ({"A": float("nan"), "B": -1.0}, "A", {}),  # B alone would be all that was said
    ({"A": 1e6, "B": -1.0}, "A", {}),
    ({"A": -0.1, "B": 1e6, "C": "-1", "D": True, "E": None, "F": -(10**400)}, None, {"A": -0.1}),
    ({"A": -9999.0}, "A", {"A": -9999.0}),
  ],
)
def test_log_probabilities(tops, token, found):
  listed = [{"token": t, "logprob": v} for t, v in tops.items()] + [None, {}, {"token": 5, "logprob": -1}]
  logprobs = {"content": [{"token": token, "top_logprobs": listed}]}
  assert read("openai", openai(logprobs=logprobs))["log_p"] == found
  assert read("openai", openai("<think>B</think>A", logprobs=logprobs))["log_p"] == {}
  assert read("openai", openai(reasoning="B?", logprobs=logprobs))["log_p"] == {}
  candidates = [{"token": t, "logProbability": v} for t, v in tops.items()]
  result = {"topCandidates": [{"candidates": candidates}], "chosenCandidates": [{"token": token}]}
  assert read("gemini", gemini({"text": "A"}, logprobsResult=result))["log_p"] == found


@pytest.mark.parametrize("logprobs", [{"content": [{"top_logprobs": None}]}, {"content": None}, [], "x", 5])
def test_odd_log_probabilities(logprobs):
  assert read("openai", openai(logprobs=logprobs))["log_p"] == {}


@pytest.mark.parametrize(
  "usage, counts",
  [
    ({"prompt_tokens": 12, "completion_tokens": 3.0}, [12, 3]),
    ({"prompt_tokens": float("inf"), "completion_tokens": -3}, [0, 0]),
    ({"prompt_tokens": "12", "completion_tokens": None}, [12, 0]),
    ({"prompt_tokens": "n/a", "completion_tokens": "-1"}, [0, 0]),
    ({"prompt_tokens": 10**400, "completion_tokens": [1]}, [0, 0]),
    ([1, 2], []),
    (None, []),
  ],
)
def test_counts(usage, counts):
  assert read("openai", openai(usage=usage))["tokens"] == counts


@pytest.mark.parametrize(
  "response, status, words, code",
  [
    ({"error": {"message": "slow down", "code": 429}}, 200, "slow down", 429),
    ({"error": {"message": "busy", "code": "502"}}, 200, "busy", 502),
    ({"error": "no model"}, 200, "no model", 0),
    ({"error": {"code": "content_filter"}}, 400, '{"code": "content_filter"}', 400),
    ({"error": [1]}, 200, "[1]", 0),
    ({"choices": [{"error": {"message": "upstream", "code": 503}, "message": {"content": ""}}]}, 200, "upstream", 503),
    ({"object": "error", "message": "too long", "code": 400}, 200, "too long", 400),
    ({"detail": "Not Found"}, 404, "Not Found", 404),
    ({"detail": [{"msg": "x"}]}, 422, '{"detail": [{"msg": "x"}]}', 422),
    ({"message": "wrong key"}, 401, "wrong key", 401),
    ({}, 500, "{}", 500),
  ],
)  # fmt: skip
def test_faults(response, status, words, code):
  fault = protocols.fault_in(response, status)
  assert fault is not None and (fault.words, fault.status) == (words, code)
  assert ("inside a 200" in str(fault)) == (status == 200)


@pytest.mark.parametrize(
  "words, code, known",
  [
    ("This model's maximum context length is 4096 tokens.", "", True),
    ("Prompt is\ntoo long", "", True),
    ("", "context_length_exceeded", True),
    ("", "Content_Filter", True),
    ("Your input was flagged", "", True),
    ("unknown field safety_settings", "invalid_request_error", False),
    ("the safety of this key", "", False),
    ("the model name is too long", "", False),
  ],
)
def test_refusals_of_one_request(words, code, known):
  fault = protocols.fault_in({"error": {"message": words, "code": code}}, 400)
  assert fault is not None and fault.is_of_content == known


@pytest.mark.parametrize(
  "words, field",
  [
    ("'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", LIMIT),
    (
      "'temperature' does not support 0 with this model. Only the default (1) value is supported.",
      TEMPERATURE,
    ),
    ("`temperature` is deprecated for this model.", TEMPERATURE),
    ("This model does not support logprobs", LOG_P),
    ("Logprobs is not enabled for models/x", LOG_P),
    ("max_tokens is too large", ""),
    ("wrong key, whatever the temperature", ""),
  ],
)
def test_refused_fields(words, field):
  for name in (LIMIT, TEMPERATURE, LOG_P):
    assert Fault(words, 400).refuses(name) == (name == field)
    assert not Fault(words, 500).refuses(name)


@pytest.mark.parametrize(
  "change",
  [{"text": ["A"]}, {"text": {"a": 1}}, {"text": 5}, {"text": None}, {"log_p": None}, {"log_p": {"A": None}},
   {"log_p": {"A": 1e6}}, {"tokens": [1]}, {"tokens": [-1, 2]}, {"tokens": 5}, {"refused": 5}],
)  # fmt: skip
def test_stored_rows_that_are_no_answers(change):
  row = {"id": "x", "text": "<think>B</think>A", "log_p": {"<": -0.1}, "tokens": [1, 2]}
  assert protocols.stored_answer(row) == row | {"text": "A", "log_p": {}}
  assert protocols.stored_answer(row | change) is None
  assert protocols.stored_answer({"id": "x"}) is None


def test_damaged_responses_are_answers_or_one_line():
  found = asyncio.run(endpoint_kinds.outcomes(3000, seed=0))
  assert sum(found.values()) == 3000 and len(found) > 12
