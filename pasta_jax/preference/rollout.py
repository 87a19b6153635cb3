"""Samples of a policy, several for each prompt, and the baseline's answers; a resumed run repeats none, and several
processes share them out."""

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pasta_jax.config.sections import share_of
from pasta_jax.data.prompts import PromptTurn
from pasta_jax.decode.generator import Model, adapter_digest, decode_settings
from pasta_jax.decode.record import current, to_record
from pasta_jax.decode.scheduler import Scheduler
from pasta_jax.decode.trace import Trace, to_json
from pasta_jax.evaluate.identity import settings_of
from pasta_jax.evaluate.systems.registry import load_system
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.preference.score import chunk_facts
from pasta_jax.utils import distributed
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import agree, missing, read_records, settings_beside
from pasta_jax.utils.shared_records import SharedRecords

PLAIN = "plain"  # in place of a number: the sample that was drawn without promises


def is_plain(sample: str) -> bool:
  """Whether the sample with the id `sample` is the one without promises (`preference.plain`)."""
  return sample.rpartition("#")[2] == PLAIN


def seed_of(seed: int, policy: str | None, speed: int, sample: str) -> int:
  """The seed of a sample with the id `sample`.

  It does not depend on the machine or on what else is sampled; it does on the policy, so that rounds do not
  draw the same noise.
  """
  return zlib.crc32(f"{seed}/{policy}/{speed}/{sample}".encode())


def sample_row(trace: Trace, vocabulary: Vocabulary) -> dict:
  """The record's JSON with what `score` needs, the trace, and the decode loop's log p of its own tokens."""
  return {
    **to_record(trace, vocabulary).to_json(),
    **chunk_facts(trace, vocabulary),
    "prompt_tokens": len(trace.prompt),
    "rounds": np.sort(np.concatenate([t.rounds for t in trace.threads])).tolist(),
    "log_p": float(sum(np.nansum(t.log_p, dtype=np.float64) for t in trace.threads)),
    "trace": to_json(trace),
  }


def _requests_of_share(requests: Sequence[PromptTurn], share: tuple[int, int] | None) -> Sequence[PromptTurn]:
  return requests[share[0] - 1 :: share[1]] if share else requests


def _records(
  path: Path, settings: dict, share: tuple[int, int] | None
) -> tuple[SharedRecords, dict[str, dict]]:
  """(the file that rows are added to, by id the rows of `path` and of all files of shares beside it).

  The other files are only read, since another process may be writing to them.
  """
  file_of_share = lambda k, n: path.with_name(f"{path.stem}.{k}-of-{n}{path.suffix}")
  records = SharedRecords(file_of_share(*share) if share else path, settings)
  rows = dict(records.rows)
  for other in (path, *sorted(path.parent.glob(file_of_share("*", "*").name))):
    if other != records.path and (more := read_records(other)):
      if distributed.is_first():
        agree(other, settings_beside(other), settings)
      rows |= {row["id"]: row for row in more}
  return records, {i: current(row) for i, row in rows.items()}


def draw_samples(
  config, adapter: str, requests: Sequence[PromptTurn], path: Path, speed: int = -1, *, may_draw: bool = True
) -> dict[str, list[dict]]:
  """`config.preference.samples` samples of each request from the policy `adapter`, by the request's id, and with
  `preference.plain` one that is drawn without promises.

  Decoding follows `config.decode`, but with `preference.temperature`. Rows are appended to `path` as samples
  finish, or with `preference.share` to a file beside it, which has that share's requests only; rows that
  exist are not drawn again. Every process of several calls this with the same arguments. Raises ValueError if rows are
  missing and `may_draw` is False.
  """
  c = config.preference
  digest = adapter_digest(adapter)
  settings = decode_settings(config, adapter, parallel=True) | {
    "source": config.model.source,
    "adapter's sha256": digest,
    "samples": c.samples,
    "speed": speed,
    "decode.temperature": c.temperature,
    "decode.seed": c.seed,
    "decode.dtype": c.sample_dtype,
  }
  share = share_of(c.share)
  records, rows = _records(path, settings, share)
  requests = _requests_of_share(requests, share)
  names = [*map(str, range(c.samples)), *([PLAIN] if c.plain else [])]
  wanted = [dataclasses.replace(r, id=f"{r.id}#{name}") for r in requests for name in names]
  todo = missing(path, rows, wanted)
  if todo and not may_draw:
    raise ValueError(
      f"{path} lacks {len(todo)} of {len(wanted)} samples: run the sample stage first "
      "(--config.preference.stages=sample)"
    )
  done = len(wanted) - len(todo)

  def work(share: Sequence[PromptTurn], add: Callable[[dict], None]) -> None:
    model = Model(config, adapter=adapter, dtype=c.sample_dtype)
    encoded = {prompt: model.encode(prompt, speed) for prompt in {r.prompt for r in share}}
    sampling = dataclasses.replace(model.sampling, temperature=c.temperature)
    started, tokens = time.perf_counter(), 0
    bar, task = progress_bar(f"samples, {path.parent.name}", done + len(share), done)

    def finish(request: PromptTurn, trace: Trace) -> None:
      nonlocal tokens
      tokens += trace.cost.total_tokens
      add(
        {
          "id": request.id,
          "of": request.id.rpartition("#")[0],
          "prompt": request.prompt,
          **sample_row(trace, model.vocabulary),
        }
      )
      bar.update(task, advance=1, note=f"{tokens / (time.perf_counter() - started):.0f} tokens/s")

    def draw(some: Sequence[PromptTurn], parallel: bool) -> None:
      width = c.branch_width if parallel else 1
      scheduler = Scheduler(model.interpreter(parallel), batch_size=c.decode_batch_size, branch_width=width)
      seeds = [seed_of(c.seed, digest, speed, r.id) for r in some]
      prompts = [encoded[r.prompt] for r in some]
      scheduler.run(prompts, sampling, seeds=seeds, on_finish=lambda i, trace: finish(some[i], trace))

    with bar:
      for parallel in (True, False):
        if some := [r for r in share if parallel != is_plain(r.id)]:
          draw(some, parallel)

  started = time.perf_counter()
  # Samples of a prompt share its prefill.
  records.make(todo, work, together=lambda r: r.id.rpartition("#")[0])
  rows |= {r.id: records.rows[r.id] for r in todo}
  if todo and distributed.is_first():
    tokens, seconds = sum(rows[r.id]["total_tokens"] for r in todo), time.perf_counter() - started
    print(f"{len(todo)} samples of {tokens} tokens in {seconds:.0f} s: {tokens / seconds:.0f} tokens/s")
  return {r.id: [rows[f"{r.id}#{name}"] for name in names] for r in requests}


def baseline_answers(config, requests: Sequence[PromptTurn], path: Path) -> dict[str, dict]:
  """The answers of `config.eval.baseline` by id, with which samples are compared in quality and speed."""
  name = config.eval.baseline
  share = share_of(config.preference.share)
  records, rows = _records(path, settings_of(config, name, timed=False), share)
  requests = _requests_of_share(requests, share)
  todo = missing(path, rows, requests)
  done = len(requests) - len(todo)

  def work(share: Sequence[PromptTurn], add: Callable[[dict], None]) -> None:
    system = load_system(config, name, {}, timed=False)
    bar, task = progress_bar(name, done + len(share), done)

    def on_finish(i: int, record: dict) -> None:
      add({"id": share[i].id, "prompt": share[i].prompt, **record})
      bar.advance(task)

    with bar:
      system.answer([[{"role": "user", "content": r.prompt}] for r in share], on_finish)

  records.make(todo, work)
  rows |= {r.id: records.rows[r.id] for r in todo}
  return {r.id: rows[r.id] for r in requests}
