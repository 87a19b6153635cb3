"""Nats of the reader's text by several adapters: against a dense pass with a mask made by hand, and by pairs."""

import types

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import tiny

from pasta_jax.config import Config
from pasta_jax.data.examples import encoded, program_of
from pasta_jax.evaluate import nats, text_nats
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.utils.jsonl import DataError

RULE = PositionRule("fixed", 5)  # no numbers: the tiny tokenizer lacks most of them
PARTS_OF_TEXT = [
  "tree stone",
  "amber lemon tiger cloud river a the in of stone cloud",
  "stone river cloud tiger tree in a of the lemon tiger",
]
RESPONSE = " ".join(PARTS_OF_TEXT)
STARTS = [RESPONSE.index(p) for p in PARTS_OF_TEXT[1:]]
CHUNKS = [{"start": a, "end": a + len(p), "topic": "the"} for a, p in zip(STARTS, PARTS_OF_TEXT[1:])]
ROWS = [
  {"id": "chunks", "prompt": "tree cloud", "response": RESPONSE, "syncs": [], "chunks": CHUNKS},
  {"id": "plain", "prompt": "lemon", "response": "tiger of a lemon", "syncs": [], "chunks": []},
]


class Fake(types.SimpleNamespace):
  """A Model of random weights."""

  def __init__(self, seed: int, form: Forms = Forms(RULE), has_tags: bool = True):
    graph, _ = nnx.split(tiny.model(tiny.CONFIGS[form.number]))
    params = tiny.weights(seed, number=form.number)
    super().__init__(
      params=params,
      model=nnx.merge(graph, params),
      has_tags=has_tags,
      vocabulary=tiny.VOCABULARIES[form.promise, form.number],
      forms=form,
      encode=tiny.VOCABULARY.tokenizer.encode,
    )


FAKES = {
  "baseline": Fake(0, has_tags=False),
  "topic": Fake(0),
  "same": Fake(0),
  "head": Fake(1, Forms(RULE, promise="head")),
  "token": Fake(1, Forms(promise="head", number="token")),
  "live": Fake(0, Forms(RULE, "live")),
}


def compare(*names: str, rows=ROWS) -> nats.Figures:
  return text_nats.compare(Config(), rows, names)


@pytest.fixture(autouse=True)
def adapters(monkeypatch):
  monkeypatch.setattr(text_nats, "source_of", lambda config, adapter: FAKES[adapter])
  monkeypatch.setattr(text_nats, "Model", lambda config, adapter, dtype: FAKES[adapter])


def by_hand(fake: Fake, row: dict) -> tuple[float, float]:
  """(-log p of the whole response, that of its text), without syncs: a thread sees itself and those above it up to
  its promise."""
  program = program_of(row) if fake.has_tags else program_of(row | {"chunks": []})
  rule = fake.forms.positions
  thread = encoded(program, fake.vocabulary, rule)
  laid = layout(thread, rule, fake.vocabulary.table, fake.encode(row["prompt"]))
  at, own = np.arange(len(laid)), laid.threads
  mask = (at[None] <= at[:, None]) & ((own[None] == own[:, None]) | (own[None] == 0))
  logits = tiny.dense_logits(fake.params, laid.tokens, laid.positions, mask)
  log_p = np.asarray(jax.nn.log_softmax(logits))
  tags = fake.vocabulary.tags
  inside = np.cumsum(laid.tokens == tags.open) > np.cumsum(laid.tokens == tags.close)  # of a promise
  is_text = ~inside & (laid.tokens > 0) & (laid.tokens < tiny.VOCABULARY.tokenizer.vocab_size)
  threads = [at[own == thread] for thread in np.unique(own)]
  pairs = [(q, k) for mine in threads for q, k in zip(mine, mine[1:]) if laid.index[k] >= 0]
  cost = {k: -log_p[q, laid.tokens[k]] for q, k in pairs}
  return sum(cost.values()), sum(cost[k] for k in cost if is_text[k])


@pytest.mark.parametrize("name", ["baseline", "topic", "head", "token"])
def test_parts_add_up_to_the_likelihood_of_the_layout(name: str):
  figures = {part: by_name[name] for part, by_name in compare(name).items()}
  expected = np.sum([by_hand(FAKES[name], row) for row in ROWS], axis=0)
  n = sum(len(row["response"].split()) for row in ROWS)  # the tokenizer's words, whatever the form
  assert set(figures) == set(text_nats.PARTS) and all(f["tokens"] == n for f in figures.values())
  np.testing.assert_allclose(sum(f["nats"] for f in figures.values()) * n, expected[0], rtol=1e-5)
  np.testing.assert_allclose(figures["text"]["nats"] * n, expected[1], rtol=1e-5)
  assert (figures["control"]["nats"] > 0) == FAKES[name].has_tags


def test_adapters_that_agree_do_not_differ_and_others_do():
  figures = compare("topic", "same", "topic@promise", "topic@live", "live", "live@promise", "baseline")
  for part, by_name in figures.items():
    for name in ("same", "topic@promise", "live@promise"):
      assert by_name[name]["difference"] == by_name[name]["low"] == by_name[name]["high"] == 0, part
    assert by_name["topic@live"] == by_name["live"]
  assert list(figures["text"])[-1] == "baseline"
  assert figures["text"]["live"]["difference"] != 0 and figures["text"]["baseline"]["difference"] != 0
  plain = compare("topic", "live", "baseline", rows=ROWS[1:])  # nothing to see, nothing to promise
  np.testing.assert_allclose([f["difference"] for p in plain.values() for f in p.values()], 0, atol=1e-6)


def test_what_cannot_be_compared_is_one_line(monkeypatch):
  for names in ((), ("topic", "topic")):
    with pytest.raises(ValueError, match="--adapters needs"):
      compare(*names)
  with pytest.raises(DataError, match="^row odd: "):
    compare("topic", rows=[*ROWS, {"id": "odd", "prompt": "tree", "response": "unknown"}])
  with pytest.raises(DataError, match="^row none: no text under prompt"):
    compare("baseline", rows=[{"id": "none", "response": "tree"}])
  monkeypatch.setattr(text_nats, "Model", None)  # nothing is loaded before all are known to exist
  with pytest.raises(KeyError, match="missing"):
    compare("topic", "missing@live")
