"""What happened in a response: the device's log and thread table, read back as a program of `lang`."""

import dataclasses

import jax
import numpy as np

from pasta_jax.decode.state import DONE, FINISH_REASONS, State
from pasta_jax.lang.cost import Cost, cost
from pasta_jax.lang.layout import PositionRule
from pasta_jax.lang.program import Program, reading_order
from pasta_jax.lang.thread import Fork, Thread, ill_formed_tags, read
from pasta_jax.lang.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class ThreadTrace:
  """One thread of a response. Arrays have one entry for each own token (n)."""

  number: int
  path: tuple[int, ...]  # ordinals of the promises that lead to it from the main thread, which has ()
  parent: int  # -1 for the main thread
  topic: str
  declared: int | None  # the number in its promise
  fork_index: int  # own index, in the parent, of its promise's last token
  tokens: np.ndarray  # [n] int32
  positions: np.ndarray  # [n] int32
  entries: np.ndarray  # [n] int32, pool entries; -1 for a token that was not read back
  rounds: np.ndarray  # [n] int32, in which the token was written: its clock on a machine with enough branches
  steps: np.ndarray  # [n] int32, decode step in which it was written; 0 for a chunk's `<async>` and unread tokens
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
  thread: Thread  # the main thread, as `lang` has it
  program: Program
  steps: int  # decode steps that were run
  finish_reason: str
  cost: Cost
  ill_formed: int
  refused: int  # promises beyond the limits on count and depth
  logits: np.ndarray | None  # [entries, V] where captured

  @property
  def text(self) -> str:
    """The response in reading order."""
    return reading_order(self.program)


def read_trace(state: State, vocabulary: Vocabulary, rule: PositionRule) -> Trace:
  """Reads a state back. The state is not changed; the pool's keys and values are not copied."""
  log, t, used, prompt_entries, steps, finish, n = jax.device_get(
      (state.log._replace(logits=None), state.threads._replace(visible=None), state.used, state.prompt, state.steps,
       state.finish, state.n_threads))
  used, prompt_entries = int(used), int(prompt_entries)
  prompt = log.token[: prompt_entries + 1] if used > prompt_entries else np.append(log.token[:prompt_entries], t.token[0])
  owner_of = np.asarray(log.thread[:used])
  order = np.argsort(owner_of, kind="stable")
  bounds = np.searchsorted(owner_of[order], np.arange(int(n) + 1))
  paths: list[tuple[int, ...]] = []
  tokens_of: list[list[int]] = []
  for i in range(int(n)):
    paths.append(() if i == 0 else (*paths[t.parent[i]], int(t.ordinal[i])))
  traces = []
  for i in range(int(n)):
    entries = order[bounds[i] : bounds[i + 1]]
    tokens = log.token[entries]
    # Entry e of a thread holds its token; the token was chosen behind the thread's previous entry.
    before = np.concatenate([[prompt_entries if i == 0 else int(t.fork_entry[i])], entries])[: len(entries)]
    rounds, written, log_p = log.round[before], log.step[before], log.log_p[before].astype(np.float32)
    positions, entry = log.position[entries], entries
    waits = t.token[i : i + 1]
    if t.status[i] != DONE or i == 0:  # the token that was chosen last and is not read back
      if t.index[i] >= 0:
        last = entries[-1] if len(entries) else (prompt_entries if i == 0 else int(t.fork_entry[i]))
        tokens, rounds = np.append(tokens, waits), np.append(rounds, log.round[last])
        written, log_p = np.append(written, log.step[last]), np.append(log_p, log.log_p[last])
        positions, entry = np.append(positions, t.position[i]), np.append(entry, -1)
    if i:
      log_p[:1] = np.nan
    last_token = int(tokens[-1]) if len(tokens) else -1
    ends = vocabulary.tags.eos if i == 0 else (vocabulary.tags.end, *vocabulary.tags.eos)
    tokens_of.append(tokens.tolist())
    traces.append(ThreadTrace(
        number=i, path=paths[i], parent=int(t.parent[i]), topic="",
        declared=None if t.declared[i] < 0 else int(t.declared[i]), fork_index=int(t.fork_index[i]), tokens=tokens,
        positions=positions, entries=entry.astype(np.int32), rounds=rounds, steps=written, log_p=log_p,
        finished=last_token in ends))

  def tree(i: int) -> Thread:
    below = [traces[c] for c in range(i + 1, int(n)) if traces[c].parent == i]
    return Thread(tuple(tokens_of[i]), tuple(Fork(c.fork_index, c.declared, tree(c.number)) for c in below))

  main = tree(0)
  kept: dict[int, int] = {}
  wanted = 0
  for i, trace in enumerate(traces):
    reading = read(Thread(tuple(tokens_of[i])), vocabulary.table, is_main=i == 0, numbered=rule.numbered)
    read_back = {k for k in reading.declared if trace.entries[k] >= 0}
    wanted += len(read_back)
    for c in traces:
      if c.parent == i:
        start = max(k for k in range(c.fork_index) if trace.tokens[k] == vocabulary.tags.open) + 1
        topic = [int(x) for k, x in enumerate(trace.tokens[start : c.fork_index], start) if reading.is_topic[k]]
        traces[c.number] = dataclasses.replace(c, topic=vocabulary.text(topic).strip())
        kept[c.number] = i
  logits = np.asarray(state.log.logits[:used]) if state.log.logits.shape[1] else None
  return Trace(
      threads=tuple(traces), prompt=np.asarray(prompt), thread=main, program=vocabulary.decode(main, rule),
      steps=int(steps), finish_reason=FINISH_REASONS[int(finish)], cost=cost(main, vocabulary.table),
      ill_formed=ill_formed_tags(main, vocabulary.table, numbered=rule.numbered), refused=wanted - len(kept),
      logits=logits)
