"""`--mode=preference` on a tiny model: rounds, stages by themselves, resuming, one policy for all weights,
audits."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.folders import trained_config, with_fields
from helpers.old_schema import make_old, old
from safetensors.numpy import load_file, save_file

from pasta_jax.data.prompts import read_prompts
from pasta_jax.decode import command
from pasta_jax.decode.generator import DecodeError, Model
from pasta_jax.decode.scheduler import Scheduler
from pasta_jax.evaluate.benchmark import step_cost
from pasta_jax.preference import audit, pareto_front, rollout, selection
from pasta_jax.preference.policies import policies
from pasta_jax.preference.rounds import optimise
from pasta_jax.preference.score import StepCost
from pasta_jax.weights.adapter import AdapterError, Merged, read_adapter, read_metadata
from pasta_jax.weights.build import to_params
from pasta_jax.weights.checkpoint import load_checkpoint

OWN = '{"no_repeat": 7}'  # settings of decoding that the start carries
PROMPTS = [
  {"id": str(i), "prompt": p} for i, p in enumerate(["Plan a trip.", "Why?", "Name three birds.", "Sing."])
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """A config whose adapter the trainer made in a few steps on the seed data."""
  folder = tmp_path_factory.mktemp("preference")
  config = trained_config(folder)
  adapter = Path(config.model.adapter)
  save_file(load_file(adapter), adapter, read_metadata(adapter) | {"decode": OWN})
  config = with_fields(config, "systems.baseline", adapter=config.model.adapter)
  config = with_fields(
    config,
    "decode",
    max_new_tokens=90,
    max_branches=2,
    kv_capacity=1024,
    dtype="float32",
    promise_bias=5.0,
    no_repeat=0,
    repetition_penalty=1.0,
  )
  (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
  config = with_fields(
    config,
    "eval",
    batch_size=2,
    branch_width=2,
    limit=2,
    prompts=str(folder / "prompts.jsonl"),
    judge_dtype="float32",
  )
  # A model of random weights is nearly always cut off, so every sample here has defects.
  return with_fields(
    config,
    "preference",
    prompts=str(folder / "prompts.jsonl"),
    samples=3,
    temperature=1.0,
    decode_batch_size=4,
    weights="2",
    guards=False,
    length=320,
    batch_size=2,
    grad_accum_steps=1,
    steps=3,
    learning_rate=1e-2,
    dtype="float32",
    remat="none",
    attention="auto",
    loss_chunk=256,
    checkpoint_every=1,
  )


def changed(config, **preference):
  return with_fields(config, "preference", **preference)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("whole")
  optimise(start, workdir)
  return workdir


def rows_of(path: Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_adapter(one: Path, other: Path) -> None:
  """Bit for bit, header included, whose fields may stand in another order."""
  assert read_metadata(one) == read_metadata(other)
  first, second = load_file(one), load_file(other)
  assert first.keys() == second.keys()
  assert all(np.array_equal(first[k].view(np.uint16), second[k].view(np.uint16)) for k in first)


def test_two_rounds_leave_what_they_promise(whole, start):
  first, second = (whole / "weight_2" / f"round{n}" for n in (1, 2))
  for folder, samples in ((first, whole / "start"), (second, second)):
    drawn = rows_of(samples / "samples.jsonl")
    assert sorted(r["id"] for r in drawn) == sorted(f"{p['id']}#{k}" for p in PROMPTS for k in range(3))
    by_id = {r["id"]: r for r in drawn}
    pairs = rows_of(folder / "pairs.jsonl")
    report = json.loads((folder / "round.json").read_text())
    figures = report["by weight"]["2"]
    assert len(pairs) == figures["pairs"] >= 2
    assert figures["prompts"] == len(PROMPTS) == len(pairs) + sum(figures["without a pair"].values())
    for p in pairs:
      value = lambda side, p=p: p[side]["speedup"] + 2 * p[side]["quality"]
      assert value("best") > value("worst") and p["best"]["text"] == by_id[p["best"]["id"]]["text"]
    assert (
      figures["defects of samples, share"]["cut off"] == sum(r["finish_reason"] != "stop" for r in drawn) / 12
    )
    assert report["training"]["margin"] > 0.1 and (folder / "train" / "metrics.jsonl").exists()
    assert len(rows_of(folder / "train" / "reference.jsonl")) == len(pairs)
    assert read_metadata(folder / "train" / "adapter.safetensors")["decode"] == OWN
  texts = [[r["text"] for r in rows_of(p / "samples.jsonl")] for p in (whole / "start", second)]
  assert texts[0] != texts[1]  # another policy
  assert (whole / "front.svg").is_file() and (whole / "front.png").is_file()
  summary = json.loads((whole / "eval" / "summary.json").read_text())
  assert {"start", "baseline", "weight_2_round1", "weight_2_round2"} <= summary["systems"].keys()
  assert summary["systems"]["weight_2_round2"]["quality"]["local"]["judged"] == 2


def test_adapters_are_kept_part_way_through_a_round(whole, start, tmp_path):
  """The one after two of three steps is what a training that stops there would have, and the last one is as ever."""
  for name in ("baseline.jsonl", "baseline.settings.json"):
    shutil.copy(whole / name, tmp_path)
  shutil.copytree(whole / "start", tmp_path / "start")
  optimise(changed(start, rounds=1, stages="train", keep="0.1,0.6"), tmp_path)
  train = tmp_path / "weight_2" / "round1" / "train"
  assert_same_adapter(
    train / "adapter.safetensors", whole / "weight_2" / "round1" / "train" / "adapter.safetensors"
  )
  first, second, last = (
    load_file(train / name / "adapter.safetensors") for name in ("kept_10", "kept_60", ".")
  )
  assert read_metadata(train / "kept_60" / "adapter.safetensors") == read_metadata(
    train / "adapter.safetensors"
  )
  apart = lambda a, b: max(np.abs(a[k].astype(np.float32) - b[k].astype(np.float32)).max() for k in a)
  assert 0 < apart(first, second) and 0 < apart(second, last)
  shutil.rmtree(train / "checkpoints" / "3")  # the run as it was after two steps
  of_run = load_checkpoint(train).params
  base = load_checkpoint(start.model.source)
  of_kept = Merged(
    base.config, base.params, read_adapter(train / "kept_60" / "adapter.safetensors", base.config)
  )
  for name in of_kept:
    np.testing.assert_allclose(of_kept[name], of_run[name], rtol=2**-7, atol=2**-8, err_msg=name)


def test_stages_by_themselves_and_after_a_kill(whole, start, tmp_path):
  """Each stage in a call of its own, the samples' file cut off in a line: the same adapter, and nothing drawn
  twice."""
  once = changed(start, rounds=1)
  optimise(changed(once, stages="sample"), tmp_path)
  path = tmp_path / "start" / "samples.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed while it wrote
  with pytest.raises(ValueError, match="lacks 7 of 12 samples: run the sample stage first"):
    optimise(changed(once, stages="judge"), tmp_path)
  optimise(changed(once, stages="sample"), tmp_path)
  again = path.read_bytes().splitlines(keepends=True)
  assert again[:5] == lines[:5] and len(again) == 12
  known = {r["id"]: r["text"] for r in map(json.loads, lines)}
  assert {r["id"]: r["text"] for r in map(json.loads, again)} == known
  optimise(changed(once, stages="judge"), tmp_path)
  judged = (tmp_path / "start" / "judgements" / "local" / "samples.jsonl").read_bytes()
  optimise(changed(once, stages="train", steps=3), tmp_path)
  assert (tmp_path / "start" / "judgements" / "local" / "samples.jsonl").read_bytes() == judged
  adapter = "weight_2/round1/train/adapter.safetensors"
  assert_same_adapter(tmp_path / adapter, whole / adapter)


def test_samples_drawn_in_shares_are_those_of_one_call(whole, start, tmp_path):
  once = changed(start, rounds=1)
  optimise(changed(once, stages="sample", share="2/3"), tmp_path)
  with pytest.raises(ValueError, match="lacks 9 of 12 samples"):
    optimise(changed(once, stages="train"), tmp_path)
  other = tmp_path / "start" / "samples.2-of-3.jsonl"
  whole_lines = other.read_bytes()
  other.write_bytes(whole_lines + b'{"id": "0#0", ')  # another process is about to end a line
  optimise(
    changed(once, stages="sample", share="1/2"), tmp_path
  )  # of other shares: what is there is not drawn again
  assert other.read_bytes() == whole_lines + b'{"id": "0#0", '
  other.write_bytes(whole_lines)
  optimise(changed(once, stages="sample"), tmp_path)
  files = sorted((tmp_path / "start").glob("samples*.jsonl"))
  assert [(p.name, len(rows_of(p))) for p in files] == [
    ("samples.1-of-2.jsonl", 6),
    ("samples.2-of-3.jsonl", 3),
    ("samples.jsonl", 3),
  ]
  texts = lambda paths: {r["id"]: r["text"] for p in paths for r in rows_of(p)}
  assert texts(files) == texts([whole / "start" / "samples.jsonl"])
  optimise(changed(once, stages="judge,train"), tmp_path)
  adapter = "weight_2/round1/train/adapter.safetensors"
  assert_same_adapter(tmp_path / adapter, whole / adapter)
  with pytest.raises(ValueError, match="preference.share='2/3' is for samples"):
    optimise(changed(once, share="2/3"), tmp_path)
  with pytest.raises(ValueError, match='must be like "2/3", for the second of three'):
    optimise(changed(once, stages="sample", share="4/3"), tmp_path)


def test_a_sample_without_promises_is_one_more(start, whole, tmp_path):
  """Drawn from the policy; the others, and the loss's target, stay what they are without it."""
  once = changed(start, rounds=1, plain=True, best=2, stages="sample,judge,train")
  optimise(once, tmp_path)
  drawn = {r["id"]: r for r in rows_of(tmp_path / "start" / "samples.jsonl")}
  others = {r["id"]: r["text"] for r in rows_of(whole / "start" / "samples.jsonl")}
  assert {i: r["text"] for i, r in drawn.items() if i in others} == others
  plain = {i: r for i, r in drawn.items() if i not in others}
  assert set(plain) == {f"{p['id']}#plain" for p in PROMPTS}
  assert all(r["promises"] == 0 and rollout.is_plain(i) for i, r in plain.items())
  assert not any(map(rollout.is_plain, others))
  found = audit.compare(
    start, load_checkpoint(start.model.source), Path(start.model.adapter), [*plain.values()]
  )
  assert found["worst"] < 1e-4
  report = json.loads((tmp_path / "weight_2" / "round1" / "round.json").read_text())
  pairs = rows_of(tmp_path / "weight_2" / "round1" / "pairs.jsonl")
  best = rows_of(tmp_path / "weight_2" / "round1" / "best.jsonl")
  assert {p["best"]["id"] for p in pairs} <= {s["id"] for s in best} and all("trace" in s for s in best)
  share = report["by weight"]["2"]["best without promises"]
  assert share == np.mean([p["best"]["id"].endswith("#plain") for p in pairs])
  of = [r | {"speedup": 1.0, "quality": 0.5, "defects": []} for r in drawn.values() if r["of"] == "0"]
  best = next(r for r in of if rollout.is_plain(r["id"]))
  others_of = [
    (best, of[0]),
    (of[1], of[0]),
  ]  # a planted one: the best of two pairs is drawn without promises
  assert selection.figures({"0": of}, others_of, {}, len(of))["best without promises"] == 0.5
  assert (
    "best without promises"
    not in json.loads((whole / "weight_2/round1/round.json").read_text())["by weight"]["2"]
  )
  with pytest.raises(ValueError, match="lacks 4 of 16 samples"):
    copy = shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("weight_2"))
    optimise(changed(start, rounds=1, plain=True, stages="judge"), copy)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_training_that_was_killed_goes_on(whole, start, tmp_path, steps, capsys):
  """Checkpoints of some steps, and neither adapter nor report: the adapter and the report of a run never
  stopped."""
  for name in ("baseline.jsonl", "baseline.settings.json"):
    shutil.copy(whole / name, tmp_path)
  shutil.copytree(whole / "start", tmp_path / "start")
  train = tmp_path / "weight_2" / "round1" / "train"
  shutil.copytree(whole / "weight_2" / "round1" / "train", train)
  (train / "adapter.safetensors").unlink()
  if steps == 2:
    shutil.rmtree(train / "checkpoints" / "3")
  assert (train / "checkpoints" / str(steps)).is_dir()
  optimise(changed(start, rounds=1, stages="train"), tmp_path)
  assert [r["step"] for r in rows_of(train / "metrics.jsonl")] == [1, 2, 3]
  reports = [json.loads((w / "weight_2" / "round1" / "round.json").read_text()) for w in (tmp_path, whole)]
  for r in reports:
    del r["training"]["pairs_per_second"], r["training"]["data_wait"]
  assert reports[0] == reports[1] and "margin" in capsys.readouterr().out
  assert_same_adapter(
    train / "adapter.safetensors", whole / "weight_2" / "round1" / "train" / "adapter.safetensors"
  )


def test_a_folder_of_the_old_schema_goes_on(whole, start, tmp_path, capsys):
  """Samples, scores and the first round's report with the old keys: the second round is trained as before."""
  for name in ("baseline.jsonl", "baseline.settings.json"):
    shutil.copy(whole / name, tmp_path)
  shutil.copytree(whole / "start", tmp_path / "start")
  shutil.copytree(whole / "weight_2", tmp_path / "weight_2")
  assert {"theoretical_speedup", "faults", "share with faults", "lost"} <= make_old(tmp_path)
  first, second = (tmp_path / "weight_2" / f"round{n}" for n in (1, 2))
  old_report = (first / "round.json").read_text()
  for path in (second / "round.json", second / "pairs.jsonl"):
    path.unlink()
  shutil.rmtree(second / "train")
  shutil.rmtree(second / "judgements" / "local")
  optimise(changed(start, stages="judge,train"), tmp_path)
  assert (first / "round.json").read_text() == old_report
  adapter = Path("weight_2") / "round2" / "train" / "adapter.safetensors"
  assert_same_adapter(tmp_path / adapter, whole / adapter)
  reports = [json.loads((w / "weight_2" / "round2" / "round.json").read_text()) for w in (tmp_path, whole)]
  for report in reports:
    del report["training"]["pairs_per_second"], report["training"]["data_wait"]
  assert reports[0] == reports[1] and reports[0]["schema"] == 2
  shown = capsys.readouterr().out
  assert "weight_2, round 1: cut off" in shown and "weight_2, round 2: cut off" in shown


def test_every_parameter_can_be_trained(whole, start, tmp_path):
  """From a low-rank start: each round goes on from the weights of the one before, and so does whoever
  decodes."""
  for name in ("baseline.jsonl", "baseline.settings.json"):
    shutil.copy(whole / name, tmp_path)
  shutil.copytree(whole / "start", tmp_path / "start")
  optimise(changed(start, lora_rank=0, learning_rate=1e-3, stages="sample,judge,train"), tmp_path)
  first, second = (tmp_path / "weight_2" / f"round{n}" / "train" for n in (1, 2))
  low_rank, full = (
    {r["id"]: r["log_p"] for r in rows_of(f / "reference.jsonl")}
    for f in (whole / "weight_2" / "round1" / "train", first)
  )
  assert low_rank.keys() == full.keys()
  np.testing.assert_allclose(
    list(full.values()), [low_rank[k] for k in full], rtol=1e-5
  )  # the start, updates merged
  kernels = [
    load_checkpoint(source).params["layers.0.attn.q.kernel"]
    for source in (start.model.source, first / "model", second / "model")
  ]
  assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(kernels, kernels[1:]))
  found = json.loads((second.parent / "audit.json").read_text())
  assert found["samples"] == 8 and found["worst"] < 1e-5 and abs(found["from_start"]) > 1e-4
  moved = shutil.copytree(second, tmp_path / "elsewhere")
  generators = [
    Model(start, adapter=str(f / "adapter.safetensors"), dtype="float32") for f in (second, moved)
  ]
  kernel, same = (to_params(g.model)["layers.0.attn.q.kernel"] for g in (generators[1], generators[0]))
  np.testing.assert_array_equal(kernel, same)
  np.testing.assert_array_equal(kernel, kernels[2])
  shutil.rmtree(moved / "model")
  with pytest.raises(AdapterError, match="belongs to the weights in .*model, which is not there") as caught:
    Model(start, adapter=str(moved / "adapter.safetensors"))
  assert "\n" not in str(caught.value)


def test_other_settings_need_another_folder(whole, start):
  for changes in ({"loss": "dpo"}, {"alpha": 0.5}, {"guards": True}, {"score": "harmonic"}, {"length": 300}):
    [(name, value)] = changes.items()
    with pytest.raises(
      ValueError, match=f"was made with preference.{name}=.*, not {value!r}: choose another"
    ):
      optimise(changed(start, **changes), whole)


def test_samples_depend_on_their_own_seed_alone(start, tmp_path, whole):
  """Fewer prompts and other places beside them: the same samples."""
  requests = read_prompts(start.preference.prompts)[1:3]
  drawn = rollout.draw_samples(
    changed(start, decode_batch_size=2), start.model.adapter, requests, tmp_path / "samples.jsonl"
  )
  other = [dataclasses.replace(requests[0], prompt="Another prompt.")]
  with pytest.raises(ValueError, match="another prompt with the id '1#0'"):
    rollout.draw_samples(start, start.model.adapter, other, tmp_path / "samples.jsonl")
  known = {r["id"]: r["text"] for r in rows_of(whole / "start" / "samples.jsonl")}
  assert {s["id"]: s["text"] for rows in drawn.values() for s in rows} == {
    i: t for i, t in known.items() if i.split("#")[0] in ("1", "2")
  }


def test_decode_loop_and_trainer_agree(start, whole):
  samples = rows_of(whole / "start" / "samples.jsonl")
  assert sum(s["promises"] > 0 for s in samples) >= 3
  checkpoint, adapter = load_checkpoint(start.model.source), Path(start.model.adapter)
  found = audit.compare(start, checkpoint, adapter, samples[:6])
  assert found["samples"] == 6 and found["worst"] < 1e-4
  wrong = [s | {"log_p": s["log_p"] + 1.0} for s in samples[:1]]
  assert audit.compare(start, checkpoint, adapter, wrong)["worst"] > 1e-3
  assert audit.divergence(start, checkpoint, adapter, samples[:6]) == pytest.approx(0, abs=1e-4)
  trained = whole / "weight_2" / "round1" / "train" / "adapter.safetensors"
  behind = json.loads((whole / "weight_2" / "round2" / "audit.json").read_text())
  assert (
    behind["worst"] < 1e-4 and behind["from_start"] > 1e-2
  )  # its own samples, which the start would rarely write
  own = rows_of(whole / "weight_2" / "round2" / "samples.jsonl")
  assert audit.divergence(start, checkpoint, trained, own) == pytest.approx(0, abs=1e-4)


def test_one_policy_for_all_weights(start, whole, tmp_path, monkeypatch):
  config = changed(start, weights="1,inf", conditioned=True, rounds=1, stages="train,eval")
  for name in ("baseline.jsonl", "baseline.settings.json"):
    shutil.copy(whole / name, tmp_path)
  shutil.copytree(whole / "start", tmp_path / "start")
  [judged] = (tmp_path / "start" / "judgements").glob("*/samples.jsonl")
  rows = rows_of(
    judged
  )  # answers of random weights are nearly all the same to the judge, and ties make no pair
  judged.write_text("".join(json.dumps(r | {"preference": n / len(rows)}) + "\n" for n, r in enumerate(rows)))
  optimise(config, tmp_path)
  folder = tmp_path / "conditioned" / "round1"
  adapter = folder / "train" / "adapter.safetensors"
  assert json.loads(read_metadata(adapter)["speeds"]) == [0, 1]
  assert {p["weight"] for p in rows_of(folder / "pairs_inf.jsonl")} == {"inf"}
  assert {p["weight"] for p in rows_of(folder / "pairs_1.jsonl")} == {1.0}
  systems = json.loads((tmp_path / "eval" / "summary.json").read_text())["systems"]
  assert {"conditioned_speed0_round1", "conditioned_speed1_round1"} <= systems.keys()
  config = with_fields(config, "model", adapter=str(adapter))
  (tmp_path / "one.jsonl").write_text(json.dumps(PROMPTS[3]) + "\n")
  # What the decoder is given is looked at, too: a model of random weights may answer the same to any speed.
  decoded, run = [], Scheduler.run
  monkeypatch.setattr(
    Scheduler,
    "run",
    lambda self, prompts, *a, **k: decoded.extend(prompts) or run(self, prompts, *a, **k),
  )
  for speed in (-1, 0, 1):
    config = with_fields(config, "decode", speed=speed)
    generator = Model(config)
    asked = generator.encode("Sing.", speed)
    assert (f"Sing.\n\n(speed {speed})" in generator.vocabulary.text(asked)) == (speed >= 0)
    command.decode_file(config, str(tmp_path / "one.jsonl"), str(tmp_path / "out.jsonl"))
    assert list(decoded[-1]) == list(asked)
    assert rows_of(tmp_path / "out.jsonl")[0]["text"] == generator.generate("Sing.", speed=speed).text
  config = with_fields(config, "decode", speed=2)
  with pytest.raises(DecodeError, match="speed=2 means nothing to the adapter .*: it knows 0, 1"):
    command.decode_file(config, str(tmp_path / "one.jsonl"), None)
  config = with_fields(config, "model", adapter=start.model.adapter)
  with pytest.raises(DecodeError, match="was not trained for it"):
    command.decode_file(config, str(tmp_path / "one.jsonl"), None)


def test_a_start_without_tags_is_refused_before_any_work(start, tmp_path):
  for name, words in (
    ("baseline", "starts from a PASTA adapter"),
    ("", "starts from a PASTA adapter"),
    (str(tmp_path / "gone"), "no adapter file at .*gone"),
  ):
    config = with_fields(start, "model", adapter=name)
    with pytest.raises(ValueError, match=words):
      optimise(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_step_cost_is_found_again():
  """From steps of a known cost, with a measurement of another precision and of other kinds beside them."""
  cost = StepCost(base=0.02, row=0.003, entry=1e-5)
  median = {
    ("float32", b, p): 0.02 + 0.003 * b + 1e-5 * p / 2 for b, p in ((1, 512), (4, 512), (8, 512), (1, 2048))
  }
  median |= {("bfloat16", 1, 512): 9.0, ("sequential", "float32"): 1.0, ("requests", "float32", 8): 5.0}
  assert dataclasses.asdict(cost) == pytest.approx(step_cost(median, "float32"))


@pytest.mark.parametrize("changes, words", [
  ({"weights": "1,x"}, "weights must be a number or several"), ({"weights": "2,2"}, "must be weights of quality"),
  ({"stages": "sample,guess"}, "stages takes sample, judge, train, eval, not 'guess'"),
  ({"samples": 1}, "samples must be 2 or more"), ({"temperature": 0.0}, "temperature must be above 0"),
  ({"score": "fast"}, "score must be one of delivered, theoretical"),
  ({"score": "clock"}, "needs preference.cost=FILE"),
  ({"prompts": ""}, "name a file"), ({"loss": "hinge"}, "loss must be one of bonbon, ipo, dpo"),
  ({"alpha": 2.0}, "alpha must be in"), ({"dtype": "float16"}, "dtype must be one of auto, float32")])  # fmt: skip
def test_wrong_settings_are_one_line(start, tmp_path, changes, words):
  with pytest.raises(ValueError, match=words) as error:
    optimise(changed(start, **changes), tmp_path / "new")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "new").exists()


def test_policies(start):
  assert [(p.name, p.weights) for p in policies(changed(start, weights="1, inf"))] == [
    ("weight_1", (1.0,)),
    ("weight_inf", (float("inf"),)),
  ]
  [one] = policies(changed(start, weights="1,8,inf", conditioned=True))
  assert [one.speed(w) for w in one.weights] == [2, 1, 0]


def test_what_a_round_learned_is_in_its_report(whole, start):
  """Gains by kind of token add up to what the answers gained as a whole."""
  report = json.loads((whole / "weight_2" / "round1" / "round.json").read_text())
  by_id = {r["id"]: r for r in rows_of(whole / "start" / "samples.jsonl")}
  checkpoint = load_checkpoint(start.model.source)
  policies = [start.model.adapter, whole / "weight_2" / "round1" / "train" / "adapter.safetensors"]
  pairs = rows_of(whole / "weight_2" / "round1" / "pairs.jsonl")
  picked = audit.some([(p["best"]["id"], p["worst"]["id"]) for p in pairs], start.preference.audit)
  for side, name in enumerate(("best", "worst")):
    answers = [by_id[ids[side]] for ids in picked]
    log_p = [audit.log_likelihoods(start, checkpoint, Path(p), answers) for p in policies]
    kinds = report["learned"][name]
    assert {"text", "promise"} <= kinds.keys() and "async" not in kinds
    total = sum(k["tokens"] * k["gain"] for k in kinds.values())
    assert total == pytest.approx((log_p[1] - log_p[0]).mean(), abs=1e-3)
  margin = {n: sum(k["tokens"] * k["gain"] for k in report["learned"][n].values()) for n in ("best", "worst")}
  assert margin["best"] > margin["worst"]


# --- the figure ---


def summary(**systems) -> str:
  one = lambda own, paper, win: {
    "responses": {"theoretical_parallelism": own, "speedup_over_baseline": paper},
    "quality": {"local": {"win_rate": win, "win_rate_error": 2.0}},
  }
  return json.dumps({"systems": {name: one(*values) for name, values in systems.items()}})


def test_the_figure_shows_every_policy_from_the_start_on(tmp_path):
  first = summary(start=(1.6, 1.8, 43.0), weight_1_round1=(1.7, 2.4, 42.0), baseline=(1.0, 1.0, 50.0))
  second = summary(weight_1_round2=(2.3, 2.4, 38.0), conditioned_speed0_round1=(1.5, 1.9, 44.0))
  for name, text in (("a", first), ("b", second)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "summary.json").write_text(text)
  found = pareto_front.points([tmp_path / "a", tmp_path / "b"])
  assert {(p.policy, p.number, p.speed, p.quality) for p in found} == {
    ("start", 0, (1.6, 1.8), 43.0),
    ("weight_1", 1, (1.7, 2.4), 42.0),
    ("weight_1", 2, (2.3, 2.4), 38.0),
    ("conditioned_speed0", 1, (1.5, 1.9), 44.0),
  }
  for axes, k in zip(pareto_front.draw(found).axes, (0, 1)):
    paths = [list(zip(*line.get_data())) for line in axes.lines]
    assert [(f[k], q) for f, q in (((1.6, 1.8), 43.0), ((1.7, 2.4), 42.0), ((2.3, 2.4), 38.0))] in paths
    assert [(f[k], q) for f, q in (((1.6, 1.8), 43.0), ((1.5, 1.9), 44.0))] in paths
  pareto_front.main([str(tmp_path / "a"), str(tmp_path / "front.svg")])
  assert "<svg" in (tmp_path / "front.svg").read_text()
  (tmp_path / "a" / "summary.json").write_text(json.dumps(old(json.loads(first))))
  assert pareto_front.points([tmp_path / "a", tmp_path / "b"]) == found
  (tmp_path / "a" / "summary.json").write_text(summary(start=(1.6, 1.8, 43.0)))
  assert pareto_front.points([tmp_path / "a"]) == []
  for name, words in (("a", "no round was judged in"), ("c", "has no finished evaluation")):
    with pytest.raises(SystemExit, match=words):
      pareto_front.main([str(tmp_path / name), str(tmp_path / "none.svg")])
  assert not (tmp_path / "none.svg").exists()
