"""A run's answers judged by file: all systems in one batch, blind, places balanced; runs that stop and go on."""

import collections
import json
import re
from pathlib import Path

import pytest

from pasta_jax.config import Config, with_changes
from pasta_jax.data.prompts import PromptTurn
from pasta_jax.evaluate.judges.judging import judge_run
from pasta_jax.evaluate.judges.llm import LlmJudge
from pasta_jax.evaluate.judges.questions import DEFECTS
from pasta_jax.utils.records import Records
from pasta_jax.utils.waiting import Waiting

REQUESTS = [PromptTurn(f"p{n}", f"Question {n}?", "") for n in range(40)]
SYSTEMS = ("pasta", "fast", "baseline")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
  """Responses whose worth is a digit in them: pasta's is the better one at every third prompt, fast's never."""
  for name in SYSTEMS:
    records = Records(tmp_path / "responses" / f"{name}.jsonl", {})
    for n, r in enumerate(REQUESTS):
      worth = {"pasta": 9 if n % 3 == 0 else 1, "fast": 2, "baseline": 5}[name]
      text = (
        f"worth {worth}, {n}, {len(name)}" if n or name != "fast" else "worth 5, 0, 8"
      )  # once as the baseline
      records.add({"id": r.id, "prompt": r.prompt, "text": text, "finish_reason": "stop"})
  return tmp_path


def judge(workdir: Path, **changes) -> dict[str, dict[str, dict]]:
  """Judgements by system and id. Raises Waiting."""
  settings = {"kind": "batch", "model": "a/reader", "orders": "one"} | changes
  config = with_changes(Config(), {f"judge.{k}": v for k, v in settings.items()})
  judge_run(workdir, SYSTEMS, "baseline", REQUESTS, [LlmJudge.from_config(config)], config.judge)
  return {
    name: {r["id"]: r for r in lines(workdir / "judgements" / "a-reader" / f"{name}-against-baseline.jsonl")}
    for name in SYSTEMS[:2]
  }


def lines(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def shown(row: dict) -> list[int]:
  """The worth of the answers in a request."""
  return [int(w) for w in re.findall(r"<answer>\nworth (\d)", row["body"]["messages"][-1]["content"])]


def by_worth(row: dict) -> str:
  worth = shown(row)
  if len(worth) == 1:
    return "2, 3" if worth[0] < 5 else "0"
  return "A" if worth[0] > worth[1] else "B" if worth[0] < worth[1] else "T"


def reply(workdir: Path, how=by_worth) -> list[dict]:
  """Answers the batch; returns its requests."""
  folder = workdir / "judgements" / "a-reader"
  rows = lines(folder / "requests.jsonl")
  text = "".join(json.dumps({"custom_id": r["custom_id"], "text": how(r)}) + "\n" for r in rows)
  (folder / "answers.jsonl").write_text(text)
  return rows


def test_one_order_balanced_over_prompts_and_blind(workdir):
  with pytest.raises(Waiting, match="79 requests"):  # equal texts need no reader
    judge(workdir)
  rows = reply(workdir)
  whole = json.dumps(rows)
  assert not any(name in whole for name in SYSTEMS)
  found = judge(workdir)
  for name, want in (("pasta", [n % 3 == 0 for n in range(40)]), ("fast", [False] * 40)):
    assert [found[name][r.id]["preference"] for r in REQUESTS[1:]] == [float(w) for w in want[1:]]
    first = sum(row["orders"][0] is not None for row in found[name].values() if row["orders"])
    second = sum(row["orders"][1] is not None for row in found[name].values() if row["orders"])
    assert {first, second} <= {19, 20} and first + second == (40 if name == "pasta" else 39)
  assert found["fast"]["p0"]["preference"] == 0.5
  names = [r["body"]["messages"][-1]["content"].split()[4] for r in rows]
  assert names != sorted(names)


def test_a_reader_that_always_takes_the_first_place(workdir):
  """One order: half of each system's wins are its place. Both orders: no pair has a winner."""
  with pytest.raises(Waiting):
    judge(workdir)
  reply(workdir, lambda row: "A")
  found = judge(workdir)
  for rows in found.values():
    assert sum(r["preference"] for r in rows.values()) in (20, 19.5, 20.5)
  with pytest.raises(Waiting, match="79 requests"):
    judge(workdir, orders="both")
  reply(workdir, lambda row: "A")
  found = judge(workdir, orders="both")
  assert all(r["preference"] == 0.5 for rows in found.values() for r in rows.values())
  assert all(r["orders"] in ([1.0, 0.0], []) for rows in found.values() for r in rows.values())


def test_some_prompts_are_read_in_both_orders_and_twice(workdir):
  """The same ones for all systems; what was read before is not asked again, and the seed decides which."""
  with pytest.raises(Waiting):
    judge(workdir)
  reply(workdir)
  judge(workdir)
  with pytest.raises(Waiting, match="28 requests"):
    judge(workdir, both=10, repeats=5)
  reply(workdir)
  found = judge(workdir, both=10, repeats=5)
  both = {
    n: {i for i, r in rows.items() if r["orders"] and None not in r["orders"]} for n, rows in found.items()
  }
  again = {n: {i for i, r in rows.items() if "repeated" in r} for n, rows in found.items()}
  assert both["pasta"] | {"p0"} == both["fast"] | {"p0"} and len(both["pasta"]) == 10
  assert again["pasta"] | {"p0"} == again["fast"] | {"p0"} and len(again["pasta"]) == 5
  assert all(
    r["repeated"] == r["preference"] == r["orders"][r["first"]]
    for rows in found.values()
    for r in rows.values()
    if "repeated" in r
  )
  assert judge(workdir, both=10, repeats=5) == found
  with pytest.raises(Waiting):
    judge(workdir, both=10, seed=1)


def test_defects_are_named_once_an_answer_in_the_same_batch(workdir):
  with pytest.raises(Waiting, match="198 requests"):  # 79 pairs, 120 answers of which two are the same
    judge(workdir, defects=True)
  rows = reply(workdir)
  asked = [r["body"]["messages"][-1]["content"] for r in rows if len(shown(r)) == 1]
  assert len(asked) == 119 and all(text in asked[0] for text in DEFECTS.values())
  judge(workdir, defects=True)
  counts = {}
  for name in SYSTEMS:
    named = lines(workdir / "judgements" / "a-reader" / "defects" / f"{name}.jsonl")
    assert len(named) == 40
    counts[name] = collections.Counter(d for r in named for d in r["defects"])
  assert counts["baseline"] == {} and counts["fast"] == {"said twice": 39, "cut off": 39}
  assert counts["pasta"] == {"said twice": 26, "cut off": 26}


def test_what_could_not_be_read_is_counted_and_the_rest_goes_on(workdir, capsys):
  with pytest.raises(Waiting):
    judge(workdir)
  folder = workdir / "judgements" / "a-reader"
  rows = reply(workdir, lambda row: "It depends." if shown(row)[0] == 2 else by_worth(row))
  kept = (folder / "answers.jsonl").read_text().splitlines()[:70]
  (folder / "answers.jsonl").write_text("\n".join(kept))
  found = judge(workdir)
  lost = sum(shown(r)[0] == 2 for r in rows[:70])
  assert sum(map(len, found.values())) == 80 - 9 - lost
  said = capsys.readouterr().err
  assert "9 calls have no readable answer" in said
  assert f"a-reader: {lost + 9} of 79 pairs got no judgement (" in said
  assert f"no letter {lost}" in said and "no answer 9" in said


@pytest.mark.parametrize("at", [1, 20, 60])
def test_a_run_that_is_killed_while_it_judges_goes_on(workdir, at, monkeypatch):
  """No request is made anew, and the judgements are those of a run that was left alone."""
  with pytest.raises(Waiting):
    judge(workdir)
  reply(workdir)
  add, left = Records.add, [at]

  def killed(self, row):
    left[0] -= "-against-" in self.path.name
    if not left[0]:
      raise KeyboardInterrupt
    add(self, row)

  monkeypatch.setattr(Records, "add", killed)
  with pytest.raises(KeyboardInterrupt):
    judge(workdir)
  monkeypatch.setattr(Records, "add", add)
  found = judge(workdir)
  assert all(len(rows) == 40 for rows in found.values())
  assert sum(r["preference"] for r in found["pasta"].values()) == 14


def test_readings_that_are_added_later_are_made_and_none_is_lost(workdir):
  """Which ones a pair has counts, not how many."""
  for changes, sizes in (
    ({"orders": "one", "repeats": 6}, (79 + 11, 79 + 12)),  # one of two pairs of a prompt may need no reader
    ({"orders": "both"}, (79,)),
    ({"orders": "one", "repeats": 12}, (11, 12)),
  ):
    with pytest.raises(Waiting):
      judge(workdir, **changes)
    assert len(reply(workdir)) in sizes, changes
    found = judge(workdir, **changes)
  rows = [r for of in found.values() for r in of.values() if r["orders"]]
  assert all(None not in r["orders"] for r in rows) and sum("repeated" in r for r in rows) in (23, 24)


def test_a_repeated_reading_that_comes_late_is_used(workdir):
  with pytest.raises(Waiting):
    judge(workdir, repeats=6)
  folder = workdir / "judgements" / "a-reader"
  reply(workdir)
  every = (folder / "answers.jsonl").read_text().splitlines()
  bodies = collections.Counter(json.dumps(r["body"]) for r in lines(folder / "requests.jsonl"))
  twice = [n for n, r in enumerate(lines(folder / "requests.jsonl")) if bodies[json.dumps(r["body"])] == 2]
  assert len(twice) in (22, 24)
  (folder / "answers.jsonl").write_text(
    "\n".join(line for n, line in enumerate(every) if n not in twice[1::2])
  )
  first = judge(workdir, repeats=6)
  (folder / "answers.jsonl").write_text("\n".join(every))
  found = judge(workdir, repeats=6)
  have = lambda of: sum(r.get("repeated") is not None for rows in of.values() for r in rows.values())
  assert have(first) < have(found) == len(twice) // 2
