"""Has a run's responses judged: every system against the baseline, each pair once."""

from collections.abc import Sequence
from pathlib import Path

from pasta_jax.data.prompts import PromptTurn, conversation
from pasta_jax.evaluate.judges.judge import Answer, Judge, Pair
from pasta_jax.utils.records import Records, read_records


def pairs_of(workdir: Path, name: str, baseline: str, requests: list[PromptTurn]) -> list[Pair]:
  """The answers of a system and of the baseline, each after its own answers to earlier turns."""
  rows = {
    n: {r["id"]: r for r in read_records(workdir / "responses" / f"{n}.jsonl")} for n in (name, baseline)
  }

  def answer(n: str, request: PromptTurn) -> Answer:
    row = rows[n][request.id]
    return Answer(
      conversation(request, {i: r["text"] for i, r in rows[n].items()} if request.earlier else {}),
      row["text"],
      row["finish_reason"] == "stop",
    )

  return [
    Pair(r.id, answer(name, r), answer(baseline, r), name)
    for r in requests
    if r.id in rows[name] and r.id in rows[baseline]
  ]


def judge_run(
  workdir: Path, names: Sequence[str], baseline: str, requests: list[PromptTurn], judges: Sequence[Judge]
) -> None:
  """Judges the pairs that have no judgement yet, into `judgements/JUDGE/SYSTEM-against-BASELINE.jsonl`."""
  for judge in judges:
    for name in names:
      if name != baseline:
        path = workdir / "judgements" / judge.name / f"{name}-against-{baseline}.jsonl"
        judge_pairs(judge, pairs_of(workdir, name, baseline, requests), path)


def judge_pairs(judge: Judge, pairs: Sequence[Pair], path: Path) -> dict[str, dict]:
  """Judgements by id, of the pairs that could be judged.

  They are kept in `path`; a pair is judged again only where one of its texts has changed.
  """
  records = Records(path, judge.settings)
  is_judged = lambda p: records.rows.get(p.id, {}).get("texts") == p.digest()
  todo = [p for p in pairs if not is_judged(p)]
  if todo:
    judge.compare(
      todo, path.parent, lambda i, row: records.add({"id": todo[i].id, "texts": todo[i].digest(), **row})
    )
  return {p.id: records.rows[p.id] for p in pairs if is_judged(p)}
