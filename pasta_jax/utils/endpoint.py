"""Language models behind HTTP: any OpenAI-compatible endpoint (OpenAI, vLLM, a llama.cpp server, …) or
Google's Gemini API.

Answers are kept in a file by the request's content, so that no call is paid twice, whatever interrupts a run.
"""

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pasta_jax.utils.records import Records

Messages = Sequence[Mapping[str, str]]
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_THIS_ONE = re.compile(
  r"content.?(filter|policy)|context.?(length|window)|maximum context|too long|safety", re.I
)
_URLS = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta"}


class EndpointError(ValueError):
  """An endpoint that cannot be asked, refuses, or does not answer; the message never holds the key."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where a model answers, and how patient to be."""

  model: str
  kind: str = "openai"  # or "gemini"
  url: str = ""  # "": the provider's own
  key_env: str = ""  # environment variable that holds the key; "": OPENAI_API_KEY or GEMINI_API_KEY
  max_tokens: int = 1
  logprobs: bool = True  # ask for token probabilities; some servers refuse
  concurrency: int = 8
  retries: int = 6  # after the first attempt; waits double from one second, or are what the server says
  timeout: float = 60.0  # seconds
  per_minute: int = 0  # calls that are begun, at most; 0: as many as there are
  part: str = "judge"  # of the config, for messages

  def __post_init__(self):
    if self.kind not in _URLS:
      raise EndpointError(f"{self.part}.kind must be {' or '.join(_URLS)}, not {self.kind!r}")
    if not self.model:
      raise EndpointError(f"name a model: --config.{self.part}.model=…")
    if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or self.per_minute < 0:
      raise EndpointError(
        f"{self.part}: concurrency must be 1 or more, retries and per_minute 0 or more, timeout above 0"
      )

  def _key(self) -> str:
    return os.environ.get(self.key_env or f"{self.kind.upper()}_API_KEY", "").strip()

  def require_key(self) -> None:
    """Raises EndpointError where a provider needs a key and none is set; a server of one's own may need
    none."""
    if not self._key() and not self.url:
      raise EndpointError(
        f"{self.part}: the key is read from ${self.key_env or self.kind.upper() + '_API_KEY'}, which is not set"
      )

  def _request(self, messages: Messages) -> tuple[str, dict, dict[str, str]]:
    """(address, body, headers) of a call."""
    self.require_key()
    base, key = (self.url or _URLS[self.kind]).rstrip("/"), self._key()
    if self.kind == "openai":
      body = {
        "model": self.model,
        "messages": [dict(m) for m in messages],
        "temperature": 0,
        "max_tokens": self.max_tokens,
        **({"logprobs": True, "top_logprobs": 5} if self.logprobs else {}),
      }
      return f"{base}/chat/completions", body, {"Authorization": f"Bearer {key}"} if key else {}
    roles = {"user": "user", "assistant": "model"}
    body = {
      "contents": [
        {"role": roles[m["role"]], "parts": [{"text": m["content"]}]} for m in messages if m["role"] in roles
      ],
      "generationConfig": {
        "temperature": 0,
        "maxOutputTokens": self.max_tokens,
        **({"responseLogprobs": True, "logprobs": 5} if self.logprobs else {}),
      },
    }
    if system := [m["content"] for m in messages if m["role"] == "system"]:
      body["systemInstruction"] = {"parts": [{"text": "\n".join(system)}]}
    return f"{base}/models/{self.model}:generateContent", body, {"x-goog-api-key": key} if key else {}

  def identity(self, messages: Messages) -> str:
    """The same for the same call, whoever pays."""
    address, body, _ = dataclasses.replace(self, url=self.url or _URLS[self.kind])._request(messages)
    return hashlib.sha256(json.dumps([address, body], sort_keys=True).encode()).hexdigest()[:32]

  def call(self, messages: Messages) -> dict:
    """{"text": …, "log_p": {token: log p of it as the first token}, "tokens": [read, written]}; the latter
    two are empty where the server does not say.

    All are empty, and `refused` says why, where the server will not answer this one request (its content is
    filtered, or too long). Tries again, with growing waits, what may pass: limits, server errors, broken
    answers, silence. Raises EndpointError when it does not pass, and at once for what will not (a wrong key,
    an unknown model).
    """
    address, body, headers = self._request(messages)
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
      raise EndpointError(f"{self.part}: the key holds characters that no key has")
    request = urllib.request.Request(
      address, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    fault, wait = "", 0.0
    for attempt in range(self.retries + 1):
      time.sleep(wait)
      wait = min(2.0**attempt, 60.0) * random.uniform(0.75, 1.25)
      try:
        with _OPENER.open(request, timeout=self.timeout) as answer:
          return _read(self.kind, json.loads(answer.read()))
      except urllib.error.HTTPError as error:
        fault = self._without_key(f"status {error.code}: {_excerpt(error)}")
        if error.code == 400 and _THIS_ONE.search(fault):
          return {"text": "", "log_p": {}, "tokens": [], "refused": fault}
        if error.code not in _TRY_AGAIN:
          raise EndpointError(f"{address} refused, {fault}") from None
        asked = error.headers.get("Retry-After", "")
        wait = min(float(asked), 120.0) if asked.replace(".", "", 1).isdigit() else wait
      except (urllib.error.URLError, TimeoutError, http.client.HTTPException, OSError) as error:
        fault = self._without_key(str(getattr(error, "reason", error)) or type(error).__name__)
      except (ValueError, KeyError, IndexError, TypeError) as error:
        fault = self._without_key(f"an answer of another form ({error!r})")
    raise EndpointError(f"{address} gave no answer in {self.retries + 1} attempts; the last one: {fault}")

  def _without_key(self, text: str) -> str:
    """The text as it may be shown."""
    return text.replace(self._key(), "…") if self._key() else text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """A redirect would carry the key to another host."""

  def redirect_request(self, *args):
    return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _excerpt(error: urllib.error.HTTPError) -> str:
  try:
    text = error.read(400).decode("utf-8", "replace")
  except OSError:
    text = ""
  return " ".join(text.split()) or str(error.reason)


def _read(kind: str, answer: dict) -> dict:
  """`Endpoint.call`'s result; an answer without text (filtered, or cut before its first word) is an empty
  one."""
  if kind == "openai":
    choice = answer["choices"][0]
    first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
    found = {t["token"]: float(t["logprob"]) for t in first.get("top_logprobs") or ()}
    tokens = _counts(answer.get("usage"), "prompt_tokens", "completion_tokens")
    return {"text": choice["message"].get("content") or "", "log_p": found, "tokens": tokens}
  if "candidates" not in answer and "promptFeedback" in answer:
    reason = str(answer["promptFeedback"].get("blockReason", "blocked"))
    return {"text": "", "log_p": {}, "tokens": [], "refused": reason}
  candidate = answer["candidates"][0]
  tops = (candidate.get("logprobsResult") or {}).get("topCandidates") or [{}]
  found = {t["token"]: float(t["logProbability"]) for t in tops[0].get("candidates") or ()}
  parts = (candidate.get("content") or {}).get("parts") or ()
  tokens = _counts(answer.get("usageMetadata"), "promptTokenCount", "candidatesTokenCount")
  return {"text": "".join(p.get("text", "") for p in parts), "log_p": found, "tokens": tokens}


def _counts(usage: object, *names: str) -> list[int]:
  return [int(usage.get(name) or 0) for name in names] if isinstance(usage, dict) else []


class Caller:
  """Makes calls side by side; each answer is written to `path` before it is used, and read from there ever
  after."""

  def __init__(self, endpoint: Endpoint, path: Path):
    self._endpoint, self._records, self._lock = endpoint, Records(path, {}), threading.Lock()
    self.paid = 0  # calls made, not read from the file
    self._next = 0.0  # when the next call may begin, where they are limited

  def _one(self, messages: Messages) -> dict:
    key = self._endpoint.identity(messages)
    with self._lock:
      if key in self._records.rows:
        return self._records.rows[key]
    self._wait()
    row = {"id": key, **self._endpoint.call(messages)}
    with self._lock:
      self._records.add(row)
      self.paid += 1
    return row

  def _wait(self) -> None:
    """Until the endpoint's limit lets a call begin."""
    if self._endpoint.per_minute:
      with self._lock:
        now = time.monotonic()
        at, self._next = max(now, self._next), max(now, self._next) + 60 / self._endpoint.per_minute
      time.sleep(at - now)

  def map(self, calls: Sequence[Messages], done: Callable[[int, dict], None]) -> None:
    """`done(i, answer)` for each call, as answers come. Calls under way are finished before an error is
    raised."""
    with concurrent.futures.ThreadPoolExecutor(self._endpoint.concurrency) as pool:
      futures = {pool.submit(self._one, messages): i for i, messages in enumerate(calls)}
      try:
        for future in concurrent.futures.as_completed(futures):
          done(futures[future], future.result())
      except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
