"""Calls to an `endpoint` over HTTP, many at a time, with retries, limits of time and size; each answer is stored
before it is used (`answers`), so a restarted run repeats no paid call.

`Caller.map` is an ordinary function that runs an event loop: interrupts and limits of time cancel calls, whatever
they wait for. This module loads the HTTP client, so it is imported where calls are made.
"""

import asyncio
import concurrent.futures
import datetime
import email.utils
import math
import random
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import httpx2
import tenacity

from pasta_jax.utils import protocols
from pasta_jax.utils.answers import Answers
from pasta_jax.utils.endpoint import Endpoint, EndpointError
from pasta_jax.utils.json_io import to_json
from pasta_jax.utils.protocols import Call, Fault, Malformed
from pasta_jax.utils.text import one_line, printable

MAX_ANSWER = 16 << 20  # bytes, unpacked
MAX_ERROR = 64 << 10  # bytes of the body of an error
MAX_WAIT = 120.0  # seconds before the next attempt, whatever the server asks
GRACE = 2.0  # seconds that calls in progress have to finish after an interrupt
TOLERATED = 8  # refusals in a row, before any answer: the settings are wrong, not the requests
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_OF_THE_REQUEST = (400, 413, 422)  # statuses that may concern one request only

Todo = tuple[str, Call, list[int]]  # identity of a call, and the indices of those who ask for it


class _Passing(Exception):
  """A fault that may pass. `wait`: seconds that the server asks for."""

  def __init__(self, fault: str, wait: float | None = None):
    super().__init__(fault)
    self.wait = wait


class _Unreadable(_Passing):
  """A response that is none: the server works, and this request may be what it cannot answer."""


class _Refused(Exception):
  """This request is refused, for a reason that may pass."""


class Caller:
  """Makes calls concurrently. Each answer is stored in `path` before it is used; it is requested once."""

  def __init__(self, endpoint: Endpoint, path: Path):
    self._endpoint, self._answers = endpoint, Answers(path)
    self.paid = 0  # calls answered, as opposed to read from the file
    self._works = any("refused" not in answer for answer in self._answers.by_key.values())
    self._refusals: list[str] = []  # those before the first answer
    if host := endpoint.open_to_others():
      host = printable(host)
      print(
        f"warning: the key of {endpoint.part} goes to {host} unencrypted, over plain http", file=sys.stderr
      )

  def map(self, calls: Sequence[Call], on_answer: Callable[[int, dict], None]) -> None:
    """Calls `on_answer(i, answer)` for each call: stored answers first, the others in order of completion.

    An answer is that of `protocols.read_answer`. After an error, calls in progress finish (and are stored) before
    it is raised; after an interrupt they have `GRACE` seconds.

    A request that the server refuses gets an answer with `refused`. It is stored if the reason is the request's
    content or length, and asked again by the next run otherwise.

    Raises:
      EndpointError: the last retry of a call failed, or the error is permanent (a wrong key, an unknown model,
        all requests refused).
    """
    todo: dict[str, Todo] = {}
    for i, call in enumerate(calls):
      key = self._endpoint.identity(call)
      if key in self._answers.by_key:
        on_answer(i, self._answers.by_key[key])
      else:
        todo.setdefault(key, (key, call, []))[2].append(i)
    if todo:
      self._endpoint.require_key()
      _run(lambda: self._make(list(todo.values()), on_answer))

  async def _make(self, todo: Sequence[Todo], on_answer: Callable[[int, dict], None]) -> None:
    async with _Client(self._endpoint) as client:
      queue = iter(todo)
      workers = [
        asyncio.create_task(self._work(client, queue, on_answer))
        for _ in range(min(self._endpoint.concurrency, len(todo)))
      ]
      patience = GRACE
      try:
        done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        patience = self._endpoint.timeout
      finally:
        client.end()
        await asyncio.wait(workers, timeout=patience)
        for worker in workers:
          worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    for worker in done:
      worker.result()  # raises its error
    self._check_works(1)

  async def _work(
    self, client: "_Client", queue: Iterator[Todo], on_answer: Callable[[int, dict], None]
  ) -> None:
    """Makes one call after the other until none is left, or the client has ended."""
    for key, call, asking in queue:
      try:
        answer = self._endpoint.redacted(await client.call(call))
        self._answers.add(key, answer)
        self.paid += 1
        self._works = self._works or "refused" not in answer
      except _Refused as refused:
        answer = protocols.refusal(str(refused))
        self._refusals.append(str(refused))
        self._check_works(TOLERATED)
      if client.ended:
        return
      for i in asking:
        on_answer(i, answer)

  def _check_works(self, tolerated: int) -> None:
    """Raises EndpointError if that many requests were refused, and none was ever answered."""
    if not self._works and len(self._refusals) >= tolerated:
      count, last = len(self._refusals), self._refusals[-1]
      raise EndpointError(f"{self._endpoint.address} answered none of {count} requests; the last one: {last}")


class _Client:
  """HTTP for one event loop."""

  def __init__(self, endpoint: Endpoint):
    self._endpoint = endpoint
    self._without: set[str] = set()  # fields that the model refuses
    self._next = 0.0  # with a limit: when the next call may start
    self._resting: set[asyncio.Task] = set()  # calls that wait for their turn or the next attempt
    self.ended = False
    try:  # the environment's proxies and certificates: ValueError, OSError, ImportError, …
      self._http = httpx2.AsyncClient(
        proxy=_proxy(endpoint.address),
        verify=httpx2.create_ssl_context(),  # with SSL_CERT_FILE and SSL_CERT_DIR
        trust_env=False,
        timeout=None,
        limits=httpx2.Limits(max_connections=endpoint.concurrency),
      )
    except Exception as error:
      raise EndpointError(
        f"{endpoint.part}: the HTTP client cannot start: {self._shown(str(error))}"
      ) from None

  async def __aenter__(self) -> "_Client":
    return self

  async def __aexit__(self, *error) -> None:
    await self._http.aclose()

  def end(self) -> None:
    """Lets requests in progress finish, and nothing else start."""
    self.ended = True
    for task in self._resting:
      task.cancel()

  async def _rest(self, seconds: float) -> None:
    if self.ended:
      raise asyncio.CancelledError
    task = asyncio.current_task()
    assert task is not None
    self._resting.add(task)
    try:
      await _sleep(seconds)
    finally:
      self._resting.discard(task)

  async def call(self, call: Call) -> dict:
    """The answer (`protocols.read_answer`).

    Retries rate limits, server errors, malformed responses and timeouts, with growing delays. Raises EndpointError,
    and _Refused.
    """
    if self._endpoint.per_minute:
      now = monotonic()
      at, self._next = max(now, self._next), max(now, self._next) + 60 / self._endpoint.per_minute
      await self._rest(at - now)
    attempts = self._endpoint.retries + 1
    retrying = tenacity.AsyncRetrying(
      stop=tenacity.stop_after_attempt(attempts),
      retry=tenacity.retry_if_exception_type(_Passing),
      wait=_delay,
      sleep=self._rest,
      reraise=True,
    )
    try:
      return await retrying(self._attempt, call)
    except _Unreadable as fault:
      raise _Refused(str(fault)) from None
    except _Passing as fault:
      raise EndpointError(
        f"{self._endpoint.address} gave no answer in {attempts} attempts; the last one: {fault}"
      ) from None

  async def _attempt(self, call: Call) -> dict:
    """One attempt; one more for each field that the model turns out to refuse."""
    without = frozenset(self._without)
    try:
      async with asyncio.timeout(self._endpoint.timeout):
        status, headers, text = await self._post(self._endpoint.body(call, without))
    except TimeoutError:
      raise _Passing(f"no whole answer in {self._endpoint.timeout:g} seconds") from None
    except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
      raise _Passing(self._shown(str(error)) or type(error).__name__) from None
    except (httpx2.InvalidURL, UnicodeError) as error:
      raise EndpointError(f"{self._endpoint.address} is no address: {self._shown(str(error))}") from None
    try:
      response = protocols.parse(text)
      fault = protocols.fault_in(response, status)
      if fault is None:
        return protocols.read_answer(self._endpoint.kind, response)
    except Malformed as error:
      if status == 200:
        raise _Unreadable(f"malformed response ({self._shown(str(error))})") from None
      fault = Fault(text or httpx2.codes.get_reason_phrase(status) or "no words", status)
    for field in (protocols.LIMIT, protocols.TEMPERATURE):
      if field not in without and fault.refuses(field):
        self._without.add(field)
        return await self._attempt(call)
    return self._refused(fault, _asked_wait(headers))

  def _refused(self, fault: Fault, wait: float | None) -> dict:
    """The answer to a request whose content is refused; raises what the fault is otherwise."""
    shown = self._shown(str(fault))
    if fault.status in _RETRIED or fault.inside and not fault.status and not fault.is_of_content:
      raise _Passing(shown, wait)
    if self._endpoint.logprobs and fault.refuses(protocols.LOG_P):
      raise EndpointError(
        f"the model gives no token probabilities: --config.{self._endpoint.part}.logprobs=False ({shown})"
      )
    if fault.is_of_content and fault.status in (0, 403, *_OF_THE_REQUEST):
      return protocols.refusal(shown)
    if fault.status in _OF_THE_REQUEST:
      raise _Refused(shown)
    raise EndpointError(f"{self._endpoint.address} refused, {shown}")

  async def _post(self, body: dict) -> tuple[int, httpx2.Headers, str]:
    """(status, headers, body without secrets) of a response. Raises what httpx2 does, and _Unreadable."""
    headers = {"Content-Type": "application/json", **self._endpoint.headers()}
    async with self._http.stream(
      "POST", self._endpoint.address, content=to_json(body).encode(), headers=headers
    ) as response:
      status = 200 if response.is_success else response.status_code
      limit = MAX_ANSWER if status == 200 else MAX_ERROR
      raw = bytearray()
      async for part in response.aiter_bytes():
        raw += part
        if len(raw) > limit:
          break
    text = self._endpoint.redacted(raw[:limit].decode("utf-8", "replace"))
    if len(raw) > limit:
      if status == 200:
        raise _Unreadable(f"a response of more than {MAX_ANSWER >> 20} MB")
      text = text[: -self._endpoint.longest_secret() or None]  # a secret may have been cut in two
    return status, response.headers, text

  def _shown(self, text: str) -> str:
    """A server's words, for a message: without secrets, which go before anything is cut."""
    return one_line(self._endpoint.redacted(text), 300)


def _proxy(address: str) -> str | None:
  """The proxy for an address, by the standard library's rules (http_proxy, no_proxy, the system's settings)."""
  parts = urllib.parse.urlsplit(address)
  proxy = urllib.request.getproxies().get(parts.scheme)
  if not proxy or urllib.request.proxy_bypass(parts.netloc):
    return None
  return proxy if "://" in proxy else f"http://{proxy}"


async def _sleep(seconds: float) -> None:
  await asyncio.sleep(seconds)


def _delay(state: tenacity.RetryCallState) -> float:
  """Seconds before the next attempt: what the server asks for, or twice as many each time."""
  assert state.outcome is not None
  asked = getattr(state.outcome.exception(), "wait", None)
  return asked if asked is not None else _GROWING(state) * random.uniform(0.75, 1.25)


_GROWING = tenacity.wait_exponential(multiplier=1, max=60)


def _asked_wait(headers: httpx2.Headers) -> float | None:
  """Seconds of a Retry-After header, which has a number or a date; None without."""
  asked = headers.get("Retry-After", "")
  try:
    seconds = float(asked)
  except ValueError:
    try:
      date = email.utils.parsedate_to_datetime(asked)
      now = datetime.datetime.now(datetime.UTC if date.tzinfo else None)
      seconds = (date - now).total_seconds()
    except (ValueError, OverflowError):
      return None
  return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_WAIT)


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
  """`asyncio.run`; in a thread of its own where this one runs an event loop (a notebook)."""
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    asyncio.run(work())
    return
  tasks: list[asyncio.Task | None] = []

  async def beside() -> None:
    tasks.append(asyncio.current_task())
    await work()

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(lambda: asyncio.run(beside()))
    try:
      running.result()
    except BaseException:
      for task in tasks:
        if task is not None and not running.done():
          task.get_loop().call_soon_threadsafe(task.cancel)
      raise
