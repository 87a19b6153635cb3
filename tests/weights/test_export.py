"""Models for other engines: transformers and PEFT compute the same logits, and we decode the same answers;
and the vocabulary rows of the tags."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.folders import model_config, with_fields, write_model
from test_model import NESTED, logits, torch_logits

from pasta_jax.config import Config
from pasta_jax.data.heads import with_heads
from pasta_jax.decode.generator import Model, decode_settings
from pasta_jax.lang.forms import Forms, to_metadata
from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.syntax import TAG_TEXTS, TOKEN_TEXTS, length_texts, token_texts
from pasta_jax.lang.visibility import is_visible
from pasta_jax.model import lora
from pasta_jax.train.state import make_model
from pasta_jax.weights import build
from pasta_jax.weights.adapter import AdapterError, Merged, form_of, load_adapter, read_adapter, save_adapter
from pasta_jax.weights.arrays import WeightsError
from pasta_jax.weights.checkpoint import load_checkpoint
from pasta_jax.weights.export import export
from pasta_jax.weights.tokenizer import Tokenizer

RULE = PositionRule("pred_10x")
OWN = '{"repetition_penalty": 1.25}'  # settings of decoding that the adapter carries
UNUSED = [f"<unused{i}>" for i in (7, 11, 2, 3, 9, 8, 10, 30)]  # not in order, and not from 0
MANY = [f"<unused{i}>" for i in reversed(range(75))]
# Rows of the tags -> (changes of the model, reserved entries, the ids that the tags must take; () for
# additional rows).
PLACES = {
  "rows without a token": ({}, (), range(512, 518)),
  "new rows": (dict(vocab_size=512), (), ()),
  "new rows, untied head": (dict(vocab_size=515, tie_embeddings=False), (), ()),
  "reserved entries": (dict(vocab_size=512), UNUSED, (5, 6, 3, 8, 7, 9)),
  "reserved entries, untied head": (dict(vocab_size=515, tie_embeddings=False), UNUSED, (5, 6, 3, 8, 7, 9)),
}
# The same for lengths that are tokens: (changes, reserved entries, rows of the tags, of the lengths).
LENGTH_PLACES = {
  "rows without a token": (dict(vocab_size=600), (), range(512, 518), range(518, 582)),
  "rows for the tags only": ({}, (), range(512, 518), range(520, 584)),
  "new rows": (dict(vocab_size=512), (), range(512, 518), range(518, 582)),
  "new rows, untied head": (
    dict(vocab_size=515, tie_embeddings=False), (), range(515, 521), range(521, 585),
  ),
  "reserved for the tags only": (dict(vocab_size=512), UNUSED, (5, 6, 3, 8, 7, 9), range(512, 576)),
  "reserved entries": (
    dict(vocab_size=515, tie_embeddings=False), MANY, range(77, 71, -1), range(71, 7, -1),
  ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("place", PLACES)


def base(folder: Path, changes: dict, reserved: Sequence[str]) -> Path:
  """A model whose reserved entries are not control tokens."""
  write_model(folder, model_config(**changes), reserved)
  path = folder / "tokenizer.json"
  parts = json.loads(path.read_text())
  for entry in parts["added_tokens"]:
    entry["special"] &= entry["content"] not in reserved
  path.write_text(json.dumps(parts))
  return folder


def write_adapter(path: Path, source: Path, seed: int = 0, form: Forms = Forms()) -> Path:
  """Tag rows and updates that change the output."""
  checkpoint = load_checkpoint(source).speaking(form)
  model, rng = build.from_params(checkpoint.config, checkpoint.params), np.random.default_rng(seed)
  tags = len(checkpoint.vocabulary.tag_ids)
  rows = lambda: rng.normal(size=(tags, checkpoint.config.d_model)).astype("f")
  lora.add_tags(model, rows(), rows())
  lora.add_lora(model, 3, 6.0, nnx.Rngs(seed))
  for module in lora.linears(model).values():
    module.lora_b[...] = jnp.asarray(rng.normal(size=module.lora_b.shape) * 0.1, jnp.float32)
  save_adapter(
    path,
    model,
    {**to_metadata(form), "speeds": "[0, 1]", "decode": OWN},
  )
  return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """By place: (folder of the base, its adapter, folder of the two merged)."""
  found = {}

  def of(place: str) -> tuple[Path, Path, Path]:
    if place not in found:
      folder = tmp_path_factory.mktemp("made")
      source = base(folder / "base", *PLACES[place][:2])
      adapter = write_adapter(folder / "adapter.safetensors", source)
      export(folder / "merged", load_checkpoint(source), adapter, form="merged", dtype="float32")
      found[place] = source, adapter, folder / "merged"
    return found[place]

  return of


def program(vocabulary):
  """tokens, positions [1, T] and mask [1, T, T] of a program with nested chunks."""
  nodes = with_heads(NESTED) if vocabulary.promise == "head" else NESTED
  laid = layout(
    vocabulary.encode(nodes, RULE), RULE, vocabulary.table, vocabulary.tokenizer.encode("Question?")
  )
  at = np.arange(len(laid))
  mask = is_visible(at[:, None], at[None, :], laid.masked_intervals[None])
  return laid.tokens[None], laid.positions[None], jnp.asarray(mask[None])


def with_adapter(source: Path, adapter: Path):
  checkpoint = load_checkpoint(source).speaking(form_of(adapter))
  model = build.from_params(checkpoint.config, checkpoint.params)
  load_adapter(adapter, model)
  return checkpoint, model


@EVERY
def test_tags_take_reserved_entries_then_spare_rows_then_new_ones(place: str, made):
  source, _, merged = made(place)
  checkpoint, ids = load_checkpoint(source), tuple(PLACES[place][2])
  assert checkpoint.config.tag_ids == ids
  vocabulary = checkpoint.vocabulary
  assert vocabulary.tags.ids == (
    ids or tuple(range(checkpoint.config.vocab_size, checkpoint.config.vocab_size + 6))
  )
  assert [vocabulary.label(i) for i in vocabulary.tags.ids] == list(TAG_TEXTS)
  assert not set(vocabulary.tags.ids) & set(vocabulary.tags.eos)
  assert load_checkpoint(merged).vocabulary.tags == vocabulary.tags


@EVERY
def test_no_text_yields_a_tag(place: str, made):
  source, _, merged = made(place)
  text = "".join(TAG_TEXTS + TOKEN_TEXTS) + "".join(UNUSED) + "<|im_end|>"
  for folder in (source, merged):
    vocabulary = load_checkpoint(folder).vocabulary
    tokens = vocabulary.tokenizer.encode(text)
    chat = vocabulary.tokenizer.chat_prompt([{"role": "user", "content": text}])
    assert not set(tokens) & {*vocabulary.tags.ids, *vocabulary.tags.eos}
    assert not set(chat) & set(vocabulary.tags.ids)
    assert text == vocabulary.tokenizer.decode(tokens) and text in vocabulary.tokenizer.decode(chat)


@pytest.mark.parametrize("promise", ["head", "topic"])
@pytest.mark.parametrize("place", LENGTH_PLACES)
def test_lengths_take_rows_too_and_come_back(place: str, promise: str, tmp_path: Path):
  """Reserved entries, rows without a token, else new rows; in exported files each has its name."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  peft = pytest.importorskip("peft")
  changes, reserved, tags, lengths = LENGTH_PLACES[place]
  form = Forms(RULE, promise=promise, number="token")
  source = base(tmp_path / "base", changes, reserved)
  adapter = write_adapter(tmp_path / "adapter.safetensors", source, form=form)
  checkpoint, model = with_adapter(source, adapter)
  vocabulary = checkpoint.vocabulary
  assert vocabulary.tag_ids == checkpoint.config.tag_ids == (*tags, *lengths)
  assert vocabulary.table.lengths.tolist() == list(lengths)
  assert not set(vocabulary.tag_ids) & set(vocabulary.tags.eos)
  # No text becomes a length, which other forms leave what it was; nothing of it is lost.
  names = length_texts(promise)
  text = "".join(reserved) + "".join(names) + names[0][:-1] + "x"
  plain = load_checkpoint(source)
  assert plain.config.tag_ids == (() if tuple(tags)[0] >= plain.config.vocab_size else tuple(tags))
  if place == "reserved entries":
    assert plain.tokenizer.encode(reserved[0]) == [3] and checkpoint.tokenizer.encode(reserved[-7]) != [71]
  export(tmp_path / "merged", plain, adapter, form="merged", dtype="float32")
  merged = load_checkpoint(tmp_path / "merged")
  assert merged.form == form and merged.vocabulary.tag_ids == vocabulary.tag_ids
  for tokenizer in (checkpoint.tokenizer, merged.tokenizer):
    tokens = tokenizer.encode(text)
    chat = tokenizer.chat_prompt([{"role": "user", "content": text}])
    assert not {*tokens, *chat} & set(vocabulary.tag_ids) and tokenizer.decode(tokens) == text
  # Logits of the two engines, of the merged weights and of an adapter for PEFT.
  tokens, positions, mask = program(vocabulary)
  assert set(tokens[0].tolist()) & set(lengths)
  expected = logits(model, tokens, positions, mask)
  banned = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["bad_words_ids"]
  assert sorted(banned) == sorted([index] for index in vocabulary.tag_ids)
  both = logits(build.from_params(merged.config, merged.params), tokens, positions, mask)
  np.testing.assert_allclose(both, expected, atol=1e-4, rtol=1e-4)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
  np.testing.assert_allclose(
    torch_logits(theirs.eval(), tokens, positions, mask), expected, atol=1e-4, rtol=1e-4
  )
  written = theirs.generate(torch.tensor(tokens[:, :20]), max_new_tokens=20, do_sample=False, pad_token_id=0)
  assert not set(written[0, 20:].tolist()) & set(vocabulary.tag_ids)
  their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
  assert their_tokenizer.convert_tokens_to_ids(list(names)) == list(lengths)
  export(tmp_path / "peft", plain, adapter, form="peft", dtype="float32")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
  if max(vocabulary.tag_ids) >= theirs.config.vocab_size:
    theirs.resize_token_embeddings(max(vocabulary.tag_ids) + 1, mean_resizing=False)
  theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
  np.testing.assert_allclose(torch_logits(theirs, tokens, positions, mask), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_with_lengths_decodes_and_is_refused_where_its_rows_are_others(tmp_path: Path):
  form = Forms(RULE, "live", "head", "token")
  source = base(tmp_path / "base", dict(vocab_size=512), ())
  adapter = write_adapter(tmp_path / "adapter.safetensors", source, form=form)
  settings = with_fields(Config(), "decode", dtype="float32", max_new_tokens=60, promise_bias=6.0)
  ours = Model(with_fields(settings, "model", source=str(source), adapter=str(adapter)))
  assert ours.forms == form
  export(tmp_path / "merged", load_checkpoint(source), adapter, form="merged", dtype="float32")
  theirs = Model(with_fields(settings, "model", source=str(tmp_path / "merged"), adapter=""))
  one, other = (g.generate("What now?").trace for g in (ours, theirs))
  assert [t.tokens.tolist() for t in one.threads] == [t.tokens.tolist() for t in other.threads]
  assert len(one.threads) > 1
  with pytest.raises(AdapterError, match="has its tags in vocabulary rows 512"):
    read_adapter(adapter, load_checkpoint(source).config)


@EVERY
def test_transformers_gives_the_same_logits(place: str, made):
  transformers = pytest.importorskip("transformers")
  source, adapter, merged = made(place)
  checkpoint, model = with_adapter(source, adapter)
  tokens, positions, mask = program(checkpoint.vocabulary)
  assert set(checkpoint.vocabulary.tags.ids) <= set(tokens[0].tolist())
  theirs = transformers.AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager").eval()
  expected = logits(model, tokens, positions, mask)
  np.testing.assert_allclose(torch_logits(theirs, tokens, positions, mask), expected, atol=1e-4, rtol=1e-4)
  for module in lora.linears(model).values():
    module.lora_b[...] = jnp.zeros(module.lora_b.shape)
  assert np.abs(expected - logits(model, tokens, positions, mask)).max() > 0.1  # the updates matter
  tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
  assert tuple(tokenizer.convert_tokens_to_ids(list(TOKEN_TEXTS))) == checkpoint.vocabulary.tags.ids
  serialised = '1.<promise topic=" cost" tokens="40" /><async> Two.</async><sync/>'
  assert tokenizer.decode(tokenizer(serialised)["input_ids"], skip_special_tokens=True) == serialised
  assert set(checkpoint.vocabulary.tags.ids) <= set(tokenizer(serialised)["input_ids"])


@EVERY
def test_peft_gives_the_same_logits(place: str, made, tmp_path: Path):
  transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
  source, adapter, _ = made(place)
  checkpoint, model = with_adapter(source, adapter)
  tokens, positions, mask = program(checkpoint.vocabulary)
  said = export(tmp_path / "peft", checkpoint, adapter, form="peft", dtype="float32")
  described = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
  theirs = transformers.AutoModelForCausalLM.from_pretrained(described, attn_implementation="eager")
  rows = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "peft"))
  assert ("rows: call" in said) == (rows > theirs.config.vocab_size)
  if rows > theirs.config.vocab_size:
    assert f"resize_token_embeddings({rows})" in said
    theirs.resize_token_embeddings(rows, mean_resizing=False)
  theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
  np.testing.assert_allclose(
    torch_logits(theirs, tokens, positions, mask),
    logits(model, tokens, positions, mask),
    atol=1e-4,
    rtol=1e-4,
  )


@EVERY
def test_merged_weights_come_back_bit_for_bit(place: str, made):
  source, adapter, merged = made(place)
  checkpoint = load_checkpoint(source)
  params = Merged(checkpoint.config, checkpoint.params, read_adapter(adapter, checkpoint.config))
  config, back = params.config, load_checkpoint(merged)
  assert back.config == config and params.keys() == back.params.keys()
  for name, value in params.items():
    np.testing.assert_array_equal(back.params[name], value, err_msg=name)


@pytest.mark.parametrize("place", ["new rows", "reserved entries, untied head"])
def test_merged_weights_give_the_same_answers(place: str, made):
  source, adapter, merged = made(place)
  settings = with_fields(
    Config(), "decode", dtype="float32", max_new_tokens=60, max_branches=2, promise_bias=6.0
  )
  ours = Model(with_fields(settings, "model", source=str(source), adapter=str(adapter)))
  theirs = Model(with_fields(settings, "model", source=str(merged), adapter=""))
  assert theirs.forms == ours.forms == Forms(RULE) and theirs.speeds == (0, 1)
  assert theirs.sampling == ours.sampling and ours.sampling.repetition_penalty == 1.25
  stored = [
    decode_settings(with_fields(settings, "model", source=str(path)), name, parallel=True)
    for path, name in ((source, str(adapter)), (merged, ""))
  ]
  assert stored[0] == stored[1] and stored[0]["decode.repetition_penalty"] == 1.25
  one, other = (g.generate("What now?").trace for g in (ours, theirs))
  assert [t.tokens.tolist() for t in one.threads] == [t.tokens.tolist() for t in other.threads]
  assert len(one.threads) > 1  # it does write promises


def test_training_continues_from_the_tags_of_merged_weights(made):
  _, _, merged = made("new rows, untied head")
  checkpoint, config = load_checkpoint(merged), dataclasses.replace(Config().train, dtype="bfloat16")
  graph, trainable, frozen = make_model(checkpoint, checkpoint.vocabulary, config)
  model = nnx.merge(graph, trainable, frozen)
  ids = list(checkpoint.config.tag_ids)
  np.testing.assert_array_equal(model.embed.tags[...], checkpoint.params["embed.embedding"][ids])
  np.testing.assert_array_equal(model.head_tags[...], checkpoint.params["head.kernel"][:, ids])


def test_bfloat16_halves_the_file(made, tmp_path: Path):
  source, adapter, merged = made("rows without a token")
  export(tmp_path / "half", load_checkpoint(source), adapter, form="merged", dtype="bfloat16")
  size = lambda folder: (folder / "model.safetensors").stat().st_size
  assert size(tmp_path / "half") < 0.6 * size(merged)
  assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
  half, whole = load_checkpoint(tmp_path / "half"), load_checkpoint(merged)
  for name, value in whole.params.items():
    np.testing.assert_array_equal(half.params[name], value.astype(jnp.bfloat16).astype("f"), err_msg=name)


def test_a_base_model_without_an_adapter_stays_one(made, tmp_path: Path):
  source, _, _ = made("reserved entries")
  export(tmp_path / "again", load_checkpoint(source), None, form="merged", dtype="float32")
  again, before = load_checkpoint(tmp_path / "again"), load_checkpoint(source)
  assert again.config == before.config and not again.pasta and not again.tokenizer.knows_tags
  assert again.tokenizer.encode("Just a text.") == before.tokenizer.encode("Just a text.")


def test_an_adapter_with_tags_in_other_rows_is_refused(made, tmp_path: Path):
  source, _, _ = made("new rows")
  other = write_adapter(tmp_path / "other.safetensors", source)
  checkpoint = load_checkpoint(made("reserved entries")[0])
  model = build.from_params(checkpoint.config, checkpoint.params)
  with pytest.raises(AdapterError, match="additional vocabulary rows, this model in vocabulary rows 5, 6, 3"):
    load_adapter(other, model)
  assert model.embed.tags is None


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(made, tmp_path: Path):
  source, adapter, merged = made("new rows")
  checkpoint = load_checkpoint(source)
  given = dict(form="merged", dtype="float32")
  for changes, its_adapter, message in (
    (dict(form="gguf"), adapter, "export.form is merged or peft"),
    (dict(dtype="int8"), adapter, "export.dtype float32 or bfloat16"),
    (dict(form="peft"), None, "needs an adapter"),
  ):
    with pytest.raises(ValueError, match=message):
      export(tmp_path / "out", checkpoint, its_adapter, **given | changes)
  before = {path: path.stat().st_mtime_ns for path in merged.iterdir()}
  assert "was written before" in export(merged, checkpoint, adapter, **given)  # after a kill at the very end
  for changes, its_adapter in ((dict(dtype="bfloat16"), adapter), ({}, None)):
    with pytest.raises(ValueError, match="already exists"):
      export(merged, checkpoint, its_adapter, **given | changes)
  assert before == {path: path.stat().st_mtime_ns for path in merged.iterdir()}
  with pytest.raises(AdapterError, match="made for another model"):
    export(tmp_path / "out", load_checkpoint(made("rows without a token")[0]), adapter, **given)
  assert not list(tmp_path.iterdir())


def test_damaged_descriptions_of_pasta_are_named(made, tmp_path: Path):
  _, _, merged = made("new rows")
  described = json.loads((merged / "config.json").read_text())
  copy = tmp_path / "copy"
  copy.mkdir()
  for path in merged.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  (copy / "config.json").write_text(json.dumps(described | {"pasta": [1]}))
  with pytest.raises(WeightsError, match="config.json: pasta is not the metadata"):
    load_checkpoint(copy)
  (copy / "config.json").write_text(json.dumps(described))
  (copy / "tokenizer.json").write_bytes((made("new rows")[0] / "tokenizer.json").read_bytes())
  with pytest.raises(WeightsError, match="which the tokenizer in the same folder does not have"):
    load_checkpoint(copy)


@pytest.mark.parametrize("name", ["<|reserved_special_token_{}|>", "[control_{}]", "[PAD{}]", "<unused{}>"])
def test_gguf_vocabularies_have_reserved_entries_too(name: str):
  tokens = [*(chr(i) for i in range(33, 127)), *(name.format(i) for i in range(8)), "</s>"]
  made = Tokenizer.from_gguf_fields(tokens, [1] * 94 + [5] * 8 + [3], 102, merges=[], pre="smollm")
  assert made.tag_ids == tuple(range(94, 100)) and set(made.tag_ids) <= made.special_ids
  assert not set(made.encode(name.format(3))) & set(made.tag_ids)


def test_smollm2s_vocabulary_takes_the_tags(smollm2_checkpoint, tmp_path: Path):
  """It has an ordinary token `"/>`, which must stay one."""
  transformers = pytest.importorskip("transformers")
  ids, ours = smollm2_checkpoint.vocabulary.tags.ids, smollm2_checkpoint.tokenizer
  ours.save(tmp_path, token_texts(ids, "topic"))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert len(theirs) == ids[-1] + 1 and tuple(theirs.convert_tokens_to_ids(list(TOKEN_TEXTS))) == ids
  back = Tokenizer.from_folder(tmp_path)
  assert back.tag_ids == ids and back.knows_tags and not ours.tag_ids
  for text in ('<a href="x"/>', "".join(TAG_TEXTS), "Two words.\n"):
    assert back.encode(text) == ours.encode(text)
  assert len(ours.encode('"/>')) == 1
