"""What sight is worth: sums of nats under three rules, against a dense pass with masks made by hand."""

import types

import numpy as np
import pytest
from helpers import tiny

from pasta_jax.evaluate import nats, sight_worth
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
    has_tags=True,
    vocabulary=tiny.VOCABULARY,
    forms=Forms(PositionRule("fixed", 5)),
    encode=lambda prompt: tiny.VOCABULARY.tokenizer.encode(prompt),
  )
  return sight_worth.measure(fake, ROWS)


def test_parts_are_counted_once_and_rules_agree_where_nothing_is_promised(measured):
  nats, tokens = measured
  assert tokens.tolist() == [[8, 4, 4], [8, 0, 8]]  # with chunks, plain
  for sums in nats.values():
    np.testing.assert_allclose(sums[:, 0], sums[:, 1] + sums[:, 2])
    assert np.isfinite(sums).all()
    np.testing.assert_allclose(sums[1], nats["promise"][1])
  different = {tuple(np.round(sums[0], 6)) for sums in nats.values()}
  assert len(different) == 3  # each rule shows the chunks something else


def test_intervals_are_over_rows_and_paired(measured, capsys):
  sums, tokens = measured
  tiled = {name: np.tile(x, (20, 1)) for name, x in sums.items()}
  figures = nats.summarise(tiled, np.tile(tokens, (20, 1)), sight_worth.PARTS)
  for by_rule in figures.values():
    assert by_rule["promise"]["difference"] == by_rule["promise"]["low"] == by_rule["promise"]["high"] == 0
    for f in by_rule.values():
      assert f["low"] <= f["difference"] <= f["high"]
      assert f["nats"] == pytest.approx(by_rule["promise"]["nats"] + f["difference"])
  assert set(figures) == set(sight_worth.PARTS)
  assert [len(axes.lines) for axes in nats.draw(figures).axes] == [5, 5, 5]  # two rules, and zero
  nats.show(figures, "a title")
  assert "difference to promise" in " ".join(capsys.readouterr().out.split())
