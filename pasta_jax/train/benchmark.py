"""The cost of training on this machine: `python -m pasta_jax.train.benchmark`.

Attention, forward and backward, by row length: the full T x T mask against the program that trains on this
machine (`train.attention`), for plain causal rows, and for one long answer of 16 chunks and real examples packed
into a row, both in each form of visibility. Then whole training steps: tokens per second and model FLOPs utilisation
(MFU). Figures are medians; the cases are measured in turns.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich
from absl import app, flags
from ml_collections import config_flags
from rich.table import Table

from pasta_jax.config import from_flags
from pasta_jax.config.sections import VISIBILITIES
from pasta_jax.data.examples import examples
from pasta_jax.data.packing import PackedBatch, fill_rows, pack_row
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import flash, tiles
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.sharding import AXES, make_mesh, shard_put_batch
from pasta_jax.model.transformer import set_matmul_precision
from pasta_jax.train.attention import make_attend, mask_of
from pasta_jax.train.flops import step_flops
from pasta_jax.train.sft import SFT
from pasta_jax.train.state import make_model
from pasta_jax.train.trainer import Trainer
from pasta_jax.utils.chips import chip
from pasta_jax.utils.jsonl import read_jsonl
from pasta_jax.weights.checkpoint import Checkpoint, load_checkpoint

FLAGS = flags.FLAGS
CHUNKS = 16  # of the long answer


def causal_row(length: int) -> PackedBatch:
  """One example without chunks."""
  row = pack_row([], length, 1)
  row.segment_ids[:] = 1
  row.positions[:] = row.rounds[:] = np.arange(length)
  return row


def answer_row(length: int) -> PackedBatch:
  """One answer: an eighth of it before any chunk, chunks of equal length, and an eighth after their sync."""
  row = causal_row(length)
  head = length // 8
  size = (length - 2 * head) // CHUNKS
  for c in range(CHUNKS):
    start = head + c * size
    row.masked_intervals[0, start : start + size, 0] = start + size, head + CHUNKS * size
    row.rounds[0, start:] -= size  # whoever promised goes on beside the chunk
    row.rounds[0, start : start + size] = head + np.arange(size)
  row.rounds[0, head + CHUNKS * size :] += size  # the sync waits
  return row


def packed_row(vocabulary: Vocabulary, length: int) -> PackedBatch:
  """Examples of `--data`, repeated until the row is full."""
  found = examples(
    read_jsonl(FLAGS.data), vocabulary, PositionRule(), annotation="plan", max_length=length
  ).examples
  found = found * (1 + length // sum(map(len, found)))
  levels = max(e.masked_intervals.shape[1] for e in found)
  return pack_row([found[i] for i in fill_rows([len(e) for e in found], length)[0]], length, levels)


def attention_timer(
  kind: str, row: PackedBatch, config: ModelConfig, visibility: str
) -> tuple[Callable[[], float], int]:
  """(a function that measures seconds of a forward and backward pass over one row, bytes of temporary
  memory)."""
  dtype, length = jnp.dtype(FLAGS.dtype), row.tokens.shape[1]
  set_matmul_precision(FLAGS.dtype)
  keys = jax.random.split(jax.random.key(0), 3)
  heads = (1, length, config.n_kv_heads)
  q = jax.random.normal(keys[0], (*heads, config.n_groups, config.head_dim), dtype)
  k, v = (jax.random.normal(key, (*heads, config.head_dim), dtype) for key in keys[1:])
  batch = {name: jnp.asarray(x) for name, x in row.as_dict().items()}

  def loss(q, k, v, batch):
    return jnp.square(make_attend(kind, batch, config, dtype, visibility)(None, q, k, v, False)[0]).sum()

  run = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, batch).compile()

  def measure() -> float:
    started = time.perf_counter()
    jax.block_until_ready(run(q, k, v, batch))
    return time.perf_counter() - started

  measure()
  return measure, _temporary(run)


def _temporary(compiled) -> int:
  """Bytes of memory in addition to arguments and results."""
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes if memory else 0


def visited(row: PackedBatch, size: int, visibility: str) -> tuple[float, float]:
  """Tiles of `size` tokens that are partly masked, and that are not masked at all, as fractions of the tiles that a
  causal row visits."""
  length = row.tokens.shape[1] // size * size
  batch = {name: jnp.asarray(x)[:, :length] for name, x in row.as_dict().items()}
  run = jax.jit(tiles.tile_kinds, static_argnums=(2, 3))
  kinds = run(mask_of(batch, visibility), batch["positions"], 0, size)
  n = length // size
  partial, full = (float((kinds == kind).sum()) / (n * (n + 1) / 2) for kind in (tiles.PARTIAL, tiles.FULL))
  return partial, full


def measure_attention(checkpoint: Checkpoint) -> list[dict[str, Any]]:
  """Figures by length, program and mask."""
  found = []
  for length in map(int, FLAGS.lengths):
    both = {"one answer": answer_row(length), "packed": packed_row(checkpoint.vocabulary, length)}
    rows = {"causal": (causal_row(length), "promise")}
    rows |= {f"{name}, {v}": (row, v) for name, row in both.items() for v in VISIBILITIES}
    cases = [(kind, mask) for kind in FLAGS.kinds for mask in rows]
    cases = ([("dense", "causal")] if length <= FLAGS.dense_up_to else []) + cases
    timers = {}
    for kind, mask in cases:
      row, visibility = rows[mask]
      timers[kind, mask] = attention_timer(kind, row, checkpoint.config, visibility)
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for _ in range(FLAGS.rounds):
      for case, (measure, _) in timers.items():
        seconds[case].append(measure())
    size = flash.tile_size("tpu", length, checkpoint.config.head_dim)
    for kind, mask in cases:
      partial, full = visited(rows[mask][0], size, rows[mask][1])
      found.append(
        {
          "length": length,
          "kind": kind,
          "mask": mask,
          "seconds": statistics.median(seconds[kind, mask]),
          "temporary": timers[kind, mask][1],
          "partial_tiles_on_tpu": partial,
          "full_tiles_on_tpu": full,
        }
      )
  return found


def measure_step(checkpoint: Checkpoint, what: str) -> dict[str, Any]:
  """Figures of a training step, "full" or "lora" and a dtype."""
  kind, dtype = what.split()
  c = dataclasses.replace(
    from_flags(FLAGS.config).train,
    lora_rank=0 if kind == "full" else 16,
    dtype=dtype,
    batch_size=FLAGS.rows,
    length=FLAGS.length,
  )
  set_matmul_precision(dtype)
  mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
  trainer = Trainer(SFT(c), make_model(checkpoint, checkpoint.vocabulary, c, mesh=mesh), mesh, steps=100)
  row = packed_row(checkpoint.vocabulary, c.length).as_dict()
  batch = shard_put_batch(
    mesh, {name: np.stack([np.concatenate([x] * c.batch_size)]) for name, x in row.items()}
  )
  state = trainer.init_state()
  step = trainer.update.lower(state, trainer.frozen, batch).compile()
  seconds = []
  for _ in range(FLAGS.rounds + 1):
    started = time.perf_counter()
    state, metrics = step(state, trainer.frozen, batch)
    float(metrics["loss"])
    seconds.append(time.perf_counter() - started)
  median = statistics.median(seconds[1:])
  limits = chip(jax.devices()[0].device_kind)
  flops = step_flops(checkpoint.config, c.batch_size, c.length, full=kind == "full")
  return {
    "step": what,
    "seconds": median,
    "tokens_per_second": c.batch_size * c.length / median,
    "temporary": _temporary(step),
    "flops_per_second": flops / median,
    "mfu": flops / median / limits.peak if limits else None,
  }


def main(argv: list[str]) -> None:
  del argv
  checkpoint = load_checkpoint(FLAGS.config.model.source)
  attention = measure_attention(checkpoint)
  if attention:
    table = Table(
      "tokens",
      "program",
      "mask",
      "ms",
      "to causal",
      "MiB",
      "tiles on TPU, partial + full",
      title=f"attention of a layer, {FLAGS.dtype}, forward and backward, {jax.devices()[0].device_kind}",
    )
    causal: dict[tuple[int, str], float] = {}
    for f in attention:
      base = causal.setdefault((f["length"], f["kind"]), f["seconds"])
      table.add_row(
        f"{f['length']:,}",
        f["kind"],
        f["mask"],
        f"{1e3 * f['seconds']:.1f}",
        f"{f['seconds'] / base:.2f}",
        f"{f['temporary'] / 2**20:,.0f}",
        f"{100 * f['partial_tiles_on_tpu']:.0f} + {100 * f['full_tiles_on_tpu']:.0f} %",
      )
    rich.print(table)
  steps = [measure_step(checkpoint, what) for what in FLAGS.steps]
  if steps:
    table = Table(
      "step",
      "tokens/s",
      "TFLOP/s of the model",
      "MFU",
      "temporary, MiB",
      title=f"{FLAGS.rows} rows of {FLAGS.length} tokens, {jax.devices()[0].device_kind}",
    )
    for s in steps:
      table.add_row(
        s["step"],
        f"{s['tokens_per_second']:,.0f}",
        f"{s['flops_per_second'] / 1e12:.3f}",
        "" if s["mfu"] is None else f"{100 * s['mfu']:.0f} %",
        f"{s['temporary'] / 2**20:,.0f}",
      )
    rich.print(table)
  if FLAGS.json:
    Path(FLAGS.json).write_text(json.dumps({"attention": attention, "steps": steps}, indent=2))


def define_flags() -> None:
  config_flags.DEFINE_config_file("config", "configs/smollm2_135m.py", "its model, and how `train` trains it")
  flags.DEFINE_string("data", "data/seed.jsonl", "annotated rows that are packed")
  flags.DEFINE_list("lengths", ["2048", "8192"], 'tokens of a row in the measurements of attention; "": none')
  flags.DEFINE_integer("dense_up_to", 8192, "longest row for which the whole mask is tried")
  flags.DEFINE_list("kinds", ["auto"], "programs for attention (train.attention) beside the dense one")
  flags.DEFINE_string("dtype", "bfloat16", "of attention's products")
  flags.DEFINE_list("steps", ["full float32", "full bfloat16", "lora bfloat16"], 'training steps; "": none')
  flags.DEFINE_integer("rows", 4, "of a training step")
  flags.DEFINE_integer("length", 512, "tokens of a row of a training step")
  flags.DEFINE_integer("rounds", 5, "measurements; medians are reported")
  flags.DEFINE_string("json", None, "write the figures to this file too")


if __name__ == "__main__":
  define_flags()
  app.run(main)
