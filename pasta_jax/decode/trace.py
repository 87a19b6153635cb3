"""What happened in a response: the device's log and thread table, read back as a program of `lang`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pasta_jax.decode.state import FINISH_REASONS, State
from pasta_jax.decode.threads import DONE
from pasta_jax.lang.cost import Cost, cost
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import Layout, layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Program, reading_order
from pasta_jax.lang.thread import Fork, Reading, Thread, read
from pasta_jax.lang.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class ThreadTrace:
  """One thread of a response. Arrays have one entry for each own token (n)."""

  number: int
  path: tuple[int, ...]  # ordinals of the promises that lead to it from the main thread, which has ()
  parent: int  # -1 for the main thread
  topic: str  # of its promise, or the promise's head (`lang.head`)
  declared: int | None  # the number in its promise
  fork_index: int  # own index, in the parent, of its promise's last token
  tokens: np.ndarray  # [n] int32
  positions: np.ndarray  # [n] int32
  entries: np.ndarray  # [n] int32, pool entries; -1 for a token that was not read back
  rounds: np.ndarray  # [n] int32, in which the token was written: its clock on a machine with enough branches
  read_in: np.ndarray  # [n] int32, round in which it was read into the pool; 0 for an unread token
  steps: np.ndarray  # [n] int32, decode step in which it was written; 0 for `<async>` and unread tokens
  log_p: np.ndarray  # [n] float32, the model's; NaN for `<async>`, which the interpreter writes
  finished: bool  # it wrote its last token

  @property
  def length(self) -> int:
    """Own tokens, tags included: what the promise's number predicts."""
    return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Trace:
  """One response, finished or so far."""

  threads: tuple[ThreadTrace, ...]  # by number: in the order in which they were promised
  prompt: np.ndarray  # token ids
  readings: tuple[Reading, ...]  # by number: what the tag automaton makes of each thread
  main: Thread  # the main thread, as `lang` has it
  program: Program
  steps: int  # decode steps that were run
  finish_reason: str
  cost: Cost
  ill_formed: int
  refused: int  # promises beyond the limits on count and depth
  logits: np.ndarray | None  # [entries, V] where captured
  visibility: str = "promise"  # in which it was decoded (lang.forms)
  promise: str = "topic"  # the form of its promises
  number: str = "digits"  # and of their lengths

  @property
  def form(self) -> Forms:
    """The form of the language, but for its positions."""
    return Forms(visibility=self.visibility, promise=self.promise, number=self.number)

  @property
  def text(self) -> str:
    """The response in reading order."""
    return reading_order(self.program)


def read_trace(
  state: State, vocabulary: Vocabulary, rule: PositionRule, visibility: str = "promise"
) -> Trace:
  """Reads a state back, which was decoded under `visibility`. The state is not changed; the pool's keys and values
  are not copied."""
  # The large arrays stay where they are.
  small = state.entries, state.table, state.used, state.prompt, state.steps, state.finish, state.n_threads
  entries, threads, used, prompt_entries, steps, finish, n = jax.device_get(small)
  log, table = entries.unpack(), threads.unpack()
  n, used = int(n), int(used)
  last_prompt = log.token[prompt_entries] if used > prompt_entries else table.token[0]
  prompt = np.append(log.token[:prompt_entries], last_prompt)
  order = np.argsort(log.thread[:used], kind="stable")
  bounds = np.searchsorted(log.thread[:used][order], np.arange(n + 1))

  traces: list[ThreadTrace] = []
  readings: list[Reading] = []
  for i in range(n):  # parents come first
    trace = _thread_trace(i, order[bounds[i] : bounds[i + 1]], log, table, int(prompt_entries), vocabulary)
    if i:
      topic = vocabulary.about(readings[trace.parent], trace.fork_index)
      path = (*traces[trace.parent].path, int(table.ordinal[i]))
      trace = dataclasses.replace(trace, path=path, topic=topic)
    traces.append(trace)
    readings.append(_reading(trace, vocabulary, rule))

  # Promises that were read back, kept or not.
  promised = sum(int(t.entries[k]) >= 0 for t, r in zip(traces, readings) for k in r.declared)
  return _whole(
    traces,
    readings,
    vocabulary,
    rule,
    prompt=prompt,
    steps=int(steps),
    finish_reason=FINISH_REASONS[int(finish)],
    refused=promised - (n - 1),
    logits=np.asarray(state.logits[:used]) if state.logits.shape[1] else None,
    visibility=visibility,
  )


def _reading(trace: ThreadTrace, vocabulary: Vocabulary, rule: PositionRule) -> Reading:
  tokens = Thread(tuple(trace.tokens.tolist()))
  return read(tokens, vocabulary.table, is_main=trace.number == 0, numbered=rule.numbered)


def _whole(
  threads: Sequence[ThreadTrace],
  readings: Sequence[Reading],
  vocabulary: Vocabulary,
  rule: PositionRule,
  **facts,
) -> Trace:
  """The trace of these threads, read by the automaton: program and figures follow from them, `facts` are what
  does not."""
  walked: list[Reading] = []  # in the order of `lang.thread.walk`

  def tree(i: int) -> Thread:
    walked.append(readings[i])
    below = [t for t in threads[i + 1 :] if t.parent == i]
    forks = tuple(Fork(t.fork_index, t.declared, tree(t.number)) for t in below)
    return Thread(tuple(threads[i].tokens.tolist()), forks)

  main = tree(0)
  return Trace(
    threads=tuple(threads),
    readings=tuple(readings),
    main=main,
    promise=vocabulary.promise,
    number=vocabulary.number,
    program=vocabulary.decode(main, rule, walked),
    cost=cost(main, vocabulary.table, walked),
    ill_formed=sum(r.malformed for r in readings),
    **facts,
  )


_SAVED = ("path", "parent", "topic", "declared", "fork_index", "tokens", "positions", "rounds", "finished")


def to_json(trace: Trace) -> dict:
  """What a trace can be drawn from again, ready for JSON: threads without pool entries, steps and log p."""
  plain = lambda x: x.tolist() if isinstance(x, np.ndarray) else list(x) if isinstance(x, tuple) else x
  return {
    "steps": trace.steps,
    "finish_reason": trace.finish_reason,
    "refused": trace.refused,
    "prompt": trace.prompt.tolist(),
    "threads": [{name: plain(getattr(t, name)) for name in _SAVED} for t in trace.threads],
    **({} if trace.visibility == "promise" else {"visibility": trace.visibility}),
    **({} if trace.promise == "topic" else {"promise": trace.promise}),
    **({} if trace.number == "digits" else {"number": trace.number}),
  }


def from_json(saved: dict, vocabulary: Vocabulary, rule: PositionRule) -> Trace:
  """The trace that `to_json` saved; what it left out is -1, 0 or NaN."""
  form = Forms(rule, promise=saved.get("promise", "topic"), number=saved.get("number", "digits"))
  vocabulary = vocabulary.speaking(form)
  threads = []
  for number, row in enumerate(saved["threads"]):
    n = len(row["tokens"])
    arrays = {name: np.asarray(row[name], np.int32) for name in ("tokens", "positions", "rounds")}
    threads.append(
      ThreadTrace(
        **(row | arrays | {"path": tuple(row["path"])}),
        number=number,
        entries=np.full(n, -1, np.int32),
        steps=np.zeros(n, np.int32),
        read_in=np.zeros(n, np.int32),
        log_p=np.full(n, np.nan, np.float32),
      )
    )
  return _whole(
    threads,
    [_reading(t, vocabulary, rule) for t in threads],
    vocabulary,
    rule,
    prompt=np.asarray(saved["prompt"], np.int32),
    logits=None,
    visibility=saved.get("visibility", "promise"),
    **{name: saved[name] for name in ("steps", "finish_reason", "refused")},
  )


def lay_out(
  trace: Trace, vocabulary: Vocabulary, rule: PositionRule, prompt: Sequence[int] | None = None
) -> Layout:
  """A response as its policy wrote it, for training: after its own prompt, or after `prompt`."""
  return layout(trace.main, rule, vocabulary.table, trace.prompt.tolist() if prompt is None else prompt)


def _thread_trace(
  i: int, entries: np.ndarray, log: Any, table: Any, prompt_entries: int, vocabulary: Vocabulary
) -> ThreadTrace:
  """Thread `i`, whose tokens are the pool's `entries`; the caller adds path and topic.

  `log` and `table` are the state's TokenLog and table of threads on the host.
  """
  # A token was chosen after the thread's entry before it: the promise's for a chunk, the prompt's for the
  # response.
  chosen_at = np.concatenate([[table.fork_entry[i] if i else prompt_entries], entries]).astype(np.int32)
  tokens, positions, at = log.token[entries], log.position[entries], entries.astype(np.int32)
  pending = table.index[i] >= 0 and (i == 0 or table.status[i] != DONE)  # chosen, but not read back
  if pending:
    tokens, positions = np.append(tokens, table.token[i]), np.append(positions, table.position[i])
    at = np.append(at, np.int32(-1))
  chosen_at = chosen_at[: len(tokens)]
  log_p = log.log_p[chosen_at].astype(np.float32)
  if i:
    log_p[:1] = np.nan
  ends = (vocabulary.tags.end, *vocabulary.tags.eos) if i else vocabulary.tags.eos
  return ThreadTrace(
    number=i,
    path=(),
    parent=int(table.parent[i]),
    topic="",
    declared=None if table.declared[i] < 0 else int(table.declared[i]),
    fork_index=int(table.fork_index[i]),
    tokens=tokens,
    positions=positions,
    entries=at,
    rounds=log.round[chosen_at],
    read_in=np.where(at >= 0, log.round[at], 0),
    steps=log.step[chosen_at],
    log_p=log_p,
    finished=len(tokens) > 0 and int(tokens[-1]) in ends,
  )
