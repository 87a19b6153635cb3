"""Whether the decode loop and the trainer agree: log p of sampled answers from both."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from pasta_jax.data.packing import pack_row
from pasta_jax.lang.layout import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import lora
from pasta_jax.model.checkpoint import load_checkpoint
from pasta_jax.preference.pairs import laid_out
from pasta_jax.train.loss import token_log_likelihood
from pasta_jax.train.state import compute_model, make_model


def compare(config, adapter: Path, samples: Sequence[dict]) -> dict[str, float]:
  """Differences between the samples' own log p and the trainer's, a token: `mean` and `worst`, in nats; printed too."""
  checkpoint = load_checkpoint(config.model.source)
  vocabulary = Vocabulary(checkpoint.tokenizer, checkpoint.config.vocab_size)
  c = ml_collections.ConfigDict(config.preference.to_dict() | {"dtype": config.preference.sample_dtype})
  graph, trainable, frozen = make_model(checkpoint, vocabulary, c, adapter=adapter)
  rule = PositionRule(**json.loads(lora.read_metadata(adapter)["positions"]))
  run = jax.jit(lambda batch: token_log_likelihood(compute_model(graph, trainable, frozen, c.dtype), batch)[0].sum())
  differences = []
  for s in samples:
    laid = laid_out(s, vocabulary, rule)
    length = 1 << (len(laid) - 1).bit_length()
    row = pack_row([laid], length, laid.hidden.shape[1])
    differences.append(abs(float(run(row.as_dict())) - s["log_p"]) / max(s["total_tokens"], 1))
  out = {"mean": float(np.mean(differences)), "worst": float(np.max(differences))}
  print(f"audit of {len(samples)} samples: between decode loop and trainer, log p a token differs by "
        f"{out['mean']:.2g} on average, {out['worst']:.2g} at most")
  return out
