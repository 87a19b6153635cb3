"""`--mode=preference`: rounds of sampling, judging, choosing pairs, training and evaluating, as one resumable job.

    workdir/baseline.jsonl                     the baseline's answers to the training prompts
    workdir/start/samples.jsonl, judgements/   samples of the policy that training starts from: of every first round
    workdir/POLICY/round1/pairs.jsonl          best and worst samples, and where they come from
    workdir/POLICY/round1/round.json           figures of samples and pairs, faults, metrics of the training
    workdir/POLICY/round1/train/               checkpoints, reference.jsonl, metrics.jsonl, adapter.safetensors
    workdir/POLICY/round2/samples.jsonl, …     the same again, from the policy behind round 1
    workdir/eval/                              all policies on the prompts of `config.eval` (`evaluate.run`)

A policy is trained for one weight of quality, or, `conditioned`, for all of them: its prompts then say which speed is
wanted. Every stage keeps what it made and goes on where it stopped; `preference.stages` runs some of them, so that they
can run on different machines, with the folder carried between these.
"""

import dataclasses
import json
import math
from pathlib import Path

import rich.console
import rich.table

from pasta_jax.data.pairs import PreferencePair
from pasta_jax.decode.generate import adapter_path, with_speed
from pasta_jax.evaluate.judging import judges_of
from pasta_jax.evaluate.prompts import Request, read_prompts
from pasta_jax.evaluate.run import evaluate
from pasta_jax.lang.layout import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model.checkpoint import load_checkpoint
from pasta_jax.model.lora import read_metadata
from pasta_jax.preference import audit, pairs, sampling
from pasta_jax.preference.score import SPEEDUPS, StepCost
from pasta_jax.train.preference import check_settings, train_on_pairs

STAGES = ("sample", "judge", "train", "eval")


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
  """The policies that `config.preference` asks for: one a weight, or one for all. Raises ValueError, one line."""
  c = config.preference
  try:
    weights = [float(w) for w in str(c.weights).split(",") if w.strip()]
  except ValueError:
    weights = []
  if not weights or min(weights) < 0 or len(set(weights)) < len(weights) or any(map(math.isnan, weights)):
    raise ValueError(f"preference.weights={c.weights!r}: give weights of quality, each once, such as 1,2,4,8,inf")
  if c.conditioned:
    return [Policy("conditioned", tuple(weights), True)]
  return [Policy(f"weight_{w:g}", (w,), False) for w in weights]


def _check(config) -> tuple[list[str], StepCost | None]:
  """(stages to run, step cost or None); ValueError, one line, for settings that cannot be used."""
  c = config.preference
  stages = [s.strip() for s in c.stages.split(",") if s.strip()]
  for s in stages:
    if s not in STAGES:
      raise ValueError(f"preference.stages: {s!r} is none of {', '.join(STAGES)}")
  for field in ("rounds", "samples", "requests", "width"):
    if c[field] < (2 if field == "samples" else 1):
      raise ValueError(f"preference.{field} must be {2 if field == 'samples' else 1} or more, not {c[field]}")
  check_settings(c)
  if not c.temperature > 0:
    raise ValueError("preference.temperature must be above 0: at 0 all samples of a prompt are the same")
  if c.score != "clock":
    if c.score not in SPEEDUPS:
      raise ValueError(f"preference.score must be one of {', '.join(SPEEDUPS)}, clock, not {c.score!r}")
    return stages, None
  try:
    return stages, StepCost(**json.loads(Path(c.cost).read_text()))
  except (OSError, ValueError, TypeError) as error:
    raise ValueError("preference.score=clock needs preference.cost=FILE, which the benchmark writes with --cost=FILE "
                     f"({error})") from None


class _Job:
  """What all rounds share."""

  def __init__(self, config, workdir: Path):
    self.config, self.workdir = config, workdir
    self.stages, self.cost = _check(config)
    self.policies = policies(config)
    judges = judges_of(config)
    if not judges:
      raise ValueError("preference optimisation needs a judge: --config.eval.judges=local")
    self.judge = judges[0]
    c = config.preference
    self.requests: list[Request] = [r for r in read_prompts(c.prompts, limit=c.limit) if not r.earlier]

  def adapter(self, policy: Policy, number: int) -> str:
    """The policy behind round `number`; 0: where all start."""
    if number == 0:
      return self.config.model.adapter
    return str(self.folder(policy, number) / "train" / "adapter.safetensors")

  def folder(self, policy: Policy, number: int) -> Path:
    return self.workdir / policy.name / f"round{number}"

  def samples(self, policy: Policy, number: int, weight: float) -> tuple[Path, int]:
    """(folder of the samples that a round learns from, speed that their prompts ask for)."""
    if number == 1:
      return self.workdir / "start", -1
    speed = policy.speed(weight)
    return self.folder(policy, number) / (f"speed{speed}" if speed >= 0 else "."), speed


def optimise(config, workdir: Path) -> None:
  """Runs `config.preference` in `workdir`. Raises ValueError, one line, for what cannot be used."""
  job = _Job(config, workdir)
  c = config.preference
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(config.to_json_best_effort(indent=2))
  for number in range(1, c.rounds + 1):
    for policy in job.policies:
      if set(job.stages) & {"sample", "judge", "train"} and not _round(job, policy, number):
        return
    if "eval" in job.stages:
      _evaluate(job, number)
  show(workdir)


def _round(job: _Job, policy: Policy, number: int) -> bool:
  """One round of one policy up to its adapter, as far as the stages go; False where it has to stop there."""
  config, c = job.config, job.config.preference
  if Path(job.adapter(policy, number)).is_file():
    return True
  before = job.adapter(policy, number - 1)
  path = adapter_path(before)
  if path is None or not path.is_file():
    if number > 1:
      print(f"{policy.name}: round {number} waits for the train stage of round {number - 1}")
      return False
    raise ValueError("preference optimisation starts from an adapter: name --config.model.adapter")
  baseline = sampling.answers_of_baseline(config, job.requests, job.workdir / "baseline.jsonl")
  chosen: dict[float, list[tuple[dict, dict]]] = {}
  report: dict = {"policy": policy.name, "round": number, "by weight": {}}
  for weight in policy.weights:
    folder, speed = job.samples(policy, number, weight)
    samples = sampling.draw(config, before, job.requests, folder / "samples.jsonl", speed,
                            may_draw="sample" in job.stages)
    if c.audit:
      audit.compare(config, path, [s for rows in samples.values() for s in rows][: c.audit])
    if not set(job.stages) & {"judge", "train"}:
      continue
    quality = pairs.judged(job.judge, samples, baseline, folder / "judgements" / job.judge.name)
    if "train" not in job.stages:
      continue
    rows = pairs.scored(samples, baseline, quality, c.score, job.cost)
    chosen[weight], reasons = pairs.choose_pairs(rows, weight, guards=c.guards)
    job.folder(policy, number).mkdir(parents=True, exist_ok=True)
    name = f"pairs_{weight:g}.jsonl" if policy.conditioned else "pairs.jsonl"
    pairs.write_pairs(job.folder(policy, number) / name, chosen[weight], weight)
    report["by weight"][f"{weight:g}"] = pairs.figures(rows, chosen[weight], reasons)
  return _train(job, policy, number, path, chosen, report) if "train" in job.stages else True


def _train(job: _Job, policy: Policy, number: int, before: Path, chosen: dict[float, list[tuple[dict, dict]]],
           report: dict) -> bool:
  """Trains on the pairs of each weight; False if it was stopped."""
  config, c = job.config, job.config.preference
  checkpoint = load_checkpoint(config.model.source)
  vocabulary = Vocabulary(checkpoint.tokenizer, checkpoint.config.vocab_size)
  rule = PositionRule(**json.loads(read_metadata(before)["positions"]))
  laid: list[PreferencePair] = []
  names: list[str] = []
  for weight, found in chosen.items():
    speed = policy.speed(weight)
    say = lambda prompt, speed=speed: with_speed(_user(prompt), speed) if speed >= 0 else _user(prompt)
    prompts = {r.id: vocabulary.tokenizer.chat_prompt([say(r.prompt)]) for r in job.requests}
    more, of, too_long = pairs.lay_out(found, vocabulary, rule, prompts, c.length)
    laid += more
    names += [f"{weight:g}: {n}" for n in of]
    report["by weight"][f"{weight:g}"]["too long"] = too_long
  if not laid:
    raise ValueError(f"round {number} of {policy.name} found no pair to train on: {report['by weight']}")
  folder = job.folder(policy, number)
  speeds = sorted(policy.speed(w) for w in policy.weights)
  notes = {"weights": ", ".join(f"{w:g}" for w in policy.weights), "round": str(number)}
  if policy.conditioned:
    notes["speeds"] = json.dumps(speeds)
  metrics = train_on_pairs(config, folder / "train", laid, names, checkpoint=checkpoint, vocabulary=vocabulary,
                           rule=rule, adapter=before, samples=c.samples, notes=notes)
  if not Path(job.adapter(policy, number)).is_file():
    return False
  (folder / "round.json").write_text(json.dumps(report | {"training": metrics}, indent=2) + "\n")
  return True


def _user(prompt: str) -> dict[str, str]:
  return {"role": "user", "content": prompt}


def _evaluate(job: _Job, number: int) -> None:
  """Every policy up to a round on the prompts of `config.eval`, beside the start and the baseline."""
  config = job.config.copy_and_resolve_references()
  with config.unlocked():
    names = ["start"]
    config.systems.start = dict(adapter=config.model.adapter, decode="parallel")
    for n in range(1, number + 1):
      for policy in job.policies:
        adapter = job.adapter(policy, n)
        if not Path(adapter).is_file():
          raise ValueError(f"{adapter} is not there: run the train stage first")
        for weight in policy.weights:
          speed = policy.speed(weight)
          name = f"{policy.name}{f'_speed{speed}' if speed >= 0 else ''}_round{n}"
          asked = {"speed": speed} if speed >= 0 else {}
          config.systems[name] = dict(adapter=adapter, decode="parallel", **asked)
          names.append(name)
  config.eval.systems = ",".join(names)
  evaluate(config, job.workdir / "eval")


def show(workdir: Path) -> None:
  """Prints what each round's samples and pairs were like."""
  table = rich.table.Table(title="rounds", caption="speedup and quality: of all samples (of the best ones, the worst)")
  for name in ("policy", "round", "weight", "pairs", "speedup", "quality", "faulty", "margin", "accuracy"):
    table.add_column(name, justify="left" if name == "policy" else "right")
  for path in sorted(workdir.glob("*/round*/round.json")):
    report = json.loads(path.read_text())
    for weight, f in report["by weight"].items():
      of = lambda key, f=f: "{:.2f} ({:.2f}, {:.2f})".format(*(f[side].get(key, math.nan)
                                                               for side in ("samples", "best", "worst")))
      table.add_row(report["policy"], str(report["round"]), weight, str(f["pairs"]), of("speedup"), of("quality"),
                    f"{100 * f['share with faults']:.0f} %", f"{report['training']['margin']:.1f}",
                    f"{100 * report['training']['accuracy']:.0f} %")
  if table.row_count:
    rich.console.Console().print(table)
