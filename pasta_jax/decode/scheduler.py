"""Requests to an interpreter: a queue, a batch with places that are refilled, and the traces that come
out."""

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pasta_jax.decode.interpreter import UNBOUNDED, Interpreter, capacity_of
from pasta_jax.decode.sampling import Sampling, as_arrays
from pasta_jax.decode.settings import DecodeError, SamplingConfig, StepFeatures, padded_length, specialise
from pasta_jax.decode.state import STOP, UNFINISHED, State
from pasta_jax.decode.trace import Trace, read_trace

EVERY = 16  # decode steps between two looks at a running batch


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
  """One prompt and how to answer it."""

  tokens: Sequence[int]  # of the prompt, chat form included (`Model.encode`)
  sampling: SamplingConfig = SamplingConfig()
  seed: int | None = None  # in place of `sampling.seed`
  on_step: Callable[[Trace], None] | None = None  # called with the trace so far, and with the finished one
  every: int = EVERY  # decode steps between two calls of `on_step`, at most


@dataclasses.dataclass(eq=False)
class _Job:
  """A request inside the scheduler."""

  id: int
  request: DecodeRequest
  features: StepFeatures  # compiled for it
  pool_size: int  # entries that it needs in a batch; 0 for a scheduler with one place
  cancelled: bool = False

  @property
  def seed(self) -> int:
    return self.request.sampling.seed if self.request.seed is None else self.request.seed


def pool_groups(needs: Sequence[int], places: int) -> list[tuple[int, list[int]]]:
  """(pool entries, indices of the requests that run together in pools of that size), smallest pools first.

  Attention costs a request the whole pool, so requests run with those that need a pool of the same size. A
  group smaller than `places` would leave places empty until its longest request ends, and each size compiles
  its own programs: such a group joins the next size, unless that is more than twice what its members need.
  """
  sizes: dict[int, list[int]] = {}
  for i, need in enumerate(needs):
    sizes.setdefault(need, []).append(i)
  groups: list[tuple[int, list[int]]] = []
  least = 0  # the smallest need in the last group
  for size in sorted(sizes):
    if groups and len(groups[-1][1]) < places and size <= 2 * least:
      groups[-1] = (size, groups[-1][1] + sizes[size])
    else:
      groups.append((size, sizes[size]))
      least = size
  return groups


class Scheduler:
  """Decodes requests, up to `batch_size` at once, each with up to `branch_width` branches in a step.

      scheduler = Scheduler(interpreter, batch_size=8, branch_width=2)
      id = scheduler.submit(DecodeRequest(tokens))
      while scheduler.step():
        for id, trace in scheduler.results(): ...

  On a mesh the places of a batch are split over its axis `data`: `batch_size` is rounded up to a multiple of it.

  With `batch_size` 1 a program of its own decodes one request after the other: the step is as wide as the
  number of live branches asks for (`branch_width` is not used), and the pool grows with the response.

  A trace depends on its request only: not on when it was submitted, nor on what runs beside it. (Tokens are
  identical in float32; in bfloat16 a wider matrix product may round differently.)

  **Serving.** One thread owns the device: it calls `step` in a loop, and `results` after each call; when
  `step` returns False it waits for the next request (a `threading.Event` that the handlers set after
  `submit`). HTTP handlers call `submit` and `cancel` from their own threads: these, and `results`, are safe
  to call from any thread at any time and never wait for the device; `step`, `run` and `precompile` belong to
  the one thread. `on_step` is called in that thread, between two segments: it should hand the trace over (to
  a queue, or to an event loop by `call_soon_threadsafe`) and return. A late request takes a free place of the
  running batch if its pool fits (it needs the same compiled features, no more entries than the batch's pools
  have, and no less than half) and no older request waits for another batch; otherwise it waits until the
  running batch and those planned before it have ended. So nobody starves.

  A cancelled request gives no result: one that waits leaves the queue, one that runs frees its place before
  the next segment, one that has finished is dropped. A client has the partial trace from `on_step`.
  """

  def __init__(self, interpreter: Interpreter, *, batch_size: int = 1, branch_width: int = 1):
    if batch_size < 1 or branch_width < 1:
      raise DecodeError(f"batch_size and branch_width must be 1 or more, not {batch_size} and {branch_width}")
    if batch_size > 1:  # no group of devices idles
      batch_size = place_counts(batch_size, interpreter.replicas)[0]
    self.interpreter, self.batch_size, self.branch_width = interpreter, batch_size, branch_width
    self._ids = itertools.count()
    self._lock = threading.Lock()  # for the next three
    self._jobs: dict[int, _Job] = {}  # waiting or running
    self._waiting: deque[_Job] = deque()  # not yet planned
    self._finished: dict[int, Trace] = {}
    self._planned: deque[tuple[int, deque[_Job]]] = deque()  # batches to run: pool size, requests
    self._queue: deque[_Job] = deque()  # of the running batch
    self._running: _One | _Batch | None = None

  # Requests.

  def submit(self, request: DecodeRequest) -> int:
    """Adds a request and returns its id. Raises DecodeError if the pool cannot hold it."""
    return self._submit(request, self._pool_size(request.tokens))

  def _submit(self, request: DecodeRequest, pool_size: int) -> int:
    self.interpreter.limits.check(request.tokens)
    features = specialise(self.interpreter.features, request.sampling)
    with self._lock:
      job = _Job(next(self._ids), request, features, pool_size)
      self._jobs[job.id] = job
      self._waiting.append(job)
    return job.id

  def cancel(self, id: int) -> bool:
    """Drops a request: no result of it will come. False if it is unknown or its result was already taken."""
    with self._lock:
      if job := self._jobs.pop(id, None):
        job.cancelled = True
        return True
      dropped = id in self._finished
      self._finished = {k: trace for k, trace in self._finished.items() if k != id}
    return dropped

  def results(self) -> Iterator[tuple[int, Trace]]:
    """(id, trace) of the requests that finished since the last call, in the order in which they finished."""
    with self._lock:
      finished, self._finished = self._finished, {}
    return iter(finished.items())

  def _pool_size(self, prompt: Sequence[int]) -> int:
    """Pool entries that a prompt and its response may take in a batch, rounded up: five sizes an octave."""
    if self.batch_size == 1:
      return 0
    limits = self.interpreter.limits
    need = max(len(prompt) + limits.max_new_tokens + self.branch_width, padded_length(len(prompt)))
    if need > limits.kv_buckets[-1] + self.branch_width:
      raise DecodeError(
        f"a prompt and its response may take {need} pool entries, decode.kv_capacity is {limits.kv_buckets[-1]}"
      )
    quantum = max(128, 1 << (need - 1).bit_length() - 2)  # a quarter of the next power of two
    return -(-need // quantum) * quantum

  # The loop.

  def step(self, max_steps: int = EVERY) -> bool:
    """Admits requests, runs one segment of at most `max_steps` decode steps, and collects what finished.

    Returns False if there was nothing to do: no request waits or runs. A segment ends early when a request
    finishes whose place another can take.
    """
    self._admit()
    ran = self._running is not None
    if self._running is not None:
      streamed = [job.request.every for job in self._running.jobs() if job.request.on_step]
      traces = self._running.advance(min([max_steps, *streamed]), bool(self._queue))
      with self._lock:
        for job, trace in traces:
          if trace.finish_reason != "unfinished" and not job.cancelled:
            del self._jobs[job.id]
            self._finished[job.id] = trace
      if all(job.cancelled for job in [*self._queue, *self._running.jobs()]):
        self._running = None  # frees its memory
      for job, trace in traces:
        if job.request.on_step and not job.cancelled:
          job.request.on_step(trace)
    return ran or bool(self._jobs)

  def _admit(self) -> None:
    """Starts the next planned batch if none runs, and fills free places."""
    if self._running is not None:
      self._running.free_cancelled()
      if not self._planned:
        self._queue.extend(self._late_requests(self._running))
    self._queue = deque(job for job in self._queue if not job.cancelled)
    while not self._queue and (self._running is None or not self._running.jobs()):
      self._running = None
      if not self._planned:
        self._plan()
      if not self._planned:
        return
      pool_size, members = self._planned.popleft()
      self._queue = deque(job for job in members if not job.cancelled)
      if self._queue:
        it, features = self.interpreter, self._queue[0].features
        self._running = (
          _Batch(it, features, pool_size, self.batch_size, self.branch_width)
          if self.batch_size > 1
          else _One(it)
        )
    if self._running is not None:
      self._running.admit(self._queue)

  def _late_requests(self, batch: "_One | _Batch") -> list[_Job]:
    """Waiting requests that may join the running batch; none that would overtake one that may not."""
    with self._lock:
      fitting = list(itertools.takewhile(lambda job: job.cancelled or batch.fits(job), self._waiting))
      for _ in fitting:
        self._waiting.popleft()
    return fitting

  def _plan(self) -> None:
    """Puts all waiting requests into batches: by compiled features, then by the size of their pools."""
    with self._lock:
      jobs, self._waiting = [job for job in self._waiting if not job.cancelled], deque()
    if self.batch_size == 1 and jobs:
      self._planned.append((0, deque(jobs)))
      return
    for features in dict.fromkeys(job.features for job in jobs):
      alike = [job for job in jobs if job.features == features]
      for pool_size, members in pool_groups([job.pool_size for job in alike], self.batch_size):
        self._planned.append((pool_size, deque(alike[i] for i in members)))

  # A whole list.

  def run(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seeds: Sequence[int] | None = None,
    on_finish: Callable[[int, Trace], None] | None = None,
    one_pool_size: bool = False,
  ) -> list[Trace]:
    """The prompts' traces, in their order; `on_finish(i, trace)` is called as each one ends.

    Request i draws from seed `seeds[i]`, else from `sampling.seed`. Consecutive requests with the same
    prompt, as when several samples are drawn, share one prefill. With `one_pool_size` all get the largest
    pool that one of them needs. Raises DecodeError, before anything is decoded, if a prompt and its response
    may exceed the largest pool; RuntimeError while other requests are under way.
    """
    if self._jobs or self._finished:
      raise RuntimeError("Scheduler.run needs a scheduler without other requests")
    sizes = [self._pool_size(prompt) for prompt in prompts]
    if one_pool_size:
      sizes = [max(sizes)] * len(sizes)
    ids: dict[int, int] = {}
    traces: dict[int, Trace] = {}
    try:
      for i, prompt in enumerate(prompts):
        request = DecodeRequest(prompt, sampling, None if seeds is None else seeds[i])
        ids[self._submit(request, sizes[i])] = i
      while len(traces) < len(prompts):
        self.step(UNBOUNDED)
        for id, trace in self.results():
          traces[ids[id]] = trace
          if on_finish:
            on_finish(ids[id], trace)
    finally:  # nothing is left after an interruption
      for id in ids:
        self.cancel(id)
    return [traces[i] for i in range(len(prompts))]

  def precompile(self, prompt_length: int, sampling: SamplingConfig) -> None:
    """Compiles what a full batch of prompts of this length needs, and the smaller ones that it becomes."""
    if self.batch_size == 1:
      precompile(self.interpreter, prompt_length, sampling)
      return
    request = DecodeRequest([1] * prompt_length, sampling)
    features, pool_size = specialise(self.interpreter.features, sampling), self._pool_size(request.tokens)
    batch = _Batch(self.interpreter, features, pool_size, self.batch_size, self.branch_width)
    jobs = [_Job(i, request, features, pool_size) for i in range(self.batch_size)]
    batch.admit(deque(jobs))
    for count in place_counts(self.batch_size, self.interpreter.replicas):
      for job in jobs[count:]:
        job.cancelled = True
      batch.free_cancelled()
      batch.admit(deque())
      batch.advance(0, False)


def decode(
  interpreter: Interpreter,
  prompt: Sequence[int],
  sampling: SamplingConfig = SamplingConfig(),
  *,
  on_step: Callable[[Trace], None] | None = None,
  every: int = EVERY,
) -> Trace:
  """The trace of one request, decoded by itself. `on_step` is called at least every `every` steps, and at the
  end."""
  scheduler = Scheduler(interpreter)
  scheduler.submit(DecodeRequest(prompt, sampling, on_step=on_step, every=every))
  while scheduler.step(UNBOUNDED):
    pass
  [(_, trace)] = scheduler.results()
  return trace


def precompile(
  interpreter: Interpreter,
  prompt_length: int,
  sampling: SamplingConfig = SamplingConfig(),
  *,
  on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
  """Compiles everything that `decode` may need for a prompt of this length.

  Timings taken afterwards include no compilation. `on_progress(done, total)` is called for each program.
  """
  features, numbers = specialise(interpreter.features, sampling), as_arrays(sampling)
  limits, widths = interpreter.limits, interpreter.limits.branch_widths
  state = interpreter.prefill([1] * min(prompt_length, limits.kv_buckets[-1] - widths[-1]))
  longest = prompt_length + limits.max_new_tokens + limits.margin
  sizes = [c for c in interpreter.limits.capacities if c >= capacity_of(state)]
  sizes = [c for i, c in enumerate(sizes) if i == 0 or sizes[i - 1] < longest]
  shapes = [(size, width) for size in sizes for width in widths]
  for done, (size, width) in enumerate(shapes):
    on_progress(done, len(shapes))
    if size > capacity_of(state):
      state = interpreter.grow(state)
    state, _ = interpreter.segment(state, numbers, 0, width=width, features=features)
  on_progress(len(shapes), len(shapes))


class _One:
  """The running request of a scheduler with one place."""

  def __init__(self, interpreter: Interpreter):
    self._interpreter = interpreter
    self._job: _Job | None = None
    self._state: State
    self._sampling: Sampling
    self._runnable, self._used = 1, 0

  def jobs(self) -> list[_Job]:
    return [] if self._job is None else [self._job]

  def fits(self, job: _Job) -> bool:
    return True

  def free_cancelled(self) -> None:
    if self._job is not None and self._job.cancelled:
      self._job = None

  def admit(self, queue: deque[_Job]) -> None:
    if self._job is None and queue:
      self._job = job = queue.popleft()
      self._state = self._interpreter.prefill(job.request.tokens, job.seed)
      self._sampling = as_arrays(job.request.sampling)
      self._runnable, self._used = 1, len(job.request.tokens) - 1

  def advance(self, steps: int, others_wait: bool) -> list[tuple[_Job, Trace]]:
    """Runs one segment; (request, trace) if the request has finished or is streamed."""
    assert self._job is not None
    it, job = self._interpreter, self._job
    widths = it.limits.branch_widths
    width = next((w for w in widths if w >= self._runnable), widths[-1])
    if self._used + it.limits.steps_per_look * width > capacity_of(self._state):
      self._state = it.grow(self._state)
    self._state, scalars = it.segment(self._state, self._sampling, steps, width=width, features=job.features)
    scalars = jax.device_get(scalars)
    self._runnable, self._used = int(scalars["runnable"]), int(scalars["used"])
    ended = scalars["finish"] != UNFINISHED
    if not ended and not job.request.on_step:
      return []
    trace = read_trace(self._state, it.vocabulary, job.features.rule, job.features.visibility)
    if ended:
      self._job = None
    return [(job, trace)]


def place_counts(batch_size: int, replicas: int = 1) -> list[int]:
  """Numbers of places that batches are compiled for: all, and halves of them while a queue runs dry; multiples of
  `replicas`, the groups of devices that places are split over."""
  counts = [-(-batch_size // replicas)]
  while counts[-1] > (2 if replicas == 1 else 1):
    counts.append(-(-counts[-1] // 2))
  return [count * replicas for count in counts]


class _Batch:
  """The running requests of a scheduler with several places, in pools of one size."""

  def __init__(
    self, interpreter: Interpreter, features: StepFeatures, pool_size: int, batch_size: int, width: int
  ):
    self._interpreter, self._features, self._width = interpreter, features, width
    self._pool_size, self._batch_size = pool_size, batch_size
    self._counts = place_counts(batch_size, interpreter.replicas)
    self._places: list[_Job | None] = []
    self._arrays: tuple[State, Sampling] | None = None  # every leaf [places, …]
    self._kept: tuple[tuple[int, ...], State] | None = None  # the last prompt and its prefill

  def jobs(self) -> list[_Job]:
    return [job for job in self._places if job is not None]

  def fits(self, job: _Job) -> bool:
    return job.features == self._features and job.pool_size <= self._pool_size <= 2 * job.pool_size

  def free_cancelled(self) -> None:
    gone = [job is not None and job.cancelled for job in self._places]
    if any(gone):
      self._stop(gone)
      self._places = [None if free else job for job, free in zip(self._places, gone)]

  def admit(self, queue: deque[_Job]) -> None:
    """Fills free places from the queue; changes the number of places to what is needed."""
    wanted = min(len(self.jobs()) + len(queue), self._batch_size)
    count = min(c for c in self._counts if c >= wanted)
    if self._arrays is None:
      first = self._start(queue[0])
      self._arrays = self._interpreter.take(jax.tree.map(lambda x: x[None], first), [0] * count)
      self._places = [None] * count
      self._stop([True] * count)
    elif count != len(self._places):
      self._resize(count)
    for row, job in enumerate(self._places):
      if job is None and queue:
        self._places[row] = job = queue.popleft()
        self._arrays = self._interpreter.insert(self._arrays, self._start(job), row)

  def advance(self, steps: int, others_wait: bool) -> list[tuple[_Job, Trace]]:
    """Runs one segment; (request, trace) of those that finished or are streamed.

    The segment ends with the first request that finishes if others wait for its place; otherwise when as many
    have finished that half of the places do.
    """
    assert self._arrays is not None
    it, (states, sampling) = self._interpreter, self._arrays
    fewer = max((c for c in self._counts if c < len(self._places)), default=0)
    enough = self._places.count(None) + 1 if others_wait else len(self._places) - fewer
    states, finish = it.batch_segment(
      states, sampling, enough, steps, width=self._width, features=self._features
    )
    self._arrays = states, sampling
    ended = np.asarray(finish) != UNFINISHED
    traces = []
    for row, job in enumerate(self._places):
      if job is not None and (ended[row] or job.request.on_step):
        small = states.replace(pool=None)  # a trace does without it
        one = jax.tree.map(lambda x, row=row: x[row], small)
        trace = read_trace(one, it.vocabulary, self._features.rule, self._features.visibility)
        traces.append((job, trace))
        if ended[row]:
          self._places[row] = None
    return traces

  def _start(self, job: _Job) -> tuple[State, Sampling]:
    """The state after the request's prefill, which is shared with the request before it if the prompts
    agree."""
    it, prompt = self._interpreter, tuple(job.request.tokens)
    if self._kept is None or self._kept[0] != prompt:
      self._kept = prompt, it.prefill(prompt, job.seed, self._pool_size)
      return self._kept[1], as_arrays(job.request.sampling)
    return it.reseed(self._kept[1], np.uint32(job.seed & 0xFFFFFFFF)), as_arrays(job.request.sampling)

  def _resize(self, count: int) -> None:
    """Changes the number of places; running requests move to the first ones."""
    rows = sorted(range(len(self._places)), key=lambda r: self._places[r] is None)
    added = count - len(rows)
    self._places = [self._places[r] for r in rows[:count]] + [None] * added
    self._arrays = self._interpreter.take(self._arrays, (rows + rows[:1] * added)[:count])
    if added > 0:
      self._stop([job is None for job in self._places])

  def _stop(self, rows: Sequence[bool]) -> None:
    """Marks rows as finished, so that nothing waits for them."""
    assert self._arrays is not None
    states, sampling = self._arrays
    self._arrays = states.replace(finish=jnp.where(np.asarray(rows), STOP, states.finish)), sampling
