"""`--mode=preference`: rounds of sampling, judging, choosing pairs, training and evaluating. Resumable.

    workdir/baseline.jsonl                     the baseline's answers to the training prompts
    workdir/start/samples.jsonl, judgements/   samples of the start, for the first round of every policy
    workdir/POLICY/round1/settings.json        what the round depends on: other settings need another folder
    workdir/POLICY/round1/pairs.jsonl          best and worst samples of each prompt
    workdir/POLICY/round1/best.jsonl           the best ones, whole, to train on (`preference.best`)
    workdir/POLICY/round1/round.json           figures of samples, defects, pairs and training
    workdir/POLICY/round1/train/               checkpoints, reference.jsonl, metrics.jsonl, the new adapter
    workdir/POLICY/round2/samples.jsonl, …     the same again, from the policy after round 1
    workdir/front.svg, front.png               speed and quality of all policies (`pareto_front`)
    workdir/eval/                              all policies on the prompts of `config.eval` (`evaluate.run`)

A policy is trained for one quality weight λ or, `conditioned`, for all of them: its prompts then say which
speed is wanted. Every stage keeps its results and continues where it stopped. `preference.stages` selects
stages, so that they can run on different machines with the folder copied between them.

Several processes share out the samples and the evaluation's answers, and train together; the first one writes the
files. What they do apart stands in blocks of `distributed.as_one`, training outside of them.
"""

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pasta_jax.config import System, identity
from pasta_jax.config.sections import share_of
from pasta_jax.data.pairs import PreferencePair
from pasta_jax.data.prompts import PromptTurn, read_prompts
from pasta_jax.decode.generator import adapter_path, source_of, with_speed
from pasta_jax.decode.precision import resolve
from pasta_jax.decode.record import SCHEMA
from pasta_jax.evaluate.judges.judge import Reader
from pasta_jax.evaluate.judges.questions import GRADES_PROMPT
from pasta_jax.evaluate.judges.registry import judges_of
from pasta_jax.evaluate.run import evaluate
from pasta_jax.lang import forms
from pasta_jax.lang.forms import Forms
from pasta_jax.preference import audit, pareto_front, rollout, selection
from pasta_jax.preference.policies import Policy, policies
from pasta_jax.preference.quality import Qualities, check_quality, judge_samples
from pasta_jax.preference.report import show
from pasta_jax.preference.score import StepCost
from pasta_jax.train.metrics import last_scalars
from pasta_jax.train.preference import train_on_pairs
from pasta_jax.train.trainer import training_mesh
from pasta_jax.utils import distributed
from pasta_jax.utils.files import write_atomic, write_json_atomic
from pasta_jax.utils.json_io import read_json
from pasta_jax.utils.jsonl import write_jsonl
from pasta_jax.utils.locks import LOCK
from pasta_jax.utils.records import agree
from pasta_jax.utils.typed import checked
from pasta_jax.utils.waiting import Together
from pasta_jax.weights.adapter import has_tags, read_metadata
from pasta_jax.weights.checkpoint import Checkpoint, load_checkpoint


def read_step_cost(c) -> StepCost | None:
  """The step cost of `preference.score=clock`, else None. Raises ValueError, one line, for a bad file."""
  if c.score != "clock":
    return None
  try:
    return StepCost(**checked(dict[str, float], read_json(Path(c.cost)), c.cost))
  except (OSError, ValueError, TypeError) as error:
    raise ValueError(
      "preference.score=clock needs preference.cost=FILE, which the benchmark writes with --cost=FILE "
      f"({error})"
    ) from None


class _Job:
  """What all rounds share. Raises ValueError, one line, for settings and files that cannot be used."""

  def __init__(self, config, workdir: Path):
    self.config, self.workdir = config, workdir
    self.stages, self.cost = config.preference.stages, read_step_cost(config.preference)
    if "train" in self.stages:
      training_mesh(config, "preference")
    self.policies = policies(config)
    judges = judges_of(config)
    if not judges:
      raise ValueError("preference optimisation needs a judge: --config.eval.judges=local")
    self.judge = judges[0]
    c, e = config.preference, config.eval
    self.requests: list[PromptTurn] = [
      r for r in read_prompts(c.prompts, limit=c.limit, part="preference") if not r.earlier
    ]
    self.references = {r.id: r.response for r in self.requests}
    check_quality(c.quality, self.judge, self.references)
    if "eval" in self.stages:
      training = {r.prompt for r in self.requests}
      held_out = read_prompts(e.prompts, limit=e.limit, categories=e.categories)
      both = sum(r.prompt in training for r in held_out)
      if both and distributed.is_first():
        print(f"{both} of {len(held_out)} evaluation prompts are training prompts too")
    start = adapter_path(config.model.adapter)
    if start is None or not has_tags(start):
      raise ValueError("preference optimisation starts from a PASTA adapter: name --config.model.adapter")
    self.start: Path = start
    own = forms.from_metadata(read_metadata(start)).visibility
    if config.decode.visibility not in ("", own):
      raise ValueError(
        f"decode.visibility={config.decode.visibility} draws samples that the policy is not trained for, its own is "
        f"{own}: leave it empty"
      )
    self._loaded: tuple[str | Path, Checkpoint] | None = None

  def checkpoint(self, adapter: Path) -> Checkpoint:
    """The weights that a policy's adapter belongs to; the last ones are kept in memory."""
    source = source_of(self.config, adapter)
    if self._loaded is None or self._loaded[0] != source:
      self._loaded = None  # frees the memory before the next ones are read
      self._loaded = source, load_checkpoint(source)
    return self._loaded[1]

  def adapter(self, policy: Policy, number: int) -> Path:
    """The policy after round `number`; 0: the start of all policies."""
    return self.start if number == 0 else self.folder(policy, number) / "train" / "adapter.safetensors"

  def folder(self, policy: Policy, number: int) -> Path:
    return self.workdir / policy.name / f"round{number}"

  def is_done(self, policy: Policy, number: int) -> bool:
    """Whether a round is finished, the same answer in all processes; round 0 always is."""
    path = self.folder(policy, number) / "round.json"
    return number == 0 or distributed.from_first(path.is_file)

  def samples(self, policy: Policy, number: int, weight: float) -> tuple[Path, int]:
    """(folder of the samples that a round learns from, speed in their prompts)."""
    if number == 1:
      return self.workdir / "start", -1
    speed = policy.speed(weight)
    return self.folder(policy, number) / (f"speed{speed}" if speed >= 0 else "."), speed

  def settings(self, policy: Policy, number: int) -> dict:
    """What a round's adapter depends on."""
    before = self.adapter(policy, number - 1)
    out = {
      "start's sha256": hashlib.sha256(before.read_bytes()).hexdigest(),
      "weights": [f"{w:g}" for w in policy.weights],
      "judge": self.judge.name,
      "prompts' digest": hashlib.sha256("\0".join(r.prompt for r in self.requests).encode()).hexdigest()[:16],
      "cost": dataclasses.asdict(self.cost) if self.cost else None,
    }
    judge = self.judge.settings
    if self.config.preference.quality == "grade" and isinstance(self.judge, Reader):
      judge = self.judge.settings_of(GRADES_PROMPT)
    out |= {f"judge.{k}": v for k, v in judge.items()}
    if self.config.preference.quality != "preference":
      own = "\0".join(self.references.values())
      out["responses' digest"] = hashlib.sha256(own.encode()).hexdigest()[:16]
    return out | {f"preference.{k}": v for k, v in identity(self.config.preference).items()}


def optimise(config, workdir: Path) -> None:
  """Runs `config.preference` in `workdir`, which it locks. Every process of several calls this. Raises ValueError, one
  line, for what cannot be used."""
  with distributed.as_one():
    config = resolve(config, "preference", workdir / "config.json")
    job = _Job(config, workdir)
  with distributed.writing_in(workdir, _lock_name(config.preference.share)):
    if distributed.is_first():
      write_atomic(workdir / "config.json", config.to_json(indent=2), shared=bool(config.preference.share))
    _rounds(job)


def _lock_name(share: str) -> str:
  """A process that draws a share of the samples locks that share only: it writes files of its own."""
  found = share_of(share)
  return f"share.{found[0]}-of-{found[1]}.lock" if found else LOCK


def _rounds(job: _Job) -> None:
  config = job.config
  for number in range(1, config.preference.rounds + 1):
    together = Together()
    for policy in job.policies:
      if job.is_done(policy, number - 1):
        with together.part():
          _round(job, policy, number)
    together.end()
    untrained = [p.name for p in job.policies if not job.is_done(p, number)]
    if untrained:
      if distributed.is_first():
        print(
          f"round {number} of {', '.join(untrained)} is not trained yet (--config.preference.stages=train)"
        )
      break
    if "eval" in job.stages:
      with distributed.as_one():
        _evaluate(job, number)
  with distributed.as_one():
    if distributed.is_first():
      show(job.workdir)


def _round(job: _Job, policy: Policy, number: int) -> None:
  """One round of one policy: samples, judgements, training, as far as the stages go."""
  folder = job.folder(policy, number)

  def begin() -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings, shared = job.settings(policy, number), bool(job.config.preference.share)
    agree(folder, folder / "settings.json", settings, shared=shared)

  done = job.is_done(policy, number)
  if not done and not set(job.stages) & {"sample", "judge", "train"}:
    return
  with distributed.as_one():
    distributed.from_first(begin)
    judged = None if done else _sample_and_judge(job, policy, number)
  if judged is not None and "train" in job.stages:
    _train(job, policy, number, *judged)


def _sample_and_judge(job: _Job, policy: Policy, number: int) -> tuple[dict[str, dict], list["_Judged"]]:
  """(the baseline's answers, samples and judgements for each quality weight), as far as the stages go."""
  config, c = job.config, job.config.preference
  before = job.adapter(policy, number - 1)
  baseline = rollout.baseline_answers(config, job.requests, job.workdir / "baseline.jsonl")
  judged: list[_Judged] = []
  together = Together()
  for weight in policy.weights:
    samples_folder, speed = job.samples(policy, number, weight)
    samples = rollout.draw_samples(
      config,
      str(before),
      job.requests,
      samples_folder / "samples.jsonl",
      speed,
      may_draw="sample" in job.stages,
    )
    if c.audit and not c.share:
      every = [s for rows in samples.values() for s in rows]
      distributed.from_first(partial(_audit, job, samples_folder / "audit.json", before, number, every))
    if set(job.stages) & {"judge", "train"}:
      with together.part():  # the samples of other speeds can be drawn meanwhile
        quality = judge_samples(
          job.judge,
          samples,
          baseline,
          job.references,
          samples_folder / "judgements" / job.judge.name,
          quality=c.quality,
          how=config.judge,
        )
        judged.append(_Judged(weight, samples, quality))
  together.end()
  return baseline, judged


class _Judged(NamedTuple):
  """What the pairs for one quality weight are chosen from."""

  weight: float
  samples: dict[str, list[dict]]  # by prompt
  quality: Qualities


def _train(job: _Job, policy: Policy, number: int, baseline: dict[str, dict], judged: list[_Judged]) -> None:
  """Chooses the pairs for each quality weight, trains on all of them and writes the round's report."""
  folder, before = job.folder(policy, number), job.adapter(policy, number - 1)
  with distributed.as_one():
    chosen = _choose(job, policy, number, baseline, judged)
  train_on_pairs(
    job.config,
    folder / "train",
    chosen.pairs,
    checkpoint=chosen.checkpoint,
    vocabulary=chosen.checkpoint.vocabulary,
    form=chosen.form,
    adapter=before,
    notes=chosen.notes,
  )

  def report() -> None:
    chosen.report["training"] = last_scalars(folder / "train", share=0.25)  # one step has few pairs
    if job.config.preference.audit:
      chosen.report["learned"] = _learned(job, before, job.adapter(policy, number), chosen.samples)
    write_json_atomic(folder / "round.json", chosen.report)

  with distributed.as_one():
    distributed.from_first(report)


class _Chosen(NamedTuple):
  """What a round trains on."""

  pairs: list[PreferencePair]
  samples: list[tuple[dict, dict]]  # that they are made of
  checkpoint: Checkpoint
  form: Forms
  notes: dict[str, str]  # for the adapter's header
  report: dict  # of the round


def _choose(
  job: _Job, policy: Policy, number: int, baseline: dict[str, dict], judged: list[_Judged]
) -> _Chosen:
  """Chooses the pairs for each quality weight, and writes them."""
  c = job.config.preference
  folder, before = job.folder(policy, number), job.adapter(policy, number - 1)
  metadata = read_metadata(before)
  form = forms.from_metadata(metadata)
  checkpoint = job.checkpoint(before).speaking(form)
  vocabulary = checkpoint.vocabulary
  training_pairs: list[PreferencePair] = []
  chosen_samples: list[tuple[dict, dict]] = []
  report: dict = {"schema": SCHEMA, "policy": policy.name, "round": number, "by weight": {}}
  for weight, samples, quality in judged:
    speed = policy.speed(weight)
    message = lambda prompt, speed=speed: with_speed({"role": "user", "content": prompt}, speed)
    prompts = {r.id: vocabulary.tokenizer.chat_prompt([message(r.prompt)]) for r in job.requests}
    rows = selection.score_samples(
      samples, baseline, quality.by_sample, c.score, job.cost, prompts=prompts, length=c.length
    )
    chosen, reasons = selection.choose_pairs(rows, weight, guards=c.guards)
    of_weight = f"_{weight:g}" if policy.conditioned else ""
    if distributed.is_first():
      selection.write_pairs(folder / f"pairs{of_weight}.jsonl", chosen, weight)
      if c.best:
        best = selection.choose_best(rows, weight, c.best, guards=c.guards)
        write_jsonl(folder / f"best{of_weight}.jsonl", best)
    drawn = sum(map(len, samples.values()))
    figures = selection.figures(rows, chosen, reasons, drawn)
    report["by weight"][f"{weight:g}"] = figures | ({"judge": quality.figures} if quality.figures else {})
    training_pairs += selection.lay_out_pairs(chosen, vocabulary, form, prompts)
    chosen_samples += chosen
  if not training_pairs:
    reasons_by_weight = {w: f["without a pair"] for w, f in report["by weight"].items()}
    raise ValueError(
      f"round {number} of {policy.name} has no pair to train on; prompts without a pair, by quality weight: "
      f"{reasons_by_weight}"
    )
  notes = {"weights": ", ".join(f"{w:g}" for w in policy.weights), "round": str(number)}
  if policy.conditioned:
    notes["speeds"] = json.dumps(sorted(policy.speed(w) for w in policy.weights))
  # What the start decodes with, and who annotated the rows that it learned from; who chose its pairs.
  notes |= {k: v for k, v in metadata.items() if k in ("decode", "annotator")}
  notes["teacher"] = job.judge.name
  return _Chosen(training_pairs, chosen_samples, checkpoint, form, notes, report)


def _audit(job: _Job, path: Path, policy: Path, number: int, samples: list[dict]) -> None:
  """Once per file of samples: decode loop against trainer, and after round 1 the policy against the start."""
  if path.is_file():
    return
  some = audit.some(samples, job.config.preference.audit)
  report: dict = audit.compare(job.config, job.checkpoint(policy), policy, some)
  print(
    f"audit of {report['samples']} samples: log p per token differs between decode loop and trainer by "
    f"{report['mean']:.2g} on average, {report['worst']:.2g} at most"
  )
  if number > 1:
    report["from_start"] = audit.divergence(job.config, job.checkpoint(job.start), job.start, some)
    print(f"divergence of the policy from the start: {report['from_start']:.3f} nats per token")
  write_json_atomic(path, report)


def _learned(job: _Job, before: Path, after: Path, pairs: list[tuple[dict, dict]]) -> dict:
  """What training changed in some of the pairs (`audit.gains`)."""
  some = audit.some(pairs, job.config.preference.audit)
  return audit.gains(job.config, (job.checkpoint(before), before), (job.checkpoint(after), after), some)


def _evaluate(job: _Job, number: int) -> None:
  """Evaluates the policies of all rounds so far, the start and the baseline, on `config.eval`'s prompts."""
  systems = {"start": System(job.config.model.adapter)}
  for n in range(1, number + 1):
    for policy in job.policies:
      for weight in policy.weights:
        speed = policy.speed(weight)
        name = f"{policy.name}{f'_speed{speed}' if speed >= 0 else ''}_round{n}"
        systems[name] = System(str(job.adapter(policy, n)), speed=speed if speed >= 0 else None)
  config = dataclasses.replace(
    job.config,
    systems={**job.config.systems, **systems},
    eval=dataclasses.replace(job.config.eval, systems=tuple(systems)),
  )
  evaluate(config, job.workdir / "eval")
  if not distributed.is_first():
    return
  if points := pareto_front.points([job.workdir / "eval"]):
    for suffix in ("svg", "png"):
      pareto_front.draw(points).savefig(job.workdir / f"front.{suffix}")
