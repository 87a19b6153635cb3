"""`--mode=annotate`: annotates a file of responses, by a language model (plan and check) or by form alone.

workdir/annotated.jsonl   rows to train on (`data.examples`)
workdir/rejected.jsonl    rows that could not be read or got no valid plan, each with the cause
workdir/report.json       figures, causes, calls and their price
workdir/calls.jsonl       every response of the model, so a restarted run repeats no paid call
workdir/requests.jsonl    with annotate.kind=batch: the calls of a stage, which wait for answers.jsonl (`utils.batch`)
"""

import collections
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import rich.console

from pasta_jax.data import report as data_report
from pasta_jax.data import structure
from pasta_jax.data.annotate import check, measure, plan, prompts
from pasta_jax.data.examples import read_annotated
from pasta_jax.data.prompts import read_prompts
from pasta_jax.data.sources import Source, decontaminate, read_instructions
from pasta_jax.lang import forms
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.utils.callers import caller_of
from pasta_jax.utils.endpoint import Endpoint
from pasta_jax.utils.files import write_json_atomic
from pasta_jax.utils.jsonl import DataError, write_jsonl
from pasta_jax.utils.locks import LOCK, locked
from pasta_jax.utils.progress import progress_bar
from pasta_jax.utils.protocols import Call, cause_of
from pasta_jax.utils.records import agree
from pasta_jax.utils.terminal import as_text
from pasta_jax.weights.checkpoint import load_checkpoint

DEMONSTRATIONS = 7  # PASTA's number
LOST = ("no answer", "refused", "cut off", "no text")  # causes (`protocols.cause_of`)


def annotate(config, workdir: Path) -> dict:
  """Runs `config.annotate` in `workdir`, which it locks; returns the report. Raises ValueError, one line, for
  unusable settings or files, if another run writes there, and if the endpoint fails; Waiting (`utils.batch`) where
  it asks by file: for plans, for those to be mended, and for each check."""
  c = config.annotate
  if not c.data:
    raise DataError("name a file of instructions and responses: --config.annotate.data=FILE")
  source = read_instructions(c.data)
  if c.avoid:
    decontaminate(source, [r.prompt for r in read_prompts(c.avoid, part="annotate")])
  rows = source.rows
  if c.limit and c.limit < len(rows):
    rows = [rows[i * len(rows) // c.limit] for i in range(c.limit)]
  other = read_annotated(c.against) if c.against else []
  by_model = _ByModel(c, workdir) if c.kind != "structure" else None  # before anything is written
  vocabulary = load_checkpoint(config.model.source).vocabulary.speaking(forms.from_config(config))
  with locked(workdir / LOCK):
    report = _annotate(config, workdir, source, rows, other, by_model, vocabulary)
  _show(report, workdir)
  return report


def _annotate(
  config,
  workdir: Path,
  source: Source,
  rows: list[dict],
  other: list[dict],
  by_model: "_ByModel | None",
  vocabulary: Vocabulary,
) -> dict:
  c = config.annotate
  digest = hashlib.sha256(json.dumps([[r["prompt"], r["response"]] for r in rows]).encode()).hexdigest()[:16]
  agree(
    workdir,
    workdir / "settings.json",
    {
      "annotator": c.kind if by_model is None else c.model,
      "check": c.checks,
      **({"rules": c.rules} if c.rules != "independent" else {}),
      "rows": len(rows),
      "rows' digest": digest,
    },
  )
  rejected = [{"id": name, "cause": cause} for cause, names in source.faults.items() for name in names]
  if by_model is None:
    done = [r | {"chunks": structure.annotate(r["response"]), "syncs": []} for r in rows]
  else:
    done, refused = by_model(rows)
    rejected += refused
  annotator = c.kind if by_model is None else c.model
  done = [r | {"annotator": annotator} for r in done]
  form = forms.from_config(config)
  figures = lambda annotated: data_report.figures(data_report.facts(annotated, vocabulary, form))
  report: dict = {
    "annotator": annotator,
    "figures": figures(done),
    "rejected": dict(collections.Counter(r["cause"] for r in rejected)),
    **(by_model.report if by_model else {}),
  }
  if c.against:
    report["agreement"] = measure.agreement(done, other)
    both = {d["response"] for d in done}
    report["other's figures"] = figures([r for r in other if r["response"] in both])
  for name, content in (("annotated", done), ("rejected", rejected)):
    write_jsonl(workdir / f"{name}.jsonl", content)
  write_json_atomic(workdir / "report.json", report)
  return report


class _ByModel:
  """Plans from a model: invalid ones are returned to it with the error message, valid ones are checked."""

  def __init__(self, c, workdir: Path):
    endpoint = Endpoint.from_config(c, part="annotate", logprobs=False)
    endpoint.require_key()
    shown = read_annotated(c.demonstrations)
    shown = [r for r in shown if plan.fault(r["response"], r["chunks"], c.rules) is None]
    self._shown = prompts.demonstrations(_spread(shown, nested=c.rules == "independent"), c.rules)
    self._config, self._endpoint, self._path = c, endpoint, workdir / "calls.jsonl"
    self.report: dict = {}

  def __call__(self, rows: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """(annotated rows, rejected rows)."""
    self._caller = caller_of(self._endpoint, self._path)
    self._tokens, self._dropped, self._needy, self._synced = [0, 0], 0, 0, 0
    self._mended: collections.Counter[str] = collections.Counter()
    self._no_verdict: collections.Counter[str] = collections.Counter()
    plans, rejected = self._plans(rows)
    if self._config.checks:
      self._check_chunks(plans)
      self._check_texts(plans)
    c = self._config
    price = (self._tokens[0] * c.price_read + self._tokens[1] * c.price_written) / 1e6
    checked = {"chunks given up": self._dropped, "syncs placed": self._synced} if c.checks else {}
    self.report = {
      "asked again because": dict(self._mended),
      "check": checked | ({"chunks that need their siblings": self._needy} if self._needy else {}),
      "checked without a verdict": dict(self._no_verdict),
      "calls": {
        "paid now": self._caller.paid,
        "tokens read": self._tokens[0],
        "tokens written": self._tokens[1],
        "price": round(price, 4),
      },
    }
    return [plans[r["id"]] for r in rows if r["id"] in plans], rejected

  def _calls(
    self, what: str, calls: Sequence[prompts.Messages], answered: Callable[[int, dict], None]
  ) -> None:
    bar, task = progress_bar(what, len(calls))

    def done(i: int, answer: dict) -> None:
      self._tokens = [n + m for n, m in zip(self._tokens, answer.get("tokens") or (0, 0))]
      answered(i, answer)
      bar.update(task, advance=1, note=f"{self._caller.paid} calls paid, {sum(self._tokens):,} tokens")

    with bar:
      self._caller.map([Call(messages) for messages in calls], done)

  def _plans(self, rows: Sequence[dict]) -> tuple[dict[str, dict], list[dict]]:
    """(annotated rows by id, rows without a valid plan after `tries` answers)."""
    plans: dict[str, dict] = {}
    rejected: list[dict] = []
    todo = [(r, prompts.ask(r, self._shown, self._config.rules)) for r in rows]
    for attempt in range(self._config.tries):
      again: list[tuple[dict, prompts.Messages]] = []

      def answered(
        i: int, answer: dict, todo=todo, again=again, last=attempt + 1 == self._config.tries
      ) -> None:
        row, messages = todo[i]
        try:
          chunks, syncs = plan.read(answer["text"], row["response"], self._config.rules)
          plans[row["id"]] = row | {"chunks": chunks, "syncs": syncs}
        except plan.PlanError as error:
          cause = cause_of(answer, error.cause)
          if last or cause in LOST:  # to ask for these again, with more words before, is of no use
            said = answer.get("refused") or answer["text"]
            rejected.append({"id": row["id"], "cause": cause, "answer": said})
          else:
            self._mended[error.cause] += 1
            again.append((row, prompts.ask_again(messages, answer["text"], str(error))))

      if todo:
        self._calls(
          "plans" if attempt == 0 else f"plans, answer {attempt + 1}", [m for _, m in todo], answered
        )
      todo = again
    return plans, rejected

  def _verdicts(
    self, what: str, asked: list[tuple[dict, check.Context]], *, reading: bool = False
  ) -> list[tuple[dict, check.Context]]:
    """The pieces that the model does not call independent; an answer other than yes or no counts as no. `reading` as
    of `prompts.ask_whether`."""
    failed: list[tuple[dict, check.Context]] = []

    def answered(i: int, answer: dict) -> None:
      verdict = prompts.says_yes(answer["text"])
      if verdict is None:
        self._no_verdict[cause_of(answer, "neither yes nor no")] += 1
      if verdict is not True:
        failed.append(asked[i])

    if asked:
      calls = [prompts.ask_whether(row, context, reading=reading) for row, context in asked]
      self._calls(what, calls, answered)
    return failed

  def _check_chunks(self, plans: dict[str, dict]) -> None:
    failed = self._verdicts("check of chunks", [(r, c) for r in plans.values() for c in check.of_chunks(r)])
    lost = self._verdicts("check of chunks that read along", failed, reading=True)
    by_row: dict[str, tuple[set[int], set[int]]] = collections.defaultdict(lambda: (set(), set()))
    for pieces, which in ((failed, 0), (lost, 1)):
      for row, context in pieces:
        by_row[row["id"]][which].add(context.at)
    for name, (asked, given_up) in by_row.items():
      plans[name] = check.without_chunks(plans[name], given_up, asked - given_up)
    self._dropped, self._needy = len(lost), len(failed) - len(lost)

  def _check_texts(self, plans: dict[str, dict]) -> None:
    failed = self._verdicts("check of joins", [(r, c) for r in plans.values() for c in check.of_texts(r)])
    by_row = collections.defaultdict(list)
    for row, context in failed:
      by_row[row["id"]].append(context)
    for name, texts in by_row.items():
      before = len(plans[name]["syncs"])
      plans[name] = check.with_syncs(plans[name], texts)
      self._synced += len(plans[name]["syncs"]) - before


def _spread(rows: Sequence[dict], *, nested: bool = True) -> list[dict]:
  """Demonstrations from annotated rows: some of each kind (nested, with a sync, flat, sequential), spread by
  length. `nested`: whether there is to be a nested one, else another flat one."""
  if len(rows) <= DEMONSTRATIONS:
    return list(rows)
  ordered = lambda r: sorted(r["chunks"], key=lambda c: (c["start"], -c["end"]))
  is_nested = lambda r: any(d["start"] < c["end"] for c, d in itertools.pairwise(ordered(r)))
  kind = lambda r: (
    "nested" if is_nested(r) else "synced" if r["syncs"] else "flat" if r["chunks"] else "sequential"
  )
  chosen: list[dict] = []
  for name, count in (("flat", 3 - nested), ("synced", 2), ("sequential", 2), ("nested", int(nested))):
    of_kind = sorted((r for r in rows if kind(r) == name), key=lambda r: (len(r["response"]), r["id"]))
    chosen += [of_kind[(2 * i + 1) * len(of_kind) // (2 * count)] for i in range(min(count, len(of_kind)))]
  return chosen


def _show(report: dict, workdir: Path) -> None:
  console = rich.console.Console(highlight=False)
  sides = {report["annotator"]: report["figures"]}
  console.print(
    data_report.table(sides | ({"against": report["other's figures"]} if "agreement" in report else {}))
  )
  if "agreement" in report:
    a = report["agreement"]
    console.print(
      f"Boundaries of chunks: precision {a['precision']:.0%}, recall {a['recall']:.0%}; "
      f"both have chunks or neither has: {a['same_choice']:.0%} of {a['responses']} responses"
    )
  for title in ("rejected", "asked again because", "check", "checked without a verdict", "calls"):
    if found := report.get(title):
      console.print(as_text(f"{title}: " + ", ".join(f"{name} {n:,}" for name, n in found.items())))
  if any("cut off" in report.get(title, ()) for title in ("rejected", "checked without a verdict")):
    console.print("cut off: give more --config.annotate.max_tokens")
  console.print(as_text(f"{workdir / 'annotated.jsonl'}"), soft_wrap=True)
