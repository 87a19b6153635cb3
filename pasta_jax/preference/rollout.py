"""Answers sampled from a policy, several a prompt, and the baseline's: rows that a resumed run does not draw
again."""

import dataclasses
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pasta_jax.config.sections import share_of
from pasta_jax.data.prompts import PromptTurn
from pasta_jax.decode.generator import Model, adapter_digest
from pasta_jax.decode.record import to_record
from pasta_jax.decode.scheduler import Scheduler
from pasta_jax.decode.trace import Trace, to_json
from pasta_jax.evaluate.run import decode_settings, settings_of
from pasta_jax.evaluate.systems.registry import load_system
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.preference.score import chunk_facts
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.records import Records, agree, missing, read_records, settings_beside


def seed_of(seed: int, policy: str | None, speed: int, sample: str) -> int:
  """The seed of a sample, by its id: the same on every machine, whatever is sampled beside it; another one
  for another policy, so that rounds do not draw the same noise."""
  return zlib.crc32(f"{seed}/{policy}/{speed}/{sample}".encode())


def sample_record(trace: Trace, vocabulary: Vocabulary) -> dict:
  """`to_record`, what `score` needs besides, the trace, and the decode loop's log p of the tokens that it
  chose."""
  return {
    **to_record(trace, vocabulary),
    **chunk_facts(trace, vocabulary),
    "prompt_tokens": len(trace.prompt),
    "rounds": np.sort(np.concatenate([t.rounds for t in trace.threads])).tolist(),
    "log_p": float(sum(np.nansum(t.log_p, dtype=np.float64) for t in trace.threads)),
    "trace": to_json(trace),
  }


def _own(requests: Sequence[PromptTurn], share: tuple[int, int] | None) -> Sequence[PromptTurn]:
  return requests[share[0] - 1 :: share[1]] if share else requests


def _records(path: Path, settings: dict, share: tuple[int, int] | None) -> tuple[Records, dict[str, dict]]:
  """(the file that rows are added to, all rows of `path` and of the shares of it that stand beside it).

  The others are only read: another process may be writing to them.
  """
  named = lambda k, n: path.with_name(f"{path.stem}.{k}-of-{n}{path.suffix}")
  records = Records(named(*share) if share else path, settings)
  rows = dict(records.rows)
  for other in (path, *sorted(path.parent.glob(named("*", "*").name))):
    if other != records.path and (found := read_records(other)):
      agree(other, settings_beside(other), settings)
      rows |= {row["id"]: row for row in found}
  return records, rows


def draw(
  config, adapter: str, requests: Sequence[PromptTurn], path: Path, speed: int = -1, *, may_draw: bool = True
) -> dict[str, list[dict]]:
  """`config.preference.samples` samples of each request from the policy `adapter`, by the request's id.

  They are decoded as `config.decode` says, but for the temperature. Rows stand in `path` as they end, or, of
  `preference.share` only those, in a file beside it; those that are there are not drawn again. Raises
  ValueError if some are missing and `may_draw` does not hold.
  """
  c = config.preference
  digest = adapter_digest(adapter)
  settings = decode_settings(config, parallel=True) | {
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
  requests = _own(requests, share)
  wanted = [dataclasses.replace(r, id=f"{r.id}#{k}") for r in requests for k in range(c.samples)]
  todo = missing(path, rows, wanted)
  if todo and not may_draw:
    raise ValueError(
      f"{path} lacks {len(todo)} of {len(wanted)} samples: run the sample stage first "
      "(--config.preference.stages=sample)"
    )
  if todo:
    generator = Model(config, adapter=adapter, dtype=c.sample_dtype)
    decoder = Scheduler(
      generator.interpreter(True), batch_size=c.decode_batch_size, branch_width=c.branch_width
    )
    encoded = {prompt: generator.encode(prompt, speed) for prompt in {r.prompt for r in todo}}
    sampling = dataclasses.replace(generator.sampling, temperature=c.temperature)
    started, tokens = time.perf_counter(), 0
    bar, task = progress_bar(f"samples, {path.parent.name}", len(wanted), len(wanted) - len(todo))

    def done(i: int, trace: Trace) -> None:
      nonlocal tokens
      tokens += trace.cost.total_tokens
      rows[todo[i].id] = {
        "id": todo[i].id,
        "of": todo[i].id.rpartition("#")[0],
        "prompt": todo[i].prompt,
        **sample_record(trace, generator.vocabulary),
      }
      records.add(rows[todo[i].id])
      bar.update(task, advance=1, note=f"{tokens / (time.perf_counter() - started):.0f} tokens/s")

    seeds = [seed_of(c.seed, digest, speed, r.id) for r in todo]
    with bar:
      decoder.run([encoded[r.prompt] for r in todo], sampling, seeds=seeds, on_finish=done)
    seconds = time.perf_counter() - started
    print(f"{len(todo)} samples of {tokens} tokens in {seconds:.0f} s: {tokens / seconds:.0f} tokens/s")
  return {r.id: [rows[f"{r.id}#{k}"] for k in range(c.samples)] for r in requests}


def answers_of_baseline(config, requests: Sequence[PromptTurn], path: Path) -> dict[str, dict]:
  """The baseline system's answers (`config.eval.baseline`) by id: what quality and speed are measured
  against."""
  name = config.eval.baseline
  share = share_of(config.preference.share)
  records, rows = _records(path, settings_of(config, name, timed=False), share)
  requests = _own(requests, share)
  todo = missing(path, rows, requests)
  if todo:
    system = load_system(config, name, {}, timed=False)
    bar, task = progress_bar(name, len(requests), len(requests) - len(todo))

    def done(i: int, record: dict) -> None:
      rows[todo[i].id] = {"id": todo[i].id, "prompt": todo[i].prompt, **record}
      records.add(rows[todo[i].id])
      bar.advance(task)

    with bar:
      system.many([[{"role": "user", "content": r.prompt}] for r in todo], done)
  return {r.id: rows[r.id] for r in requests}
