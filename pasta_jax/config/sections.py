"""The sections of settings, in the order of config.json: one class each, with its defaults and rules."""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

from pasta_jax.config.fields import (
  NEVER,
  PROMISES,
  Section,
  above,
  at_least,
  between,
  each_between,
  each_of,
  one_of,
  setting,
  to_text,
  within,
)

# Choices that other modules implement: they import them from here, or a test compares the two.
VISIBILITIES = ("promise", "live")  # who sees whom (lang.forms)
PROMISE_FORMS = ("topic", "head")  # what says what a promise is about (lang.forms)
NUMBER_FORMS = ("digits", "token")  # how a promise says its length (lang.forms)
LENGTH_CHOICES = ("likeliest", "median", "apart")  # of lengths that are tokens (decode.sampling)
ORACLES = (
  "oracle",
  "oracle_10x",
  "oracle_1x",
)  # positions from true lengths, which only teacher forcing knows
STRATEGIES = ("pred_10x", "pred_1x", "fixed", *ORACLES, "max", "sum")  # of positions (lang.positions)
ANNOTATION_RULES = ("independent", "full", "paper")  # which parts are chunks (data.annotate.prompts)
ANNOTATIONS = ("plan", "structure", "none")  # of responses (data.examples)
DTYPES = ("float32", "bfloat16")
AUTO = "auto"  # of DTYPES the one that this machine multiplies fastest (decode.precision)
WEIGHTS = ("int8", "fp8")  # formats of matrices in 8 bits, for decoding (weights.quantise)
REMAT = ("none", "full", "attention", "products")  # rematerialisation policies (model.transformer)
ATTENTION = ("auto", "chunked", "tpu", "gpu", "interpret", "dense")  # programs for training (train.attention)
# of decode steps and prefill (decode.attention)
DECODE_ATTENTION = ("auto", "xla", "numba", "tpu", "gpu", "interpret")
KERNELS = ("auto", "numba", "xla")  # of decoding on CPU (model.products)
LOSSES = ("bonbon", "ipo", "dpo")  # of preference optimisation (train.losses)
SCORES = ("delivered", "theoretical", "parallelism", "arithmetic", "harmonic", "clock")  # preference.score
STAGES = ("sample", "judge", "train", "eval")  # of preference optimisation (preference.rounds)
PROGRAMS = ("train", "preference", "prefill", "decode")  # that can be compiled ahead of time (train.ahead)
JUDGES = ("local", "llm")  # of evaluation (judges.registry)
DECODINGS = ("parallel", "sequential", "skeleton")  # of a system that is evaluated
PROVIDERS = (
  "openai",
  "gemini",
  "batch",
)  # ways to reach a model: two protocols, and by file (utils.endpoint)
ORDERS = ("both", "one")  # in which a judge reads a pair (judges.judging)
QUALITIES = ("preference", "grade", "ratio")  # of a sample of stage two (preference.quality)
EXPORTS = ("merged", "peft")  # forms of exported weights (weights.export)
# Settings of decoding that an adapter may carry (weights.adapter), with the values where neither it nor the user says.
OWN_SETTINGS: Mapping[str, Any] = {
  "repetition_penalty": 1.1,
  "no_repeat": 16,
  "promise_bias": 1.5,
  "max_threads": 24,
}


def formats(dtype: str) -> tuple[str, str]:
  """(dtype of products, format of matrices in 8 bits or ""): what `decode.dtype` and `eval.dtype` stand for."""
  return ("bfloat16", dtype) if dtype in WEIGHTS else (dtype, "")


def _weights(weights: tuple[float, ...]) -> str:
  good = bool(weights) and all(w >= 0 for w in weights) and len(set(weights)) == len(weights)
  return "" if good else f"must be weights of quality, 0 or more, each once, not {to_text(weights)!r}"


def _shares(shares: tuple[float, ...]) -> str:
  good = all(0 < s < 1 for s in shares) and len({kept_folder(s) for s in shares}) == len(shares)
  return "" if good else f"must be shares of the steps between 0 and 1, each once, not {to_text(shares)!r}"


def kept_folder(share: float) -> str:
  """The folder, in that of a training, of the adapter after a share of its steps (`preference.keep`)."""
  return f"kept_{100 * share:g}"


def _judges(names: tuple[str, ...]) -> str:
  wrong = [n for n in names if n not in JUDGES and not n.endswith((".json", ".jsonl", ".jsonl.gz"))]
  known = ", ".join(JUDGES)
  return f"takes {known}, and .json or .jsonl files of preferences, not {wrong[0]!r}" if wrong else ""


def _variable(name: str) -> str:
  """A key that was put in place of its variable's name is refused, and not shown."""
  is_key = any(
    len(part) >= 16
    and re.search(r"\d", part)
    and re.search(r"[^\W\d]", part)
    or len(part) >= 20
    and not part.isupper()
    and not part.islower()
    for part in name.split("_")
  )
  if not name or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{,79}", name) and not is_key:
    return ""
  return (
    "must be the name of an environment variable, such as OPENAI_API_KEY, not the key (it is not shown here)"
  )


def without_login(url: str) -> str:
  """A URL without user:password@."""
  return re.sub(r"^([^:/?#]+://)[^/?#]*@", r"\1", url)


def share_of(share: str) -> tuple[int, int] | None:
  """`preference.share`, such as "2/3", as (2, 3); None for all prompts. Raises ValueError, one line."""
  if wrong := _share(share):
    raise ValueError(f"preference.share {wrong}")
  number, _, count = share.partition("/")
  return (int(number), int(count)) if share else None


def _share(share: str) -> str:
  number, _, count = share.partition("/")
  if not share or number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
    return ""
  return f'must be like "2/3", for the second of three shares of the prompts, not {share!r}'


@dataclasses.dataclass(frozen=True)
class Model(Section):
  """The weights."""

  source: str = setting("smollm2-135m-instruct", path=True)  # a released model, a folder or a .gguf file
  adapter: str = setting("pasta", path=True)  # a name in decode.generator.EMBEDDED, a file; "": none


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
  """Devices by axis (model.sharding), in training and decoding. One may be -1: all devices that the others leave."""

  data: int = 1  # replicas of the parameters; batch rows are split over them
  fsdp: int = -1  # parameters, optimizer moments and batch rows are split over these
  tensor: int = 1  # heads, feed-forward columns and the vocabulary are split over these

  def __post_init__(self):
    super().__post_init__()
    sizes = self.to_dict()
    if list(sizes.values()).count(-1) > 1 or any(n != -1 and n < 1 for n in sizes.values()):
      raise ValueError(f"mesh={sizes}: sizes are 1 or more; one may be -1, for all devices left")


@dataclasses.dataclass(frozen=True)
class Positions(Section):
  """Positions in training (lang.positions.PositionRule); decoding takes its adapter's."""

  strategy: str = setting("pred_10x", one_of(STRATEGIES))  # how far a promise jumps
  fixed: int = 60  # positions reserved for a chunk whose promise has no number


@dataclasses.dataclass(frozen=True)
class Language(Section):
  """The form of the language in training (lang.forms.Forms); decoding takes its adapter's."""

  visibility: str = setting("promise", one_of(VISIBILITIES))  # promise: the paper's; live: chunks read along
  promise: str = setting(
    "topic", one_of(PROMISE_FORMS)
  )  # topic: the paper's; head: the text before the promise
  number: str = setting("digits", one_of(NUMBER_FORMS))  # digits: the paper's; token: one for each length


@dataclasses.dataclass(frozen=True)
class Train(Section):
  """Supervised finetuning (--mode=train)."""

  annotation: str = setting("plan", one_of(ANNOTATIONS))  # which chunks the rows of `data` get
  data: tuple[str, ...] = setting(("data/seed.jsonl",), file=True)  # files, data sets; FILE*2: twice
  validation: tuple[str, ...] = setting((), file=True)  # the same, held out
  min_speedup: float = 1.4  # annotated responses with a lower theoretical parallelism are left out
  # annotated responses with more chunks are left out, and those with fewer tokens a chunk on average; 0: no limit
  max_parts: int = setting(0, at_least(0), late=True)
  min_part: float = setting(0.0, at_least(0), late=True)
  plain_share: float = 0.15  # maximal share of examples without chunks
  workers: int = setting(0, at_least(0))  # processes that lay out rows before training; 0: the main process
  length: int = setting(640, at_least(1))  # tokens of a packed row; longer examples are left out
  batch_size: int = setting(3, between(1, 2**16))  # rows of a batch
  grad_accum_steps: int = setting(1, at_least(1))  # batches of a step
  steps: int = setting(0, at_least(0))  # optimizer steps; 0: enough for `epochs`
  epochs: float = 3.0
  learning_rate: float = 4e-4  # peak
  warmup: float = 0.05  # share of the steps
  weight_decay: float = 0.0
  adam_b2: float = 0.99
  max_grad_norm: float = 1.0  # gradients are clipped to this global norm
  lora_rank: int = setting(16, at_least(0))  # 0: train every parameter
  lora_alpha: float = 32.0
  # an adapter to go on from, as model.adapter, with its rank and alpha; "": updates start at zero
  start: str = setting("", file=True, late=True)
  # a length that is one token is learned with its neighbours: a Gaussian of this many tokens around it; 0: alone
  length_spread: float = setting(0.0, at_least(0), late=True)
  # an adapter without tags, usually Baseline-SFT, whose distribution of each token of text is learned; "": none
  teacher: str = setting("", file=True, late=True)
  dtype: str = setting(AUTO, one_of((AUTO, *DTYPES)))  # of matrix products
  remat: str = setting("full", one_of(REMAT))  # rematerialisation policy of a layer (model.transformer)
  attention: str = setting("auto", one_of(ATTENTION))  # auto: kernels on TPU, blocks of plain JAX elsewhere
  loss_chunk: int = setting(1024, at_least(1))  # tokens whose logits are computed at once
  seed: int = 0
  validate_every: int = setting(50, at_least(1))  # steps
  checkpoint_every: int = setting(25, at_least(1))  # steps

  def __post_init__(self):
    super().__post_init__()
    _check_steps("train", self.steps, self.epochs)


def _check_steps(name: str, steps: int, epochs: float) -> None:
  if not steps and not epochs > 0:
    raise ValueError(f"{name}.epochs must be above 0, or {name}.steps must give a number of steps")


@dataclasses.dataclass(frozen=True)
class Decode(Section):
  """Decoding, in every mode that decodes."""

  parallel: bool = setting(True, identity=NEVER)  # False: the same weights without promises
  # auto: the faster of the first two; float32: the same tokens at every branch width; int8, fp8: matrices in 8 bits,
  # products in bfloat16
  dtype: str = setting(AUTO, one_of((AUTO, *DTYPES, *WEIGHTS)))
  # the same bits at every branch width, batch size and pool size, in every dtype (decode.invariant)
  invariant: bool = setting(False, late=True)
  max_new_tokens: int = setting(512, at_least(1))  # of all threads together
  max_branches: int = setting(8, between(1, 256), identity=NEVER)  # branches that a step decodes at once
  kv_capacity: int = setting(4096, between(1, 2**20))  # entries of the key-value pool, prompt included
  max_depth: int = setting(1, between(0, 8), identity=PROMISES)  # levels of chunks
  max_topic: int = setting(12, between(1, 256), identity=PROMISES)  # tokens of a topic, with `guard`
  guard: bool = setting(True, identity=PROMISES)  # allow only well-formed tags
  temperature: float = setting(0.0, at_least(0))  # 0: the likeliest token
  top_k: int = setting(0, at_least(0))  # 0: off
  top_p: float = setting(1.0, within("(0, 1]"))
  min_p: float = setting(0.0, within("[0, 1)"))
  # None, of the next four: the adapter's own, otherwise OWN_SETTINGS (`resolved`)
  repetition_penalty: float | None = setting(None, at_least(1))  # 1: off
  no_repeat: int | None = setting(None, between(0, 1024))  # block topics and n-grams of this length; 0: off
  promise_bias: float | None = setting(
    None, identity=PROMISES
  )  # added to the logit of a promise's opening tag
  max_threads: int | None = setting(None, between(1, 4096), identity=PROMISES)  # with the main thread
  speed: int = setting(-1, identity=NEVER)  # of adapters that have it; 0: best quality; -1: none
  seed: int = 0
  # form in which an adapter is decoded; "": its own, others are experiments
  visibility: str = setting("", one_of(("", *VISIBILITIES)), identity=PROMISES, late=True)
  # which length a greedy promise gets where each is a token; apart: each competes with text on its own
  length: str = setting("likeliest", one_of(LENGTH_CHOICES), identity=PROMISES, late=True)
  attention: str = setting("auto", one_of(DECODE_ATTENTION), identity=NEVER)  # program of steps and prefill
  # CPU: programs of matrix products and attention; auto: numba's where they work
  kernels: str = setting("auto", one_of(KERNELS), identity=NEVER)
  # decode steps between two looks at whether to stop; 0: 1 on CPU, where a look costs nothing, 8 elsewhere
  steps_per_look: int = setting(0, between(0, 256), identity=NEVER)
  command_buffers: bool = setting(False, identity=NEVER)  # GPU: offer the loop of steps to CUDA graphs
  live: bool = setting(True, identity=NEVER)  # show branches while they are written, on a terminal
  compare: bool = setting(True, identity=NEVER)  # one prompt: time it without promises too
  batch_size: int = setting(4, between(1, 4096), identity=NEVER)  # prompts of a file decoded at once

  def __post_init__(self):
    super().__post_init__()
    if self.kv_capacity <= self.max_branches:
      raise ValueError(
        f"decode.kv_capacity={self.kv_capacity} must be above decode.max_branches={self.max_branches}: a step "
        "writes an entry for each branch"
      )
    if self.invariant and self.attention not in ("auto", "xla"):
      raise ValueError(
        f"decode.invariant has an attention of its own, not decode.attention={self.attention}: leave it at auto"
      )

  def resolved(self, own: Mapping[str, Any]) -> "Decode":
    """With a value for every setting: what was given, otherwise the adapter's `own`, otherwise OWN_SETTINGS."""
    values = {**OWN_SETTINGS, **own}
    return dataclasses.replace(self, **{n: v for n, v in values.items() if getattr(self, n) is None})


def own_setting(text: str) -> dict[str, Any]:
  """A setting of decoding that results depend on, such as "promise_bias=1.5", by its name; {} for "".

  Raises ValueError, one line, for a field or a value that does not exist.
  """
  if not text:
    return {}
  name, equals, value = text.partition("=")
  fields = {f.name: f for f in dataclasses.fields(Decode)}
  # Batches have eval.dtype; a speed is a part of the prompt, which results depend on too.
  known = {n for n, f in fields.items() if f.metadata.get("identity") != NEVER and n != "dtype"} | {"speed"}
  if not equals or name not in known:
    raise ValueError(f"takes FIELD=VALUE of decode, with one of {', '.join(sorted(known))}, not {text!r}")
  kind = fields[name].type
  kind = kind.__args__[0] if isinstance(kind, types.UnionType) else kind
  try:
    parsed: Any = {"True": True, "False": False}[value] if kind is bool else kind(value)  # type: ignore[operator]
    return {name: getattr(dataclasses.replace(Decode(), **{name: parsed}), name)}
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"gives decode.{name} no usable value in {text!r} ({error})") from None


def vary_of(text: str) -> tuple[str, ...]:
  """`eval.vary`, such as "decode.promise_bias=0,1.5", as the settings promise_bias=0 and promise_bias=1.5.

  Raises ValueError, one line, as `own_setting`.
  """
  name, _, values = text.removeprefix("decode.").partition("=")
  settings = tuple(f"{name}={value.strip()}" for value in values.split(",")) if text else ()
  found = [own_setting(s) for s in settings]
  if any(one in found[:k] for k, one in enumerate(found)):
    raise ValueError(f"has a value twice: {text!r}")
  return settings


def _readable(read: Callable[[str], Any]) -> Callable[[str], str]:
  """The rule that `read` takes the text."""

  def rule(text: str) -> str:
    try:
      read(text)
    except ValueError as error:
      return str(error)
    return ""

  return rule


@dataclasses.dataclass(frozen=True)
class System:
  """What can be evaluated and compared: an adapter and a way of decoding."""

  adapter: str = setting("", path=True)  # as model.adapter
  decode: str = setting("parallel", one_of(DECODINGS))
  speed: int | None = None  # None: decode.speed, where the adapter was trained with speeds
  follows_model: bool = False  # `adapter` is always model.adapter
  own: str = setting("", _readable(own_setting))  # a setting of decode for this system: "promise_bias=1.5"

  def to_dict(self) -> dict[str, Any]:
    out: dict[str, Any] = {"adapter": self.adapter, "decode": self.decode}
    out |= {} if self.speed is None else {"speed": self.speed}
    return out | ({"own": self.own} if self.own else {})


SYSTEMS: Mapping[str, System] = {
  "pasta": System(follows_model=True),
  "sequential": System(decode="sequential", follows_model=True),  # the same weights without promises
  "paper": System("pasta_paper"),  # PASTA-SFT in the paper's form
  "fast": System("pasta_fast"),  # after preference optimisation with a small weight on quality
  "quality": System("pasta_quality"),  # with a large one
  "baseline": System("baseline", "sequential"),  # Baseline-SFT
  "apar": System("apar"),  # chunks by form, no joins
  "sot": System("", "skeleton"),  # Skeleton-of-Thought: an outline, then its points side by side
  "base": System("", "sequential"),  # the model without an adapter
}


@dataclasses.dataclass(frozen=True)
class Skeleton(Section):
  """Skeleton-of-Thought (evaluate.systems.skeleton)."""

  max_points: int = 10  # of an outline; later ones are dropped
  outline_tokens: int = setting(160, at_least(0))  # 0: decode.max_new_tokens
  point_tokens: int = setting(128, at_least(0))  # of each point; 0: decode.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Eval(Section):
  """--mode=eval and --mode=pilot."""

  prompts: str = setting("", path=True)  # JSON lines: "prompt" or MT-Bench's "turns"; AlpacaEval's JSON
  limit: int = setting(0, at_least(0))  # prompts, spread evenly over the file; 0: all
  categories: tuple[str, ...] = ()  # of prompts; none: all
  systems: tuple[str, ...] = ("pasta", "baseline")  # of `Config.systems`
  baseline: str = "baseline"  # the system that the others are compared with
  # values of a field of decode, such as decode.promise_bias=0,1.5: every other system becomes one for each
  vary: str = setting("", _readable(vary_of))
  batch_size: int = setting(48, between(1, 4096))  # prompts decoded at once
  branch_width: int = setting(2, between(1, 4096))  # branches of each prompt in a step
  # as decode.dtype, batched; float32: the same at every batch size
  dtype: str = setting("float32", one_of((*DTYPES, *WEIGHTS)))
  timed: int = setting(0, at_least(-1))  # prompts timed one at a time, in decode.dtype; -1: all
  timed_prompts: str = setting("", path=True)  # a file of the prompts to time; "": the first of `prompts`
  repeats: int = setting(0, at_least(0))  # runs of each timed prompt, the last counts; 0: 1 on CPU, else 2
  judges: tuple[str, ...] = setting(("local",), _judges, path=True)  # local, llm, files of preferences
  judge_dtype: str = setting("bfloat16", one_of(DTYPES))  # of the local judge's model
  difficulty: str = setting("", path=True)  # file of difficulties, for the length-controlled win rate
  min_quality: float = 0.0  # pilot: win rate to reach, per cent; 0: none
  min_speedup: float = 0.0  # pilot: realised speedup to reach; 0: none


@dataclasses.dataclass(frozen=True)
class Preference(Section):
  """Preference optimisation (--mode=preference)."""

  prompts: str = setting("", file=True)  # to sample answers to; those of `eval` evaluate each round
  limit: int = setting(0, at_least(0))  # prompts, spread evenly over the file; 0: all
  rounds: int = setting(2, at_least(1), identity=NEVER)
  # λ, how much quality weighs against speed in a sample's score; a policy each
  weights: tuple[float, ...] = setting((1.0, 2.0, 4.0, 8.0, math.inf), _weights, identity=NEVER)
  conditioned: bool = False  # one policy for all weights: its prompts name the wanted speed (decode.speed)
  stages: tuple[str, ...] = setting(STAGES, each_of(STAGES), identity=NEVER)
  share: str = setting("", _share, identity=NEVER)  # stage sample: "2/3" for the second third of the prompts
  samples: int = setting(10, at_least(2))  # answers to a prompt; the best and the worst make a pair
  plain: bool = setting(False, late=True)  # and one more that is drawn without promises
  temperature: float = setting(0.5, above(0))  # of samples; at 0.8 nearly all of a small model's answers lose
  sample_dtype: str = setting("float32", one_of(DTYPES))
  decode_batch_size: int = setting(48, between(1, 4096), identity=NEVER)  # prompts decoded at once
  branch_width: int = setting(2, between(1, 4096), identity=NEVER)  # branches of each prompt in a step
  audit: int = setting(8, at_least(0), identity=NEVER)  # samples whose log p the trainer recomputes
  score: str = setting("delivered", one_of(SCORES))  # what speedup means (preference.score)
  cost: str = setting("", file=True)  # file of the step cost, for score=clock (evaluate.benchmark)
  # preference: for the sample over Baseline-SFT's answer; grade: of all samples in one call; ratio: the paper's
  quality: str = setting("preference", one_of(QUALITIES), late=True)
  guards: bool = True  # a defective answer cannot be the best one
  loss: str = setting("bonbon", one_of(LOSSES))
  alpha: float = setting(0.005, within("[0, 1]"))  # weight of the best answer's likelihood in BoNBoN's loss
  beta: float = setting(0.0, at_least(0))  # 0: from the number of samples (train.losses)
  per_token: bool = True  # compare log p per token; False: summed over an answer, as in the paper
  length: int = setting(768, at_least(1))  # tokens of a packed row; longer samples are left out
  batch_size: int = setting(3, between(2, 2**16))  # rows, with about as many pairs
  grad_accum_steps: int = setting(2, at_least(1))  # batches of a step
  steps: int = setting(0, at_least(0))  # optimizer steps; 0: enough for `epochs`
  epochs: float = 1.0
  learning_rate: float = 5e-5  # peak
  warmup: float = 0.1  # share of the steps
  weight_decay: float = 0.0
  adam_b2: float = 0.99
  max_grad_norm: float = 1.0  # gradients are clipped to this global norm
  lora_rank: int = setting(16, at_least(0))  # of new updates, if the start has none; 0: train every parameter
  lora_alpha: float = 32.0
  dtype: str = setting(AUTO, one_of((AUTO, *DTYPES)))  # of matrix products
  remat: str = setting("full", one_of(REMAT))  # as train.remat
  attention: str = setting("auto", one_of(ATTENTION))  # as train.attention
  loss_chunk: int = setting(1024, at_least(1))  # tokens whose logits are computed at once
  seed: int = 0
  checkpoint_every: int = setting(10, at_least(1), identity=NEVER)  # steps
  # of each prompt's samples, the best ones that go into best.jsonl, for train.data; 0: none
  best: int = setting(0, at_least(0), identity=NEVER)
  # shares of a round's steps after which the adapter is kept as it is then (`kept_folder`)
  keep: tuple[float, ...] = setting((), _shares, identity=NEVER)

  def __post_init__(self):
    super().__post_init__()
    _check_steps("preference", self.steps, self.epochs)
    if self.share and self.stages != ("sample",):
      raise ValueError(
        f"preference.share={self.share!r} is for samples: give --config.preference.stages=sample too, and "
        "run the other stages without a share"
      )


@dataclasses.dataclass(frozen=True)
class Endpoint(Section):
  """A language model behind HTTP, or one that answers files (utils.endpoint)."""

  # openai: any OpenAI-compatible endpoint; batch: by file, the run stops until answers lie beside the requests
  kind: str = setting("openai", one_of(PROVIDERS))
  url: str = ""  # "": the provider's own; a local server: http://localhost:8000/v1; may have user:password@
  model: str = ""
  # environment variable that holds the key; "": OPENAI_API_KEY or GEMINI_API_KEY
  key_env: str = setting("", _variable)
  max_tokens: int = setting(1, at_least(1))  # of an answer
  concurrency: int = setting(8, at_least(1))  # calls at once
  retries: int = setting(6, at_least(0))  # of a call that failed
  timeout: float = setting(60.0, above(0))  # seconds, of an attempt as a whole


@dataclasses.dataclass(frozen=True)
class Judge(Endpoint):
  """The judge of eval.judges=llm. More `max_tokens` if its answers do not begin with the letter."""

  logprobs: bool = True  # ask for token probabilities; False for servers that refuse
  cache: str = setting("", path=True)  # file of paid calls, to share between runs; "": in the run's folder
  # one: each pair once, places balanced over prompts
  orders: str = setting("both", one_of(ORDERS), identity=NEVER)
  both: int = setting(0, at_least(0), identity=NEVER)  # prompts that are read in both orders all the same
  # prompts that are read a second time, to measure noise
  repeats: int = setting(0, at_least(0), identity=NEVER)
  defects: bool = setting(False, identity=NEVER)  # one more call an answer, which names its defects
  seed: int = setting(0, identity=NEVER)  # of places, and of the prompts that are read more than once


@dataclasses.dataclass(frozen=True)
class Annotate(Endpoint):
  """--mode=annotate."""

  kind: str = setting("openai", one_of((*PROVIDERS, "structure")))  # structure: by form
  max_tokens: int = setting(1500, at_least(1))  # of an answer
  timeout: float = setting(120.0, above(0))  # seconds
  # JSON lines: prompt and response; Alpaca's fields; SlimOrca's conversations; messages
  data: str = setting("", path=True)
  limit: int = setting(0, at_least(0))  # rows, spread evenly over the file; 0: all
  # file of evaluation prompts: rows that share eight consecutive words with one are left out
  avoid: str = setting("", path=True)
  per_minute: int = setting(0, at_least(0))  # maximal rate of calls; 0: no limit
  tries: int = setting(3, at_least(1))  # answers asked for until one can be used
  # which parts are chunks; full: few, full ones that read along; paper: by the paper's rules; both without the check
  rules: str = setting("independent", one_of(ANNOTATION_RULES), late=True)
  check: bool = True  # ask of each chunk whether its writer had the information to write it
  demonstrations: str = setting("data/seed.jsonl", path=True)
  against: str = setting("", path=True)  # file with other annotations of the same responses, to compare with
  price_read: float = 0.0  # of a million tokens
  price_written: float = 0.0  # of a million tokens

  @property
  def checks(self) -> bool:
    """Whether plans are checked: the paper's rules have no check of independence, and chunks that read along need
    not be independent."""
    return self.check and self.rules == "independent"


@dataclasses.dataclass(frozen=True)
class Dataset(Section):
  """--mode=build."""

  # files of annotated or plain responses: JSON lines, parquet, Arrow folders
  train: tuple[str, ...] = setting((), path=True)
  validation: tuple[str, ...] = setting((), path=True)  # the same
  validation_share: float = setting(0.0, within("[0, 1)"))  # of `train`, by prompt; if `validation` is empty
  avoid: str = setting("", path=True)  # file of evaluation prompts, as annotate.avoid
  strict: bool = False  # stop at a row that cannot be used, instead of listing it


@dataclasses.dataclass(frozen=True)
class Compile(Section):
  """--mode=compile: steps for a TPU slice or a GPU you do not have (train.ahead, decode.ahead)."""

  topology: str = "v5e:2x2"  # or a GPU of utils.topology
  stages: tuple[str, ...] = setting(("train",), each_of(PROGRAMS))
  branches: tuple[int, ...] = setting(
    (8,), each_between(1, 256)
  )  # decode: of a request, a program for each number
  requests: tuple[int, ...] = setting(
    (1,), each_between(1, 4096)
  )  # decode: at once, a program for each number
  pool: int = setting(4096, between(128, 2**20))  # decode: entries of a request's key-value pool
  prompt: int = setting(512, between(1, 2**20))  # prefill: tokens


@dataclasses.dataclass(frozen=True)
class Export(Section):
  """--mode=export."""

  form: str = setting("merged", one_of(EXPORTS))  # a Hugging Face folder; the adapter alone
  dtype: str = setting("float32", one_of(DTYPES))
