"""Quality of samples: grades of a known order make the known pairs, ties make none, the paper's ratio by hand."""

import json
import math
import re
from pathlib import Path

import pytest

from pasta_jax.config import Config, with_changes
from pasta_jax.evaluate.judges.llm import LlmJudge
from pasta_jax.evaluate.judges.local import LocalJudge
from pasta_jax.preference.quality import check_quality, judge_samples, noise, win_loss_ratio
from pasta_jax.preference.score import choose
from pasta_jax.utils.endpoint import BATCH, Endpoint
from pasta_jax.utils.waiting import Waiting

JUDGE = Config().judge


def sample(of: str, n: int, text: str, **more) -> dict:
  return {
    "id": f"{of}/{n}",
    "of": of,
    "prompt": f"Question {of}?",
    "text": text,
    "finish_reason": "stop",
  } | more


def prompts(count: int) -> tuple[dict, dict, dict]:
  """(samples, the baseline's answers, the data set's responses) whose texts begin with their worth, "worth 7: …"."""
  names = [str(n) for n in range(count)]
  samples = {
    of: [sample(of, k, f"worth {1 + (k + n) % 9}: sample {k} of {of}") for k in range(4)]
    for n, of in enumerate(names)
  }
  baseline = {of: sample(of, 0, f"worth 5: baseline {of}") for of in names}
  return samples, baseline, {of: f"worth 9: the data's {of}" for of in names}


def answer_requests(folder: Path, reply) -> list[dict]:
  """Answers a batch with `reply(question, texts of the answers)`; returns the requests."""
  rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
  out = []
  for row in rows:
    question = row["body"]["messages"][-1]["content"]
    texts = re.findall(r"<answer>\n(.*?)\n</answer>", question, re.DOTALL)
    out.append(json.dumps({"custom_id": row["custom_id"], "text": reply(question, texts)}))
  (folder / "answers.jsonl").write_text("\n".join(out) + "\n")
  return rows


def worth(text: str) -> int:
  return int(text.split()[1].rstrip(":"))


def judged(folder: Path, quality: str, count: int = 20, **changes):
  judge = LlmJudge(Endpoint("reader", kind=BATCH))
  samples, baseline, references = prompts(count)
  return judge_samples(judge, samples, baseline, references, folder, quality=quality, how=JUDGE, **changes)


def test_grades_of_a_known_order_give_the_known_pairs(tmp_path):
  """One call a prompt for samples and references, shuffled; a tenth twice, in another order."""
  with pytest.raises(Waiting, match="22 requests"):
    judged(tmp_path, "grade")
  shown = []

  def grade(question: str, texts: list[str]) -> str:
    shown.append(texts)
    assert "grade for each of the 6 answers" in question
    return json.dumps({str(n): worth(t) for n, t in enumerate(texts, 1)})

  rows = answer_requests(tmp_path, grade)
  assert all(r["body"]["max_tokens"] >= 60 and "logprobs" not in r["body"] for r in rows)
  by_prompt: dict = {}
  for texts in shown:
    by_prompt.setdefault(frozenset(texts), []).append(texts)
  assert len(by_prompt) == 20 and sorted(len(v) for v in by_prompt.values()) == [1] * 18 + [2] * 2
  assert all(v[0] != v[1] for v in by_prompt.values() if len(v) == 2)
  first = [[t.split(":")[1].split()[0] for t in texts].index("baseline") for texts in shown]
  assert len(set(first)) > 3, "the references have no place of their own"
  found = judged(tmp_path, "grade")
  samples, *_ = prompts(20)
  for rows in samples.values():
    for s in rows:
      assert found.by_sample[s["id"]] == pytest.approx((worth(s["text"]) - 1) / 9)
    scored = [
      s | {"speedup": 1.0, "quality": found.by_sample[s["id"]], "defects": [], "longest_path": 1}
      for s in rows
    ]
    pair = choose(scored, math.inf)
    worths = [worth(s["text"]) for s in rows]
    assert (worths[pair.best], worths[pair.worst]) == (max(worths), min(worths))
  assert found.figures["lists graded twice"] == 2 and found.figures["same best"] == 1
  assert found.figures["mean difference of two gradings"] == 0
  assert found.figures["mean grade of the baseline"] == pytest.approx(4 / 9)
  assert found.figures["mean grade of the data set"] == pytest.approx(8 / 9)


def test_lists_that_come_back_without_grades_are_left_out(tmp_path, capsys):
  with pytest.raises(Waiting):
    judged(tmp_path, "grade", 10)
  replies = iter(["I cannot say.", '{"1": 3}'])
  answer_requests(
    tmp_path, lambda _, texts: next(replies, json.dumps({str(n): 5 for n in range(1, len(texts) + 1)}))
  )
  found = judged(tmp_path, "grade", 10)
  assert len(found.by_sample) in (32, 36)  # two lists, which may be of the same prompt
  assert "reader: 2 of 11 lists got no grades (not a grade for each answer 2)" in capsys.readouterr().err


def test_ties_make_no_pair():
  """Where quality alone counts, speed breaks no tie between the best and the worst; it chooses among the best."""
  row = lambda quality, speedup: {
    "quality": quality,
    "speedup": speedup,
    "defects": [],
    "text": str(speedup),
    "longest_path": 1,
  }
  assert choose([row(0.5, 1.0), row(0.5, 2.0)], math.inf).reason == "no difference"
  chosen = choose([row(0.5, 1.0), row(0.5, 2.0), row(0.2, 1.5), row(0.2, 3.0)], math.inf)
  assert (chosen.best, chosen.worst) == (1, 2)
  assert choose([row(0.5, 1.0), row(0.5, 2.0)], 4.0).best == 1
  assert choose([row(0.25, 2.0), row(0.5, 1.0)], 4.0).reason == "no difference"


def test_noise_by_hand():
  one = {"a": 0.0, "b": 0.5, "c": 1.0}
  assert noise([(one, one)]) == {
    "lists graded twice": 1,
    "mean difference of two gradings": 0,
    "same best": 1,
    "rank correlation": 1,
  }
  other = {"a": 1.0, "b": 0.5, "c": 0.0}
  found = noise([(one, other), (one, one)])
  assert found["same best"] == 0.5 and found["rank correlation"] == 0
  assert found["mean difference of two gradings"] == pytest.approx(1 / 3)
  assert noise([({"a": 0.5, "b": 0.5}, {"a": 0.1, "b": 0.2})])["same best"] == 0.5  # a tie is shared out
  assert noise([]) == {}


@pytest.mark.parametrize(
  "preferences, ratio",
  [
    ([0.9, 0.8, 0.3, 0.4], 1.7 / 1.3), ([1, 1, 1, 1], 8), ([0, 0, 0, 0], 0), ([1, 0, 1, 0], 1), ([0.5] * 4, 1),
    ([0.6, 0.5], 0.85 / 0.5), ([0.2, 0.5], 0.25 / 1.05),
  ],
)  # fmt: skip
def test_the_papers_ratio_by_hand(preferences, ratio):
  assert win_loss_ratio(preferences) == pytest.approx(ratio)


def test_the_ratio_compares_with_the_baseline_and_the_data_set_in_both_orders(tmp_path):
  with pytest.raises(Waiting, match="48 requests"):
    judged(tmp_path, "ratio", 3)
  rows = answer_requests(
    tmp_path,
    lambda _, texts: "T" if worth(texts[0]) == worth(texts[1]) else "AB"[worth(texts[0]) < worth(texts[1])],
  )
  assert len(rows) == 3 * 4 * 4
  found = judged(tmp_path, "ratio", 3).by_sample
  samples, *_ = prompts(3)
  for s in (s for rows in samples.values() for s in rows):
    others = [5, 5, 9, 9]
    p = [1.0 if worth(s["text"]) > o else 0.5 if worth(s["text"]) == o else 0.0 for o in others]
    assert found[s["id"]] == pytest.approx(win_loss_ratio(p))


def test_what_a_quality_needs_is_said_before_any_work():
  local = LocalJudge(lambda: None, {})  # type: ignore[arg-type, return-value]
  with pytest.raises(ValueError, match="preference.quality=grade needs a judge that reads, not local"):
    check_quality("grade", local, {})
  with pytest.raises(ValueError, match="prompt 'b' and 0 others have no \"response\""):
    check_quality("ratio", local, {"a": "x", "b": ""})
  with pytest.raises(ValueError, match="preference.quality"):
    with_changes(Config(), {"preference.quality": "length"})
