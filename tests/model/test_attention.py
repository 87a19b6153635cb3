"""Attention of packed rows: every implementation against the definition, and the tiles that it skips."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import BYTES
from test_layout import trees

from pasta_jax.config.sections import VISIBILITIES, Train
from pasta_jax.data.packing import FIRST_ROUND, fill_rows, pack_row
from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.model import flash, tiles
from pasta_jax.model.attention import chunked_attention, dense_attention, sliding_window_mask
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.masks import Intervals, Rounds
from pasta_jax.model.transformer import REMAT
from pasta_jax.train.attention import attention_mask, check_machine, make_attend, mask_of

CONFIG = ModelConfig(vocab_size=8, d_model=8, n_layers=1, n_heads=6, n_kv_heads=2, head_dim=16, d_ff=8)
RULE = PositionRule()
KINDS_OF = jax.jit(tiles.tile_kinds, static_argnums=(2, 3))
LENGTH, LEVELS = 512, 6  # of rows of random programs


def random_rows(rng: np.random.Generator, rows: int, length: int) -> dict[str, np.ndarray]:
  """A batch of nested chunks, up to two levels, some never joined; several examples per row, and padding."""
  hidden = np.zeros((rows, length, 2, 2), np.int32)
  segment_ids = np.zeros((rows, length), np.int32)
  positions = np.zeros((rows, length), np.int32)
  rounds = np.zeros((rows, length), np.int32)
  for r in range(rows):
    at, number = 0, 0
    while at < length * 0.9:
      stop, number = min(at + int(rng.integers(length // 4, length)), length), number + 1
      segment_ids[r, at:stop] = number
      positions[r, at:stop] = np.cumsum(rng.integers(1, 3, stop - at)) - 1
      rounds[r, at:stop] = FIRST_ROUND - number * length + np.arange(stop - at)
      c = at + 1
      while c < stop - 3:
        end = int(rng.integers(c + 1, stop))
        hidden[r, c:end, 0] = end, (stop if rng.random() < 0.3 else rng.integers(end, stop + 1))
        if end - c > 4:
          hidden[r, c + 1 : c + 3, 1] = c + 3, rng.integers(c + 3, end)
        positions[r, end:stop] -= int(rng.integers(0, end - c))
        rounds[r, end:stop] -= end - c  # whoever promised goes on beside the chunk
        c = end + int(rng.integers(0, 9))
      at = stop
  return {
    "tokens": np.zeros_like(segment_ids),
    "segment_ids": segment_ids,
    "masked_intervals": hidden,
    "positions": positions,
    "rounds": rounds,
  }


def definition(batch, visibility: str) -> np.ndarray:
  """[B, T, T] who sees whom; `live` told anew, by segments and not by the rounds' offsets."""
  if visibility == "promise":
    return np.asarray(attention_mask(batch))
  at, (segments, rounds) = np.arange(batch["tokens"].shape[1]), (batch["segment_ids"], batch["rounds"])
  before = (at[:, None] > at) & (rounds[:, :, None] > rounds[:, None]) & (segments[:, None] > 0)
  return np.eye(len(at), dtype=bool) | before & (segments[:, :, None] == segments[:, None])


def naive(q, k, v, mask, softcap: float):
  """[B, T, K, G, H] in float64, by the definition."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("btkgh,bskh->bkgts", q, k)
  scores = softcap * np.tanh(scores / softcap) if softcap else scores
  scores = np.where(mask[:, None, None], scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("bkgts,bskh->btkgh", weights / weights.sum(-1, keepdims=True), v)


def programs(batch, config, dtype=jnp.float32, visibility="promise"):
  """Every implementation by name: (q, k, v, local) -> context."""
  mask, positions = mask_of(batch, visibility), batch["positions"]
  window_mask = sliding_window_mask(positions, positions, config.window)
  attends = {
    "dense": dense_attention(
      attention_mask(batch, visibility), dtype, window_mask=window_mask, softcap=config.attention_softcap
    ),
    "chunked": chunked_attention(mask, positions, config, dtype),
    "chunked, long": chunked_attention(mask, positions, config, dtype, block=8),
  }
  ways = {
    name: lambda q, k, v, local, attend=attend: attend(None, q, k, v, local)[0]
    for name, attend in attends.items()
  }
  for platform in ("tpu", "gpu"):
    how = flash.Settings(platform, 32, config.attention_softcap, config.window > 0, True, type(mask))
    ways[platform] = partial(
      flash.attention,
      tables=flash.make_tables(mask, positions, config.window, 32),
      settings=how,
      config=config,
    )
  return ways


@pytest.mark.parametrize(
  "window, softcap, length, heads, groups, width, visibility",
  [
    (0, 0.0, 130, 2, 3, 16, "promise"),
    (17, 0.0, 96, 3, 1, 16, "promise"),
    (17, 3.0, 101, 1, 4, 12, "promise"),
    (0, 0.0, 64, 1, 1, 8, "promise"),
    (0, 0.0, 130, 2, 3, 16, "live"),
    (17, 3.0, 101, 1, 4, 12, "live"),
  ],
)
def test_every_implementation_equals_the_definition(
  window: int, softcap: float, length: int, heads: int, groups: int, width: int, visibility: str
):
  """Context against float64; its three cotangents against the reference's. Grouped heads, one key-value head
  per query head, one for all, and a single head."""
  rng = np.random.default_rng(length)
  config = dataclasses.replace(CONFIG, window=window, attention_softcap=softcap)
  batch = random_rows(rng, 2, length)
  q = rng.normal(size=(2, length, heads, groups, width)).astype("f")
  k, v = (rng.normal(size=(2, length, heads, width)).astype("f") for _ in range(2))
  out = rng.normal(size=q.shape).astype("f")

  @partial(jax.jit, static_argnums=0)
  def run(name, local):
    context, pull = jax.vjp(
      lambda *x: programs(batch, config, visibility=visibility)[name](*x, local), q, k, v
    )
    return context, pull(out)

  mask = definition(batch, visibility)
  window_mask = batch["positions"][:, :, None] - batch["positions"][:, None] < (window or 2**30)
  for local in (False, True):
    expected = naive(q, k, v, mask & window_mask if local else mask, softcap)
    _, wanted = run("dense", local)
    for name in programs(batch, config):
      context, found = run(name, local)
      np.testing.assert_allclose(context, expected, atol=2e-5, err_msg=f"{name} {local}")
      for x, y in zip(found, wanted):
        np.testing.assert_allclose(x, y, atol=1e-4, err_msg=f"{name} {local}")


def test_kernels_accumulate_bfloat16_in_float32():
  rng = np.random.default_rng(0)
  batch = random_rows(rng, 1, 64)
  q = rng.normal(size=(1, 64, 2, 3, 16)).astype(jnp.bfloat16)
  k, v = (rng.normal(size=(1, 64, 2, 16)).astype(jnp.bfloat16) for _ in range(2))
  expected = naive(q, k, v, np.asarray(attention_mask(batch)), 0.0)
  for name in ("tpu", "gpu"):

    @jax.jit
    def run(q, k, v, name=name):
      context, pull = jax.vjp(lambda *qkv: programs(batch, CONFIG)[name](*qkv, False), q, k, v)
      return context, pull(context)

    context, found = run(q, k, v)
    assert context.dtype == jnp.float32 and {g.dtype for g in found} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(context, expected, atol=2e-2)


@settings(deadline=None, max_examples=30)
@given(mains=st.lists(trees(), min_size=1, max_size=5))
def test_tile_kinds_agree_with_the_mask(mains):
  """Empty tiles are fully masked, full ones not at all; without windows, every full tile is recognised."""
  laid = [layout(main, RULE, BYTES.table, (63, 58)) for main in mains]
  laid = [e for e in laid if len(e) <= LENGTH and e.masked_intervals.shape[1] <= LEVELS]
  rows = fill_rows([len(e) for e in laid], LENGTH) or [[]]
  batch = pack_row([laid[i] for i in rows[0]], LENGTH, LEVELS).as_dict()
  positions = batch["positions"]
  for visibility, window in itertools.product(VISIBILITIES, (0, 5, 40)):
    mask = definition(batch, visibility)
    seen = mask & (positions[:, :, None] - positions[:, None] < window) if window else mask
    by_tile = seen.reshape(1, LENGTH // 8, 8, LENGTH // 8, 8)
    kinds = np.asarray(KINDS_OF(mask_of(batch, visibility), positions, window, 8))
    some, every = by_tile.any((2, 4)), by_tile.all((2, 4))
    assert not some[kinds == tiles.EMPTY].any() and every[kinds == tiles.FULL].all()
    if not window:
      assert (kinds[every] == tiles.FULL).all()
    if not window and visibility == "live":  # rows and columns of a tile are told apart by their rounds alone
      assert some[kinds == tiles.PARTIAL].all()
    plan = jax.tree.map(np.asarray, tiles.tile_schedule(jnp.asarray(kinds)))
    assert (plan.visits > 0).all()  # the diagonal: every token sees itself
    for i in range(LENGTH // 8):
      met = plan.order[0, i, : plan.visits[0, i]]
      assert (met >> 1).tolist() == np.flatnonzero(kinds[0, i]).tolist()
      assert ((met & 1) == 1).tolist() == (kinds[0, i][met >> 1] == tiles.FULL).tolist()


def test_chunks_that_do_not_see_each_other_are_skipped():
  """Eight chunks, never joined: of the tiles of a causal mask, those between chunks are skipped."""
  n, size = 8, 64
  hidden = np.zeros((1, n * size, 1, 2), np.int32)
  for c in range(n):
    hidden[0, c * size : (c + 1) * size, 0] = (c + 1) * size, n * size
  positions = np.arange(n * size)[None]
  kinds = lambda hidden: np.asarray(tiles.tile_kinds(Intervals(hidden), positions, 0, size))[0]
  np.testing.assert_array_equal(kinds(hidden), np.eye(n))
  np.testing.assert_array_equal(kinds(hidden * 0), np.tri(n, k=-1) * tiles.FULL + np.eye(n))


def test_kinds_agree():
  """`make_attend` of every kind that runs on all machines, with the layer's flag traced as in a scan over
  layers."""
  rng = np.random.default_rng(1)
  batch = random_rows(rng, 2, 72)
  config = dataclasses.replace(CONFIG, window=11)
  q = rng.normal(size=(2, 72, 2, 3, 16)).astype("f")
  k, v = (rng.normal(size=(2, 72, 2, 16)).astype("f") for _ in range(2))
  on_device = {n: jnp.asarray(x) for n, x in batch.items()}
  for visibility, local in itertools.product(VISIBILITIES, (False, True)):
    run = lambda kind, local=local, visibility=visibility: jax.jit(
      lambda local: make_attend(kind, on_device, config, jnp.float32, visibility)(None, q, k, v, local)[0]
    )(local)
    for kind in ("auto", "chunked", "interpret"):
      np.testing.assert_allclose(run(kind), run("dense"), atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("platform, lowered", [("tpu", "tpu"), ("gpu", "cuda")])
@pytest.mark.parametrize(
  "length, heads, groups, width, window, softcap, dtype, kind",
  [
    (640, 3, 3, 64, 0, 0.0, jnp.bfloat16, Intervals),
    (4096, 1, 4, 256, 512, 50.0, jnp.bfloat16, Intervals),
    (2048, 2, 2, 80, 0, 0.0, jnp.float32, Intervals),
    (640, 3, 3, 64, 0, 0.0, jnp.bfloat16, Rounds),
    (4096, 1, 4, 256, 512, 50.0, jnp.bfloat16, Rounds),
  ],
)
def test_kernels_lower(platform, lowered, length, heads, groups, width, window, softcap, dtype, kind):
  """Head widths of SmolLM2, of Gemma and an uneven one, forward and backward, lowered for other machines."""
  config = dataclasses.replace(CONFIG, window=window, attention_softcap=softcap)
  size = flash.tile_size(platform, length, width)
  how = flash.Settings(platform, size, softcap, window > 0, mask=kind)

  def both(q, k, v, mask, positions, local):
    tables = flash.make_tables(kind(mask), positions, window, size)
    f = lambda q, k, v: flash.attention(q, k, v, local, tables, settings=how, config=config)
    context, pull = jax.vjp(f, q, k, v)
    return context, pull(context)

  shape = jax.ShapeDtypeStruct
  key = shape((2, length, heads, width), dtype)
  text = (
    jax.jit(both)
    .trace(
      shape((2, length, heads, groups, width), dtype),
      key,
      key,
      shape((2, length, 2, 2) if kind is Intervals else (2, length), jnp.int32),
      shape((2, length), jnp.int32),
      shape((), jnp.bool_),
    )
    .lower(lowering_platforms=(lowered,))
    .as_text()
  )
  assert text.count("tpu_custom_call" if platform == "tpu" else "__gpu$xla.gpu.triton") == 3
  assert f"x{length}x{length}x" not in text  # no array of the size of a mask


def test_invalid_settings_are_refused():
  check_machine(Train(attention="interpret"), "train")
  with pytest.raises(ValueError, match="train.attention=tpu cannot run on this machine's cpu"):
    check_machine(Train(attention="tpu"), "train")
  with pytest.raises(ValueError, match="attention must be one of .*, not 'flash'"):
    make_attend("flash", random_rows(np.random.default_rng(0), 1, 32), CONFIG, jnp.float32)


def test_padding_is_not_computed():
  """After the last example of a row, and in the padding to whole tiles, a tile visits only itself."""
  segment_ids = np.zeros((1, 500), np.int32)
  segment_ids[0, :100], segment_ids[0, 100:250] = 1, 2
  at = np.arange(500)[None]
  batch = {
    "tokens": segment_ids,
    "segment_ids": segment_ids,
    "masked_intervals": np.zeros((1, 500, 1, 2), np.int32),
    "positions": at,
    "rounds": np.where(segment_ids, FIRST_ROUND - 1000 * segment_ids + at, 0),
  }
  for visibility in VISIBILITIES:
    tables = flash.make_tables(mask_of(batch, visibility), jnp.asarray(at), 0, 64)
    assert tables.by_query[0].visits.tolist() == [[1, 2, 2, 3, 1, 1, 1, 1]], visibility


def test_saved_results_are_not_computed_again():
  """`remat="attention"`: the kernel's forward pass does not run twice. (Blocks in plain JAX save nothing.)"""
  rng = np.random.default_rng(0)
  batch = {n: jnp.asarray(x) for n, x in random_rows(rng, 1, 256).items()}
  x = jnp.asarray(rng.normal(size=(1, 256, 2, 3, 16)), jnp.float32)

  def loss(x, policy):
    attend = make_attend("interpret", batch, CONFIG, jnp.float32)
    layer = lambda x: attend(None, jnp.tanh(x), x[:, :, :, 0], x[:, :, :, 1], False)[0]
    return jnp.square(jax.checkpoint(layer, policy=policy)(x)).sum()

  def flops(how: str) -> float:
    jax.config.update("jax_disable_most_optimizations", False)  # so that unused results are removed
    step = jax.jit(jax.grad(partial(loss, policy=REMAT[how])))
    return step.lower(x).compile().cost_analysis()["flops"]

  assert 0 < flops("attention") < 0.95 * flops("full")
