"""Training: the loss is the likelihood that the language defines; a killed run resumes as if never killed."""

import hashlib
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.folders import model_config, write_model
from helpers.programs import NESTED
from safetensors.numpy import load_file, save_file

from pasta_jax.config import Config, with_changes
from pasta_jax.data.examples import examples, program_of
from pasta_jax.data.packing import PackedBatches, concatenate, pack_row
from pasta_jax.decode.generator import Model
from pasta_jax.decode.settings import DecodeError
from pasta_jax.lang.layout import NO_TARGET, layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Promise
from pasta_jax.lang.thread import Thread
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import lora
from pasta_jax.model.attention import causal_mask, dense_attention
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.transformer import REMAT, stack, unstack
from pasta_jax.train import loop, sft, trainer
from pasta_jax.train.attention import attention_mask
from pasta_jax.train.checkpoints import Checkpoints
from pasta_jax.train.losses import LengthTargets, length_targets, sft_loss, token_log_likelihood
from pasta_jax.train.state import TrainState, compute_model, make_model
from pasta_jax.utils.jsonl import DataError, read_jsonl
from pasta_jax.weights import build
from pasta_jax.weights.adapter import (
  Merged,
  load_adapter,
  read_adapter,
  read_metadata,
  save_adapter,
  weights_of,
)
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
SEED_DATA = ROOT / "data" / "seed.jsonl"
RULE = PositionRule("pred_10x")
LENGTH = 320


# --- a model, a tokenizer and data, all small ---


def shorter(row: dict) -> dict:
  """The row shortened to fit 320 tokens: every span keeps its first 24 characters."""
  ends = (c[k] for c in row["chunks"] for k in ("start", "end"))
  cuts = sorted({0, len(row["response"]), *row["syncs"], *ends})
  text, at = "", {}
  for start, stop in zip(cuts, cuts[1:]):
    at[start] = len(text)
    text += row["response"][start : min(stop, start + 24)]
  at[cuts[-1]] = len(text)
  chunks = [c | {"start": at[c["start"]], "end": at[c["end"]]} for c in row["chunks"]]
  return row | {
    "prompt": row["prompt"][:30],
    "response": text,
    "chunks": chunks,
    "syncs": [at[s] for s in row["syncs"]],
  }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
  """A folder with `model/` and `data.jsonl`: 24 shortened rows of the seed data, 4 nested and 3 plain."""
  folder = tmp_path_factory.mktemp("tiny")
  write_model(folder / "model", model_config())
  rows = [shorter(row) for row in read_jsonl(SEED_DATA)]
  is_nested = lambda row: any(
    isinstance(n, Promise) and any(isinstance(m, Promise) for m in n.body) for n in program_of(row)
  )
  nested = [row for row in rows if is_nested(row)][:4]
  plain = [row for row in rows if not row["chunks"]][:3]
  flat = [row for row in rows if row["chunks"] and not is_nested(row)][:17]
  assert len(nested) == 4 and len(plain) == 3
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nested + flat + plain))
  return folder


@pytest.fixture(scope="module")
def checkpoint(tiny):
  return load_checkpoint(tiny / "model")


@pytest.fixture(scope="module")
def vocabulary(checkpoint):
  return checkpoint.vocabulary


@pytest.fixture(scope="module")
def laid_out(tiny, vocabulary):
  rows = read_jsonl(tiny / "data.jsonl")
  return examples(rows, vocabulary, RULE, annotation="plan", max_length=LENGTH).examples


def settings(tiny: Path, **train) -> Config:
  changes = dict(
    data=str(tiny / "data.jsonl"), min_speedup=0.0, plain_share=1.0, length=LENGTH, batch_size=2, steps=6,
    learning_rate=1e-2, lora_rank=2, lora_alpha=4.0, dtype="float32", remat="none", attention="auto", loss_chunk=256,
    checkpoint_every=2,
  ) | train  # fmt: skip
  source = {"model.source": str(tiny / "model")}
  return with_changes(Config(), source | {f"train.{name}": value for name, value in changes.items()})


# --- an independent account of the same thing, in float64 ---


class Account:
  """The layout of a thread tree, computed by running it: each thread has a set of visible entries, a fork
  copies it, a join adds the children's. It uses no intervals over serialised indices.
  """

  def __init__(self, thread: Thread, prompt: list[int], vocabulary: Vocabulary):
    self.vocabulary = vocabulary
    self.tokens: list[int] = []
    self.positions: list[int] = []
    self.sees: list[set[int]] = []
    self.targets: list[int] = []
    seen: set[int] = set()
    for i, token in enumerate(prompt):
      seen = self._enter(token, i, seen, NO_TARGET)
    self.targets[-1] = thread.tokens[0]
    self._run(thread, len(prompt), seen, main=True)

  def _enter(self, token, position, seen, target) -> set[int]:
    seen = seen | {len(self.tokens)}
    self.tokens.append(token)
    self.positions.append(position)
    self.sees.append(seen)
    self.targets.append(target)
    return seen

  def _run(self, thread, position, seen, main=False):
    """Returns what the thread sees at its end, and the visible sets of children that were not joined."""
    children = {fork.at: fork for fork in thread.forks}
    waiting: list[set[int]] = []
    for i, token in enumerate(thread.tokens):
      if token == self.vocabulary.tags.sync:
        seen = seen.union(*waiting)
        waiting = []
      following = thread.tokens[i + 1] if i + 1 < len(thread.tokens) else NO_TARGET
      seen = self._enter(token, position, seen, following)
      position += 1
      if i in children:
        child_seen, orphans = self._run(children[i].child, position, seen)
        waiting += [child_seen, *orphans]
        position += -(-children[i].declared // 10) * 10
    return seen, waiting

  def mask(self) -> np.ndarray:
    mask = np.zeros((len(self.tokens),) * 2, bool)
    for q, keys in enumerate(self.sees):
      mask[q, list(keys)] = True
    return mask


def numpy_log_likelihood(config: ModelConfig, params: dict, tags, tokens, positions, mask, targets) -> float:
  """Σ log p of the targets: a Llama decoder in float64 for one example."""
  p = {name: np.asarray(value, np.float64) for name, value in params.items()}
  table = p["embed.embedding"].copy()
  table[list(config.tag_ids)] = tags  # the tiny model has rows that no token has
  norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale
  half = config.head_dim // 2
  angle = np.asarray(positions)[:, None] / config.rope_theta ** (np.arange(half) / half)
  turn = np.exp(1j * angle)[:, None]  # RoPE as a complex product

  def rope(x):
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)

  x = table[tokens]
  n = len(tokens)
  for i in range(config.n_layers):
    w = lambda name, i=i: p[f"layers.{i}.{name}"]
    y = norm(x, w("attn_norm.scale"))
    q = rope((y @ w("attn.q.kernel")).reshape(n, config.n_heads, -1))
    k, v = ((y @ w(f"attn.{c}.kernel")).reshape(n, config.n_kv_heads, -1) for c in "kv")
    k = rope(k)
    out = np.zeros_like(q)
    for head in range(config.n_heads):
      group = head // (config.n_heads // config.n_kv_heads)
      scores = np.where(mask, q[:, head] @ k[:, group].T / np.sqrt(config.head_dim), -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
    x = x + out.reshape(n, -1) @ w("attn.o.kernel")
    y = norm(x, w("mlp_norm.scale"))
    gate = y @ w("mlp.gate.kernel")
    x = x + (gate / (1 + np.exp(-gate)) * (y @ w("mlp.up.kernel"))) @ w("mlp.down.kernel")
  scores = norm(x, p["final_norm.scale"]) @ table.T
  scores -= scores.max(-1, keepdims=True)
  log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  return sum(log_p[at, target] for at, target in enumerate(targets) if target != NO_TARGET)


@pytest.fixture(scope="module")
def nested(checkpoint, vocabulary):
  """(layout, account) of one nested example after a prompt."""
  prompt = checkpoint.tokenizer.chat_prompt([{"role": "user", "content": "Why?"}])
  thread = vocabulary.encode(NESTED, RULE)
  return layout(thread, RULE, vocabulary.table, prompt), Account(thread, prompt, vocabulary)


@pytest.fixture(scope="module")
def full(tiny, checkpoint, vocabulary):
  """(graph, trainable) of a model whose parameters are all trained, float32."""
  graph, trainable, frozen = make_model(checkpoint, vocabulary, settings(tiny, lora_rank=0).train)
  assert not jax.tree.leaves(frozen)
  return graph, trainable


def as_batch(*rows, length: int = 0) -> dict[str, np.ndarray]:
  """A batch of rows, each a list of layouts, of `length` or else the shortest length that fits them."""
  length = length or max(sum(len(e) for e in row) for row in rows)
  levels = max(e.masked_intervals.shape[1] for row in rows for e in row)
  return concatenate([pack_row(row, length, levels) for row in rows]).as_dict()


def loss_of(graph, trainable, batch, **options):
  return sft_loss(nnx.merge(graph, trainable), batch, **options)[0]


value_and_gradient = jax.jit(
  jax.value_and_grad(loss_of, argnums=1), static_argnums=0, static_argnames=("chunk", "remat")
)


# --- the loss ---


def test_layout_is_what_running_the_threads_gives(nested):
  laid, account = nested
  np.testing.assert_array_equal(laid.tokens, account.tokens)
  np.testing.assert_array_equal(laid.positions, account.positions)
  np.testing.assert_array_equal(laid.targets, account.targets)
  batch = as_batch([laid])
  np.testing.assert_array_equal(np.asarray(attention_mask(batch))[0], account.mask())


@pytest.mark.parametrize("chunk", [1024, 37])
def test_loss_equals_an_independent_computation(nested, full, checkpoint, chunk: int):
  laid, account = nested
  graph, trainable = full
  model = nnx.merge(graph, trainable)
  expected = numpy_log_likelihood(
    checkpoint.config,
    checkpoint.params,
    model.embed.tags[...],
    account.tokens,
    account.positions,
    account.mask(),
    account.targets,
  )
  total, sums = sft_loss(model, as_batch([laid]), chunk=chunk)
  assert float(total) == pytest.approx(-expected, rel=1e-5)
  assert int(sums["tokens"]) == sum(t != NO_TARGET for t in account.targets)
  causal = numpy_log_likelihood(
    checkpoint.config,
    checkpoint.params,
    model.embed.tags[...],
    account.tokens,
    account.positions,
    np.tril(np.ones_like(account.mask())),
    account.targets,
  )
  assert abs(causal - expected) > 1e-3 * abs(expected)  # the mask matters


def test_gradients_equal_finite_differences(nested, full, checkpoint):
  """Central differences in float64, at the coordinate of each parameter where the gradient is largest."""
  laid, account = nested
  graph, trainable = full
  _, gradient = value_and_gradient(graph, trainable, as_batch([laid]))
  tags = np.asarray(nnx.merge(graph, trainable).embed.tags[...], np.float64)
  params = {name: value.astype(np.float64) for name, value in checkpoint.params.items()}
  run = lambda: (
    -numpy_log_likelihood(
      checkpoint.config, params, tags, account.tokens, account.positions, account.mask(), account.targets
    )
  )
  g = nnx.merge(graph, gradient)
  layer = lambda i, get: get(jax.tree.map(lambda x: x[i], g.layers))
  pairs = {
    "embed.embedding": (params["embed.embedding"], g.embed.embedding[...]),
    "tags": (tags, g.embed.tags[...]),
    "final_norm.scale": (params["final_norm.scale"], g.final_norm.scale[...]),
    "q": (params["layers.0.attn.q.kernel"], layer(0, lambda m: m.attn.q.kernel[...])),
    "k": (params["layers.1.attn.k.kernel"], layer(1, lambda m: m.attn.k.kernel[...])),
    "v": (params["layers.0.attn.v.kernel"], layer(0, lambda m: m.attn.v.kernel[...])),
    "o": (params["layers.1.attn.o.kernel"], layer(1, lambda m: m.attn.o.kernel[...])),
    "gate": (params["layers.0.mlp.gate.kernel"], layer(0, lambda m: m.mlp.gate.kernel[...])),
    "down": (params["layers.1.mlp.down.kernel"], layer(1, lambda m: m.mlp.down.kernel[...])),
    "norm": (params["layers.0.attn_norm.scale"], layer(0, lambda m: m.attn_norm.scale[...])),
  }
  for name, (value, slope) in pairs.items():
    slope = np.asarray(slope)
    at = np.unravel_index(np.abs(slope).argmax(), slope.shape)
    middle, step = value[at], 1e-5
    value[at] = middle + step
    above = run()
    value[at] = middle - step
    below = run()
    value[at] = middle
    assert slope[at] == pytest.approx((above - below) / (2 * step), rel=2e-3), name


def test_rematerialised_gradients_are_the_same(nested, full):
  graph, trainable = full
  plain, *others = (value_and_gradient(graph, trainable, as_batch([nested[0]]), remat=r) for r in REMAT)
  for again in others:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, again)


def test_packing_equals_no_packing(laid_out, full):
  """Examples side by side in one row, and each in a row of its own: the same loss and gradient."""
  graph, trainable = full
  some = sorted(laid_out, key=len)[:4]
  assert any(e.masked_intervals.any() for e in some)
  total = sum(map(len, some))
  (packed, together), (single, alone) = (
    value_and_gradient(graph, trainable, as_batch(*rows, length=total))
    for rows in ([some], [[e] for e in some])
  )
  np.testing.assert_allclose(packed, single, rtol=1e-5)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), together, alone)


def test_what_carries_no_loss(laid_out, full, vocabulary):
  """Prompts, the ends of chunks and padding have no target; tags that the interpreter writes are no
  targets."""
  tags = vocabulary.tags
  for e in laid_out:
    prompt = (e.index < 0).sum()
    assert (e.targets[: prompt - 1] == NO_TARGET).all() and e.targets[prompt - 1] == e.tokens[prompt]
    assert (e.targets[e.tokens == tags.end] == NO_TARGET).all()
    assert not (e.targets == tags.async_).any()
    assert (e.targets != NO_TARGET).sum() == len(e) - prompt - (e.tokens == tags.async_).sum()
    assert e.targets[-1] == NO_TARGET  # the end of the turn, or of a last chunk
  batch = as_batch(laid_out[:2], laid_out[2:3])
  log_p, correct = token_log_likelihood(nnx.merge(*full), batch)
  silent = batch["targets"] == NO_TARGET
  assert silent[1].sum() > len(laid_out[0]) / 2  # padding is among them
  assert not np.asarray(log_p)[silent].any() and not np.asarray(correct)[silent].any()
  assert (np.asarray(log_p)[~silent] < 0).all()


def test_packed_rows_equal_single_rows(laid_out, full):
  """Each target's likelihood is the same in a row of its own and after other examples in a row."""
  score = jax.jit(lambda batch: token_log_likelihood(nnx.merge(*full), batch, chunk=200)[0])
  few = laid_out[:6]
  alone = np.asarray(score(as_batch(*([e] for e in few))))
  groups = ((0, 1), (5, 2, 4), (3,))
  packed = np.asarray(score(as_batch(*([few[i] for i in group] for group in groups))))
  for row, group in enumerate(groups):
    at = 0
    for i in group:
      np.testing.assert_allclose(packed[row, at : at + len(few[i])], alone[i, : len(few[i])], atol=2e-5)
      at += len(few[i])


def test_a_length_is_learned_with_its_neighbours(laid_out, full):
  """Cross-entropy with a Gaussian over neighbours, less its own entropy; other targets as before."""
  lengths = length_targets(np.arange(40, 45), 10.0)
  np.testing.assert_array_equal(lengths.ids, np.arange(40, 45))
  np.testing.assert_allclose(lengths.weights.sum(1), 1)
  np.testing.assert_allclose(lengths.weights[2, [1, 3, 0]] / lengths.weights[2, 2], np.exp([-0.5, -0.5, -2]))
  assert length_targets(np.arange(40, 45), 0.0) is None and length_targets(np.arange(0), 10.0) is None
  batch = as_batch(laid_out[:2])
  of = lambda targets, **how: np.asarray(
    token_log_likelihood(nnx.merge(*full), batch | {"targets": targets}, **how)[0], np.float64
  )
  # Every third target is one of the lengths; the other tokens in their range are made others.
  targets = np.array(batch["targets"])
  targets[(targets >= 40) & (targets < 45)] = 50
  places = np.flatnonzero(targets.reshape(-1) != NO_TARGET)[::3]
  targets.reshape(-1)[places] = 40 + np.arange(len(places)) % 5
  each = np.stack([of(np.where(targets == NO_TARGET, NO_TARGET, n)) for n in range(40, 45)], -1)
  found = of(targets, lengths=lengths)
  is_length = (targets >= 40) & (targets < 45)
  weights = lengths.weights[targets[is_length] - 40]
  expected = (weights * (each[is_length] - np.log(weights))).sum(-1)
  assert is_length.sum() > 20
  np.testing.assert_allclose(found[is_length], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found[~is_length], of(targets)[~is_length])
  assert (found[is_length] < 0).all()
  alone = LengthTargets(lengths.ids, np.eye(5))
  np.testing.assert_allclose(of(targets, lengths=alone), of(targets), rtol=1e-6, atol=1e-6)
  apart = LengthTargets(lengths.ids[::-1], lengths.weights[::-1, ::-1])  # ids in another order
  np.testing.assert_allclose(of(targets, lengths=apart), found, rtol=1e-5, atol=1e-5)


# --- the update ---


def sgd_update(tiny, graph, trainable, batches, **train):
  """The trainer's update under plain gradient descent at rate 1: it subtracts the gradient."""
  optimiser = optax.sgd(1.0)
  update = trainer.make_update(sft.SFT(settings(tiny, **train).train), graph, optimiser)
  copy = jax.tree.map(jnp.array, trainable)  # the update takes its argument's buffers
  nothing = nnx.State({})  # is frozen: the whole model is trained
  state, metrics = update(TrainState(jnp.zeros((), jnp.int32), copy, optimiser.init(copy)), nothing, batches)
  assert int(state.step) == 1
  return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), trainable, state.trainable), metrics


def test_accumulated_gradients_equal_the_big_batch(tiny, laid_out, full):
  """Even if the small ones have different numbers of targets: the mean is over tokens, not batches."""
  graph, trainable = full
  packed = PackedBatches(laid_out, batch_size=1, length=LENGTH, levels=2, seed=0)
  rows = [packed(i).as_dict() for i in range(3)] + [
    concatenate([pack_row(laid_out[:1], LENGTH, 2)]).as_dict()
  ]
  counts = [(row["targets"] != NO_TARGET).sum() for row in rows]
  assert max(counts) > 1.2 * min(counts)
  small = jax.tree.map(lambda *x: np.stack(x), *rows)  # [4, 1, T]
  big = jax.tree.map(lambda x: x.swapaxes(0, 1), small)  # [1, 4, T]
  (first, a), (second, b) = (sgd_update(tiny, graph, trainable, batches) for batches in (small, big))
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), first, second)
  for name in ("loss", "tokens", "accuracy", "gradient_norm"):
    assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-5)
  assert int(a["tokens"]) == sum(counts)
  batch = jax.tree.map(lambda x: x[0], big)
  total, gradient = value_and_gradient(graph, trainable, batch)
  assert float(a["loss"]) == pytest.approx(float(total) / sum(counts), rel=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y / sum(counts), atol=1e-5), first, gradient)


# --- whole runs ---


def saved_state(workdir: Path) -> dict[str, np.ndarray]:
  """The newest checkpoint's arrays by name, read by Orbax alone."""
  import orbax.checkpoint as ocp

  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  with ocp.StandardCheckpointer() as checkpointer:
    return {k: np.asarray(v) for k, v in checkpointer.restore(newest.resolve() / "state").items()}


def metric_lines(workdir: Path) -> list[dict]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "data_wait")} for line in lines]


@pytest.fixture(scope="module")
def whole_run(tiny, tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("whole") / "new" / "run"
  sft.train(settings(tiny, validation=str(tiny / "data.jsonl"), validate_every=4), workdir)
  return workdir


def terminate_after(monkeypatch: pytest.MonkeyPatch, step: int):
  """Sends SIGTERM to this process while that step's metrics are written."""
  write = loop.MetricWriter.write

  def and_terminate(self, at, scalars):
    write(self, at, scalars)
    if at == step:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(loop.MetricWriter, "write", and_terminate)


def test_a_run_leaves_what_it_promises(whole_run: Path, tiny: Path, checkpoint):
  assert {p.name for p in whole_run.iterdir()} == {
    "adapter.safetensors",
    "checkpoints",
    "config.json",
    "metrics.jsonl",
    "tensorboard",
  }
  lines = metric_lines(whole_run)
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert ["validation_loss" in line for line in lines] == [False, False, False, True, False, True]
  assert json.loads((whole_run / "config.json").read_text())["train"]["length"] == LENGTH
  model = build.from_params(checkpoint.config, checkpoint.params)
  metadata = load_adapter(whole_run / "adapter.safetensors", model)
  assert json.loads(metadata["positions"])["strategy"] == "pred_10x"
  assert json.loads(metadata["train"])["lora_rank"] == 2
  assert np.abs(model.layers[1].mlp.down.lora_b[...]).max() > 0  # trained


def test_an_adapter_names_the_annotators_of_its_rows(tiny, tmp_path: Path):
  """Of the rows that it was trained on, and only where their chunks are what it learned."""
  rows = read_jsonl(tiny / "data.jsonl")
  named = [r | {"annotator": name} for r, name in zip(rows, ["b", "a, c", "b"])]
  unused = named[0] | {"id": "long", "prompt": "word " * LENGTH, "annotator": "d"}
  for name, data, annotation, expected in (
    ("named", [*named, *rows[3:], unused], "plan", "a, c, b"),
    ("odd", [rows[0] | {"annotator": 3}, rows[1] | {"annotator": None}, *rows[2:]], "plan", None),
    ("baseline", named, "none", None),
  ):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    sft.train(settings(tiny, data=str(path), steps=1, annotation=annotation), tmp_path / name)
    assert read_metadata(tmp_path / name / "adapter.safetensors").get("annotator") == expected


def test_killed_and_resumed_equals_never_killed(whole_run, tiny, tmp_path, monkeypatch, capsys):
  """After step 3, at which no checkpoint is due; then again in the same folder."""
  config = settings(tiny, validation=str(tiny / "data.jsonl"), validate_every=4)
  with monkeypatch.context() as patch:
    terminate_after(patch, 3)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Stopped, match="stopped by SIGTERM after step 3 of 6"):
      sft.train(config, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is handler
  assert int(saved_state(tmp_path)["step"]) == 3 and not (tmp_path / "adapter.safetensors").exists()
  with open(tmp_path / "metrics.jsonl", "a") as file:  # a step whose checkpoint was lost, and a line cut off
    file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
  last = sft.train(config, tmp_path)
  assert "other settings" not in capsys.readouterr().out

  assert metric_lines(tmp_path) == metric_lines(whole_run)
  assert last["loss"] == metric_lines(whole_run)[-1]["loss"]
  actual, expected = saved_state(tmp_path), saved_state(whole_run)
  assert actual.keys() == expected.keys() and int(expected["step"]) == 6
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  ours, theirs = (load_file(d / "adapter.safetensors") for d in (tmp_path, whole_run))
  assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)


def test_sigterm_in_the_last_step_counts(whole_run, tiny, tmp_path, monkeypatch):
  """Whoever sent it wants the process to end, and stage two would go on to its next training."""
  with monkeypatch.context() as patch:
    terminate_after(patch, 6)
    with pytest.raises(loop.Stopped, match="after step 6 of 6"):
      sft.train(settings(tiny), tmp_path)
  assert not (tmp_path / "adapter.safetensors").exists()
  sft.train(settings(tiny), tmp_path)
  ours, theirs = (load_file(d / "adapter.safetensors") for d in (tmp_path, whole_run))
  assert all((ours[k] == theirs[k]).all() for k in theirs)


def test_a_full_disk_is_one_line_before_a_checkpoint_is_begun(whole_run, tiny, tmp_path, monkeypatch):
  config = settings(tiny)
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="a checkpoint needs .* MB are free: make room") as error:
      sft.train(config, tmp_path)
  assert "\n" not in str(error.value) and not list((tmp_path / "checkpoints").iterdir())
  sft.train(config, tmp_path)
  ours, theirs = (load_file(d / "adapter.safetensors") for d in (tmp_path, whole_run))
  assert all((ours[k] == theirs[k]).all() for k in theirs)


def damage(checkpoint: Path, how: str) -> None:
  files = [p for p in checkpoint.rglob("*") if p.is_file()]
  if how == "cut off":
    for path in files:
      os.truncate(path, path.stat().st_size // 2)
  elif how == "empty":
    for path in files:
      os.truncate(path, 0)
  elif how == "no metadata":
    for path in files:
      if path.name.startswith("_METADATA") or path.name == "_CHECKPOINT_METADATA":
        path.unlink()
  else:
    for path in (checkpoint / "data").rglob("*"):
      if path.is_file():
        path.write_text("[3]")


@pytest.mark.parametrize("how", ["cut off", "empty", "no metadata", "other data"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
  whole_run, tiny, tmp_path, how: str, capsys
):
  run = tmp_path / "run"
  shutil.copytree(whole_run, run)
  (run / "adapter.safetensors").unlink()
  config = settings(tiny, validation=str(tiny / "data.jsonl"), validate_every=4)
  older, newest = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
  damage(run / "checkpoints" / str(newest), how)
  sft.train(config, run)
  assert f"the checkpoint of step {newest} is damaged" in capsys.readouterr().err
  assert (run / f"damaged-{newest}").is_dir()
  assert metric_lines(run) == metric_lines(whole_run)
  actual, expected = saved_state(run), saved_state(whole_run)
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)
  for step in (older, newest):
    damage(run / "checkpoints" / str(step), how)
  with pytest.raises(ValueError, match="no older one: choose another --workdir"):
    sft.train(config, run)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_is_compiled_once(tiny, tmp_path, caplog, rank: int):
  """The first state of a step has the shardings of its results."""
  with jax.log_compiles():
    sft.train(settings(tiny, steps=3, lora_rank=rank), tmp_path)
  assert sum("Finished XLA compilation of jit(step)" in record.getMessage() for record in caplog.records) == 1


def test_checkpoints_of_an_earlier_version_are_refused(whole_run, tiny, tmp_path):
  shutil.copytree(whole_run, tmp_path / "old")
  for step in (tmp_path / "old" / "checkpoints").iterdir():
    (step / "state").rename(step / "default")
  with pytest.raises(ValueError, match="is of an earlier version of this program"):
    sft.train(settings(tiny), tmp_path / "old")


@pytest.mark.parametrize("strategy", ["oracle", "oracle_10x", "oracle_1x"])
def test_an_oracle_is_compared_by_its_validation_loss(tiny, tmp_path: Path, strategy: str):
  """Its adapter answers without promises, and refuses to decode with them before any work."""
  config = settings(tiny, steps=2, validation=str(tiny / "data.jsonl"))
  config = with_changes(config, {"positions.strategy": strategy})
  sft.train(config, tmp_path)
  assert metric_lines(tmp_path)[-1]["validation_loss"] > 0
  adapter = {"model.adapter": str(tmp_path / "adapter.safetensors"), "decode.max_new_tokens": 4}
  model = Model(with_changes(config, adapter))
  with pytest.raises(DecodeError, match=f"positions of the strategy '{strategy}' need true lengths"):
    model.generate("Why?")
  assert 1 <= len(model.generate("Why?", parallel=False).trace.threads[0].tokens) <= 5


@pytest.mark.parametrize("kind", ["low-rank", "full", "baseline"])
def test_a_run_is_a_source_of_weights(tiny, tmp_path: Path, kind: str):
  """The newest checkpoint of an unfinished run gives the weights that the run itself resumes with, and its
  tags and positions."""
  config = settings(
    tiny, lora_rank=0 if kind == "full" else 2, steps=2, annotation="none" if kind == "baseline" else "plan"
  )
  config = with_changes(config, {"positions.strategy": "pred_1x"})
  sft.train(config, tmp_path)
  adapter = tmp_path / "adapter.safetensors"
  base = load_checkpoint(tmp_path / "model" if kind == "full" else tiny / "model")
  expected = Merged(base.config, base.params, read_adapter(adapter, base.config))
  adapter.unlink()
  shutil.rmtree(tmp_path / "model", ignore_errors=True)
  found = load_checkpoint(tmp_path)
  assert found.config == expected.config and set(found.params) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(
      found.params[name], value, rtol=2**-8, atol=2**-8, err_msg=name
    )  # rounded in files
    if kind == "full" and not name.startswith("embed"):
      np.testing.assert_array_equal(found.params[name], value, err_msg=name)
  config = with_changes(config, {"model.source": str(tmp_path), "model.adapter": ""})
  generator = Model(config)
  assert generator.has_tags == (kind != "baseline")
  if kind != "baseline":
    assert generator.forms.positions.strategy == "pred_1x"
  assert load_checkpoint(tmp_path).source == str(tmp_path)
  shutil.rmtree(tmp_path / "checkpoints")
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(WeightsError, match="the run has saved no checkpoint yet"):
    load_checkpoint(tmp_path)


def test_resuming_with_other_settings_says_so(whole_run, tiny, tmp_path, capsys):
  """Settings that do not change arrays: the run continues and prints which of them changed. One that is not given has
  its default, which older runs wrote."""
  shutil.copytree(whole_run, tmp_path / "copy")
  older = json.loads((whole_run / "config.json").read_text())
  older["decode"] |= {"max_threads": 24, "no_repeat": 3}
  (tmp_path / "copy" / "config.json").write_text(json.dumps(older))
  sft.train(settings(tiny, seed=1, lora_alpha=5.0), tmp_path / "copy")
  out = capsys.readouterr().out
  assert "train.seed 0 -> 1" in out and "train.lora_alpha 4.0 -> 5.0" in out and "train.length" not in out
  assert "decode.no_repeat 3 -> None" in out and "max_threads" not in out
  with pytest.raises(ValueError, match="at step 6 already, past the 5 steps"):
    sft.train(settings(tiny, steps=5), tmp_path / "copy")


@pytest.mark.parametrize("what", ["rank", "full", "model", "baseline"])
def test_resuming_with_other_arrays_is_refused(whole_run, tiny, tmp_path, what: str):
  config = settings(tiny)
  if what == "rank":
    config = with_changes(config, {"train.lora_rank": 3})
  elif what == "full":
    config = with_changes(config, {"train.lora_rank": 0})
  elif what == "baseline":
    config = with_changes(config, {"train.annotation": "none"})
  else:
    wider = write_model(tmp_path / "wider", model_config(d_ff=56))
    config = with_changes(config, {"model.source": str(wider)})
  before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")}
  with pytest.raises(ValueError, match="another model or configuration") as caught:
    sft.train(config, whole_run)
  assert "\n" not in str(caught.value) and str(whole_run) in str(caught.value)
  assert {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")} == before


def test_a_checkpoint_holds_its_step_whatever_the_next_step_does(tmp_path: Path):
  """Saves run in the background while the next update reuses the state's buffers; fields keep their order."""
  step = jax.jit(
    lambda s: TrainState(s.step + 1, jax.tree.map(lambda x: x * 2, s.trainable), s.optimiser),
    donate_argnums=0,
  )
  weights = lambda: {"z": jnp.ones((512, 512)), "a": jnp.arange(4.0)}
  first = lambda: TrainState(jnp.int32(7), weights(), (jnp.zeros((3,)),))
  checkpoints = Checkpoints(tmp_path, 1, {})
  state = first()
  checkpoints.save(state, {"next": 7})
  for _ in range(3):
    state = step(state)
  checkpoints.close()
  again = Checkpoints(tmp_path, 1, {})
  restored, data = again.restore(state)  # type: ignore[misc]
  jax.tree.map(np.testing.assert_array_equal, restored, first())
  assert data == {"next": 7}
  again.close()


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_numbers_that_are_not_finite_stop_the_run(tiny, tmp_path, monkeypatch, name: str):
  """At step 4: the checkpoint of step 2 stays the newest, and a rerun starts from it."""

  def poisoned(task, graph, optimiser):
    def update(state, frozen, batches):
      del frozen, batches
      value = {"loss": 1.0, "accuracy": 0.0, "tokens": 1, "gradient_norm": 1.0}
      if int(state.step) == 3:
        value[name] = np.nan
      return state._replace(step=state.step + 1), value

    return update

  monkeypatch.setattr(trainer, "make_update", poisoned)
  handler = signal.getsignal(signal.SIGTERM)
  with pytest.raises(FloatingPointError, match=f"{name} is nan at step 4"):
    sft.train(settings(tiny), tmp_path)
  assert signal.getsignal(signal.SIGTERM) is handler
  assert int(saved_state(tmp_path)["step"]) == 2
  assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2, 3]


def test_loss_falls_and_the_base_stays(tiny, tmp_path, checkpoint):
  """Twenty steps on four rows. The frozen part is bitwise what was loaded."""
  rows = (tiny / "data.jsonl").read_text().splitlines()[4:8]
  (tmp_path / "few.jsonl").write_text("\n".join(rows))
  seen = {}
  make = trainer.make_update

  def watched(task, graph, optimiser):
    update = make(task, graph, optimiser)

    def and_keep(state, frozen, batches):
      state, metrics = update(state, frozen, batches)
      seen.update(frozen=frozen, model=compute_model(graph, state.trainable, frozen, jnp.float32))
      return state, metrics

    return and_keep

  config = settings(
    tiny,
    data=str(tmp_path / "few.jsonl"),
    steps=20,
    lora_rank=8,
    lora_alpha=32.0,
    batch_size=1,
    learning_rate=3e-2,
    checkpoint_every=100,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "make_update", watched)
    sft.train(config, tmp_path / "run")
  losses = [line["loss"] for line in metric_lines(tmp_path / "run")]
  assert len(losses) == 20 and losses[-1] < 0.8 * losses[0] and np.mean(losses[-5:]) < np.mean(losses[:5])
  model = unstack(seen["model"])
  np.testing.assert_array_equal(model.embed.embedding[...], checkpoint.params["embed.embedding"])
  for name, module in lora.linears(model).items():
    np.testing.assert_array_equal(module.kernel[...], checkpoint.params[f"{name}.kernel"])
    assert np.abs(module.lora_b[...]).max() > 0


def test_baseline_has_no_tags(tiny, tmp_path, checkpoint, vocabulary):
  """No tag rows, no tags in the data, and the text is the response in reading order."""
  rows = read_jsonl(tiny / "data.jsonl")
  plain = examples(rows, vocabulary, RULE, annotation="none", max_length=LENGTH).examples
  assert all((e.tokens < vocabulary.base_size).all() and not e.masked_intervals.any() for e in plain)
  assert all((np.diff(e.positions) == 1).all() for e in plain)
  told = {vocabulary.text(e.tokens[e.index >= 0][:-1]) for e in plain}
  assert told == {row["response"] for row in rows}
  sft.train(settings(tiny, annotation="none", steps=2), tmp_path)
  tensors = load_file(tmp_path / "adapter.safetensors")
  assert tensors and not any("tags" in name for name in tensors)
  model = build.from_params(checkpoint.config, checkpoint.params)
  load_adapter(tmp_path / "adapter.safetensors", model)
  assert len(model.embed.embedding[...]) == checkpoint.config.vocab_size


def test_training_goes_on_from_an_adapter(whole_run, tiny, tmp_path):
  """At rate 0 it is the adapter that it started from; what does not fit is refused before anything is written."""
  adapter = whole_run / "adapter.safetensors"
  sft.train(settings(tiny, start=str(adapter), learning_rate=0.0, steps=1), tmp_path / "same")
  first, same = load_file(adapter), load_file(tmp_path / "same" / "adapter.safetensors")
  assert first.keys() == same.keys()
  assert all(np.array_equal(first[k].view(np.uint16), same[k].view(np.uint16)) for k in first)
  sft.train(settings(tiny, annotation="none", steps=1), tmp_path / "baseline")
  baseline = tmp_path / "baseline" / "adapter.safetensors"
  full = settings(tiny, lora_rank=0, steps=1)
  sft.train(full, tmp_path / "full")
  head = {"language.promise": "head", "language.number": "token"}
  for changes, message in (
    ({"train.start": str(tmp_path / "full" / "adapter.safetensors")}, "all weights were trained"),
    ({"train.start": str(adapter), "train.lora_rank": 8}, "has rank 2, and keeps it: give"),
    ({"train.length_spread": 10.0}, "is for lengths that are tokens"),
    ({"train.start": str(baseline)}, "train.annotation=plan needs a PASTA adapter"),
    ({"train.start": str(adapter), "train.annotation": "none"}, "needs an adapter without tags"),
    (
      {"train.start": str(adapter), **head},
      r"another form of the language \(promise, topic, digits, pred_10x\) than",
    ),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      sft.train(with_changes(settings(tiny), changes), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_an_adapter_that_was_gone_on_from_leaves_its_settings(whole_run, tiny, tmp_path, monkeypatch):
  """Its settings of decoding and annotators, its digest in place of its path; and a resumed run needs the same one."""
  start = tmp_path / "start.safetensors"
  header = read_metadata(whole_run / "adapter.safetensors")
  header |= {"annotator": "z", "decode": '{"promise_bias": 3.0, "max_threads": 5}'}
  save_file(load_file(whole_run / "adapter.safetensors"), start, header)
  rows = tmp_path / "rows.jsonl"
  rows.write_text("".join(json.dumps(r | {"annotator": "b"}) + "\n" for r in read_jsonl(tiny / "data.jsonl")))
  config = settings(tiny, start=str(start), data=str(rows), steps=2, checkpoint_every=1)
  config = with_changes(config, {"decode.promise_bias": 0.0})
  sft.train(config, tmp_path / "run")
  made = read_metadata(tmp_path / "run" / "adapter.safetensors")
  assert json.loads(made["decode"]) == {"promise_bias": 0.0, "max_threads": 5}
  assert made["annotator"] == "b, z" and json.loads(made["train"])["start"] == "start.safetensors"
  assert made["start's sha256"] == hashlib.sha256(start.read_bytes()).hexdigest()
  with pytest.raises(ValueError, match="is the result of this --workdir"):
    sft.train(
      with_changes(config, {"train.start": str(tmp_path / "run/adapter.safetensors")}), tmp_path / "run"
    )
  save_file(load_file(start), start, header | {"scale": "8.0"})
  for changes in ({"train.steps": 3}, {"train.steps": 3, "train.start": ""}):
    with pytest.raises(ValueError, match="went on from another adapter") as caught:
      sft.train(with_changes(config, changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_an_adapter_is_merged_where_every_parameter_is_trained(tmp_path):
  """Low-rank updates into the kernels; the tag rows of the embedding and of an untied head are the
  adapter's."""
  checkpoint = load_checkpoint(write_model(tmp_path / "model", model_config(tie_embeddings=False)))
  vocabulary = checkpoint.vocabulary
  config = settings(tmp_path)
  graph, trainable, frozen = make_model(checkpoint, vocabulary, config.train)
  moved = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape), trainable)
  save_adapter(tmp_path / "adapter.safetensors", nnx.merge(graph, moved, frozen), {})
  tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size + 6, (1, 24))
  low_rank, full = [], []
  for out, rank in ((low_rank, 2), (full, 0)):
    config = with_changes(config, {"train.lora_rank": rank})
    model = nnx.merge(
      *make_model(checkpoint, vocabulary, config.train, adapter=tmp_path / "adapter.safetensors")
    )
    hidden, _ = model(jnp.asarray(tokens), jnp.arange(24)[None], dense_attention(causal_mask(24)))
    out.append(np.asarray(model.logits(hidden)))
  np.testing.assert_allclose(full[0], low_rank[0], atol=1e-4, rtol=1e-4)
  assert not lora.linears(model)["layers.attn.q"].lora_a


@pytest.mark.parametrize("annotated", [True, False])
def test_full_training_leaves_a_model_that_others_load(
  tiny, tmp_path, checkpoint, monkeypatch, annotated: bool
):
  """`model/` and the adapter's tag rows are the trained model; `transformers` reads the folder too."""
  trained = []
  export = trainer.export
  monkeypatch.setattr(trainer, "export", lambda *a, **k: (trained.append(a[1]), export(*a, **k)))
  sft.train(
    settings(tiny, annotation="plan" if annotated else "none", lora_rank=0, steps=2, dtype="float32"),
    tmp_path,
  )
  loaded = load_checkpoint(tmp_path / "model")
  assert loaded.config == checkpoint.config
  messages = [{"role": "user", "content": "Plan a trip, <|im_end|> please."}]
  assert loaded.tokenizer.chat_prompt(messages) == checkpoint.tokenizer.chat_prompt(messages)
  assert (
    np.abs(loaded.params["layers.1.mlp.down.kernel"] - checkpoint.params["layers.1.mlp.down.kernel"]).max()
    > 0
  )
  model = build.from_params(loaded.config, loaded.params)
  load_adapter(tmp_path / "adapter.safetensors", model)
  assert (model.embed.tags is not None) == annotated
  assert weights_of(tmp_path / "adapter.safetensors") == tmp_path / "model"
  tokens = np.random.default_rng(0).integers(0, checkpoint.tokenizer.vocab_size, (1, 24))

  def logits(decoder):
    hidden, _ = decoder(jnp.asarray(tokens), jnp.arange(24)[None], dense_attention(causal_mask(24)))
    return np.asarray(decoder.logits(hidden))[
      ..., : checkpoint.tokenizer.vocab_size
    ]  # tags' rows are the adapter's

  want = logits(trained[0])
  np.testing.assert_array_equal(logits(stack(model)), want)
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
  with torch.inference_mode():
    found = theirs(torch.tensor(tokens)).logits.numpy()[..., : want.shape[-1]]
  np.testing.assert_allclose(found, want, atol=2e-4, rtol=2e-4)


# --- what cannot be used ---


@pytest.mark.parametrize(
  ("changes", "message", "kind"),
  [
    ({"data": "/nowhere/x.jsonl"}, "no such data file: /nowhere/x.jsonl", DataError),
    ({"validation": "/nowhere/y.jsonl"}, "no such data file: /nowhere/y.jsonl", DataError),
    ({"data": ""}, "no example of train.data='' is left", ValueError),
    ({"length": 20}, "left out: 24 longer than 20 tokens", ValueError),
    ({"source": "/nowhere/model"}, "neither a GGUF file", WeightsError),
  ],
)
def test_what_cannot_be_trained_on_leaves_nothing(tiny, tmp_path, changes: dict, message: str, kind: type):
  config = settings(tiny, **{k: v for k, v in changes.items() if k != "source"})
  config = with_changes(config, {"model.source": changes.get("source", config.model.source)})
  with pytest.raises(kind, match=message) as caught:
    sft.train(config, tmp_path / "run")
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written(tiny, tmp_path):
  (tmp_path / "file").write_text("")
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(ValueError, match=f"--workdir={workdir}: {tmp_path / 'file'} is not a folder"):
      sft.train(settings(tiny), workdir)
  for missing in (None, ""):
    with pytest.raises(ValueError, match="pass --workdir"):
      sft.train(settings(tiny), missing)
  locked = tmp_path / "locked"
  locked.mkdir(mode=0o500)
  with pytest.MonkeyPatch.context() as patch:  # root may write anywhere, so the answer is given for it
    patch.setattr(os, "access", lambda path, _: Path(path) != locked)
    with pytest.raises(ValueError, match="no permission to write"):
      sft.train(settings(tiny), locked / "run")
