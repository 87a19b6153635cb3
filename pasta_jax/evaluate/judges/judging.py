"""Has answers judged: a run's systems against the baseline, pairs of labels, samples; each pair once.

A judge gets all pairs of all systems at once, so that a batch of requests has them all, mixed. Of several processes
the first one judges, since calls cost money; the others help where a judge scores answers on a device.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pasta_jax.data.prompts import PromptTurn, conversation
from pasta_jax.evaluate.judges import questions
from pasta_jax.evaluate.judges.judge import Answer, Judge, Pair, Reader, Scorer, digest
from pasta_jax.utils import distributed
from pasta_jax.utils.records import Records, read_records
from pasta_jax.utils.waiting import Together


def shuffled(names: Collection[str], seed: object) -> list[str]:
  """Ids or texts in an order that depends on the seed and on nothing else."""
  key = lambda name: hashlib.sha256(f"{seed}/{name}".encode("utf-8", "backslashreplace")).digest()
  return sorted(names, key=key)


def with_places(pairs: Sequence[Pair], judge) -> list[Pair]:
  """The pairs with the orders in which `config.judge` has them read.

  With `judge.orders=one`, the system's answer is the first one of every second prompt, and which ones differs from
  system to system. Prompts that are read in both orders or twice are the same for all systems.
  """
  rank = {i: n for n, i in enumerate(shuffled({p.id for p in pairs}, judge.seed))}

  def placed(p: Pair) -> Pair:
    first = bool((rank[p.id] + zlib.crc32(p.name.encode())) % 2)
    both = judge.orders == "both" or rank[p.id] < judge.both
    orders = (first, not first) if both else (first,)
    return dataclasses.replace(p, orders=orders, repeated=rank[p.id] < judge.repeats)

  return [placed(p) for p in pairs]


def judge_run(
  workdir: Path,
  names: Sequence[str],
  baseline: str,
  requests: list[PromptTurn],
  judges: Sequence[Judge],
  how,
) -> None:
  """Judges the pairs that have no judgement yet, into `judgements/JUDGE/SYSTEM-against-BASELINE.jsonl`, and names
  defects into `judgements/JUDGE/defects/SYSTEM.jsonl` if the judge does.

  `how` is `config.judge`. Raises Waiting, after the other judges have judged, for one that waits for answers.
  """
  answers = {n: _answers(workdir, n, requests) for n in dict.fromkeys([*names, baseline])}
  systems = [n for n in names if n != baseline]
  pairs = [
    Pair(i, a, answers[baseline][i], n)
    for n in systems
    for i, a in answers[n].items()
    if i in answers[baseline]
  ]
  together = Together()
  for judge in judges:
    folder = workdir / "judgements" / judge.name
    groups = {folder / f"{n}-against-{baseline}.jsonl": [] for n in systems}  # type: ignore[var-annotated]
    for p in with_places(pairs, how):
      groups[folder / f"{p.name}-against-{baseline}.jsonl"].append(p)
    named = {}
    if isinstance(judge, Reader) and judge.names_defects:
      named = {folder / "defects" / f"{n}.jsonl": of for n, of in answers.items()}
    with together.part():
      judge_pairs(judge, groups, folder, named)
  together.end()


def _answers(workdir: Path, name: str, requests: Sequence[PromptTurn]) -> dict[str, Answer]:
  """The answers of a system by id, each after its own answers to earlier turns."""
  rows = {r["id"]: r for r in read_records(workdir / "responses" / f"{name}.jsonl")}
  texts = {i: r["text"] for i, r in rows.items()}
  return {
    r.id: Answer(conversation(r, texts), rows[r.id]["text"], rows[r.id]["finish_reason"] == "stop")
    for r in requests
    if r.id in rows
  }


def judge_pairs(
  judge: Judge,
  groups: Mapping[Path, Sequence[Pair]],
  folder: Path,
  answers: Mapping[Path, Mapping[str, Answer]] | None = None,
) -> list[dict[str, dict]]:
  """Judgements by id of each group, of the pairs that could be judged.

  Each group's are kept in its file; a pair is judged again only where one of its texts has changed, or a reading is
  wanted that was not made; those that were made are kept. `answers`, by file and id, get the names of their defects.
  What the judge must keep lies in `folder`. Every process of several calls this with the same arguments.
  """
  if isinstance(judge, Scorer):
    judge.score([p for pairs in groups.values() for p in pairs], folder)
  return distributed.from_first(lambda: _judge(judge, groups, folder, answers or {}))


def _judge(
  judge: Judge,
  groups: Mapping[Path, Sequence[Pair]],
  folder: Path,
  answers: Mapping[Path, Mapping[str, Answer]],
) -> list[dict[str, dict]]:
  """`judge_pairs` in one process."""
  records = {path: Records(path, judge.settings) for path in groups}

  def row_of(path: Path, p: Pair) -> dict | None:
    row = records[path].rows.get(p.id)
    return row if row and row.get("texts") == p.digest() else None

  todo = []
  for path, pairs in groups.items():
    for p in pairs:
      if (row := row_of(path, p)) is None:
        todo.append((path, p))
      elif row.get("orders") and not _has_readings(row, p):
        todo.append((path, _with_readings(row, p)))

  def on_judged(i: int, row: dict) -> None:
    path, p = todo[i]
    records[path].add({"id": p.id, "texts": p.digest(), **row})

  wanted = [p for _, p in todo]
  if answers and isinstance(judge, Reader):
    _read_all(judge, wanted, answers, folder, on_judged)
  elif wanted:
    judge.compare(wanted, folder, on_judged)
  found = [{p.id: row_of(path, p) for p in of} for path, of in groups.items()]
  return [{i: row for i, row in rows.items() if row is not None} for rows in found]


def _has_readings(row: dict, p: Pair) -> bool:
  """Whether a judgement has all readings that are wanted of a pair."""
  orders = all(row["orders"][not first] is not None for first in p.orders)
  return orders and (not p.repeated or row.get("repeated") is not None)


def _with_readings(row: dict, p: Pair) -> Pair:
  """The pair with the readings of an earlier judgement too, which cost nothing again."""
  more = tuple(f for f in (True, False) if f not in p.orders and row["orders"][not f] is not None)
  return dataclasses.replace(p, orders=p.orders + more, repeated=p.repeated or "repeated" in row)


def _read_all(
  judge: Reader, pairs: Sequence[Pair], answers: Mapping[Path, Mapping[str, Answer]], folder: Path, on_judged
) -> None:
  """Has pairs compared, and the defects named of the answers whose file has none yet."""
  records = {path: Records(path, judge.settings_of(questions.DEFECTS_PROMPT)) for path in answers}
  todo = [
    (path, i, a)
    for path, by_id in answers.items()
    for i, a in by_id.items()
    if records[path].rows.get(i, {}).get("text") != digest([a.text])
  ]

  def on_named(k: int, names: list[str]) -> None:
    path, i, a = todo[k]
    records[path].add({"id": i, "text": digest([a.text]), "defects": names})

  if pairs or todo:
    judge.read(pairs, [a for *_, a in todo], folder, on_judged, on_named)
