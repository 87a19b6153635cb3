"""The paper's configs: Gemma 7B is read as it is published, and both stages' steps lower for TPU at full size."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from configs import gemma3_270m, llama32_1b, qwen25_05b
from configs import tiny as tiny_config
from configs.paper import gemma_7b
from pasta_jax.model import build, lora
from pasta_jax.model.checkpoint import load_checkpoint
from pasta_jax.model.decoder import Decoder
from pasta_jax.model.hf_folder import _config
from pasta_jax.preference.rounds import policies
from pasta_jax.train import preference, sft
from pasta_jax.train.preference_loss import default_beta
from pasta_jax.train.sharding import AXES, ROWS, shardings
from pasta_jax.train.state import TrainState, make_optimiser

# What google/gemma-7b's config.json says of the architecture.
PUBLISHED = {
  "model_type": "gemma", "attention_bias": False, "head_dim": 256, "hidden_act": "gelu", "hidden_size": 3072,
  "intermediate_size": 24576, "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 28,
  "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
MESH = AbstractMesh((1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def placed(tree):
  """Shapes with the shardings that training gives them."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(MESH, tree))


def batch(config, of_pairs: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the batches of one step."""
  rows, length = config.batch_size, config.length
  fields = {name: (rows, length) for name in ("tokens", "positions", "targets", "segments")}
  fields |= {"hidden": (rows, length, 1, 2)} | ({"answers": (rows, length)} if of_pairs else {})
  divided, whole = (NamedSharding(MESH, PartitionSpec(*axes)) for axes in ((None, ROWS), ()))
  out = {name: jax.ShapeDtypeStruct((config.accumulate, *shape), jnp.int32, sharding=divided)
         for name, shape in fields.items()}
  for name, shape in {"reference": (2 * rows, 2), "weight": (2 * rows,)}.items() if of_pairs else ():
    out[name] = jax.ShapeDtypeStruct((config.accumulate, *shape), jnp.float32, sharding=whole)
  return out


@pytest.mark.parametrize("stage", ["pasta", "baseline", "preference"])
def test_step_lowers_for_tpu_at_full_size(stage: str, tmp_path: Path):
  (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
  model_config = _config(tmp_path / "config.json")
  config = gemma_7b.get_config("baseline" if stage == "baseline" else "")
  c = config.preference if stage == "preference" else config.train

  def make():
    model = build.stack(Decoder(model_config, rngs=nnx.Rngs(0)))
    if stage != "baseline":
      lora.add_tags(model, jnp.zeros((6, model_config.d_model)))  # type: ignore[arg-type]
    return model

  graph, trainable, frozen = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
  n = sum(x.size for x in jax.tree.leaves(trainable))
  assert n == 8_537_680_896 + (stage != "baseline") * 6 * 3072  # "7B" is 8.5 with its embeddings
  optimiser, _ = make_optimiser(c, 100)
  state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, jax.eval_shape(optimiser.init, trainable))
  state = placed(state)
  kernel = state.trainable["layers"]["mlp"]["gate"]["kernel"].get_value()
  assert kernel.sharding.shard_shape(kernel.shape) == (28, 3072 // 8, 24_576)
  update = (preference.make_pair_update(graph, optimiser, c, default_beta(c.loss, c.samples)) if stage == "preference"
            else sft.make_update(graph, optimiser, c)[0])
  with jax.sharding.use_abstract_mesh(MESH):
    lowered = update.trace(state, placed(frozen), batch(c, stage == "preference")).lower(lowering_platforms=("tpu",))
  text = lowered.as_text()
  assert "256000" in text and ("sdy.sharding" in text or "mhlo.sharding" in text)


@pytest.mark.parametrize("make", [module.get_config for module in (
  gemma_7b, gemma3_270m, llama32_1b, qwen25_05b, tiny_config)])
def test_other_models_have_no_adapter_of_smollm2(make):
  """Adapters fit one model: what a config names is what its own commands leave; a flag changes what follows from it."""
  for arg in ("", "baseline"):
    config = make(arg)
    named = {config.model.adapter, *(s.adapter for s in config.systems.values())} - {""}
    assert named <= {f"runs/{make.__module__.rpartition('.')[2]}/{n}/adapter.safetensors"
                     for n in ("pasta", "baseline", "apar")}
  config = make()
  config.model.adapter = "mine.safetensors"
  assert config.systems.pasta.adapter == "mine.safetensors" != config.systems.baseline.adapter


def test_tiny_is_made_up_the_same_way_each_time():
  one, two = load_checkpoint(tiny_config.get_config().model.source), load_checkpoint("tiny")
  for name, value in one.params.items():
    np.testing.assert_array_equal(two.params[name], value)
  assert one.config.tag_ids == tuple(range(258, 264))
  text = "Any text, é🦜 <|end|><sync/>"
  assert one.tokenizer.decode(one.tokenizer.encode(text)) == text
  assert one.tokenizer.eos_id not in one.tokenizer.encode(text)


def test_stage_two_is_the_papers():
  config = gemma_7b.get_config()
  assert [p.name for p in policies(config)] == ["weight_1", "weight_2", "weight_4", "weight_8", "weight_inf"]
  assert (config.preference.rounds, config.preference.samples, config.preference.loss) == (2, 10, "bonbon")
  assert config.systems.pasta.adapter == config.model.adapter == "runs/gemma_7b/pasta/adapter.safetensors"
  assert config.preference.score == "theoretical" and config.preference.lora_rank == 0
  assert not config.preference.per_token
  with pytest.raises(ValueError, match="unknown argument 'apar'"):
    gemma_7b.get_config("apar")
