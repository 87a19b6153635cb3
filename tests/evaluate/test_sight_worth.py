"""What sight is worth: sums of nats under three rules, against a dense pass with masks made by hand."""

import types

import numpy as np
import pytest
from helpers import tiny

from pasta_jax.evaluate import sight_worth
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.positions import PositionRule

RESPONSE = "tree stone amber lemon tiger cloud river stone"
SPANS = [(11, 22), (23, 34)]  # "amber lemon", "tiger cloud"
ROWS = [
  {"id": "chunks", "prompt": "tree", "response": RESPONSE, "syncs": [],
   "chunks": [{"start": a, "end": b, "topic": "the"} for a, b in SPANS]},
  {"id": "plain", "prompt": "tree", "response": RESPONSE, "syncs": [], "chunks": []},
]  # fmt: skip


@pytest.fixture(scope="module")
def measured():
  model = tiny.model()
  fake = types.SimpleNamespace(
    model=model,
    vocabulary=tiny.VOCABULARY,
    forms=Forms(PositionRule("fixed", 5)),
    encode=lambda prompt: tiny.VOCABULARY.tokenizer.encode(prompt),
  )
  return sight_worth.measure(fake, ROWS)


def test_parts_are_counted_once_and_rules_agree_where_nothing_is_promised(measured):
  chunks, plain = measured
  assert chunks.tokens.tolist() == [8, 4, 4] and plain.tokens.tolist() == [8, 0, 8]
  for row in measured:
    for nats in row.nats.values():
      assert nats[0] == pytest.approx(nats[1] + nats[2]) and np.isfinite(nats).all()
  for name in sight_worth.RULES:
    np.testing.assert_allclose(plain.nats[name], plain.nats["promise"])
  different = {tuple(np.round(chunks.nats[name], 6)) for name in sight_worth.RULES}
  assert len(different) == 3  # each rule shows the chunks something else


def test_intervals_are_over_rows_and_paired(measured):
  figures = sight_worth.summarise([*measured] * 20)
  for by_rule in figures.values():
    assert by_rule["promise"]["difference"] == by_rule["promise"]["low"] == by_rule["promise"]["high"] == 0
    for f in by_rule.values():
      assert f["low"] <= f["difference"] <= f["high"]
      assert f["nats"] == pytest.approx(by_rule["promise"]["nats"] + f["difference"])
  assert set(figures) == set(sight_worth.PARTS)
  sight_worth.draw(figures)
  sight_worth.show(figures, 2)
