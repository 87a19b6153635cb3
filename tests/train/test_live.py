"""Training in the form `live`: the loss is that of the mask by rounds, and what is trained decodes by it."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from test_training import LENGTH, RULE, numpy_log_likelihood, settings, tiny  # noqa: F401

from pasta_jax.config import with_changes
from pasta_jax.config.sections import VISIBILITIES
from pasta_jax.data.examples import examples
from pasta_jax.data.packing import pack_row
from pasta_jax.data.pairs import PreferencePair
from pasta_jax.decode.generator import Model, decode_settings
from pasta_jax.decode.record import ResponseRecord
from pasta_jax.decode.settings import SamplingConfig
from pasta_jax.decode.trace import from_json, to_json
from pasta_jax.lang import forms
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import NO_TARGET, layout
from pasta_jax.lang.thread import Thread
from pasta_jax.preference import audit
from pasta_jax.preference.rounds import optimise
from pasta_jax.train import sft
from pasta_jax.train.attention import attention_mask
from pasta_jax.train.preference import train_on_pairs
from pasta_jax.train.state import make_model
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.weights.adapter import own_settings, read_metadata, save_adapter
from pasta_jax.weights.checkpoint import load_checkpoint

LIVE = Forms(RULE, "live")
ROWS = 4  # of the data that these tests train on


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):  # noqa: F811
  """(config with the adapter, the run's folder, layouts of its data): three steps, each over all of four rows."""
  folder = tmp_path_factory.mktemp("live")
  (folder / "few.jsonl").write_text("".join((tiny / "data.jsonl").read_text().splitlines(True)[:ROWS]))
  vocabulary = load_checkpoint(tiny / "model").vocabulary
  rows = read_jsonl(folder / "few.jsonl")
  laid = examples(rows, vocabulary, RULE, annotation="plan", max_length=LENGTH).examples
  assert len(laid) == ROWS and sum(e.masked_intervals.any() for e in laid) == ROWS
  config = settings(tiny, data=str(folder / "few.jsonl"), batch_size=1, length=sum(map(len, laid)), steps=3)
  decoding = {
    "max_new_tokens": 90,
    "dtype": "float32",
    "promise_bias": 5.0,
    "no_repeat": 0,
    "kv_capacity": 1024,
  }
  changes = {"language.visibility": "live", "decode.repetition_penalty": 1.0}
  config = with_changes(config, changes | {f"decode.{name}": value for name, value in decoding.items()})
  sft.train(config, folder / "run")
  adapter = str(folder / "run" / "adapter.safetensors")
  return with_changes(config, {"model.adapter": adapter}), folder / "run", laid


@pytest.fixture(scope="module")
def answers(run):
  """(the model, answers with chunks)."""
  model = Model(run[0])
  sampling = SamplingConfig(temperature=0.7, promise_bias=8.0)
  drawn = model.generate_batch([f"Why {n}?" for n in range(8)], sampling=sampling)
  drawn = sorted(drawn, key=lambda r: len(r.trace.threads))[-2:]
  assert all(len(r.trace.threads) > 2 for r in drawn)
  return model, drawn


def by_rounds(laid) -> np.ndarray:
  """[T, T], pair by pair."""
  r = laid.rounds
  return np.array([[k == q or k < q and r[k] < r[q] for k in range(len(r))] for q in range(len(r))])


def test_loss_equals_an_independent_computation(run, tiny):  # noqa: F811
  """That of the first step, before anything has moved: packed examples, each under its own dense mask in float64."""
  config, folder, laid = run
  checkpoint = load_checkpoint(tiny / "model")
  tags = nnx.merge(*make_model(checkpoint, checkpoint.vocabulary, config.train)).embed.tags[...]
  account = lambda mask: sum(
    numpy_log_likelihood(
      checkpoint.config, checkpoint.params, tags, e.tokens, e.positions, mask(e), e.targets
    )
    for e in laid
  ) / sum((e.targets != NO_TARGET).sum() for e in laid)  # fmt: skip
  first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
  assert first == pytest.approx(-account(by_rounds), rel=1e-5)
  causal = account(lambda e: np.tri(len(e), dtype=bool))
  assert abs(causal + first) > 1e-4 * first  # the mask matters


def test_adapter_run_and_trace_carry_the_form(run, answers, tiny, tmp_path):  # noqa: F811
  config, folder, _ = run
  model, drawn = answers
  assert forms.from_metadata(read_metadata(folder / "adapter.safetensors")) == model.forms == LIVE
  saved = to_json(drawn[0].trace)
  assert saved["visibility"] == drawn[0].record["visibility"] == "live"
  assert from_json(saved, model.vocabulary, RULE).visibility == "live"
  assert ResponseRecord.from_json(drawn[0].record).visibility == "live"
  shutil.copytree(folder, tmp_path / "run")  # a run that has not ended: its checkpoints alone
  (tmp_path / "run" / "adapter.safetensors").unlink()
  assert (
    Model(with_changes(config, {"model.source": str(tmp_path / "run"), "model.adapter": ""})).forms == LIVE
  )
  left_open = {"decode.no_repeat": None, "decode.promise_bias": None, "decode.repetition_penalty": None}
  unended = with_changes(config, left_open | {"model.source": str(tmp_path / "run"), "model.adapter": ""})
  own = own_settings(read_metadata(folder / "adapter.safetensors"))  # those that training was started with
  assert own == {"no_repeat": 0, "promise_bias": 5.0, "repetition_penalty": 1.0}
  assert decode_settings(unended, "", parallel=True) == decode_settings(config, "", parallel=True)
  assert Model(unended).sampling == Model(with_changes(config, left_open)).sampling == model.sampling
  other = Model(with_changes(config, {"decode.visibility": "promise"}))
  assert other.forms == Forms(RULE) and "visibility" not in other.generate("Why?").record
  assert "visibility" not in model.generate("Why?", parallel=False).record  # ordinary decoding, in every form


def samples_of(drawn) -> list[dict]:
  """What stage two keeps of answers."""
  return [
    {
      "trace": to_json(r.trace),
      "log_p": float(sum(np.nansum(t.log_p) for t in r.trace.threads)),
      "total_tokens": r.trace.cost.total_tokens,
    }
    for r in drawn
  ]


def test_decoding_agrees_with_the_trainers_forward_pass(run, answers, tiny, tmp_path):  # noqa: F811
  """By the audit of stage two, which takes the form from the adapter: one that says `promise` does not agree."""
  config, folder, _ = run
  config = with_changes(config, {"preference.sample_dtype": "float32", "preference.attention": "auto"})
  checkpoint, samples = load_checkpoint(tiny / "model"), samples_of(answers[1])
  assert audit.compare(config, checkpoint, folder / "adapter.safetensors", samples)["worst"] < 1e-5
  model = make_model(checkpoint, checkpoint.vocabulary, config.train, adapter=folder / "adapter.safetensors")
  save_adapter(tmp_path / "blind.safetensors", nnx.merge(*model), forms.to_metadata(Forms(RULE)))
  assert audit.compare(config, checkpoint, tmp_path / "blind.safetensors", samples)["worst"] > 1e-4


def test_stage_two_keeps_the_form(run, answers, tiny, tmp_path):  # noqa: F811
  """The reference is the policy that drew the answers, under its own mask; figures of another are not reused."""
  config, folder, _ = run
  changes = dict(
    length=512, batch_size=2, grad_accum_steps=1, steps=1, lora_rank=2, dtype="float32", remat="none", loss_chunk=256
  )  # fmt: skip
  config = with_changes(config, {f"preference.{name}": value for name, value in changes.items()})
  checkpoint, (model, drawn) = load_checkpoint(tiny / "model"), answers
  lay = lambda r: layout(r.trace.main, RULE, model.vocabulary.table, r.trace.prompt.tolist())
  pairs = [PreferencePair(*map(lay, drawn))]
  train = lambda form: train_on_pairs(
    config, tmp_path, pairs, checkpoint=checkpoint, vocabulary=checkpoint.vocabulary, form=form,
    adapter=folder / "adapter.safetensors", notes={},
  )  # fmt: skip
  train(LIVE)
  assert forms.from_metadata(read_metadata(tmp_path / "adapter.safetensors")) == LIVE
  [reference] = map(json.loads, (tmp_path / "reference.jsonl").read_text().splitlines())
  np.testing.assert_allclose(reference["log_p"], [s["log_p"] for s in samples_of(drawn)], rtol=1e-5)
  with pytest.raises(ValueError, match="reference"):
    train(Forms(RULE))
  (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
  changes = {"decode.visibility": "promise", "preference.prompts": str(tmp_path / "prompts.jsonl")}
  changes["eval.prompts"] = changes["preference.prompts"]
  with pytest.raises(ValueError, match="decode.visibility=promise draws .* its own is live"):
    optimise(with_changes(config, changes), tmp_path / "other")


def test_texts_without_promises_have_one_mask_in_every_form(answers):
  """So the figures that the local judge keeps do not depend on the form."""
  table, prompt = answers[0].vocabulary.table, [5, 6, 7]
  plain = [
    layout(Thread(tuple(range(10, 10 + n))), RULE, table, prompt[:k]) for n, k in ((30, 3), (1, 1), (9, 0))
  ]
  batch = pack_row(plain, 64, 1).as_dict()
  np.testing.assert_array_equal(*(attention_mask(batch, visibility) for visibility in VISIBILITIES))
