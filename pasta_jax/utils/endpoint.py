"""Language models over HTTP: any OpenAI-compatible endpoint (OpenAI, vLLM, a llama.cpp server, …) or Google's
Gemini API; and models, or people, that answer a file.

`Endpoint` is the address of a model, its key, and the limits of calls to it. `protocols` has the bodies of
requests and reads the responses, `calls` makes calls over HTTP, `batch` by file (`callers` chooses),
and `answers` stores what came back.
"""

import base64
import dataclasses
import hashlib
import ipaddress
import json
import os
import urllib.parse
from collections.abc import Iterable
from typing import Any

from pasta_jax.config.sections import without_login
from pasta_jax.utils.protocols import Call, request_body

SHORTEST_SECRET = 6  # characters; shorter keys are stand-ins ("EMPTY"), which are words of texts too
BATCH = "batch"  # the kind of an endpoint that is a file
_URLS = {"openai": "https://api.openai.com/v1", "gemini": "https://generativelanguage.googleapis.com/v1beta"}
_OWN_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")  # of machines of one's own network


class EndpointError(ValueError):
  """An endpoint that is not configured, refuses, or does not respond; the message never contains the key."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """The address of a model, and the limits and retries of calls to it."""

  model: str
  kind: str = "openai"  # or "gemini", or BATCH: no address and no key
  url: str = dataclasses.field(default="", repr=False)  # "": the provider's; may have a login, user:password@
  key_env: str = ""  # environment variable with the key; "": OPENAI_API_KEY or GEMINI_API_KEY
  max_tokens: int = 1
  logprobs: bool = True  # request token probabilities; some servers refuse
  concurrency: int = 8
  retries: int = 6  # after the first attempt; delays double from one second, unless the server names one
  timeout: float = 60.0  # seconds, of an attempt from its start to the last byte
  per_minute: int = 0  # limit on calls started; 0: none
  part: str = "judge"  # section of the config, for messages

  def __post_init__(self):
    if self.kind not in (*_URLS, BATCH):
      raise EndpointError(f"{self.part}.kind must be {', '.join(_URLS)} or {BATCH}, not {self.kind!r}")
    if not self.model:
      raise EndpointError(f"name a model: --config.{self.part}.model=…")
    if self.kind == BATCH and self.url:
      raise EndpointError(f"{self.part}.kind={BATCH} has no address: leave --config.{self.part}.url empty")
    if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0 or self.per_minute < 0:
      raise EndpointError(
        f"{self.part}: concurrency must be 1 or more, retries and per_minute 0 or more, timeout above 0"
      )
    if self.kind != BATCH:
      self._parts()

  @classmethod
  def from_config(cls, section, part: str, **fixed) -> "Endpoint":
    """The endpoint that the section `part` of a config describes; its fields have the names of these.

    `fixed` are fields that the section leaves to the caller. Raises EndpointError.
    """
    given = {f.name: getattr(section, f.name) for f in dataclasses.fields(cls) if hasattr(section, f.name)}
    return cls(**given, part=part, **fixed)

  def _parts(self) -> urllib.parse.SplitResult:
    """The parts of the URL. Raises EndpointError if it is none; a login is not shown."""
    try:
      parts = urllib.parse.urlsplit(self.url.strip() or _URLS[self.kind])
      if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1):
        return parts
    except ValueError:  # a port that is no number, brackets that do not match
      pass
    shown = "" if "@" in self.url else f", not {self.url!r}"
    raise EndpointError(f"{self.part}.url must be an address such as http://localhost:8000/v1{shown}")

  def _login(self) -> str:
    """user:password of the URL; "" without."""
    parts = self._parts()
    names = (urllib.parse.unquote(n or "") for n in (parts.username, parts.password))
    return ":".join(names) if parts.username or parts.password else ""

  def _key(self) -> str:
    return os.environ.get(self.key_env or f"{self.kind.upper()}_API_KEY", "").strip()

  def require_key(self) -> None:
    """Raises EndpointError if the key is not set, or is none. With a `url`, a server of one's own, it is
    optional."""
    if self.kind == BATCH:
      return
    if not self._key() and not self.url:
      name = self.key_env or f"{self.kind.upper()}_API_KEY"
      raise EndpointError(f"{self.part}: the key is read from ${name}, which is not set")
    if not (self._key().isascii() and self._key().isprintable()):
      raise EndpointError(f"{self.part}: the key has characters that no key has")

  def headers(self) -> dict[str, str]:
    """The headers that identify the caller: with the key, or else with the login of the URL."""
    if key := self._key():
      return {"Authorization": f"Bearer {key}"} if self.kind == "openai" else {"x-goog-api-key": key}
    return {"Authorization": f"Basic {_base64(login)}"} if (login := self._login()) else {}

  @property
  def address(self) -> str:
    """Where calls go, without the login."""
    if self.kind == BATCH:
      return BATCH
    base = without_login(self.url.strip() or _URLS[self.kind]).rstrip("/")
    return (
      f"{base}/chat/completions" if self.kind == "openai" else f"{base}/models/{self.model}:generateContent"
    )

  def body(self, call: Call, without: Iterable[str] = ()) -> dict:
    """The body of a call, without the fields that the model refuses (`protocols.request_body`)."""
    return request_body(
      self.kind,
      self.model,
      call.messages,
      call.max_tokens or self.max_tokens,
      logprobs=self.logprobs and call.letter,
      without=without,
    )

  def identity(self, call: Call) -> str:
    """A hash of address and body: the same call has the same one, whatever the key, and whatever fields the
    model turns out to refuse."""
    parts = [self.address, self.body(call), *([call.repeat] if call.repeat else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

  def redacted(self, value: Any) -> Any:
    """Text, or a value with texts in it, with the key and the login removed."""
    secrets = self._secrets()
    return _without(value, secrets) if secrets else value

  def longest_secret(self) -> int:
    """Characters: that much of the end of a text that was cut may be part of a secret."""
    return max(map(len, self._secrets()), default=0)

  def _secrets(self) -> list[str]:
    login, password = self._login(), self._parts().password or ""
    found = {self._key(), password, urllib.parse.unquote(password), _base64(login)}
    found |= {form for s in found for form in (s.replace("/", "\\/"), urllib.parse.quote(s, safe=""))}
    return sorted((s for s in found if len(s) >= SHORTEST_SECRET), key=len, reverse=True)

  def open_to_others(self) -> str:
    """The host to which a key or a login would go unencrypted, beyond one's own network; "" if none."""
    parts = self._parts()
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme == "https" or not self.headers():
      return ""
    try:
      address = ipaddress.ip_address(host)
      own = address.is_private or address.is_loopback or address.is_link_local
    except ValueError:  # a name
      own = "." not in host or host.endswith(_OWN_NAMES)
    return "" if own else host


def _base64(text: str) -> str:
  return base64.b64encode(text.encode("utf-8", "backslashreplace")).decode()


def _without(value: Any, secrets: list[str]) -> Any:
  if isinstance(value, str):
    for secret in secrets:
      value = value.replace(secret, "…")
    return value
  if isinstance(value, dict):
    return {_without(k, secrets): _without(v, secrets) for k, v in value.items()}
  return [_without(v, secrets) for v in value] if isinstance(value, list) else value
