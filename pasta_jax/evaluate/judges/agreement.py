"""How often judges agree with people.

    python -m pasta_jax.evaluate.judges.agreement --data=a.jsonl,b.jsonl --workdir=…

`--limit=N` takes N pairs of each file, spread over it. Rows have `prompt`, `chosen` and `rejected`, and may have a
`category`. The chosen answer takes the system's place: the judge agrees where its preference is above one half, and
counts half where it is exactly one half. Three figures put that into perspective: how often the chosen answer is the
longer one, the agreement on pairs whose chosen answer is the shorter one, and how often a verdict changes with the
order in which the answers are shown.
"""

import math
import sys
from pathlib import Path

import numpy as np
import rich.console
import rich.table
from absl import app, flags
from ml_collections import config_flags

from pasta_jax.config import from_flags
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges.judge import Answer, Pair
from pasta_jax.evaluate.judges.judging import judge_pairs, with_places
from pasta_jax.evaluate.judges.registry import judges_of
from pasta_jax.evaluate.metrics.wins import position, verdict
from pasta_jax.utils.files import write_json_atomic
from pasta_jax.utils.jsonl import present, read_jsonl
from pasta_jax.utils.terminal import as_text
from pasta_jax.utils.text import one_line
from pasta_jax.utils.typed import Parsed, checked
from pasta_jax.utils.waiting import WAITING, Waiting


class _Label(Parsed):
  prompt: str
  chosen: str
  rejected: str


def pairs_of_labels(path: str, limit: int = 0) -> tuple[list[Pair], list[str]]:
  """(pairs with the chosen answer in the system's place, their categories) of a file of labels; `limit` of them,
  spread over the file, or all."""
  pairs, categories = [], []
  numbered = [*enumerate(read_jsonl(path))]
  if limit and limit < len(numbered):
    numbered = [numbered[i * len(numbered) // limit] for i in range(limit)]
  for number, row in numbered:
    try:
      label = checked(_Label, row, f"{path}, row {number + 1}")
    except ValueError as error:
      raise EvalError(str(error)) from None
    row = present(row)
    conversation = [{"role": "user", "content": label.prompt}]
    chosen, rejected = (Answer(conversation, text) for text in (label.chosen, label.rejected))
    pairs.append(Pair(str(row.get("id", number)), chosen, rejected, "chosen"))
    categories.append(str(row.get("category", "all")))
  return pairs, categories


def agreement(preferences: list[float]) -> tuple[float, float]:
  """(agreement in per cent, its standard error) of preferences for the chosen answers."""
  agree = np.array([(verdict(p) + 1) / 2 for p in preferences])
  error = float(agree.std(ddof=1)) / math.sqrt(len(agree)) if len(agree) > 1 else math.nan
  return 100 * float(agree.mean()), 100 * error


def measure(config, workdir: Path, files: list[str], limit: int = 0) -> list[dict]:
  """Agreement by judge of `config.eval.judges`, file and category, of `limit` pairs of each file (0: all).

  Judgements are kept in `workdir`. A row's `changed` is the share of pairs read in both orders whose verdict changed
  with the order; it is left out where none was.
  """
  labels = {path: pairs_of_labels(path, limit) for path in files}
  rows = []
  for judge in judges_of(config):
    folder = workdir / "judgements" / judge.name
    groups = {
      folder / f"labels-{Path(path).stem}.jsonl": with_places(pairs, config.judge)
      for path, (pairs, _) in labels.items()
    }
    for (path, (pairs, categories)), judgements in zip(labels.items(), judge_pairs(judge, groups, folder)):
      judged = [(p, c, judgements[p.id]) for p, c in zip(pairs, categories) if p.id in judgements]
      names = sorted(set(categories))
      by_category = {c: [j for j in judged if j[1] == c] for c in names} if len(names) > 1 else {}
      for group, members in ({"all": judged} | by_category).items():
        if members:
          about = {"judge": judge.name, "labels": Path(path).stem, "category": group}
          rows.append(about | _figures([p for p, *_ in members], [row for *_, row in members]))
  return rows


def _figures(pairs: list[Pair], judgements: list[dict]) -> dict[str, float]:
  values = [row["preference"] for row in judgements]
  shorter = [v for p, v in zip(pairs, values) if len(p.system.text) < len(p.baseline.text)]
  share, error = agreement(values)
  out = {
    "pairs": len(pairs),
    "agreement": share,
    "error": error,
    "longer": 100 * float(np.mean([len(p.system.text) > len(p.baseline.text) for p in pairs])),
    "on_shorter": agreement(shorter)[0] if shorter else math.nan,
  }
  if (changed := position(judgements).changed).n:
    out["changed"] = 100 * changed.share
  return out


def main(argv: list[str]) -> None:
  del argv
  values = flags.FLAGS
  files = [f for f in values.data.split(",") if f]
  try:
    rows = measure(from_flags(values.config), Path(values.workdir), files, values.limit)
  except Waiting as waiting:
    print(waiting)
    sys.exit(WAITING)
  except (ValueError, OSError) as error:
    sys.exit(f"error: {one_line(str(error))}")
  write_json_atomic(Path(values.workdir) / "agreement.json", rows)
  table = rich.table.Table(title="agreement with labels, %")
  for name in (
    "judge",
    "labels",
    "category",
    "pairs",
    "agreement",
    "the longer one",
    "where the shorter was chosen",
    "changed with the order",
  ):
    table.add_column(name, justify="left" if name in ("judge", "labels", "category") else "right")
  for r in rows:
    table.add_row(
      *(as_text(r[key]) for key in ("judge", "labels", "category")),
      str(r["pairs"]),
      f"{r['agreement']:.1f} ± {r['error']:.1f}",
      f"{r['longer']:.1f}",
      f"{r['on_shorter']:.1f}",
      f"{r['changed']:.1f}" if "changed" in r else "–",
    )
  rich.console.Console().print(table)


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", "configs/smollm2_135m.py", "experiment", lock_config=True)
  flags.DEFINE_string("data", None, "files of labelled pairs, comma-separated", required=True)
  flags.DEFINE_integer("limit", 0, "pairs of each file, spread over it; 0: all", lower_bound=0)
  flags.DEFINE_string("workdir", None, "folder for the judgements", required=True)
  app.run(main)
