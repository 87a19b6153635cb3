"""Quality of samples: what a judge says of them, in the three ways that `preference.quality` names.

preference  its preference for the sample over Baseline-SFT's answer, in [0, 1]
grade       one call shows a prompt's samples and reference answers, shuffled, and asks a grade for each: N + 1
            answers or more in one call; scaled to [0, 1]. A tenth of the prompts is graded again in another
            order, which measures the grades' noise
ratio       the paper's: confidence of wins over confidence of losses (`win_loss_ratio`) against Baseline-SFT's
            answer and the data set's own response, each in both orders
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pasta_jax.evaluate.judges import questions
from pasta_jax.evaluate.judges.judge import Answer, Judge, Pair, Reader, digest
from pasta_jax.evaluate.judges.judging import judge_pairs, shuffled, with_places
from pasta_jax.utils import distributed
from pasta_jax.utils.records import Records

Samples = Mapping[str, Sequence[dict]]  # samples of each prompt, by the prompt's id
REPEATED = 0.1  # share of the prompts whose lists are graded twice
FEWEST_LOSSES = 0.5  # confidence: a sample that never lost counts as one that lost once by the toss of a coin


@dataclasses.dataclass(frozen=True)
class Qualities:
  """What a judge said of samples."""

  by_sample: dict[str, float]  # by the sample's id; samples that could not be judged are left out
  figures: dict[str, float]  # of the judge: its noise, the grades of the references


def judge_samples(
  judge: Judge,
  samples: Samples,
  baseline: Mapping[str, dict],
  references: Mapping[str, str],
  folder: Path,
  *,
  quality: str,
  how,
) -> Qualities:
  """The quality of each sample (`preference.quality`).

  Judgements are kept in `folder`. `baseline` are rows by prompt, `references` the data set's own responses, `how`
  is `config.judge`. Every process of several calls this with the same arguments.
  """
  if quality == "grade":
    assert isinstance(judge, Reader), "check_quality"
    grades = lambda: dataclasses.asdict(_grades(judge, samples, baseline, references, folder, how.seed))
    return Qualities(**distributed.from_first(grades))
  pairs = [Pair(s["id"], _answer(s), _answer(baseline[of]), "samples") for of, s in _each(samples)]
  if quality == "preference":
    [rows] = judge_pairs(judge, {folder / "samples.jsonl": with_places(pairs, how)}, folder)
    return Qualities({i: row["preference"] for i, row in rows.items()}, {})
  own = [
    Pair(s["id"], _answer(s), Answer(_conversation(s), references[of]), "samples") for of, s in _each(samples)
  ]
  groups = {folder / "against-baseline.jsonl": pairs, folder / "against-reference.jsonl": own}
  first, second = judge_pairs(judge, groups, folder)
  return Qualities(
    {i: win_loss_ratio([*_readings(first[i]), *_readings(second[i])]) for i in first if i in second}, {}
  )


def check_quality(quality: str, judge: Judge, references: Mapping[str, str]) -> None:
  """Raises ValueError, one line, if the judge or the prompts are of no use for this quality."""
  if quality == "grade" and not isinstance(judge, Reader):
    raise ValueError(
      f"preference.quality=grade needs a judge that reads, not {judge.name}: --config.eval.judges=llm"
    )
  if quality == "ratio" and (without := [i for i, text in references.items() if not text]):
    raise ValueError(
      f"preference.quality=ratio compares samples with the data set's own responses too: prompt {without[0]!r} and "
      f'{len(without) - 1} others have no "response" in preference.prompts'
    )


def win_loss_ratio(preferences: Iterable[float]) -> float:
  """Summed confidence of a sample's wins over that of its losses, from its preference in each comparison.

  A preference p above one half is a win with confidence p, one below a loss with confidence 1 - p, one half is
  half a win and half a loss. The paper does not say what a sample without losses is worth: here losses count
  `FEWEST_LOSSES` at least, so that four sure wins make 8.
  """
  p = np.asarray([*preferences])
  even = 0.25 * float((p == 0.5).sum())
  wins = float(p[p > 0.5].sum()) + even
  losses = float((1 - p[p < 0.5]).sum()) + even
  return wins / max(losses, FEWEST_LOSSES)


def _readings(row: dict) -> list[float]:
  """The preferences of a judgement in each order; equal texts, and judges without orders, have one for both."""
  return [p for p in row.get("orders") or () if p is not None] or [row["preference"]] * 2


def _grades(
  judge: Reader,
  samples: Samples,
  baseline: Mapping[str, dict],
  references: Mapping[str, str],
  folder: Path,
  seed: int,
) -> Qualities:
  texts = {
    of: [
      *dict.fromkeys([baseline[of]["text"], *([references[of]] if references.get(of) else [])]),
      *(s["text"] for s in rows),
    ]  # fmt: skip
    for of, rows in samples.items()
    if rows
  }
  twice = shuffled(texts, seed)[: math.ceil(REPEATED * len(texts))]
  asked = [(of, 0) for of in texts] + [(of, 1) for of in twice]
  lists: dict[str, tuple[str, ...]] = {}  # by the list's id: its texts in the order shown, each once
  for of, again in asked:
    lists[f"{of}#{again}"] = tuple(shuffled({*texts[of]}, f"{seed}/{of}/{again}"))
  of_list = {f"{of}#{again}": of for of, again in asked}
  records = Records(folder / "grades.jsonl", judge.settings_of(questions.GRADES_PROMPT))
  is_graded = lambda i: records.rows.get(i, {}).get("texts") == digest(lists[i])
  todo = [i for i in lists if not is_graded(i)]

  def on_graded(k: int, grades: list[float]) -> None:
    records.add({"id": todo[k], "texts": digest(lists[todo[k]]), "grades": grades})

  said = lambda i: _conversation(samples[of_list[i]][0])
  if todo:
    judge.grade([[Answer(said(i), text) for text in lists[i]] for i in todo], folder, on_graded)
  graded: dict[str, list[dict[str, float]]] = {}  # by prompt: the grade of each text, of one list or two
  for i, shown in lists.items():
    if is_graded(i):
      graded.setdefault(of_list[i], []).append(dict(zip(shown, records.rows[i]["grades"])))
  mean = lambda of, text: float(np.mean([by_text[text] for by_text in graded[of]]))
  qualities = {s["id"]: mean(of, s["text"]) for of, s in _each(samples) if of in graded}
  figures = {
    "lists graded": len(graded),
    "mean grade of samples": _mean(qualities.values()),
    "mean grade of the baseline": _mean(mean(of, baseline[of]["text"]) for of in graded),
    "mean grade of the data set": _mean(mean(of, references[of]) for of in graded if references.get(of)),
    **noise([(both[0], both[1]) for both in graded.values() if len(both) == 2]),
  }
  return Qualities(qualities, {name: v for name, v in figures.items() if not math.isnan(v)})


def noise(twice: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, float]:
  """How far two gradings of the same lists agree: it bounds what the choice of best and worst can teach.

  `same best`: the share of lists whose best answer of the first grading is a best one of the second too; ties of
  the first are shared out. `rank correlation` is Spearman's, over lists in which both gradings differ somewhere.
  """
  if not twice:
    return {}
  from scipy import stats  # here: it takes most of a second to load

  difference, best, correlation = [], [], []
  for first, second in twice:
    a, b = np.array([*first.values()]), np.array([second[text] for text in first])
    difference += np.abs(a - b).tolist()
    best.append(float((b == b.max())[a == a.max()].mean()))
    if np.ptp(a) and np.ptp(b):
      correlation.append(float(stats.spearmanr(a, b).statistic))
  return {
    "lists graded twice": len(twice),
    "mean difference of two gradings": float(np.mean(difference)),
    "same best": float(np.mean(best)),
    "rank correlation": _mean(correlation),
  }


def _mean(values: Iterable[float]) -> float:
  """NaN of none."""
  found = [*values]
  return float(np.mean(found)) if found else math.nan


def _each(samples: Samples) -> list[tuple[str, dict]]:
  """(id of the prompt, sample) of all samples."""
  return [(of, s) for of, rows in samples.items() for s in rows]


def _conversation(row: dict) -> list[dict[str, str]]:
  return [{"role": "user", "content": row["prompt"]}]


def _answer(row: dict) -> Answer:
  return Answer(_conversation(row), row["text"], row["finish_reason"] == "stop")
