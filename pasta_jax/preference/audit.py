"""Sampled answers under the trainer's forward pass.

Does it agree with the decode loop, how far is a policy from the start, and what did a round learn?
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from pasta_jax.data.packing import pack_row
from pasta_jax.lang.layout import NO_TARGET
from pasta_jax.model.sharding import AXES, make_mesh
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.preference.selection import lay_out_sample
from pasta_jax.train.losses import token_log_likelihood
from pasta_jax.train.preference import Preference
from pasta_jax.train.state import make_model
from pasta_jax.train.trainer import Trainer
from pasta_jax.weights.adapter import form_of
from pasta_jax.weights.checkpoint import Checkpoint

T = TypeVar("T")
# Classes of tokens, in the order of `lang.automaton`.
KINDS = ("text", "digits", "promise", "number", "close", "async", "end", "sync", "eos", "length")


def token_log_likelihoods(
  config, checkpoint: Checkpoint, adapter: Path, samples: Sequence[dict]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(targets, the trainer's log p of each) of every sample under the policy `adapter`, in
  `preference.sample_dtype`."""
  form = form_of(adapter)
  checkpoint = checkpoint.speaking(form)
  vocabulary = checkpoint.vocabulary
  c = dataclasses.replace(config.preference, dtype=config.preference.sample_dtype)
  set_matmul_precision(c.dtype)
  mesh = make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])
  trainer = Trainer(
    Preference(c, form=form), make_model(checkpoint, vocabulary, c, adapter=adapter, mesh=mesh), mesh
  )
  run = trainer.evaluator(
    lambda model, batch: token_log_likelihood(model, batch, visibility=form.visibility)[0]
  )
  out = []
  for s in samples:
    laid = lay_out_sample(s, vocabulary, form)
    row = pack_row([laid], 1 << (len(laid) - 1).bit_length(), laid.masked_intervals.shape[1])
    learned = row.targets[0] != NO_TARGET
    out.append((row.targets[0][learned], run(trainer.trainable, row.as_dict())[0][learned]))
  return out


def log_likelihoods(config, checkpoint: Checkpoint, adapter: Path, samples: Sequence[dict]) -> np.ndarray:
  """[n] log p of each sample's answer, by `token_log_likelihoods`."""
  return np.array(
    [log_p.sum(dtype=np.float64) for _, log_p in token_log_likelihoods(config, checkpoint, adapter, samples)]
  )


def gains(
  config, before: tuple[Checkpoint, Path], after: tuple[Checkpoint, Path], pairs: Sequence[tuple[dict, dict]]
) -> dict[str, dict[str, dict[str, float]]]:
  """What training changed in the `best` and the `worst` of pairs, by class of token.

  `tokens` is the number of such tokens per answer, `gain` the mean increase of their log p, nats per token.
  If text becomes less likely in best and worst answers alike and tags more likely, the policy has learned
  length and nothing about the answers.
  """
  classes = before[0].speaking(form_of(before[1])).vocabulary.table.classes
  answers = [answer for pair in pairs for answer in pair]
  old, new = (token_log_likelihoods(config, *policy, answers) for policy in (before, after))

  def side(start: int) -> dict[str, dict[str, float]]:
    kinds = np.concatenate([classes[targets] for targets, _ in old[start::2]])
    gain = np.concatenate([n - o for (_, o), (_, n) in zip(old[start::2], new[start::2])])
    return {
      name: {"tokens": float((kinds == k).sum() / len(pairs)), "gain": float(gain[kinds == k].mean())}
      for k, name in enumerate(KINDS)
      if (kinds == k).any()
    }

  return {"best": side(0), "worst": side(1)}


def some(samples: Sequence[T], n: int) -> list[T]:
  """At most `n` of the samples, at random, but always the same ones."""
  return [samples[i] for i in np.random.default_rng(0).permutation(len(samples))[:n]]


def compare(config, checkpoint: Checkpoint, adapter: Path, samples: Sequence[dict]) -> dict[str, float]:
  """Differences between decode loop and trainer in a sample's log p, nats per token: `mean` and `worst`."""
  tokens = np.array([max(s["total_tokens"], 1) for s in samples])
  differences = (
    np.abs(log_likelihoods(config, checkpoint, adapter, samples) - [s["log_p"] for s in samples]) / tokens
  )
  return {"samples": len(samples), "mean": float(differences.mean()), "worst": float(differences.max())}


def divergence(config, checkpoint: Checkpoint, start: Path, samples: Sequence[dict]) -> float:
  """Mean log p of the samples under their own policy minus that under `start`, nats per token.

  At temperature 1 without penalties, blocked n-grams and bias this estimates the Kullback-Leibler divergence
  from the start.
  """
  gain = np.array([s["log_p"] for s in samples]) - log_likelihoods(config, checkpoint, start, samples)
  return float(gain.sum() / max(sum(s["total_tokens"] for s in samples), 1))
