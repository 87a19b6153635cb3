"""Language models over HTTP: any OpenAI-compatible endpoint (OpenAI, vLLM, a llama.cpp server, …) or Google's
Gemini API.

`Endpoint` makes one call, with retries. `Caller` makes many concurrently and caches every response in a file,
keyed by the content of the request, so a restarted run repeats no paid call.
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
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# Status 400 with such a text concerns this request alone.
_REFUSED = re.compile(
  r"content.?(filter|policy)|context.?(length|window)|maximum context|too long|safety", re.I
)
_URLS = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta"}


class EndpointError(ValueError):
  """An endpoint that is not configured, refuses, or does not respond; the message never contains the key."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """The address of a model, and the limits and retries of calls to it."""

  model: str
  kind: str = "openai"  # or "gemini"
  url: str = ""  # "": the provider's
  key_env: str = ""  # environment variable with the key; "": OPENAI_API_KEY or GEMINI_API_KEY
  max_tokens: int = 1
  logprobs: bool = True  # request token probabilities; some servers refuse
  concurrency: int = 8
  retries: int = 6  # after the first attempt; delays double from one second, unless the server names one
  timeout: float = 60.0  # seconds
  per_minute: int = 0  # limit on calls started; 0: none
  part: str = "judge"  # section of the config, for messages

  def __post_init__(self):
    if self.kind not in _URLS:
      raise EndpointError(f"{self.part}.kind must be {' or '.join(_URLS)}, not {self.kind!r}")
    if not self.model:
      raise EndpointError(f"name a model: --config.{self.part}.model=…")
    if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0 or self.per_minute < 0:
      raise EndpointError(
        f"{self.part}: concurrency must be 1 or more, retries and per_minute 0 or more, timeout above 0"
      )

  @classmethod
  def from_config(cls, section, part: str, **fixed) -> "Endpoint":
    """The endpoint that the section `part` of a config describes; its fields have the names of these.

    `fixed` are fields that the section leaves to the caller. Raises EndpointError.
    """
    given = {f.name: getattr(section, f.name) for f in dataclasses.fields(cls) if hasattr(section, f.name)}
    return cls(**given, part=part, **fixed)

  def _key(self) -> str:
    return os.environ.get(self.key_env or f"{self.kind.upper()}_API_KEY", "").strip()

  def require_key(self) -> None:
    """Raises EndpointError if the key is not set. With a `url`, a server of one's own, it is optional."""
    if not self._key() and not self.url:
      name = self.key_env or f"{self.kind.upper()}_API_KEY"
      raise EndpointError(f"{self.part}: the key is read from ${name}, which is not set")

  def _request(self, messages: Messages) -> tuple[str, dict, dict[str, str]]:
    """(address, body, headers) of a call. Raises EndpointError if the key is not set."""
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
    """A hash of address and body: the same call has the same one, whatever the key."""
    address, body, _ = dataclasses.replace(self, url=self.url or _URLS[self.kind])._request(messages)
    return hashlib.sha256(json.dumps([address, body], sort_keys=True).encode()).hexdigest()[:32]

  def call(self, messages: Messages) -> dict:
    """The response: {"text": …, "log_p": {token: log p of it as the first token}, "tokens": [read, written]}.

    `log_p` and `tokens` are empty if the server does not return them. If the server refuses this request only
    (filtered content, too long), all are empty and `refused` has the reason.

    Retries rate limits, server errors, malformed responses and timeouts, with growing delays.

    Raises:
      EndpointError: the last retry failed, or the error is permanent (a wrong key, an unknown model).
    """
    address, body, headers = self._request(messages)
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
      raise EndpointError(f"{self.part}: the key has characters that no key has")
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
        if error.code == 400 and _REFUSED.search(fault):
          return {"text": "", "log_p": {}, "tokens": [], "refused": fault}
        if error.code not in _RETRIED:
          raise EndpointError(f"{address} refused, {fault}") from None
        asked = error.headers.get("Retry-After", "")
        wait = min(float(asked), 120.0) if asked.replace(".", "", 1).isdigit() else wait
      except (urllib.error.URLError, TimeoutError, http.client.HTTPException, OSError) as error:
        fault = self._without_key(str(getattr(error, "reason", error)) or type(error).__name__)
      except (ValueError, KeyError, IndexError, TypeError) as error:
        fault = self._without_key(f"malformed response ({error!r})")
    raise EndpointError(f"{address} gave no answer in {self.retries + 1} attempts; the last one: {fault}")

  def _without_key(self, text: str) -> str:
    """The text with the key removed."""
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
  """The result of `Endpoint.call`; an empty text if the response has none (filtered, or cut off)."""
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
  """Makes calls concurrently. Each response is stored in `path` before it is used; it is requested once."""

  def __init__(self, endpoint: Endpoint, path: Path):
    self._endpoint, self._records, self._lock = endpoint, Records(path, {}), threading.Lock()
    self.paid = 0  # calls made, as opposed to read from the file
    self._next = 0.0  # with a limit: when the next call may start

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
    """Sleeps until the limit permits another call."""
    if self._endpoint.per_minute:
      with self._lock:
        now = time.monotonic()
        at, self._next = max(now, self._next), max(now, self._next) + 60 / self._endpoint.per_minute
      time.sleep(at - now)

  def map(self, calls: Sequence[Messages], on_answer: Callable[[int, dict], None]) -> None:
    """Calls `on_answer(i, response)` for each call, in order of completion.

    After an error, calls in progress finish (and are stored) before it is raised.
    """
    with concurrent.futures.ThreadPoolExecutor(self._endpoint.concurrency) as pool:
      futures = {pool.submit(self._one, messages): i for i, messages in enumerate(calls)}
      try:
        for future in concurrent.futures.as_completed(futures):
          on_answer(futures[future], future.result())
      except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
