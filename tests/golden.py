"""Golden dumps of decoding, training, packing and layout: made once, compared with after a change.

  python tests/golden.py make OUT_FOLDER [--prompts FILE] [--only tiny,layout,train,smollm2,gemma]
  python tests/golden.py compare OUT_FOLDER [--prompts FILE] [--only ...] [--quick]

Run it in the root of the code that is to be dumped or compared: that code is imported. `make` needs the
prompts (JSON lines with "prompt") for `smollm2` and `gemma`; the dumps keep token ids only, which `compare`
reads (with --prompts it encodes them anew, and compares that too). With --quick real models answer two
prompts only, one at a time. Compiled programs are kept in the project's cache folder.

A violation, and exit code 1: tokens, positions, rounds, finish reasons, threads or packed arrays that differ
(unless the first token that differs is shown to be a tie), log p that differ by more than 1e-5, losses and
gradients by more than 1e-6 of their size. Pool entries and step numbers are counted where they differ, in the
column `schedule`; they are no violation.
"""

import argparse
import base64
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, os.getcwd())

import jax  # noqa: E402
import numpy as np  # noqa: E402

# --- All that is of the project, to be ported when its names change; the rest knows these functions only. ---
from flax import nnx  # noqa: E402

import pasta_jax  # noqa: E402
from configs import gemma3_270m, smollm2_135m  # noqa: E402
from pasta_jax.config import from_flags, with_changes  # noqa: E402
from pasta_jax.config.sections import Preference  # noqa: E402
from pasta_jax.data.examples import examples  # noqa: E402
from pasta_jax.data.packing import PackedBatches  # noqa: E402
from pasta_jax.data.pairs import PairBatches, PreferencePair  # noqa: E402
from pasta_jax.decode.generator import Model  # noqa: E402
from pasta_jax.decode.interpreter import Interpreter  # noqa: E402
from pasta_jax.decode.scheduler import Scheduler, decode  # noqa: E402
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures  # noqa: E402
from pasta_jax.lang.layout import layout  # noqa: E402
from pasta_jax.lang.positions import PositionRule  # noqa: E402
from pasta_jax.lang.program import Promise, Sync, Text  # noqa: E402
from pasta_jax.lang.thread import Fork, Thread  # noqa: E402
from pasta_jax.lang.vocabulary import Vocabulary  # noqa: E402
from pasta_jax.model.config import ModelConfig  # noqa: E402
from pasta_jax.model.lora import Adapter, adapter_of  # noqa: E402
from pasta_jax.model.transformer import set_matmul_precision  # noqa: E402
from pasta_jax.train.losses import preference_loss, sft_loss  # noqa: E402
from pasta_jax.train.state import compute_model, make_model, split  # noqa: E402
from pasta_jax.utils.environment import cache_folder, use_compilation_cache  # noqa: E402
from pasta_jax.utils.jsonl import read_jsonl  # noqa: E402
from pasta_jax.weights import build  # noqa: E402
from pasta_jax.weights.adapter import write_adapter  # noqa: E402
from pasta_jax.weights.arrays import param_shapes  # noqa: E402
from pasta_jax.weights.checkpoint import load_checkpoint  # noqa: E402

WHERE = Path(pasta_jax.__file__).parent
SEED_DATA = Path("data/seed.jsonl")
TINY_CONFIG = ModelConfig(
  vocab_size=32, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, tie_embeddings=False
)
THREAD_FIELDS = (
  "number",
  "path",
  "parent",
  "topic",
  "declared",
  "fork_index",
  "finished",
  "tokens",
  "positions",
  "rounds",
  "entries",
  "steps",
  "log_p",
)
LAYOUT_FIELDS = ("tokens", "positions", "masked_intervals", "targets", "threads", "index")
# Names in the dumps that the code has changed since.
NAMES_IN_DUMPS = {"masked_intervals": "hidden", "segment_ids": "segments", "ref_logp_drop": "lost"}


def tiny_shapes() -> dict:
  """Name -> shape of the tiny model's parameters ("layers.0.attn.q.kernel", [in, out])."""
  return param_shapes(TINY_CONFIG)


@functools.cache
def tiny_vocabulary() -> Vocabulary:
  """24 words, two rows without a token, six tags: 26 to 31."""
  return Vocabulary(TinyTokenizer(), base_size=26)


def _tiny_model(params, **how):
  return build.from_params(TINY_CONFIG, params, **how)


@functools.cache
def _tiny_interpreter(static: str, capture: bool) -> Interpreter:
  s = json.loads(static)
  limits = {k: tuple(v) if isinstance(v, list) else v for k, v in s["limits"].items()}
  limits["branch_widths"], limits["kv_buckets"] = limits.pop("widths"), limits.pop("buckets")
  features = StepFeatures(
    rule=PositionRule(s["strategy"], 7),
    guard=s["guard"],
    promises=s["promises"],
    no_repeat=s["no_repeat"],
    return_logits=capture,
  )
  return Interpreter(_tiny_model(tiny_weights(0, "habits")), tiny_vocabulary(), Limits(**limits), features)


def make_tiny_interpreter(static: dict, params: dict, capture: bool = False) -> Interpreter:
  """An interpreter of `static` settings around a tiny model with these parameters; one a setting is kept."""
  interpreter = _tiny_interpreter(json.dumps(static), capture)
  interpreter.params = nnx.split(_tiny_model(params))[1]
  return interpreter


@functools.cache
def load_generator(name: str) -> Model:
  """A real model with the adapter that the dumps were made with, float32, 160 new tokens."""
  config = from_flags({"smollm2": smollm2_135m, "gemma": gemma3_270m}[name].get_config())
  if name == "smollm2":
    config = with_changes(config, {"model.adapter": "pasta_paper"})
  return Model(with_changes(config, {"decode.dtype": "float32", "decode.max_new_tokens": 160}))


def make_real_interpreter(name: str, capture: bool = False) -> Interpreter:
  found = load_generator(name).interpreter(True)
  features = dataclasses.replace(found.features, return_logits=True)
  return Interpreter(found.model, found.vocabulary, found.limits, features) if capture else found


def real_numbers(name: str) -> dict:
  """The numbers of sampling that the model's config asks for."""
  return dataclasses.asdict(load_generator(name).sampling)


def real_encode(name: str, prompt: str) -> list[int]:
  return load_generator(name).encode(prompt)


def _record(trace) -> dict:
  array = lambda x: x if isinstance(x, np.ndarray) else list(x) if isinstance(x, tuple) else x
  return {
    "finish_reason": trace.finish_reason,
    "steps": int(trace.steps),
    "refused": int(trace.refused),
    "ill_formed": int(trace.ill_formed),
    "text": hashlib.sha256(trace.text.encode()).hexdigest(),
    "threads": [{f: array(getattr(t, f)) for f in THREAD_FIELDS} for t in trace.threads],
  }


def run_one(interpreter: Interpreter, prompt, numbers: dict) -> tuple[dict, np.ndarray | None]:
  """(the response, [entries, V] logits where captured)."""
  trace = decode(interpreter, prompt, SamplingConfig(**numbers))
  return _record(trace), trace.logits


def run_batch(interpreter: Interpreter, prompts, numbers: dict, seeds, *, requests: int, width: int) -> list:
  """The responses to prompts that share weights and numbers, but for the seed."""
  decoder = Scheduler(interpreter, batch_size=requests, branch_width=width)
  return [_record(t) for t in decoder.run(prompts, SamplingConfig(**numbers), seeds=seeds)]


def open_tag(interpreter: Interpreter) -> int:
  return interpreter.vocabulary.tags.open


def encode_program(nodes, strategy: str) -> Thread:
  """A program in the plain form of `random_program`, as tokens: one for each byte."""

  def node(n):
    if isinstance(n, tuple):
      return Promise(n[0], None, tuple(map(node, n[1])))
    return Sync() if n is None else Text(n)

  return Vocabulary(ByteTokenizer(), base_size=265).encode(tuple(map(node, nodes)), PositionRule(strategy, 7))


def thread_of(tree) -> Thread:
  """A thread in the plain form of `random_tree`."""
  tokens, forks = tree
  return Thread(tuple(tokens), tuple(Fork(at, declared, thread_of(child)) for at, declared, child in forks))


def lay_out(thread: Thread, strategy: str, prompt, byte: bool = False):
  vocabulary = Vocabulary(ByteTokenizer(), base_size=265) if byte else tiny_vocabulary()
  return layout(thread, PositionRule(strategy, 7), vocabulary.table, prompt)


def layout_arrays(laid) -> dict:
  return {NAMES_IN_DUMPS.get(f, f): getattr(laid, f) for f in LAYOUT_FIELDS}


@functools.cache
def smollm2():
  return load_checkpoint("smollm2-135m-instruct", progress=False)


def seed_layouts(annotation: str, **how) -> list:
  """The seed data laid out with SmolLM2's vocabulary."""
  rule = PositionRule("pred_10x", 60)
  return examples(read_jsonl(SEED_DATA), smollm2().vocabulary, rule, annotation=annotation, **how).examples


def _levels(layouts) -> int:
  return max(e.masked_intervals.shape[1] for e in layouts)


def sft_batches(layouts, *, rows: int, length: int) -> tuple[Callable[[int], dict], int]:
  """(number -> packed batch, batches in an epoch)."""
  batches = PackedBatches(layouts, batch_size=rows, length=length, levels=_levels(layouts), seed=0)
  return lambda step: batches(step).as_dict(), batches.steps_in_epoch(0)


def pair_batch(pairs, step: int, *, rows: int, length: int) -> dict:
  """Of (chosen, rejected, reference) triples."""
  pairs = [PreferencePair(*p) for p in pairs]
  levels = _levels([e for p in pairs for e in (p.chosen, p.rejected)])
  return PairBatches(pairs, rows=rows, length=length, levels=levels, seed=0)(step)


def tiny_trainable(params: dict):
  """(graph, trainable, frozen) of the tiny model, every parameter trained."""
  return split(_tiny_model(params, stacked=True), full=True)


def lora_trainable(rank: int):
  """(graph, trainable, frozen) of SmolLM2 with random updates of a rank, and random rows for the tags."""
  checkpoint, rng, factors = smollm2(), np.random.default_rng(0), {}
  for name, (n_in, *n_out) in param_shapes(checkpoint.config).items():
    if name.startswith("layers.") and name.endswith(".kernel"):
      factors[name.removesuffix(".kernel")] = (
        rng.normal(size=(n_in, rank)) * n_in**-0.5,
        rng.normal(size=(rank, *n_out)) * 0.02,
      )
  tags = rng.normal(size=(6, checkpoint.config.d_model)) * 0.1
  settings = Preference(dtype="float32", lora_rank=rank, lora_alpha=2.0 * rank, seed=0)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "adapter.safetensors"
    write_adapter(path, Adapter(2.0, factors, tags), checkpoint.config)
    return make_model(checkpoint, checkpoint.vocabulary, settings, adapter=path)


def loss_and_gradients(model, batch: dict, kind: str = "", per_token: bool = False, **how):
  """(sums of metrics, flat name -> gradient) of SFT or the preference loss `kind`. `how`: chunk, remat,
  attention."""
  graph, trainable, frozen = model
  pairs = dict(loss=kind, alpha=0.1, beta=0.05, per_token=per_token) if kind else {}
  loss = functools.partial(preference_loss if kind else sft_loss, **pairs, **how)
  run = lambda trainable, frozen, batch: loss(compute_model(graph, trainable, frozen, "float32"), batch)
  (_, sums), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(trainable, frozen, batch)
  whole = nnx.merge(graph, gradient, frozen)
  if not jax.tree.leaves(frozen):
    return sums, build.to_params(whole)
  adapter = adapter_of(whole)
  named = {f"{n}.lora_{x}": f for n, pair in adapter.factors.items() for x, f in zip("ab", pair)}
  return sums, named | {"embed.tags": adapter.tags}


# --- Tokenizers, tiny weights, random programs. ---

WORDS = ["#", "tree", "stone", "river", "cloud", "amber", "lemon", "tiger", "of", "a", "the", "in"]
DIGITS = ["0", "1", "2", "3", "4", "5", "7", "9", "12", "345", "1000", "12345"]
OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC = range(26, 32)  # of the tiny vocabulary
STRATEGIES = ("pred_10x", "pred_1x", "fixed", "oracle", "max", "sum")


class TinyTokenizer:
  """Words, numbers (some of several digits, some absurd) and `#`, the token that ends a turn."""

  vocab_size, eos_id, special_ids = 24, 0, frozenset({0})

  def encode(self, text: str) -> list[int]:
    return [(WORDS + DIGITS).index(word) for word in text.split()]

  def token_bytes(self, token: int) -> bytes:
    return f"{(WORDS + DIGITS)[token]} ".encode()

  def digit_values(self) -> dict:
    return {12 + i: (int(d), 10 ** len(d)) for i, d in enumerate(DIGITS)}


class ByteTokenizer:
  """A token for each byte and four more."""

  vocab_size, eos_id, special_ids = 260, 256, frozenset({256, 257})

  def encode(self, text: str) -> list[int]:
    return list(text.encode())

  def token_bytes(self, token: int) -> bytes:
    return bytes([token]) if token < 256 else (b"<eos>", b"<control>", b"42", b"1234567")[token - 256]

  def digit_values(self) -> dict:
    return {48 + d: (d, 10) for d in range(10)} | {258: (42, 100), 259: (1234567, 10_000_000)}


# Each token's group: ordinary, digits, the six tags, the end of a turn; 9: words that topics are made of.
GROUPS = np.array([8] + [0] * 5 + [9] + [0] + [9] * 4 + [1] * 12 + [0] * 2 + [2, 3, 4, 5, 6, 7])
HABITS = np.array(
  [  # scores of the next token's group behind a token's group
    [1.2, -3, 2.2, -3, -3, -4, 2.5, 0.7, 1.9, -2],
    [-2, -2, -3, -3, 3.0, -4, 0.0, -3, -2, -3],
    [-2, -3, -4, -4, -3, -4, -3, -4, -3, 3.0],
    [-3, 3.0, -4, -4, -2, -4, -3, -4, -3, -3],
    [1.2, -3, 1.9, -4, -4, -4, 2.0, 2.6, 2.1, -3],
    [2.2, -3, 1.7, -4, -4, -4, 1.7, 0.0, -3, -2],
    [1.0, -3, 0.5, -4, -4, -4, -1, -1, 2.0, -3],
    [1.5, -3, 1.0, -4, -4, -4, 2.6, -2, 2.6, -3],
    [1.0, -3, 0.0, -4, -4, -4, 2.0, 0.0, 2.0, -3],
    [-3, -3, -4, 2.5, -0.5, -4, -3, -4, -3, 1.5],
  ]
)
ENDLESS = [2, 4, 9, 1, 2, 2, 2, 2, 2, 3]  # the group behind each group, in promises within promises
KINDS = ("habits", "storm", "habits", "clockwork", "endless", "habits", "silent", "habits", "storm")


def tiny_weights(seed: int, kind: str) -> dict:
  """Random parameters: ten channels hold the group of the token just read, the head a kind's habits."""
  rng, params = np.random.default_rng(seed), {}
  for name, shape in sorted(tiny_shapes().items()):
    params[name] = rng.normal(size=shape) * shape[0] ** -0.5 if len(shape) > 1 else np.ones(shape)
    if name.endswith(("attn.o.kernel", "mlp.down.kernel")):
      params[name] *= 3 * (np.arange(shape[1]) >= 10)
    if name.endswith("attn.q.kernel"):
      params[name] *= 8
  table, head, tag = params["embed.embedding"], params["head.kernel"], np.arange(32) >= 26
  table *= 2.5
  table[:, :10] = 2 * np.eye(10)[GROUPS]
  head *= 0.7
  if kind == "habits":
    head[:10] = (HABITS - np.log(np.bincount(GROUPS)))[:, GROUPS]
  elif kind == "storm":
    head[:, tag] *= 8
    head[:10] = rng.normal(size=(10, 10))[:, GROUPS] + tag
  elif kind == "silent":
    head[:10] = -60.0 * tag
  else:
    then = np.array(ENDLESS if kind == "endless" else rng.integers(0, 10, 10))
    head[:10] = 20.0 * (then[:, None] == GROUPS) + 0.2 * HABITS[:, GROUPS]
  return {name: x.astype(np.float32) for name, x in params.items()}


def random_tree(rng, depth: int = 3, main: bool = True):
  """(tokens, [(at, declared, child)]) of a thread; some have no number, some chunks are cut off."""
  tokens, forks = [] if main else [ASYNC], []
  for _ in range(rng.integers(1, 7)):
    what = rng.random()
    if what < 0.45 and depth:
      number = int(rng.integers(0, 120)) if rng.random() < 0.8 else None
      digits = [] if number is None else [MIDDLE, int(rng.integers(12, 24))]
      tokens += [OPEN, *map(int, rng.integers(8, 12, rng.integers(1, 4))), *digits, CLOSE]
      forks.append((len(tokens) - 1, number, random_tree(rng, depth - 1, False)))
    elif what < 0.65:
      tokens.append(SYNC)
    else:
      tokens += map(int, rng.integers(1, 24, rng.integers(1, 6)))
  return tokens + ([0] if main else [END] if rng.random() < 0.9 else []), forks


def random_program(rng, depth: int = 3):
  """A list of texts, syncs (None) and promises ((topic, body))."""
  text = lambda: "".join(rng.choice(list('ab é\n"\\<1'), rng.integers(1, 30)))
  nodes = []
  for _ in range(rng.integers(0, 5)):
    what = rng.random()
    nodes.append(
      (text()[:8], random_program(rng, depth - 1)) if what < 0.5 and depth else None if what < 0.7 else text()
    )
  return nodes


# --- Sections. Each returns {"decode": {group: [{"ask": …, "trace": …}]}, "exact": {name: array or text},
# "numbers": {name: (values, sizes that differences are measured by)}}, or some of these. ---

LIMITS = dict(max_new_tokens=64, max_threads=24, max_depth=2, max_topic=4, tail=0, widths=[8], buckets=[128])
STATIC = dict(strategy="pred_10x", guard=True, promises=True, no_repeat=0)


def combo(share: int = 1, numbers: dict | None = None, limits: dict | None = None, longest=8, **static):
  """One static setting. `share`: so many programs have the same weights and numbers; where there are several
  they go through the batch too. Numbers that are lists take turns."""
  static = {**STATIC, **static, "limits": {**LIMITS, **(limits or {})}}
  return dict(share=share, numbers=numbers or {}, longest=longest, static=static)


COMBOS = [
  combo(),
  combo(5, dict(temperature=[1.0, 0.7]), dict(widths=[2], max_depth=3), longest=40),
  combo(
    1, dict(temperature=1.0, top_k=[3, 0, 8], top_p=[1.0, 0.8, 0.9]), dict(widths=[1, 3]), strategy="pred_1x"
  ),
  combo(
    5,
    dict(temperature=1.0, min_p=[0.02, 0.1], repetition_penalty=[1.3, 1.1, 2.0]),
    dict(widths=[4], tail=12),
    strategy="fixed",
  ),
  combo(1, dict(temperature=[1.0, 1.5]), dict(widths=[3]), strategy="max", guard=False),
  combo(
    1, dict(temperature=1.0, promise_bias=[1.5, -1.0, 3.0]), dict(widths=[2], max_depth=3), strategy="sum"
  ),
  combo(1, {}, dict(buckets=[48, 128], max_depth=3), guard=False),
  combo(
    5,
    dict(temperature=1.0, top_k=[4, 0], top_p=[1.0, 0.7], min_p=[0.0, 0.05]),
    dict(widths=[1], max_threads=4),
    strategy="pred_1x",
    guard=False,
  ),
  combo(1, dict(repetition_penalty=[1.1, 1.5]), dict(widths=[2], max_depth=1), strategy="fixed", guard=False),
  combo(1, dict(temperature=[0.5, 1.0]), {}, strategy="max", no_repeat=2),
  combo(
    1,
    dict(temperature=1.0, top_p=[0.9, 0.6], repetition_penalty=1.2, promise_bias=[0.0, 1.0]),
    dict(widths=[4], max_depth=3),
    strategy="sum",
    guard=False,
    no_repeat=3,
  ),
  combo(
    5,
    dict(temperature=0.8, top_p=0.95, repetition_penalty=1.1, promise_bias=1.5),
    dict(widths=[1, 4], max_depth=1, tail=12, max_threads=6),
    no_repeat=2,
  ),
  combo(1, {}, dict(widths=[1], max_depth=1), strategy="max"),
  combo(
    1,
    dict(repetition_penalty=1.3),
    dict(widths=[2], max_new_tokens=500, max_depth=3, buckets=[64]),
    strategy="sum",
  ),
  combo(1, dict(temperature=[0.0]), dict(widths=[1], max_threads=1), promises=False, no_repeat=3),
]


def as_cases(asks, traces) -> list[dict]:
  return [{"ask": a, "trace": t} for a, t in zip(asks, traces)]


def make_tiny(prompts, stored, quick) -> dict:
  out: dict = {"decode": {"tiny, one": [], "tiny, batch": []}}
  for c, setting in enumerate(COMBOS):
    together: dict = {}
    for i in range(15):
      rng, turn = np.random.default_rng((c, i)), i // setting["share"]
      numbers = {k: v[turn % len(v)] if isinstance(v, list) else v for k, v in setting["numbers"].items()}
      weights = [1000 * c + turn, KINDS[(turn + 3 * (c % 3)) % len(KINDS)]]
      prompt = rng.integers(1, 26, rng.integers(1, setting["longest"] + 1)).tolist()
      numbers["seed"] = 100 * c + i
      ask = dict(model="tiny", combo=c, weights=weights, prompt=prompt, numbers=numbers)
      interpreter = make_tiny_interpreter(setting["static"], tiny_weights(*weights))
      out["decode"]["tiny, one"] += as_cases([ask], run_one(interpreter, prompt, numbers)[:1])
      together.setdefault(turn, []).append(ask)
    for asks in together.values() if setting["share"] > 1 else ():
      interpreter = make_tiny_interpreter(setting["static"], tiny_weights(*asks[0]["weights"]))
      traces = run_batch(
        interpreter,
        [a["prompt"] for a in asks],
        asks[0]["numbers"],
        [a["numbers"]["seed"] for a in asks],
        requests=3,
        width=2,
      )
      out["decode"]["tiny, batch"] += as_cases(asks, traces)
  return out


def make_real(name: str, prompts, stored, quick) -> dict:
  ids = [real_encode(name, p) for p in prompts] if prompts else json.loads(stored["exact"]["prompts"])
  ways = {"greedy": {}, "sampled": dict(temperature=0.8, seed=7, top_p=0.95)}
  out: dict = {"decode": {}, "exact": {"prompts": json.dumps(ids)}}
  ids = ids[:2] if quick else ids
  for way, changed in ways.items():
    numbers = real_numbers(name) | changed
    asks = [dict(model=name, prompt=p, numbers=numbers) for p in ids]
    interpreter = make_real_interpreter(name)
    out["decode"][f"{name} {way}, one"] = as_cases(asks, (run_one(interpreter, p, numbers)[0] for p in ids))
    print(f"  {name} {way}, one: done at {time.perf_counter() - STARTED:.0f} s", flush=True)
    if quick:
      continue
    traces = run_batch(interpreter, ids, numbers, [numbers["seed"]] * len(ids), requests=5, width=2)
    out["decode"][f"{name} {way}, batch"] = as_cases(asks, traces)
    print(f"  {name} {way}, batch: done at {time.perf_counter() - STARTED:.0f} s", flush=True)
  return out


def digest(array) -> np.ndarray:
  array = np.ascontiguousarray(array)
  content = f"{array.shape} {array.dtype}".encode() + array.tobytes()
  return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


def make_layout(prompts, stored, quick) -> dict:
  exact = {}
  for i in range(100):
    rng = np.random.default_rng(i)
    prompt = rng.integers(1, 24, rng.integers(0, 6)).tolist()
    plain = random_program(rng) if i < 50 else random_tree(rng)
    for strategy in STRATEGIES:
      thread = encode_program(plain, strategy) if i < 50 else thread_of(plain)
      for field, array in layout_arrays(lay_out(thread, strategy, prompt, byte=i < 50)).items():
        exact[f"layout {i} {strategy} {field}"] = digest(array)
  return {"exact": exact}


def summary(sums: dict, gradients: dict) -> dict:
  """Name -> (values, sizes): sums, and of each gradient its norm and three random projections."""
  sums = {NAMES_IN_DUMPS.get(k, k): float(v) for k, v in sums.items()}
  whole = sum(abs(sums.get(k, 0.0)) for k in ("chosen", "rejected"))  # margins are differences of such sums
  out = {k: ([v], [max(abs(v), whole if k in ("margin", "lost") else 0.0)]) for k, v in sums.items()}
  for name, g in gradients.items():
    g = np.asarray(g, np.float64).ravel()
    norm = float(np.linalg.norm(g))
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=(3, g.size))
    out[f"d {name}"] = ([norm, *(noise @ g).tolist()], [norm] * 4)
  return out


def make_train(prompts, stored, quick) -> dict:
  exact, numbers = {}, {}

  def note(what: str, batch: dict, *arguments, **how):
    exact.update({f"{what} {NAMES_IN_DUMPS.get(k, k)}": digest(v) for k, v in batch.items()})
    found = summary(*loss_and_gradients(*arguments, **how))
    numbers.update({f"{what}: {k}": v for k, v in found.items()})

  for annotation in ("plan", "none", "structure"):
    layouts = seed_layouts(annotation, max_length=640, min_speedup=1.4, plain_share=0.15)
    batch, count = sft_batches(layouts, rows=3, length=640)
    for i in range(count + 3):  # into the second epoch
      exact.update(
        {f"packed {annotation} {i} {NAMES_IN_DUMPS.get(k, k)}": digest(v) for k, v in batch(i).items()}
      )

  rng = np.random.default_rng(0)
  trees = [
    t
    for t in (lay_out(thread_of(random_tree(rng, 2)), "pred_10x", [1, 2, 3]) for _ in range(80))
    if 20 < len(t) < 96
  ][:24]
  pairs = [(a, b, tuple(rng.normal(-80, 10, 2).tolist())) for a, b in zip(trees[::2], trees[1::2])]
  model = tiny_trainable(tiny_weights(1, "habits"))
  for how in (dict(attention="auto", remat="none"), dict(attention="dense", remat="full")):
    batch = sft_batches(trees, rows=3, length=96)[0](1)
    note(f"tiny sft {how['attention']}", batch, model, batch, chunk=64, **how)
  batch = pair_batch(pairs, 1, rows=3, length=96)
  for kind, per_token in (("bonbon", True), ("bonbon", False), ("ipo", False), ("dpo", True)):
    note(f"tiny {kind} {per_token}", batch, model, batch, kind, per_token=per_token, chunk=64)

  model = lora_trainable(4)
  plan, none = (seed_layouts(a, max_length=256) for a in ("plan", "none"))
  batch = sft_batches(plan, rows=2, length=256)[0](0)
  note("smollm2 sft", batch, model, batch, chunk=256, remat="full")
  pairs = [(a, b, (-1.5 * len(a), -1.4 * len(b))) for a, b in zip(plan, none)]
  batch = pair_batch(pairs, 0, rows=2, length=256)
  note("smollm2 bonbon", batch, model, batch, "bonbon", per_token=True, chunk=256, remat="full")
  return {"exact": exact, "numbers": numbers}


SECTIONS = {"tiny": make_tiny, "layout": make_layout, "train": make_train}
SECTIONS |= {name: functools.partial(make_real, name) for name in ("smollm2", "gemma")}

# --- Files: gzipped JSON, arrays in base64. ---


def pack(x):
  if isinstance(x, np.ndarray):
    if x.dtype == np.int32 and (x.size == 0 or max(x.max(), -x.min()) < 2**15):
      x = x.astype(np.int16)
    return {"$": str(x.dtype), "shape": x.shape, "data": base64.b64encode(np.ascontiguousarray(x)).decode()}
  if isinstance(x, dict):
    return {k: pack(v) for k, v in x.items()}
  return [pack(v) for v in x] if isinstance(x, (list, tuple)) else x


def unpack(x):
  if isinstance(x, dict) and "$" in x:
    return np.frombuffer(base64.b64decode(x["data"]), x["$"]).reshape(x["shape"])
  if isinstance(x, dict):
    return {k: unpack(v) for k, v in x.items()}
  return [unpack(v) for v in x] if isinstance(x, list) else x


def save(path: Path, dump: dict) -> None:
  path.write_bytes(gzip.compress(json.dumps(pack(dump)).encode(), 9, mtime=0))


def load(path: Path) -> dict:
  return unpack(json.loads(gzip.decompress(path.read_bytes())))


# --- Comparing. ---

LOG_P, RELATIVE, TIE = 1e-5, 1e-6, 1e-4
SCHEDULE = ("entries", "steps")


def same(a, b) -> bool:
  if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
    return np.array_equal(np.asarray(a), np.asarray(b))
  return a == b


def first_difference(old: dict, new: dict):
  """(path, index) of the token that differs in the earliest round, by threads that both have; or None."""
  theirs, found = {tuple(t["path"]): t for t in new["threads"]}, []
  for t in old["threads"]:
    other = theirs.get(tuple(t["path"]))
    n = min(len(t["tokens"]), len(other["tokens"])) if other else 0
    differ = np.flatnonzero(t["tokens"][:n] != other["tokens"][:n]) if other else []
    if len(differ):
      found.append((int(t["rounds"][differ[0]]), tuple(t["path"]), int(differ[0])))
  return min(found)[1:] if found else None


def scores_of(ask: dict, path, index: int, tokens) -> tuple[list, list]:
  """Of some tokens at one place, by the code that runs now: log p, and the scores that they were chosen by
  (with and without the repetition penalty), from a run that captures logits."""
  if ask["model"] == "tiny":
    static = COMBOS[ask["combo"]]["static"]
    interpreter = make_tiny_interpreter(static, tiny_weights(*ask["weights"]), capture=True)
  else:
    interpreter = make_real_interpreter(ask["model"], capture=True)
  trace, logits = run_one(interpreter, ask["prompt"], ask["numbers"])
  thread = next(t for t in trace["threads"] if tuple(t["path"]) == path)
  row = np.asarray(logits[thread["entries"][index - 1] if index else len(ask["prompt"]) - 1], np.float64)
  n, key = ask["numbers"], jax.random.key(ask["numbers"].get("seed", 0))
  for ordinal in path:
    key = jax.random.fold_in(jax.random.fold_in(key, 0x7FFFFFFF), ordinal + 1)
  temperature, penalty = n.get("temperature", 0.0), n.get("repetition_penalty", 1.0)
  noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, index), row.shape)) if temperature else 0 * row
  log_p, scores = [], []
  for t in map(int, tokens):
    bias = n.get("promise_bias", 0.0) * (t == open_tag(interpreter))
    raw = {row[t], row[t] / penalty if row[t] > 0 else row[t] * penalty}
    log_p.append(row[t] - np.logaddexp.reduce(row))
    scores.append([(x + bias) / (temperature or 1.0) + noise[t] for x in raw])
  return log_p, scores


def explain(name: str, ask: dict, old: dict, new: dict) -> tuple[bool, str]:
  """(whether the first token that differs is a tie, what is to be said of two traces that differ)."""
  place = first_difference(old, new)
  if place is None:
    facts = [k for k in old if k != "threads" and k not in SCHEDULE and old[k] != new[k]]
    facts += [
      f"thread {a['number']} {f}"
      for a, b in zip(old["threads"], new["threads"])
      for f in a
      if f not in (*SCHEDULE, "log_p") and not same(a[f], b[f])
    ]
    return False, f"{name}: no token differs, but {', '.join(facts[:6]) or 'the number of threads'}"
  path, i = place
  pick = lambda trace: next(t for t in trace["threads"] if tuple(t["path"]) == path)
  a, b = pick(old), pick(new)
  log_p, scores = scores_of(ask, path, i, (a["tokens"][i], b["tokens"][i]))
  margin = min(abs(x - y) for x in scores[0] for y in scores[1])
  moved = abs(log_p[0] - float(a["log_p"][i]))
  tie = bool(margin <= TIE and moved <= TIE)
  verdict = "tie" if tie else "DIFFERENT"
  then = f"{a['tokens'][i]} (log p {a['log_p'][i]:.6f} then, {log_p[0]:.6f} now)"
  now = f"{b['tokens'][i]} ({b['log_p'][i]:.6f}); margin now {margin:.2e}"
  return tie, f"{name}: {verdict} at path {list(path)}, token {i}: {then} became {now}"


def compare_decode(group: str, old: list, new: list) -> tuple[list, list]:
  """(row of the table, differences)."""
  identical = ties = schedule = bad = 0
  furthest, tokens, notes = 0.0, 0, []
  if len(old) != len(new):
    notes.append(f"{group}: {len(old)} cases then, {len(new)} now")
    bad += 1
  for i, (a, b) in enumerate(zip(old, new)):
    ask, (x, y) = a["ask"], (a["trace"], b["trace"])
    name = f"{group} {i}"
    if json.dumps(ask, sort_keys=True) != json.dumps(b["ask"], sort_keys=True):
      notes.append(f"{name}: something else was asked: {ask} then, {b['ask']} now")
      bad += 1
      continue
    plain = lambda t: {k: v for k, v in t.items() if k not in SCHEDULE and k not in ("log_p", "threads")}
    pairs = list(zip(x["threads"], y["threads"]))
    equal = (
      plain(x) == plain(y)
      and len(x["threads"]) == len(y["threads"])
      and all(same(s[f], t[f]) for s, t in pairs for f in s if f not in (*SCHEDULE, "log_p"))
    )
    if not equal:
      tie, note = explain(name, ask, x, y)
      notes.append(note)
      ties, bad = ties + tie, bad + (not tie)
      continue
    identical += 1
    tokens += sum(len(s["tokens"]) for s, _ in pairs)
    schedule += x["steps"] != y["steps"] or any(not same(s[f], t[f]) for s, t in pairs for f in SCHEDULE)
    gap = 0.0
    for s, t in pairs:
      silent = np.isnan(s["log_p"])
      gap = max([gap, *np.abs(s["log_p"] - t["log_p"])[~silent].tolist()])
      gap = np.inf if (silent != np.isnan(t["log_p"])).any() else gap
    furthest = max(furthest, gap)
    if gap > LOG_P:
      bad += 1
      notes.append(f"{name}: log p differ by {gap:.2e}")
  row = [group, len(old), f"{identical} ({tokens} tokens)", ties, schedule, f"{furthest:.1e}", "", bad]
  return row, notes


def compare_exact(what: str, old: dict, new: dict) -> tuple[list, list]:
  # An array that a later version adds is no difference.
  wrong = [k for k in sorted(old) if k not in new or not same(old[k], new[k])]
  notes = [f"{what}: {k} differs" for k in wrong[:10]]
  notes += [f"{what}: and {len(wrong) - 10} more"] if len(wrong) > 10 else []
  return [f"{what}, arrays", len(old), len(old) - len(wrong), "", "", "", "", len(wrong)], notes


def compare_numbers(what: str, old: dict, new: dict) -> tuple[list, list]:
  """A row for each model and loss."""
  groups: dict[str, list] = {}
  for key in sorted({*old, *new}):
    gap = np.inf
    if key in old and key in new:
      (a, sizes), (b, _) = old[key], new[key]
      gap = max(0.0 if x == y else abs(x - y) / max(s, 1e-30) for x, y, s in zip(a, b, sizes))
      gap = np.inf if not np.isfinite(gap) else gap
    groups.setdefault(key.split(":")[0], []).append((gap, key))
  bad = lambda found: sum(gap > RELATIVE for gap, _ in found)
  rows = [
    [name, len(found), sum(gap == 0 for gap, _ in found), "", "", "", f"{max(found)[0]:.1e}", bad(found)]
    for name, found in groups.items()
  ]
  wrong = sorted((x for found in groups.values() for x in found if x[0] > RELATIVE), reverse=True)
  return rows, [f"{what}: {key} differs by {gap:.1e} of its size" for gap, key in wrong[:15]]


def coverage(dump: dict) -> str:
  """What the decoded cases hold, to see that there is something to compare."""
  traces = [c["trace"] for cases in dump.get("decode", {}).values() for c in cases]
  if not traces:
    return f"{len(dump.get('exact', {}))} arrays, {len(dump.get('numbers', {}))} groups of numbers"
  count = lambda has: sum(map(has, traces))
  facts = {r: count(lambda t, r=r: t["finish_reason"] == r) for r in ("stop", "length", "pool")}
  facts["tokens"] = count(lambda t: sum(len(x["tokens"]) for x in t["threads"]))
  facts["with chunks"] = count(lambda t: len(t["threads"]) > 1)
  facts["nested"] = count(lambda t: any(len(x["path"]) > 1 for x in t["threads"]))
  facts |= {f: count(lambda t, f=f: t[f] > 0) for f in ("refused", "ill_formed")}
  return f"{len(traces)} cases: " + ", ".join(f"{k} {v}" for k, v in facts.items())


STARTED = time.perf_counter()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("action", choices=("make", "compare"))
  parser.add_argument("folder", type=Path)
  parser.add_argument("--prompts", type=Path, help="JSON lines; rows 0, 10, …, 90 are taken")
  parser.add_argument("--only", default=",".join(SECTIONS))
  parser.add_argument("--quick", action="store_true", help="of real models two prompts, one at a time")
  arguments = parser.parse_args()
  if arguments.quick and arguments.action == "make":
    parser.error("--quick is for compare")
  arguments.folder.mkdir(parents=True, exist_ok=True)
  use_compilation_cache(cache_folder() / "compiled")
  set_matmul_precision("float32")
  prompts = []
  if arguments.prompts:
    prompts = [json.loads(line)["prompt"] for line in arguments.prompts.read_text().splitlines()[:100:10]]
  print(f"{arguments.action}: code of {WHERE}, {jax.default_backend()}")

  rows, notes = [], []
  for section in arguments.only.split(","):
    before, path = time.perf_counter(), arguments.folder / f"{section}.json.gz"
    old = load(path) if arguments.action == "compare" else {}
    if section in ("smollm2", "gemma") and not (prompts or old):
      parser.error(f"{section} needs --prompts")
    new = SECTIONS[section](prompts, old, arguments.quick)
    if arguments.action == "make":
      save(path, new)
      print(f"{path.name}: {path.stat().st_size} bytes; {coverage(new)}")
    else:
      new = unpack(json.loads(json.dumps(pack(new))))
      decoded = {g: (cases, new["decode"].get(g, [])) for g, cases in old.get("decode", {}).items()}
      if arguments.quick:
        decoded = {g: (cases[: len(now)], now) for g, (cases, now) in decoded.items() if now}
      found = [compare_decode(g, cases, now) for g, (cases, now) in decoded.items()]
      found += [compare_exact(section, old["exact"], new["exact"])] if "exact" in old else []
      for row, said in found:
        rows.append(row)
        notes += said
      if "numbers" in old:
        more, said = compare_numbers(section, old["numbers"], new["numbers"])
        rows += more
        notes += said
    print(f"  {section}: {time.perf_counter() - before:.0f} s", flush=True)
  if arguments.action == "make":
    return 0
  head = ["what", "cases", "identical", "ties", "schedule", "max |Δ log p|", "max rel. Δ", "violations"]
  rows.insert(0, head)
  widths = [max(len(str(r[k])) for r in rows) for k in range(len(rows[0]))]
  for row in rows:
    print("  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip())
  print("\n".join(notes) or "no differences")
  return int(any(row[-1] for row in rows[1:]))


if __name__ == "__main__":
  sys.exit(main())
