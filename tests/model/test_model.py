"""The model against independent implementations (transformers, NumPy), and its forms against each other."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.programs import NESTED
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.visibility import is_visible
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.model import lora
from pasta_jax.model.attention import MASK_VALUE, causal_mask, dense_attention, sliding_window_mask
from pasta_jax.model.config import ModelConfig
from pasta_jax.model.products import matmul
from pasta_jax.model.transformer import LoraParam, TagParam, Transformer, stack, unstack
from pasta_jax.weights import build
from pasta_jax.weights.adapter import AdapterError, load_adapter, save_adapter
from pasta_jax.weights.arrays import param_shapes

# All widths differ, so that a transposed or swapped matrix cannot pass; three layers show their order.
TIED = ModelConfig(
  vocab_size=262, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, d_ff=40,
  rope_theta=50_000.0, norm_eps=1e-5, tie_embeddings=True, max_position=512,
)  # fmt: skip
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)
BOTH = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


def random_params(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Weights large enough that attention is far from uniform; norm scales that are not one."""
  rng = np.random.default_rng(seed)
  params = {}
  for name, shape in param_shapes(config).items():
    noise = rng.normal(size=shape).astype(np.float32)
    params[name] = 1 + 0.2 * noise if name.endswith("scale") else noise * 2 * config.d_model**-0.5
  return params


def random_tokens(rows: int, length: int, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, TIED.vocab_size, (rows, length))


@partial(jax.jit, static_argnames=("remat", "block"))
def _logits(model: Transformer, tokens, positions, mask, remat: str, block: int):
  attend = dense_attention(
    mask,
    model.dtype,
    block,
    window_mask=sliding_window_mask(positions, positions, model.config.window),
    softcap=model.config.attention_softcap,
  )
  hidden, _ = model(tokens, positions, attend, remat=remat)
  return model.logits(hidden)


def logits(
  model: Transformer, tokens, positions=None, mask=None, *, remat: str = "none", block: int = 128
) -> np.ndarray:
  """[B, T, V]; `positions` and `mask` default to those of plain text."""
  rows, length = np.shape(tokens)
  positions = np.broadcast_to(np.arange(length), (rows, length)) if positions is None else positions
  mask = jnp.broadcast_to(causal_mask(length), (rows, length, length)) if mask is None else mask
  return np.asarray(_logits(model, jnp.asarray(tokens), jnp.asarray(positions), mask, remat, block))


# --- against transformers ---


def torch_llama(config: ModelConfig, params: dict[str, np.ndarray]):
  """transformers' model with our weights, in float32."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.LlamaConfig(
    vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
    num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
    num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
    tie_word_embeddings=config.tie_embeddings, max_position_embeddings=config.max_position,
    rope_theta=config.rope_theta,
    rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},  # where transformers is >= 5
    bos_token_id=None, eos_token_id=None, pad_token_id=0, attn_implementation="eager",
  )  # fmt: skip
  words = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "attn": "self_attn",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
  }
  words |= {name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
  state = {}
  for name, value in params.items():
    *path, kind = name.split(".")
    value = np.ascontiguousarray(value.T if kind == "kernel" else value)
    state[".".join(words.get(part, part) for part in path) + ".weight"] = torch.from_numpy(value)
  with torch.device("meta"):  # no second copy of random weights
    model = transformers.LlamaForCausalLM(theirs)
  model.to_empty(device="cpu")
  model.model.rotary_emb = type(model.model.rotary_emb)(theirs)  # its table is not a weight: compute it again
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}
  model.tie_weights()
  return model.eval()


def torch_logits(model, tokens, positions=None, mask=None) -> np.ndarray:
  import torch

  more = {}
  if positions is not None:
    more["position_ids"] = torch.from_numpy(np.asarray(positions, np.int64))
  if mask is not None:  # additive, [B, 1, T, T]
    low = torch.finfo(torch.float32).min
    more["attention_mask"] = torch.where(torch.from_numpy(np.array(mask))[:, None], 0.0, low)
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False, **more).logits.numpy()


class Letters:
  """A byte tokenizer: 0 ends a turn, 1 to 256 are the bytes."""

  vocab_size, eos_id, special_ids = 257, 0, frozenset({0})

  def encode(self, text: str) -> list[int]:
    return [b + 1 for b in text.encode()]

  def token_bytes(self, token: int) -> bytes:
    return bytes([token - 1]) if token else b""

  def digit_values(self) -> dict[int, tuple[int, int]]:
    return {b + 1: (b - 48, 10) for b in range(48, 58)}


def nested_layout():
  """tokens [1, T], positions [1, T], mask [1, T, T] of a program with nested and open chunks."""
  vocabulary, rule = Vocabulary(Letters()), PositionRule("pred_10x")
  laid = layout(vocabulary.encode(NESTED, rule), rule, vocabulary.table, Letters().encode("Question?"))
  at = np.arange(len(laid))
  mask = is_visible(at[:, None], at[None, :], laid.masked_intervals[None])
  return laid.tokens[None], laid.positions[None], jnp.asarray(mask[None])


@BOTH
def test_logits_equal_those_of_transformers(config: ModelConfig):
  params, tokens = random_params(config), random_tokens(2, 70)
  expected = torch_logits(torch_llama(config, params), tokens)
  actual = logits(build.from_params(config, params), tokens)
  np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
  assert expected.std() > 0.5  # the comparison is not one of zeros


@BOTH
def test_logits_under_pastas_mask_and_positions(config: ModelConfig):
  config = dataclasses.replace(config, vocab_size=Vocabulary(Letters()).size)
  params = random_params(config)
  tokens, positions, mask = nested_layout()
  causal = np.asarray(causal_mask(tokens.shape[1]))
  assert (np.asarray(mask) & ~causal).sum() == 0 and (causal & ~np.asarray(mask)).sum() > 500
  assert (positions[0] != np.arange(tokens.shape[1])).any()
  theirs, ours = torch_llama(config, params), build.from_params(config, params)
  expected = torch_logits(theirs, tokens, positions, mask)
  actual = logits(ours, tokens, positions, mask, block=48)
  np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
  assert np.abs(actual - logits(ours, tokens, positions)).max() > 0.1  # the mask matters
  assert np.abs(actual - logits(ours, tokens, None, mask)).max() > 0.1  # so do the positions


def test_smollm2_equals_transformers(smollm2_checkpoint):
  """Logits, and twenty greedy tokens: by induction, each is our first choice after the previous ones."""
  config, tokenizer = smollm2_checkpoint.config, smollm2_checkpoint.tokenizer
  prompt = tokenizer.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
  theirs = torch_llama(config, smollm2_checkpoint.params)
  import torch

  written = theirs.generate(
    torch.tensor([prompt]),
    attention_mask=torch.ones(1, len(prompt)),
    do_sample=False,
    max_new_tokens=20,
    min_new_tokens=20,
  ).numpy()
  assert written.shape == (1, len(prompt) + 20)
  ours = stack(build.from_params(config, smollm2_checkpoint.params))
  actual, expected = logits(ours, written), torch_logits(theirs, written)
  np.testing.assert_allclose(actual, expected, atol=2e-3, rtol=1e-3)
  np.testing.assert_array_equal(actual[0, len(prompt) - 1 : -1].argmax(-1), written[0, len(prompt) :])
  assert "Paris" in tokenizer.decode(written[0, len(prompt) :])


# --- forms of the model ---


def trained_form(config: ModelConfig, *, rank: int = 4, annotated: bool = True) -> Transformer:
  """Unstacked, with tag rows and updates that change the output."""
  model = build.from_params(config, random_params(config))
  rng = np.random.default_rng(7)
  if annotated:
    lora.add_tags(model, rng.normal(size=(6, config.d_model)).astype(np.float32))
    if model.head_tags is not None:
      model.head_tags[...] = jnp.asarray(rng.normal(size=(config.d_model, 6)), jnp.float32)
  lora.add_lora(model, rank, 2.0 * rank, nnx.Rngs(3))
  for module in lora.linears(model).values():
    module.lora_b[...] = jnp.asarray(rng.normal(size=module.lora_b.shape) * 0.1, jnp.float32)
  return model


def decoding_form(model: Transformer) -> Transformer:
  """The decoding form of a model in memory, made from its weights and its adapter."""
  return build.for_decoding(
    model.config, build.to_params(model, updates=False), lora.adapter_of(model), jnp.float32
  )


@BOTH
def test_stacked_layers_and_remat_change_nothing(config: ModelConfig):
  model, tokens = trained_form(config), random_tokens(2, 40)
  expected = logits(model, tokens)
  stacked = stack(model)
  assert not isinstance(stacked.layers, nnx.List) and stacked.layers.attn.q.kernel.shape[0] == 3
  assert isinstance(model.layers, nnx.List)
  for form in (stacked, unstack(stacked)):
    np.testing.assert_allclose(logits(form, tokens), expected, atol=1e-5)
    np.testing.assert_allclose(logits(form, tokens, remat="full"), expected, atol=1e-5)
  again = nnx.state(unstack(stacked))
  jax.tree.map(np.testing.assert_array_equal, again, nnx.state(model))


def test_remat_gives_the_same_gradients():
  graph, state = nnx.split(stack(trained_form(TIED)))
  tokens, positions = jnp.asarray(random_tokens(1, 20)), jnp.arange(20)[None]

  def loss(state, remat):
    hidden, _ = nnx.merge(graph, state)(tokens, positions, dense_attention(causal_mask(20)), remat=remat)
    return jnp.square(hidden).sum()

  plain, again = (jax.jit(jax.grad(partial(loss, remat=r)))(state) for r in ("none", "full"))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, again)


def test_caches_and_collected_have_the_form_of_the_layers():
  """The model passes each layer its own cache, and returns what `attend` collects in the same order."""
  model = build.from_params(TIED, random_params(TIED))

  def attend(cache, q, k, v, local):
    del k, v
    return q, cache + 1

  arguments = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # one token, no leading axis
  _, listed = model(*arguments, attend, [jnp.float32(10 * i) for i in range(3)])
  _, scanned = stack(model)(*arguments, attend, jnp.arange(3.0) * 10)
  assert [float(x) for x in listed] == [1, 11, 21]
  np.testing.assert_array_equal(scanned, [1, 11, 21])


def test_bfloat16_is_close_to_float32():
  params, tokens = random_params(UNTIED), random_tokens(2, 48)
  exact = logits(build.from_params(UNTIED, params), tokens)
  model = build.from_params(UNTIED, params, jnp.bfloat16)
  assert model.dtype == jnp.bfloat16 and model.final_norm.scale.dtype == jnp.float32
  rough = logits(model, tokens)
  assert rough.dtype == np.float32
  error = np.abs(rough - exact).mean() / exact.std()
  assert 1e-5 < error < 0.03


@BOTH
@pytest.mark.parametrize("annotated", [True, False], ids=["pasta", "baseline"])
def test_decoding_form_gives_the_training_forms_logits(config: ModelConfig, annotated: bool):
  model = trained_form(config, annotated=annotated)
  before = jax.tree.map(np.asarray, nnx.state(model))
  size = config.vocab_size + 6 * annotated
  tokens = np.random.default_rng(2).integers(0, size, (2, 40))
  tokens[:, -6:] = size - 6 + np.arange(6)
  expected = logits(model, tokens)
  assert expected.shape[-1] == size
  for form in (model, stack(model)):
    decoding = decoding_form(form)
    assert decoding.config.vocab_size == size and decoding.head is not None and decoding.embed.tags is None
    assert decoding.head_tags is None and all(m.lora_a is None for m in lora.linears(decoding).values())
    np.testing.assert_allclose(logits(decoding, tokens), expected, atol=1e-4, rtol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_new_updates_have_no_effect():
  model, tokens = build.from_params(TIED, random_params(TIED)), random_tokens(1, 16)
  expected = logits(model, tokens)
  lora.add_lora(model, 4, 8.0, nnx.Rngs(0))
  lora.add_tags(model, np.ones((6, 24), np.float32))
  np.testing.assert_array_equal(logits(model, tokens)[..., :-6], expected)


# --- parts ---


def naive_attention(q, k, v, mask):
  """Softmax over everything in float64; q [B, T, K, G, H]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.where(mask[:, None, None], np.einsum("btkgh,bskh->bkgts", q, k), -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return np.einsum("bkgts,bskh->btkgh", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("length", "small"), [(1, 4), (4, 4), (13, 4), (131, 44)])
def test_attention_in_blocks_equals_softmax(length: int, small: int):
  rng = np.random.default_rng(length)
  q = rng.normal(size=(2, length, 2, 3, 8)).astype("f") * 2
  k, v = (rng.normal(size=(2, length, 2, 8)).astype("f") for _ in range(2))
  mask = np.tril(rng.random((2, length, length)) < 0.4) | np.eye(length, dtype=bool)
  expected = naive_attention(q, k, v, mask)
  for block in (small, 128):
    actual, (keys, values) = jax.jit(dense_attention(jnp.asarray(mask), block=block))(None, q, k, v)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    np.testing.assert_array_equal(keys, k)
    np.testing.assert_array_equal(values, v)


def test_attention_with_large_scores_and_empty_rows_stays_finite():
  rng = np.random.default_rng(0)
  q, k = rng.normal(size=(1, 6, 1, 1, 8)).astype("f") * 300, rng.normal(size=(1, 6, 1, 8)).astype("f")
  mask = np.tril(np.ones((1, 6, 6), bool))
  mask[0, 3] = False
  loss = lambda q: jnp.square(dense_attention(jnp.asarray(mask), block=4)(None, q, k, k)[0])
  assert np.isfinite(loss(q)).all() and np.isfinite(jax.grad(lambda q: loss(q).sum())(q)).all()
  seen = [0, 1, 2, 4, 5]
  expected = np.square(naive_attention(q, k, k, mask | np.eye(6, dtype=bool)))  # its row 3 is meaningless
  np.testing.assert_allclose(loss(q)[:, seen], expected[:, seen], rtol=1e-4)
  assert np.finfo(np.float32).min < MASK_VALUE


def test_attention_refuses_masks_that_are_not_boolean():
  with pytest.raises(TypeError, match="boolean"):
    dense_attention(jnp.ones((1, 4, 4)))


@pytest.mark.parametrize(
  ("x", "y"), [((5, 3), (3, 4)), ((2, 5, 3), (3, 4)), ((3,), (3, 4)), ((2, 3, 5, 3), (2, 3, 3, 4))]
)
def test_gradient_of_matmul_is_jaxs_own(x: tuple, y: tuple):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=x).astype("f"), rng.normal(size=y).astype("f")
  weight = rng.normal(size=jnp.matmul(a, b).shape).astype("f")
  ours, theirs = (
    jax.value_and_grad(lambda a, b, f=f: (f(a, b) * weight).sum(), (0, 1))(a, b) for f in (matmul, jnp.matmul)
  )
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs)
  low = jax.grad(lambda a, b: matmul(a, b).sum(), (0, 1))(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
  assert [g.dtype for g in low] == [jnp.bfloat16] * 2


def test_gradient_of_matmul_under_vmap():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(7, 3)).astype("f"), rng.normal(size=(3, 4)).astype("f")
  ours, theirs = (
    jax.grad(lambda b, f=f: jnp.square(jax.vmap(f, (0, None))(a, b)).sum())(b) for f in (matmul, jnp.matmul)
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# --- parameters that do not fit ---


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"layers.1.attn.k.kernel": None}, "layers.1.attn.k.kernel is missing"),
    ({"final_norm.scale": None}, "final_norm.scale is missing"),
    ({"head.kernel": np.zeros((24, 262))}, "unexpected parameter head.kernel"),
    ({"layers.3.attn.q.kernel": np.zeros((24, 48))}, "unexpected parameter layers.3.attn.q.kernel"),
    ({"layers.0.mlp.up.kernel": np.zeros((40, 24))}, r"up.kernel has shape \(40, 24\), .* needs \(24, 40\)"),
  ],
)
def test_parameters_that_do_not_fit_are_named(changes: dict, message: str):
  params = {k: v for k, v in (random_params(TIED) | changes).items() if v is not None}
  with pytest.raises(ValueError, match=message) as caught:
    build.from_params(TIED, params)
  assert "\n" not in str(caught.value)


# --- adapters ---


@pytest.mark.parametrize(("config", "stacked"), [(TIED, True), (UNTIED, False)], ids=["tied", "untied"])
def test_adapter_is_read_back_equal_in_bfloat16(config: ModelConfig, stacked: bool, tmp_path: Path):
  model = trained_form(config)
  path = tmp_path / "adapter.safetensors"
  save_adapter(path, stack(model) if stacked else model, {"note": "é"})
  assert [p.name for p in tmp_path.iterdir()] == [path.name]

  loaded = build.from_params(config, random_params(config))
  assert load_adapter(path, loaded)["note"] == "é"
  expected = jax.tree.map(np.asarray, nnx.state(model, nnx.Any(LoraParam, TagParam)))
  actual = nnx.state(loaded, nnx.Any(LoraParam, TagParam))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(actual))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), expected)
  jax.tree.map(np.testing.assert_array_equal, actual, rounded)
  assert loaded.layers[0].attn.q.lora_scale == 2.0
  tokens = random_tokens(1, 32)
  first, second = logits(model, tokens), logits(loaded, tokens)
  assert 0 < np.abs(first - second).mean() < 0.02 * first.std()


def rewrite(path: Path, header: dict | None = None, **changes: np.ndarray | None):
  """Replaces tensors or header entries of an adapter's file; None removes one."""
  with safe_open(path, "np") as file:
    metadata = {k: v for k, v in (file.metadata() | (header or {})).items() if v is not None}
  tensors = {k: v for k, v in (load_file(path) | changes).items() if v is not None}
  save_file(tensors, path, metadata)


BREAKAGES = {
  "no adapter file at": lambda p: p.unlink(),
  "not a readable safetensors file": lambda p: p.write_bytes(p.read_bytes()[:-5]),
  "is not a readable safetensors file": lambda p: p.write_bytes(b"hello"),
  "is not a pasta-jax adapter": lambda p: rewrite(p, {"format": "pasta-jax-adapter-0"}),
  "not a pasta-jax adapter .format None": lambda p: save_file({"x": np.ones(3)}, p),
  "header has no model": lambda p: rewrite(p, {"model": None}),
  "the header has no model or": lambda p: rewrite(p, {"model": "{"}),
  "no scale": lambda p: rewrite(p, {"scale": "large"}),
  "made for another model: d_ff is 41, not 40": lambda p: rewrite(
    p, {"model": '{"layers": 3, "d_model": 24, "d_ff": 41}'}
  ),
  "only one factor of layers.1.attn.v": lambda p: rewrite(p, **{"layers.1.attn.v.lora_b": None}),
  "only one factor of layers.2.mlp.up": lambda p: rewrite(p, **{"layers.2.mlp.up.lora_a": None}),
  "factors of layers.0.attn.q have": lambda p: rewrite(
    p, **{"layers.0.attn.q.lora_a": np.ones((4, 24), "f")}
  ),
  "factors of layers.0.attn.k have": lambda p: rewrite(p, **{"layers.0.attn.k.lora_a": np.ones(24, "f")}),
  "layers.3.attn.q.lora_a, which this model": lambda p: rewrite(
    p, **{"layers.3.attn.q.lora_a": np.ones((24, 4), "f"), "layers.3.attn.q.lora_b": np.ones((4, 48), "f")}
  ),
  "embed.tags has shape .6, 23.": lambda p: rewrite(p, **{"embed.tags": np.ones((6, 23), "f")}),
  "embed.tags and head.tags": lambda p: rewrite(p, **{"head.tags": None}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
  """The file of an adapter of the untied model."""
  path = tmp_path_factory.mktemp("saved") / "adapter.safetensors"
  save_adapter(path, trained_form(UNTIED), {})
  return path.read_bytes()


@pytest.mark.parametrize("message", BREAKAGES)
def test_adapter_that_does_not_fit_is_refused(message: str, saved: bytes, tmp_path: Path):
  path = tmp_path / "adapter.safetensors"
  path.write_bytes(saved)
  BREAKAGES[message](path)
  model = build.from_params(UNTIED, random_params(UNTIED))
  with pytest.raises(AdapterError, match=message) as caught:
    load_adapter(path, model)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
  assert model.embed.tags is None and all(m.lora_a is None for m in lora.linears(model).values())


def test_adapter_of_an_untied_model_does_not_fit_a_tied_one(saved: bytes, tmp_path: Path):
  path = tmp_path / "adapter.safetensors"
  path.write_bytes(saved)
  with pytest.raises(AdapterError, match="head.tags, which this model does not have"):
    load_adapter(path, build.from_params(TIED, random_params(TIED)))


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_failing_save_leaves_the_old_adapter(error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  path = tmp_path / "adapter.safetensors"
  save_adapter(path, trained_form(TIED), {})
  before = path.read_bytes()

  def fail(_arrays, file, _header):
    Path(file).write_bytes(b"half")
    raise error("disk full")

  monkeypatch.setattr("pasta_jax.weights.model_files.save_file", fail)
  with pytest.raises(OSError, match="disk full"):
    save_adapter(path, trained_form(TIED), {})
  assert path.read_bytes() == before
