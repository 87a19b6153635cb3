"""The input pipeline: worker processes, batches ahead of the step, and its state in checkpoints."""

from pathlib import Path

import numpy as np
import pytest
from test_data import example_of
from test_training import LENGTH, RULE, settings, tiny  # noqa: F401  (a fixture)

from pasta_jax.config import with_changes
from pasta_jax.data.examples import examples
from pasta_jax.data.packing import PackedBatches
from pasta_jax.data.pipeline import DataIterator, fingerprint, parallel_map
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.train import sft
from pasta_jax.utils.jsonl import DataError, read_jsonl
from pasta_jax.weights.checkpoint import load_checkpoint


def square(x: int) -> int:
  return x * x


def test_workers_keep_the_order():
  for workers in (0, 3):
    assert list(parallel_map(square, range(20), workers)) == [x * x for x in range(20)]
  assert list(parallel_map(square, [], 0)) == []


def test_workers_lay_out_what_one_process_does(tiny: Path):  # noqa: F811
  vocabulary: Vocabulary = load_checkpoint(tiny / "model").vocabulary
  rows = read_jsonl(tiny / "data.jsonl")
  how = dict(
    vocabulary=vocabulary, rule=RULE, annotation="plan", max_length=LENGTH, min_speedup=0.9, plain_share=0.1
  )
  alone, shared = (examples(rows, workers=n, **how) for n in (0, 2))
  assert fingerprint(alone.examples) == fingerprint(shared.examples) and len(alone.examples) > 3
  assert (alone.too_long, alone.too_slow, alone.too_plain) == (
    shared.too_long,
    shared.too_slow,
    shared.too_plain,
  )
  assert fingerprint(alone.examples[1:]) != fingerprint(alone.examples)
  bad = {**rows[0], "id": "odd", "chunks": [{"start": 0, "end": 10**6, "topic": "t"}]}
  for workers in (0, 2):
    with pytest.raises(DataError, match="^row odd: chunk 0..1000000 is not inside the response$"):
      examples([*rows, bad], workers=workers, **how)


def test_an_iterator_continues_from_its_state():
  """After any step, for a share of the rows as for all of them."""
  data = [example_of(n, 5 + n) for n in range(12)]
  packed = PackedBatches(data, batch_size=3, length=20, levels=1, seed=1)
  new = lambda share=None: DataIterator(
    lambda i: packed(i, share).as_dict(), steps=7, grad_accum_steps=2, identity=fingerprint(data)
  )
  whole = new()
  expected, states = [], [whole.state()]
  for step in range(7):
    expected.append(whole())
    states.append(whole.state())
    np.testing.assert_array_equal(
      expected[-1]["tokens"], np.stack([packed(2 * step + i).tokens for i in range(2)])
    )
  with pytest.raises(StopIteration):
    whole()
  for step in (0, 1, 4, 6):
    for share in (None, [0, 1, 2], [2]):
      feed = new(share)
      if step == 4:
        feed()  # wherever it stood
      feed.restore(states[step])
      for later in expected[step:]:
        for name, value in feed().items():
          np.testing.assert_array_equal(value, later[name][:, share or [0, 1, 2]])
      feed.close()
  whole.close()


def test_going_on_with_other_data_is_said(tiny, tmp_path: Path, capsys):  # noqa: F811
  config = settings(tiny, steps=2, checkpoint_every=1)
  sft.train(config, tmp_path / "run")
  rows = (tiny / "data.jsonl").read_text().splitlines()
  (tmp_path / "fewer.jsonl").write_text("\n".join(rows[:-2]))
  config = with_changes(config, {"train.steps": 3})
  sft.train(config, tmp_path / "run")
  assert "other training data" not in capsys.readouterr().out
  config = with_changes(config, {"train.steps": 4, "train.data": str(tmp_path / "fewer.jsonl")})
  sft.train(config, tmp_path / "run")
  assert "resuming with other training data than before" in capsys.readouterr().out
