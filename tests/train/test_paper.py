"""The paper's configs: Gemma 7B is read as published, and both stages' steps lower for TPU at full size. And
the adapters that configs name."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from safetensors import safe_open

from configs import gemma3_270m, llama32_1b, qwen25_05b, smollm2_135m
from configs import tiny as tiny_config
from configs.paper import gemma_7b
from configs.paper.recipe import RECIPE
from pasta_jax.config import from_flags, with_changes
from pasta_jax.decode.generator import EMBEDDED, adapter_path
from pasta_jax.decode.precision import on_accelerators
from pasta_jax.lang import forms
from pasta_jax.model.sharding import AXES
from pasta_jax.preference.rounds import policies
from pasta_jax.train import ahead
from pasta_jax.train.preference import Preference
from pasta_jax.weights.adapter import read_metadata
from pasta_jax.weights.checkpoint import load_checkpoint

ARCHITECTURE = Path(gemma_7b.__file__).with_suffix(".json")  # google/gemma-7b's config.json
MESH = AbstractMesh((1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("stage", ["pasta", "baseline", "preference"])
def test_step_lowers_for_tpu_at_full_size(stage: str):
  """With the kernels, and without an array of the size of a mask."""
  flags = gemma_7b.get_config("baseline" if stage == "baseline" else "")
  flags.train.attention = flags.preference.attention = "tpu"
  config = on_accelerators(from_flags(flags))
  trainer = ahead.abstract_trainer(
    config, "preference" if stage == "preference" else "train", ahead.architecture(str(ARCHITECTURE))[0], MESH
  )
  arguments = trainer.abstract_arguments()
  trainable = arguments[0].trainable
  n = sum(x.size for x in jax.tree.leaves(trainable))
  assert n == 8_537_680_896 + (stage != "baseline") * 6 * 3072  # "7B" is 8.5 with its embeddings
  kernel = trainable["layers"]["mlp"]["gate"]["kernel"].get_value()
  assert kernel.sharding.shard_shape(kernel.shape) == (28, 3072 // 8, 24_576)
  with jax.sharding.use_abstract_mesh(MESH):
    text = trainer.update.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
  assert "256000" in text and ("sdy.sharding" in text or "mhlo.sharding" in text)
  length = (config.preference if stage == "preference" else config.train).length
  assert "tpu_custom_call" in text and f"{length}x{length}x" not in text


@pytest.mark.parametrize(
  "make", [module.get_config for module in (gemma_7b, gemma3_270m, llama32_1b, qwen25_05b, tiny_config)]
)
def test_other_models_have_no_adapter_of_smollm2(make):
  """An adapter fits one model: a config names adapters made for its model, or files that its own commands
  write; a flag changes the values that follow from it."""
  name = make.__module__.rpartition(".")[2]
  made = lambda folder: {f"runs/{folder}/{n}/adapter.safetensors" for n in ("pasta", "baseline", "apar")}
  named = lambda config: {config.model.adapter, *(s.adapter for s in config.systems.values())} - {""}
  by_paper = ("", "baseline") if make is gemma_7b.get_config else ("paper", "paper_baseline", "paper_apar")
  for arg in ("", "baseline"):
    allowed = made(f"{name}/paper") if arg in by_paper else made(name)
    assert named(make(arg)) <= allowed | {n for n in EMBEDDED if n.startswith(f"{name}_")}
  for arg in by_paper:
    assert named(make(arg)) == made(f"{name}/paper")
  config = make()
  config.model.adapter = "mine.safetensors"
  assert config.systems.pasta.adapter == "mine.safetensors" != config.systems.baseline.adapter


@pytest.mark.parametrize("adapter", EMBEDDED)
def test_released_adapters_are_of_their_models(adapter: str):
  """Shapes, and tags: all but Baseline-SFT have them."""
  found = read_metadata(adapter_path(adapter))
  rows, layers = json.loads(found["model"])["vocabulary"], json.loads(found["model"])["layers"]
  assert (rows, layers) == ((262_144, 18) if adapter.startswith("gemma3") else (49_152, 30))
  with safe_open(adapter_path(adapter), "flax") as file:
    assert ("embed.tags" in file.keys()) == ("baseline" not in adapter)


def test_tiny_is_made_up_the_same_way_each_time():
  one, two = load_checkpoint(tiny_config.get_config().model.source), load_checkpoint("tiny")
  for name, value in one.params.items():
    np.testing.assert_array_equal(two.params[name], value)
  assert one.config.tag_ids == tuple(range(258, 264))
  text = "Any text, é🦜 <|end|><sync/>"
  assert one.tokenizer.decode(one.tokenizer.encode(text)) == text
  assert one.tokenizer.eos_id not in one.tokenizer.encode(text)


def test_stage_two_is_the_papers():
  config = from_flags(gemma_7b.get_config())
  assert [p.name for p in policies(config)] == ["weight_1", "weight_2", "weight_4", "weight_8", "weight_inf"]
  assert (config.preference.rounds, config.preference.samples, config.preference.loss) == (2, 10, "bonbon")
  adapter = "runs/gemma_7b/paper/pasta/adapter.safetensors"
  assert config.systems["pasta"].adapter == config.model.adapter == adapter
  assert config.preference.score == "theoretical" and config.preference.lora_rank == 0
  assert not config.preference.per_token
  with pytest.raises(ValueError, match="unknown argument 'paper_sot'"):
    gemma_7b.get_config("sot")


@pytest.mark.parametrize("make", [m.get_config for m in (smollm2_135m, gemma3_270m, llama32_1b, qwen25_05b)])
def test_the_recipe_is_one_switch(make):
  """Every setting of it, for each model alike; the three adapters of SFT differ in their tags alone."""
  pasta, baseline, apar = (from_flags(make(a)) for a in ("paper", "paper_baseline", "paper_apar"))
  assert with_changes(pasta, RECIPE) == pasta != from_flags(make())
  assert with_changes(baseline, RECIPE) == baseline and with_changes(apar, RECIPE) == apar
  assert [c.train.annotation for c in (pasta, baseline, apar)] == ["plan", "none", "structure"]
  for c, system in ((pasta, "pasta"), (baseline, "baseline"), (apar, "apar")):
    assert c.model.adapter == c.systems[system].adapter and f"/paper/{system}/" in c.model.adapter
    assert c.systems["sequential"].adapter == pasta.model.adapter
    assert dataclasses.replace(c.train, annotation="plan") == pasta.train and c.preference == pasta.preference
  task = Preference(pasta.preference)
  assert 1 / task.beta == pytest.approx(25.46, abs=0.01) and not pasta.annotate.checks
  assert forms.to_metadata(forms.from_config(pasta)).keys() == {"positions"}  # the paper's form


def test_gemma_has_the_recipe_but_for_the_rows_of_its_mesh():
  config = from_flags(gemma_7b.get_config())
  assert with_changes(config, RECIPE | {"preference.batch_size": 8}) == config
