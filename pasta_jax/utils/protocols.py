"""The two protocols of model endpoints, OpenAI's and Gemini's: bodies of requests, and what servers send back,
read into text and finite numbers.

Servers and the proxies before them take liberties: text in parts, null, reasoning before the answer, streams that
nobody asked for, errors with status 200. `parse` takes the bytes, `fault_in` finds an error in them,
`read_answer` the answer. Whatever they return can be written as JSON and used without another check.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pasta_jax.utils.json_io import parse_json, to_json

Messages = Sequence[Mapping[str, str]]


class Call(NamedTuple):
  """What a model is asked."""

  messages: Messages
  max_tokens: int = 0  # of the answer; 0: the endpoint's
  letter: bool = True  # whether the answer's first token decides: its probabilities are of use
  repeat: int = 0  # number of an independent repetition: the same call, answered anew


MAX_COUNT = 10**9  # tokens of a call; more is no count
LOWEST_LOG_P = -1e6  # servers write -9999 for "impossible"
HIGHEST_LOG_P = 1e-2  # 0, and what rounding adds

# Fields of a request that some models refuse; each can be left out or has another name.
LIMIT, TEMPERATURE, LOG_P = "max_tokens", "temperature", "logprobs"

# What concerns one request only: content that a filter caught, or a request that is too long.
_REFUSING_CODES = {
  "content_filter", "content_policy_violation", "responsibleaipolicyviolation", "moderation_blocked",
  "invalid_prompt", "context_length_exceeded", "exceed_context_size_error", "string_above_max_length",
}  # fmt: skip
_REFUSING_WORDS = re.compile(
  r"content (management |usage )?policy|content filter|input was flagged|"
  r"maximum context length|context (length|window|size)|(prompt|input|request) is too long",
  re.I,
)
_REFUSED_FIELD = re.compile(
  r"unsupported|not (support|allow|permitted|enabled|available)|only the default|deprecated|disabled", re.I
)
_CUT = ("length", "max_tokens", "MAX_TOKENS")  # finish reasons
_THOUGHTS = re.compile(r"\s*<(think|thinking)>.*?(</\1>|\Z)", re.DOTALL)


class Malformed(ValueError):
  """A response without an answer or an error in it."""


@dataclasses.dataclass(frozen=True)
class Fault:
  """An error as a server reports it."""

  words: str
  status: int = 0  # of HTTP, or the one that an error inside a 200 names; 0: none
  codes: frozenset[str] = frozenset()  # names of the error, in lower case
  inside: bool = False  # it came with status 200

  def __str__(self) -> str:
    status = f"status {self.status}" if self.status else "an error"
    return f"{status}{' inside a 200' if self.inside else ''}: {self.words}"

  @property
  def is_of_content(self) -> bool:
    """Whether it concerns the content or the length of this one request."""
    return bool(self.codes & _REFUSING_CODES) or bool(_REFUSING_WORDS.search(" ".join(self.words.split())))

  def refuses(self, field: str) -> bool:
    """Whether it says that the model takes no such field (LIMIT, TEMPERATURE, LOG_P)."""
    if self.status not in (400, 422):
      return False
    if field == LIMIT:
      return "max_completion_tokens" in self.words
    named = field in self.words.lower().replace("_", "").replace(" ", "")
    return named and bool(_REFUSED_FIELD.search(self.words))


# --- requests ---


def request_body(
  kind: str, model: str, messages: Messages, max_tokens: int, *, logprobs: bool, without: Iterable[str] = ()
) -> dict:
  """The body of a call. `without`: the fields that this model refuses."""
  if kind != "gemini":
    body: dict[str, Any] = {"model": model, "messages": [dict(m) for m in messages]}
    if TEMPERATURE not in without:
      body["temperature"] = 0
    body["max_completion_tokens" if LIMIT in without else "max_tokens"] = max_tokens
    return body | ({"logprobs": True, "top_logprobs": 5} if logprobs else {})
  roles = {"user": "user", "assistant": "model"}
  settings: dict[str, Any] = {} if TEMPERATURE in without else {"temperature": 0}
  settings["maxOutputTokens"] = max_tokens
  body = {
    "contents": [
      {"role": roles[m["role"]], "parts": [{"text": m["content"]}]} for m in messages if m["role"] in roles
    ],
    "generationConfig": settings | ({"responseLogprobs": True, "logprobs": 5} if logprobs else {}),
  }
  if system := [m["content"] for m in messages if m["role"] == "system"]:
    body["systemInstruction"] = {"parts": [{"text": "\n".join(system)}]}
  return body


# --- responses ---


def parse(raw: bytes | str) -> dict:
  """The object in a response; a stream of events (OpenAI's) becomes the response that it stands for.

  Raises Malformed.
  """
  text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
  text = text.removeprefix("\ufeff").strip()
  try:
    if not re.match(r"(data|event|id|retry)?:", text):
      value = parse_json(text)
      value = _first(value) if isinstance(value, list) else value  # Gemini's errors
    else:
      lines = [line[5:].strip() for line in re.split(r"[\r\n]+", text) if line.startswith("data:")]
      events = [_object(parse_json(line)) for line in lines if line and line != "[DONE]"]
      value = _joined(events, ended="[DONE]" in lines)
  except ValueError as error:
    raise Malformed(f"{error}: {text[:200]}" if text else "an empty response") from None
  if not isinstance(value, dict):
    raise Malformed(f"no object: {text[:200]}")
  return value


def _joined(events: list[dict], *, ended: bool) -> dict:
  """The response whose parts the events are; an error among them is returned as it is. Raises ValueError if the
  stream ends early."""
  whole: dict[str, Any] = {}
  message: dict[str, str] = {}
  choice: dict[str, Any] = {"message": message}
  for event in events:
    if fault_in(event):
      return event
    whole |= {k: v for k, v in event.items() if v}
    part = _object(_first(event.get("choices")))
    for name, value in _object(part.get("delta")).items():
      if isinstance(value, str):
        message[name] = message.get(name, "") + value
    choice |= {k: v for k, v in part.items() if v and k in ("finish_reason", "logprobs") and k not in choice}
  if not ended and "finish_reason" not in choice:
    raise ValueError("a stream that ends early")
  return whole | {"choices": [choice]}


def fault_in(response: dict, status: int = 200) -> Fault | None:
  """The error that a response contains, if it does: in the forms of OpenAI, Gemini, OpenRouter, vLLM, FastAPI."""
  choice = _object(_first(response.get("choices")))
  error = response.get("error") or choice.get("error")
  if not error and (response.get("object") == "error" or status != 200):
    error = response
  if not error and not choice and "candidates" not in response:
    error = response.get("detail") or response.get("message")
  if not error and status == 200:
    return None
  fields = _object(error)
  words = next(
    (w for n in ("message", "detail", "error", "msg") if isinstance(w := fields.get(n), str) and w), ""
  )
  found = [fields.get(n) for n in ("code", "type", "status")] + [
    _object(fields.get("innererror")).get("code")
  ]
  number = next((int(str(c)) for c in found if _is_status(c)), 0)
  return Fault(
    words or (error if isinstance(error, str) else to_json(error or response)),
    number if status == 200 else status,
    frozenset(c.lower() for c in found if isinstance(c, str)),
    inside=status == 200,
  )


def _is_status(code: Any) -> bool:
  return (
    not isinstance(code, bool)
    and isinstance(code, int | str)
    and bool(re.fullmatch(r"[3-5]\d\d", str(code)[:4]))
  )


def read_answer(kind: str, response: dict) -> dict:
  """The answer in a response: {"text": …, "log_p": {token: log p of it as the first token}, "tokens": [read,
  written]}.

  `text` has no reasoning in it; `log_p` and `tokens` are empty if the server does not return them, or returns
  what they cannot be. `cut` is True if a limit ended the answer; `refused` has the reason if the server gave no
  text for what the request contains.

  Raises Malformed if there is no answer at all.
  """
  return (_read_openai if kind == "openai" else _read_gemini)(response)


def _read_openai(response: dict) -> dict:
  choice = _object(_first(response.get("choices")))
  if not choice.keys() & {"message", "text", "finish_reason"}:
    raise Malformed(f"no choices: {to_json(response)[:200]}")
  message = _object(choice.get("message"))
  content = message.get("content", choice.get("text"))
  said = _text_of(content)
  thought = any(_text_of(message.get(n)) for n in ("reasoning_content", "reasoning")) or _has_thoughts(
    content
  )
  first = _object(_first(_object(choice.get("logprobs")).get("content")))
  log_p = _log_p(first.get("top_logprobs"), "logprob", first.get("token"))
  refused = _text_of(message.get("refusal"))
  if choice.get("finish_reason") == "content_filter":
    refused = refused or "content_filter"
  return _answer(
    said,
    {} if thought else log_p,
    _counts(response.get("usage"), "prompt_tokens", "completion_tokens"),
    refused,
    choice.get("finish_reason") in _CUT,
  )


def _read_gemini(response: dict) -> dict:
  candidate = _object(_first(response.get("candidates")))
  blocked = _object(response.get("promptFeedback")).get("blockReason")
  if not candidate and not blocked:
    raise Malformed(f"no candidates: {to_json(response)[:200]}")
  parts = _list(_object(candidate.get("content")).get("parts"))
  said = _text_of([p for p in parts if not _object(p).get("thought")])
  result = _object(candidate.get("logprobsResult"))
  tops = _object(_first(result.get("topCandidates")))
  chosen = _object(_first(result.get("chosenCandidates"))).get("token")
  log_p = _log_p(tops.get("candidates"), "logProbability", chosen)
  reason = candidate.get("finishReason")
  reason = reason if isinstance(reason, str) else ""
  ordinary = reason in ("", "STOP", *_CUT)
  return _answer(
    said,
    {} if any(_object(p).get("thought") for p in parts) else log_p,
    _counts(response.get("usageMetadata"), "promptTokenCount", "candidatesTokenCount"),
    str(blocked) if blocked else "" if ordinary else reason,
    reason in _CUT,
  )


def _answer(said: str, log_p: dict, tokens: list[int], refused: str, cut: bool) -> dict:
  text = without_thoughts(said)
  return {
    "text": text,
    "log_p": log_p if text == said else {},  # else they are those of a thought's first token
    "tokens": tokens,
    **({"cut": True} if cut else {}),
    **({"refused": refused} if refused and not text.strip() else {}),
  }


def without_thoughts(text: str) -> str:
  """The text without the reasoning before it, "<think>…</think>", which may be unfinished or lack its opening
  tag (where the prompt ends with it)."""
  if opened := _THOUGHTS.match(text):
    return text[opened.end() :].lstrip()
  before, end, after = text.partition("</think>")
  return after.lstrip() if end and "<think>" not in before else text


def refusal(words: str) -> dict:
  """The answer to a request that the server refused."""
  return {"text": "", "log_p": {}, "tokens": [], "refused": words}


def stored_answer(row: dict) -> dict | None:
  """A stored answer; None if it is none: older versions stored whatever came."""
  log_p, tokens = row.get("log_p"), row.get("tokens", [])
  good = (
    isinstance(row.get("text"), str)
    and isinstance(row.get("refused", ""), str)
    and isinstance(log_p, dict)
    and all(_is_log_p(v) for v in log_p.values())
    and isinstance(tokens, list)
    and tokens == [_count(n) for n in tokens]
    and len(tokens) in (0, 2)
  )
  if not good or (text := without_thoughts(row["text"])) == row["text"]:
    return row if good else None
  return row | {"text": text, "log_p": {}}


def no_answer() -> dict:
  """The answer to a request of a batch that came back without one."""
  return {"text": "", "log_p": {}, "tokens": [], "missing": True}


def cause_of(answer: dict, otherwise: str) -> str:
  """Why an answer could not be used: "no answer", "refused", "cut off", "no text", or `otherwise`."""
  if answer.get("missing"):
    return "no answer"
  if "refused" in answer:
    return "refused"
  return "cut off" if answer.get("cut") else otherwise if answer["text"].strip() else "no text"


# --- values of any type ---


def _object(value: Any) -> dict:
  return value if isinstance(value, dict) else {}


def _list(value: Any) -> list:
  return value if isinstance(value, list) else []


def _first(value: Any) -> Any:
  return value[0] if isinstance(value, list) and value else None


def _text_of(content: Any) -> str:
  """Text, or the text among the parts of a content."""
  if isinstance(content, str):
    return content
  if isinstance(content, dict):
    content = [content]
  texts = (p if isinstance(p, str) else _object(p).get("text") for p in _list(content) if not _is_thought(p))
  return "".join(t for t in texts if isinstance(t, str))


def _is_thought(part: Any) -> bool:
  return _object(part).get("type", "text") not in ("text", "output_text", None)


def _has_thoughts(content: Any) -> bool:
  return any(_is_thought(p) for p in _list(content))


def _is_log_p(value: Any) -> bool:
  return isinstance(value, int | float) and type(value) is not bool and LOWEST_LOG_P <= value <= HIGHEST_LOG_P


def _log_p(entries: Any, name: str, written: Any) -> dict[str, float]:
  """The log-probabilities of a token's alternatives. Those that are none are left out; all are, if the written
  token's is among them."""
  listed = {e["token"]: e.get(name) for e in map(_object, _list(entries)) if isinstance(e.get("token"), str)}
  found = {token: float(value) for token, value in listed.items() if value is not None and _is_log_p(value)}
  lost = isinstance(written, str) and written in listed and written not in found
  return {} if lost else found


def _counts(usage: Any, *names: str) -> list[int]:
  return [_count(usage.get(name)) for name in names] if isinstance(usage, dict) else []


def _count(value: Any) -> int:
  if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
    return int(value)
  good = isinstance(value, int | float) and type(value) is not bool and 0 <= value <= MAX_COUNT
  return math.floor(value) if good else 0
