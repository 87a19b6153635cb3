"""`--mode=build`: a data set from files of annotated rows, which are checked, decontaminated and split.

workdir/responses/VERSION/   the TFDS data set (`data.dataset`)
workdir/rejected.jsonl       rows that were left out, each with the cause
workdir/report.html          figures, histograms and samples (`data.report`)
"""

import collections
import hashlib
from collections.abc import Sequence
from pathlib import Path

import rich.console

from pasta_jax.data import report
from pasta_jax.data.dataset import Responses, write
from pasta_jax.data.examples import encoded, program_of
from pasta_jax.data.sources import decontaminate, read_instructions
from pasta_jax.lang import forms
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.files import write_atomic
from pasta_jax.utils.jsonl import DataError, write_jsonl
from pasta_jax.utils.locks import LOCK, locked
from pasta_jax.utils.terminal import as_text


def build(config, workdir: Path, vocabulary: Vocabulary, avoid: list[str]) -> dict:
  """Builds `config.dataset` in `workdir`, which it locks; returns its figures.

  Rows without `chunks` are plain text. A row is rejected, and named in rejected.jsonl, if its spans overlap
  or leave the response, or if the vocabulary cannot encode it. `avoid` are prompts of evaluations. Raises
  DataError, one line, for unusable settings or files and, with `dataset.strict`, for the first rejected row.
  """
  c = config.dataset
  if not c.train:
    raise DataError("name files of annotated rows: --config.dataset.train=FILE,FILE")
  target = workdir / Responses.name / str(Responses.VERSION)
  with locked(workdir / LOCK):
    if target.exists():
      raise DataError(f"{target} exists already: name another --workdir")
    return _build(config, workdir, vocabulary, avoid)


def _build(config, workdir: Path, vocabulary: Vocabulary, avoid: list[str]) -> dict:
  c = config.dataset
  rejected: list[dict] = []
  form = forms.from_config(config)
  vocabulary = vocabulary.speaking(form)
  splits = {"train": _rows(c.train, vocabulary, avoid, rejected)}
  if c.validation:
    splits["validation"] = _rows(c.validation, vocabulary, [], rejected)
    held_out = {r["prompt"] for r in splits["validation"]}
    rejected += [
      {"file": r["file"], "id": r["id"], "cause": "in the validation split too"}
      for r in splits["train"]
      if r["prompt"] in held_out
    ]
    splits["train"] = [r for r in splits["train"] if r["prompt"] not in held_out]
  elif c.validation_share:
    chosen = lambda r: (
      int(hashlib.sha256(r["prompt"].encode()).hexdigest()[:8], 16) < c.validation_share * 16**8
    )
    splits = {
      "train": [r for r in splits["train"] if not chosen(r)],
      "validation": [r for r in splits["train"] if chosen(r)],
    }
  if c.strict and rejected:
    first = rejected[0]
    raise DataError(f"{first['file']}: {first['id']}: {first['cause']} ({len(rejected)} rows cannot be used)")
  if not all(splits.values()):
    raise DataError(f"no row is left for {next(name for name, rows in splits.items() if not rows)}")
  facts = {name: report.facts(rows, vocabulary, form) for name, rows in splits.items()}
  figures = {name: report.figures(f) for name, f in facts.items()}
  causes = dict(collections.Counter(r["cause"] for r in rejected))
  page = report.page(splits["train"], facts["train"], figures, causes, vocabulary, form)
  write_jsonl(workdir / "rejected.jsonl", rejected)
  write_atomic(workdir / "report.html", page)
  # Last: a folder with the data set is complete.
  write(Responses(splits, {"figures": figures, "rejected": causes}, data_dir=str(workdir)))
  _show(figures, causes, form, workdir / Responses.name / str(Responses.VERSION))
  return {"figures": figures, "rejected": causes}


def _rows(files: Sequence[str], vocabulary: Vocabulary, avoid: list[str], rejected: list[dict]) -> list[dict]:
  """Usable rows of several files, with `file`; the others are appended to `rejected`."""
  rows: list[dict] = []
  known: set[str] = set()
  for path in files:
    source = read_instructions(path)
    if avoid:
      decontaminate(source, avoid)
    for row in source.rows:
      row = row | {key: row.get(key) or [] for key in ("chunks", "syncs")} | {"file": path}
      if cause := "an id that another row has" if row["id"] in known else _misfit(row, vocabulary):
        source.faults[cause].append(row["id"])
      else:
        known.add(row["id"])
        rows.append(row)
    rejected += [
      {"file": path, "id": name, "cause": cause} for cause, names in source.faults.items() for name in names
    ]
  return rows


def _misfit(row: dict, vocabulary: Vocabulary) -> str:
  """Why a row cannot be trained on; "" if it can."""
  try:
    encoded(program_of(row), vocabulary, PositionRule("pred_10x"))
    vocabulary.tokenizer.chat_prompt([{"role": "user", "content": row["prompt"]}])
  except DataError:
    return "chunks or syncs that do not fit the response"
  except ValueError:
    return "characters that the vocabulary lacks"
  return ""


def _show(figures: dict[str, dict], causes: dict[str, int], form: Forms, target: Path) -> None:
  console = rich.console.Console(highlight=False)
  console.print(report.table(figures))
  console.print(as_text(f"laid out in the form: {report.form_line(form)}"))
  if causes:
    console.print(as_text("rejected: " + ", ".join(f"{cause} {n:,}" for cause, n in causes.items())))
  console.print(as_text(f"{target}"), soft_wrap=True)
