"""Distillation: what the teacher reads, what of it is learned, and a run that learns from it."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.folders import model_config, write_model
from safetensors.flax import load_file

from pasta_jax import load
from pasta_jax.config import Config, with_changes
from pasta_jax.data.examples import examples
from pasta_jax.data.packing import pack_row
from pasta_jax.data.reading import pack_readings, reading
from pasta_jax.decode.trace import to_json
from pasta_jax.lang.automaton import CLOSE, DIGITS, EOS, OPEN, ORDINARY
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import NO_TARGET
from pasta_jax.model.attention import causal_mask, dense_attention
from pasta_jax.model.sharding import make_mesh
from pasta_jax.train import sft
from pasta_jax.train.attention import attention_mask
from pasta_jax.train.losses import hidden_states, token_log_likelihood
from pasta_jax.train.state import make_model
from pasta_jax.train.teacher import Teacher
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.weights import build
from pasta_jax.weights.adapter import Merged, read_adapter, read_metadata
from pasta_jax.weights.checkpoint import load_checkpoint

SEED_DATA = Path(__file__).parents[2] / "data" / "seed.jsonl"
LENGTH = 640
FORMS = [{}, {"visibility": "live", "promise": "head", "number": "token"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  """A folder with `model/`, `rows.jsonl`, and `baseline/adapter.safetensors`, trained on them without tags."""
  at = tmp_path_factory.mktemp("teacher")
  write_model(at / "model", model_config(vocab_size=512))
  rows = [r | {"prompt": r["prompt"][:30]} for r in read_jsonl(SEED_DATA) if len(r["response"]) < 500]
  rows = sorted(rows, key=lambda r: not r["chunks"])[:8]
  (at / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  sft.train(settings(at, annotation="none", steps=8), at / "baseline")
  return at


def settings(folder: Path, form: dict | None = None, **train) -> Config:
  changes = dict(
    data=str(folder / "rows.jsonl"), min_speedup=0.0, plain_share=1.0, length=LENGTH, batch_size=2, steps=4,
    learning_rate=1e-2, lora_rank=2, lora_alpha=4.0, dtype="float32", remat="none", checkpoint_every=2,
  ) | train  # fmt: skip
  named = {f"train.{k}": v for k, v in changes.items()} | {
    f"language.{k}": v for k, v in (form or {}).items()
  }
  return with_changes(Config(), {"model.source": str(folder / "model")} | named)


@pytest.fixture(scope="module", params=FORMS, ids=["paper", "live"])
def laid(request, folder):
  """(checkpoint, laid-out rows) in a form of the language."""
  form = Forms(**request.param)
  checkpoint = load_checkpoint(folder / "model").speaking(form)
  # As of the default model, whose vocabulary has no rows to spare; without ids the tags' rows stand behind it.
  assert bool(checkpoint.config.tag_ids) == bool(request.param)
  vocabulary = checkpoint.vocabulary
  rows = read_jsonl(folder / "rows.jsonl")
  how = dict(annotation="plan", max_length=LENGTH, visibility=form.visibility)
  return checkpoint, examples(rows, vocabulary, form.positions, **how).examples


def batch_of(rows, table, length: int = 2 * LENGTH) -> dict[str, np.ndarray]:
  levels = max(e.masked_intervals.shape[1] for row in rows for e in row)
  packed = [pack_row(row, length, levels).as_dict() for row in rows]
  readings = pack_readings([[reading(e, table) for e in row] for row in rows], length)
  return {k: np.concatenate([p[k] for p in packed]) for k in packed[0]} | readings


def plain_tokens(laid, vocabulary) -> np.ndarray:
  """Where the text stands, and the end of the turn, token by token."""
  text, inside = [], np.zeros(1 + laid.threads.max(), bool)
  for i, token in enumerate(laid.tokens):
    kind, thread = vocabulary.table.classes[token], laid.threads[i]
    inside[thread] |= kind == OPEN  # a promise opens; its topic and number are no text
    if kind in (ORDINARY, DIGITS, EOS) and not inside[thread]:
      text.append(i)
    inside[thread] &= kind != CLOSE
  return np.array(text)


def test_a_reading_is_the_text_alone(laid):
  """In packed rows: a token of text sees the text before it in its own example, at its place in that text."""
  checkpoint, rows = laid
  vocabulary = checkpoint.vocabulary
  batch = batch_of([rows[:2], rows[2:4]], vocabulary.table)
  mask = np.asarray(attention_mask({**batch, "rounds": batch["reading_rounds"]}, "live"))
  learned = 0
  for number, examples_of_row in enumerate((rows[:2], rows[2:4])):
    at = 0
    for e in examples_of_row:
      text = plain_tokens(e, vocabulary)
      assert len(text) < len(e) or not e.threads.any()
      for rank, i in enumerate(text):
        assert batch["reading_positions"][number, at + i] == rank
        np.testing.assert_array_equal(np.flatnonzero(mask[number, at + i]), at + text[: rank + 1])
      source, following = batch["reading_source"][number, at : at + len(e)] - at, dict(zip(text, text[1:]))
      for q in np.flatnonzero((source + at) != NO_TARGET):
        assert e.tokens[following[source[q]]] == e.targets[q]
      learned += int(((source + at) != NO_TARGET).sum())
      assert ((source + at) != NO_TARGET).sum() == (e.index[text] >= 0).sum()  # all text is learned
      at += len(e)
  assert learned > 300


def test_the_teacher_is_the_model_over_plain_rows(folder, laid):
  """Its hidden states are those of its own forward pass over the text alone, and predict what follows there."""
  checkpoint, rows = laid
  vocabulary = checkpoint.vocabulary
  adapter = folder / "baseline" / "adapter.safetensors"
  config = settings(folder)
  mesh = make_mesh(vars(config.mesh))
  batch = batch_of([rows[:2]], vocabulary.table)
  with jax.set_mesh(mesh):
    teacher = Teacher(checkpoint, adapter, config.train, mesh)
    taught = np.asarray(teacher({k: jnp.asarray(v)[None] for k, v in batch.items()})["taught"])[0, 0]
  merged = Merged(checkpoint.config, checkpoint.params, read_adapter(adapter, checkpoint.config))
  model = build.from_params(checkpoint.config, merged)
  e, at = rows[1], len(rows[0])
  text = plain_tokens(e, vocabulary)
  attend = dense_attention(causal_mask(len(text)), model.dtype)
  hidden = np.asarray(model(jnp.asarray(e.tokens[text])[None], jnp.arange(len(text))[None], attend)[0])[0]
  rank = {i: n for n, i in enumerate(text)}
  source = batch["reading_source"][0, at : at + len(e)]
  asked = np.flatnonzero(source != NO_TARGET)
  expected = np.stack([hidden[rank[i - at]] for i in source[asked]])
  np.testing.assert_allclose(taught[at + asked], expected, atol=2e-5)


def test_what_is_learned_of_text(folder, laid):
  """By NumPy from both models' logits: the divergence over text tokens, and that no tag comes; tags as ever."""
  checkpoint, rows = laid
  vocabulary = checkpoint.vocabulary
  config = settings(folder)
  model = nnx.merge(*make_model(checkpoint, vocabulary, config.train))
  batch = batch_of([rows[:1]], vocabulary.table, LENGTH)
  rng = np.random.default_rng(0)
  usual, _ = token_log_likelihood(model, batch)
  batch["taught"] = rng.normal(size=(1, LENGTH, checkpoint.config.d_model)).astype(np.float32)
  found, _ = token_log_likelihood(model, batch, chunk=100)
  hidden = hidden_states(model, batch, remat="none", attention="dense", visibility="promise")
  ours, theirs = (np.asarray(model.logits(x), np.float64)[0] for x in (hidden, batch["taught"]))
  is_tag = np.isin(np.arange(ours.shape[-1]), vocabulary.tag_ids)
  assert is_tag.sum() == len(model.embed.tags[...])
  softmax = lambda x: (
    np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
  )
  p, p_text, q = softmax(ours), softmax(ours[:, ~is_tag]), softmax(theirs[:, ~is_tag])
  divergence = (q * (np.log(q) - np.log(p_text))).sum(-1)
  of_text = batch["reading_source"][0] != NO_TARGET
  soft = np.log(p[:, ~is_tag].sum(-1)) - divergence
  expected = np.where(of_text, soft, np.asarray(usual)[0])
  np.testing.assert_allclose(np.asarray(found)[0], expected, atol=2e-4)
  tags = (batch["targets"][0] != NO_TARGET) & ~of_text
  assert tags.sum() > 1 and of_text.sum() > 50


def lines_of(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_from_its_teacher(folder, tmp_path):
  """Its text comes nearer; killed and resumed it is the same run; another teacher is refused."""
  baseline = folder / "baseline" / "adapter.safetensors"
  config = settings(folder, FORMS[1], teacher=str(baseline), steps=12)
  sft.train(config, tmp_path / "run")
  losses = [line["text_loss"] for line in lines_of(tmp_path / "run")]
  assert losses[-1] < 0.8 * losses[0] and len(losses) == 12
  header = read_metadata(tmp_path / "run" / "adapter.safetensors")
  assert header["teacher's sha256"] == hashlib.sha256(baseline.read_bytes()).hexdigest()
  whole = load_file(tmp_path / "run" / "adapter.safetensors")
  (tmp_path / "run" / "adapter.safetensors").unlink()
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")  # as if killed after step 10
  sft.train(config, tmp_path / "run")
  resumed = load_file(tmp_path / "run" / "adapter.safetensors")
  assert whole.keys() == resumed.keys() and all((whole[k] == resumed[k]).all() for k in whole)
  assert [line["text_loss"] for line in lines_of(tmp_path / "run")] == losses
  other = tmp_path / "other.safetensors"
  sft.train(settings(folder, annotation="none", steps=1), tmp_path / "one")
  other.write_bytes((tmp_path / "one" / "adapter.safetensors").read_bytes())
  with pytest.raises(ValueError, match="learned from another adapter"):
    sft.train(with_changes(config, {"train.teacher": str(other), "train.steps": 13}), tmp_path / "run")


def test_what_cannot_teach_is_refused(folder, tmp_path):
  sft.train(settings(folder, steps=1), tmp_path / "tags")
  baseline = str(folder / "baseline" / "adapter.safetensors")
  for changes, message in (
    ({"train.teacher": str(tmp_path / "tags" / "adapter.safetensors")}, "has tags or all weights"),
    ({"train.teacher": baseline, "train.lora_rank": 0}, "shares the frozen embeddings"),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      sft.train(with_changes(settings(folder), changes), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_policy_learns_its_own_answers(folder, tmp_path):
  """Rows with a trace are laid out as they were written: the trainer's loss is what the decode loop said of them.
  Those that were cut off are left out."""
  sft.train(settings(folder, steps=1), tmp_path / "policy")
  adapter = str(tmp_path / "policy" / "adapter.safetensors")
  how = dict(dtype="float32", max_new_tokens=300, temperature=20.0)
  model = load(str(folder / "model"), adapter=adapter, **how)
  rows, log_p = [], []
  for n in range(12):
    response = model.generate("Two things.", sampling=dataclasses.replace(model.sampling, seed=n))
    rows.append({"id": n, **response.record, "trace": to_json(response.trace)})
    if rows[-1]["finish_reason"] == "stop":
      log_p += [t.log_p[~np.isnan(t.log_p)] for t in response.trace.threads]
  assert len({r["finish_reason"] for r in rows}) == 2 and any(r["promises"] for r in rows)
  path = tmp_path / "own.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  config = settings(folder, start=adapter, data=str(path), steps=1, batch_size=12)
  sft.train(config, tmp_path / "own")
  line, log_p = lines_of(tmp_path / "own")[0], np.concatenate(log_p)
  assert line["tokens"] % len(log_p) == 0  # few packed rows stand several times in a batch
  assert line["loss"] == pytest.approx(-log_p.mean(), rel=1e-5)
  with pytest.raises(ValueError, match="another form of the language or of positions"):
    sft.train(settings(folder, FORMS[1], data=str(path)), tmp_path / "forms")
  with pytest.raises(ValueError, match="another form of the language or of positions"):
    sft.train(
      with_changes(settings(folder, data=str(path)), {"positions.strategy": "pred_1x"}),
      tmp_path / "positions",
    )
  with pytest.raises(ValueError, match="train.annotation=plan learns it"):
    sft.train(with_changes(config, {"train.annotation": "none", "train.start": ""}), tmp_path / "none")
  path.write_text(json.dumps(rows[0] | {"trace": {"threads": 3}}) + "\n")
  with pytest.raises(ValueError, match="its trace cannot be read"):
    sft.train(config, tmp_path / "damaged")
