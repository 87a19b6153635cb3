"""Judges over a run's responses: every system against the baseline, each judgement made once."""

from collections.abc import Sequence
from pathlib import Path

from pasta_jax.data.prompts import PromptTurn, conversation
from pasta_jax.decode.generator import Model, adapter_digest
from pasta_jax.evaluate.judges.judge import Answer, FileJudge, Judge, Pair
from pasta_jax.evaluate.judges.llm import LlmJudge
from pasta_jax.evaluate.judges.local import LocalJudge
from pasta_jax.utils.endpoint import Endpoint
from pasta_jax.utils.records import Records, read_records


def judges_of(config) -> list[Judge]:
  """The judges that `config.eval.judges` names: "local", "llm" (`config.judge`), or files of preferences."""
  judges: list[Judge] = []
  for name in config.eval.judges:
    if name == "local":
      judges.append(local_judge(config))
    elif name == "llm":
      judges.append(LlmJudge(Endpoint.from_config(config.judge, part="judge"), cache=config.judge.cache))
    else:
      judges.append(FileJudge(name, config.eval.baseline))
  return judges


def local_judge(config) -> LocalJudge:
  """The judge whose model is the baseline system's."""
  entry = config.systems[config.eval.baseline]
  return LocalJudge(
    lambda: Model(config, adapter=entry.adapter, dtype=config.eval.judge_dtype),
    {
      "source": config.model.source,
      "adapter": adapter_digest(entry.adapter),
      "dtype": config.eval.judge_dtype,
    },
  )


def pairs_of(workdir: Path, name: str, baseline: str, requests: list[PromptTurn]) -> list[Pair]:
  """The requests' answers by a system and by the baseline, each behind its own answers to earlier turns."""
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


def judge(config, workdir: Path, names: list[str], requests: list[PromptTurn], judges: list[Judge]) -> None:
  """Judges what has not been judged: `judgements/JUDGE/SYSTEM-against-BASELINE.jsonl`."""
  baseline = config.eval.baseline
  for j in judges:
    for name in names:
      if name == baseline:
        continue
      folder = workdir / "judgements" / j.name
      judge_pairs(j, pairs_of(workdir, name, baseline, requests), folder / f"{name}-against-{baseline}.jsonl")


def judge_pairs(judge: Judge, pairs: Sequence[Pair], path: Path) -> dict[str, dict]:
  """Judgements by id, of those pairs that could be judged; kept in `path` and made once, unless a text
  changes."""
  records = Records(path, judge.settings)
  known = lambda p: records.rows.get(p.id, {}).get("texts") == p.digest()
  todo = [p for p in pairs if not known(p)]
  if todo:
    judge.compare(
      todo, path.parent, lambda i, row: records.add({"id": todo[i].id, "texts": todo[i].digest(), **row})
    )
  return {p.id: records.rows[p.id] for p in pairs if known(p)}
