"""`--mode=preference`: rounds of sampling, judging, choosing pairs, training and evaluating, as one resumable
job.

    workdir/baseline.jsonl                     the baseline's answers to the training prompts
    workdir/start/samples.jsonl, judgements/   samples of the policy that training starts from: of every first round
    workdir/POLICY/round1/settings.json        what the round depends on: other settings need another folder
    workdir/POLICY/round1/pairs.jsonl          best and worst samples, and where they come from
    workdir/POLICY/round1/round.json           figures of samples and pairs, faults, metrics of the training
    workdir/POLICY/round1/train/               checkpoints, reference.jsonl, metrics.jsonl, adapter.safetensors
    workdir/POLICY/round2/samples.jsonl, …     the same again, from the policy behind round 1
    workdir/front.svg, front.png               where the rounds lead (`front`)
    workdir/eval/                              all policies on the prompts of `config.eval` (`evaluate.run`)

A policy is trained for one weight of quality, or, `conditioned`, for all of them: its prompts then say which
speed is wanted. Every stage keeps what it made and goes on where it stopped; `preference.stages` runs some of
them, so that they can run on different machines, with the folder carried between these.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import rich.box
import rich.console
import rich.table

from pasta_jax.config import System, identity
from pasta_jax.data.pairs import PreferencePair
from pasta_jax.data.prompts import PromptTurn, read_prompts
from pasta_jax.decode.generator import adapter_path, source_of, with_speed
from pasta_jax.evaluate.judges.judging import judges_of
from pasta_jax.evaluate.run import evaluate
from pasta_jax.lang.layout import PositionRule
from pasta_jax.preference import audit, front, rollout, selection
from pasta_jax.preference.score import StepCost
from pasta_jax.train.metrics import last_scalars
from pasta_jax.train.preference import mesh_for, train_on_pairs
from pasta_jax.utils.files import write_json_atomic
from pasta_jax.utils.records import agree
from pasta_jax.weights.adapter import has_tags, read_metadata
from pasta_jax.weights.checkpoint import Checkpoint, load_checkpoint


@dataclasses.dataclass(frozen=True)
class Policy:
  """What is trained, by itself, over all rounds."""

  name: str
  weights: tuple[float, ...]
  conditioned: bool

  def speed(self, weight: float) -> int:
    """What the prompt says: 0 for the largest weight of quality, then 1, 2, …; -1: nothing."""
    return sorted(self.weights, reverse=True).index(weight) if self.conditioned else -1


def policies(config) -> list[Policy]:
  """The policies that `config.preference` asks for: one for each weight, or one for all."""
  c = config.preference
  if c.conditioned:
    return [Policy("conditioned", c.weights, True)]
  return [Policy(f"weight_{w:g}", (w,), False) for w in c.weights]


def _step_cost(c) -> StepCost | None:
  """The step cost for `score="clock"`. Raises ValueError, one line, if its file cannot be read."""
  if c.score != "clock":
    return None
  try:
    return StepCost(**json.loads(Path(c.cost).read_text()))
  except (OSError, ValueError, TypeError) as error:
    raise ValueError(
      "preference.score=clock needs preference.cost=FILE, which the benchmark writes with --cost=FILE "
      f"({error})"
    ) from None


class _Job:
  """What all rounds share. Raises ValueError, one line, for settings and files that cannot be used."""

  def __init__(self, config, workdir: Path):
    self.config, self.workdir = config, workdir
    self.stages, self.cost = config.preference.stages, _step_cost(config.preference)
    if "train" in self.stages:
      mesh_for(config)
    self.policies = policies(config)
    judges = judges_of(config)
    if not judges:
      raise ValueError("preference optimisation needs a judge: --config.eval.judges=local")
    self.judge = judges[0]
    c, e = config.preference, config.eval
    self.requests: list[PromptTurn] = [
      r for r in read_prompts(c.prompts, limit=c.limit, part="preference") if not r.earlier
    ]
    if "eval" in self.stages:
      known = {r.prompt for r in self.requests}
      held_out = read_prompts(e.prompts, limit=e.limit, categories=e.categories)
      if both := sum(r.prompt in known for r in held_out):
        print(f"{both} of {len(held_out)} prompts of the evaluation are trained on too")
    start = adapter_path(config.model.adapter)
    if start is None or not has_tags(start):
      raise ValueError("preference optimisation starts from a PASTA adapter: name --config.model.adapter")
    self.start: Path = start
    self._loaded: tuple[str | Path, Checkpoint] | None = None

  def checkpoint(self, adapter: Path) -> Checkpoint:
    """The weights under a policy's adapter; the last ones asked for are kept."""
    source = source_of(self.config, adapter)
    if self._loaded is None or self._loaded[0] != source:
      self._loaded = None  # before the next ones are read
      self._loaded = source, load_checkpoint(source)
    return self._loaded[1]

  def adapter(self, policy: Policy, number: int) -> Path:
    """The policy behind round `number`; 0: where all start."""
    return self.start if number == 0 else self.folder(policy, number) / "train" / "adapter.safetensors"

  def folder(self, policy: Policy, number: int) -> Path:
    return self.workdir / policy.name / f"round{number}"

  def done(self, policy: Policy, number: int) -> bool:
    """Whether a round's adapter and report are there; of round 0, always."""
    return number == 0 or (self.folder(policy, number) / "round.json").is_file()

  def samples(self, policy: Policy, number: int, weight: float) -> tuple[Path, int]:
    """(folder of the samples that a round learns from, speed that their prompts ask for)."""
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
    out |= {f"judge.{k}": v for k, v in self.judge.settings.items()}
    return out | {f"preference.{k}": v for k, v in identity(self.config.preference).items()}


def optimise(config, workdir: Path) -> None:
  """Runs `config.preference` in `workdir`. Raises ValueError, one line, for what cannot be used."""
  workdir = workdir.expanduser()
  job = _Job(config, workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(config.to_json(indent=2))
  for number in range(1, config.preference.rounds + 1):
    for policy in job.policies:
      if job.done(policy, number - 1):
        _round(job, policy, number)
    waiting = [p.name for p in job.policies if not job.done(p, number)]
    if waiting:
      print(f"round {number} of {', '.join(waiting)} is not trained yet (--config.preference.stages=train)")
      break
    if "eval" in job.stages:
      _evaluate(job, number)
  show(workdir)


def _round(job: _Job, policy: Policy, number: int) -> None:
  """One round of one policy up to its adapter, as far as the stages go."""
  config, c = job.config, job.config.preference
  folder, before = job.folder(policy, number), job.adapter(policy, number - 1)
  if job.done(policy, number):
    agree(folder, folder / "settings.json", job.settings(policy, number))
    return
  if not set(job.stages) & {"sample", "judge", "train"}:
    return
  folder.mkdir(parents=True, exist_ok=True)
  agree(folder, folder / "settings.json", job.settings(policy, number))
  baseline = rollout.answers_of_baseline(config, job.requests, job.workdir / "baseline.jsonl")
  found: list[_Judged] = []
  for weight in policy.weights:
    where, speed = job.samples(policy, number, weight)
    samples = rollout.draw(
      config, str(before), job.requests, where / "samples.jsonl", speed, may_draw="sample" in job.stages
    )
    if c.audit and not c.share:
      _audit(job, where / "audit.json", before, number, [s for rows in samples.values() for s in rows])
    if set(job.stages) & {"judge", "train"}:
      quality = selection.judged(job.judge, samples, baseline, where / "judgements" / job.judge.name)
      found.append(_Judged(weight, samples, quality))
  if "train" in job.stages:
    _train(job, policy, number, baseline, found)


class _Judged(NamedTuple):
  """What a weight's pairs are chosen from."""

  weight: float
  samples: dict[str, list[dict]]
  quality: dict[str, float]


def _train(job: _Job, policy: Policy, number: int, baseline: dict[str, dict], found: list[_Judged]) -> None:
  """Chooses the pairs of each weight, trains on all of them and writes the round's report."""
  config, c = job.config, job.config.preference
  folder, before = job.folder(policy, number), job.adapter(policy, number - 1)
  checkpoint = job.checkpoint(before)
  vocabulary = checkpoint.vocabulary
  rule = PositionRule(**json.loads(read_metadata(before)["positions"]))
  laid: list[PreferencePair] = []
  picked: list[tuple[dict, dict]] = []
  report: dict = {"policy": policy.name, "round": number, "by weight": {}}
  for weight, samples, quality in found:
    say = lambda prompt, weight=weight: with_speed({"role": "user", "content": prompt}, policy.speed(weight))
    prompts = {r.id: vocabulary.tokenizer.chat_prompt([say(r.prompt)]) for r in job.requests}
    rows = selection.scored(samples, baseline, quality, c.score, job.cost, prompts=prompts, length=c.length)
    chosen, reasons = selection.choose_pairs(rows, weight, guards=c.guards)
    selection.write_pairs(
      folder / (f"pairs_{weight:g}.jsonl" if policy.conditioned else "pairs.jsonl"), chosen, weight
    )
    report["by weight"][f"{weight:g}"] = selection.figures(
      rows, chosen, reasons, sum(map(len, samples.values()))
    )
    laid += selection.lay_out(chosen, vocabulary, rule, prompts)
    picked += chosen
  if not laid:
    why = {w: f["without a pair"] for w, f in report["by weight"].items()}
    raise ValueError(
      f"round {number} of {policy.name} found no pair to train on; prompts without, by weight: {why}"
    )
  notes = {"weights": ", ".join(f"{w:g}" for w in policy.weights), "round": str(number)}
  if policy.conditioned:
    notes["speeds"] = json.dumps(sorted(policy.speed(w) for w in policy.weights))
  train_on_pairs(
    config,
    folder / "train",
    laid,
    checkpoint=checkpoint,
    vocabulary=vocabulary,
    rule=rule,
    adapter=before,
    notes=notes,
  )
  report["training"] = last_scalars(folder / "train", share=0.25)  # one step holds few pairs
  if c.audit:
    report["learned"] = _learned(job, before, job.adapter(policy, number), picked)
  write_json_atomic(folder / "round.json", report)


def _audit(job: _Job, path: Path, policy: Path, number: int, samples: list[dict]) -> None:
  """Once for each file of samples: decode loop against trainer, and, behind round 1, how far the policy has
  gone."""
  if path.is_file():
    return
  few = audit.some(samples, job.config.preference.audit)
  found: dict = audit.compare(job.config, job.checkpoint(policy), policy, few)
  print(
    f"audit of {found['samples']} samples: between decode loop and trainer, log p a token differs by "
    f"{found['mean']:.2g} on average, {found['worst']:.2g} at most"
  )
  if number > 1:
    found["from_start"] = audit.divergence(job.config, job.checkpoint(job.start), job.start, few)
    print(
      f"the policy finds its samples likelier than the start does by {found['from_start']:.3f} nats a token"
    )
  write_json_atomic(path, found)


def _learned(job: _Job, before: Path, after: Path, picked: list[tuple[dict, dict]]) -> dict:
  """What became likelier in some of the pairs (`audit.gains`)."""
  few = audit.some(picked, job.config.preference.audit)
  return audit.gains(job.config, (job.checkpoint(before), before), (job.checkpoint(after), after), few)


def _evaluate(job: _Job, number: int) -> None:
  """Every policy up to a round on the prompts of `config.eval`, beside the start and the baseline."""
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
  if found := front.points([job.workdir / "eval"]):
    for form in ("svg", "png"):
      front.draw(found).savefig(job.workdir / f"front.{form}")


def show(workdir: Path) -> None:
  """Prints what each round's samples and pairs were like, and which faults the samples had."""
  table = rich.table.Table(title="rounds", box=rich.box.SIMPLE_HEAD, pad_edge=False)
  for name in ("policy", "samples", "speedup", "quality", "pairs", "faulty", "margin", "accuracy"):
    table.add_column(name, justify="left" if name in ("policy", "samples") else "right", no_wrap=True)
  faults, learned = [], []
  for path in sorted(workdir.glob("*/round*/round.json")):
    report = json.loads(path.read_text())
    for weight, f in report["by weight"].items():
      which = [report["policy"], f"round {report['round']}"]
      if len(report["by weight"]) > 1:
        which.append(f"weight {weight}")
      of = lambda key, f=f: "\n".join(
        f"{f[side].get(key, math.nan):.2f}" for side in ("samples", "best", "worst")
      )
      table.add_row(
        "\n".join(which),
        "all\nbest\nworst",
        of("speedup"),
        of("quality"),
        str(f["pairs"]),
        f"{100 * f['share with faults']:.0f} %",
        f"{report['training']['margin']:.1f}",
        f"{100 * report['training']['accuracy']:.0f} %",
      )
      found = ", ".join(
        f"{fault} {100 * share:.0f} %" for fault, share in f["faults of samples, share"].items()
      )
      faults.append(f"{', '.join(which)}: {found or 'none'}")
    if of_kinds := report.get("learned"):
      words = (
        f"{kind} {' / '.join(_gain(of_kinds[side].get(kind)) for side in ('best', 'worst'))}"
        for kind in audit.KINDS
        if any(kind in of_kinds[side] for side in ("best", "worst"))
      )
      learned.append(f"{report['policy']}, round {report['round']}: {', '.join(words)}")
  if table.row_count:
    console = rich.console.Console(highlight=False)
    console.print(table)
    console.print("Faults of samples, a share of all of them each:", *faults, sep="\n")
    if learned:
      console.print(
        "How much likelier tokens became in best / worst answers, nats a token:", *learned, sep="\n"
      )


def _gain(kind: dict | None) -> str:
  return f"{kind['gain']:+.2f}" if kind else "-"
