"""Which tokens a token of a timeline could see: a few numbers on each lane, and a script that fades the others.

A lane's attributes describe the tokens of its thread. `data-at` has their indices in serialised order. Under the
visibility `live`, `data-rounds` has the rounds in which they are read; otherwise `data-masked` has the intervals of
queries that they are hidden from, which are the same for all tokens of a thread. Indices and rounds go up by one
except after a promise or at a sync, so that they are lists of runs: "0:7 5:40" stands for 7, 8, 9, 10, 11, 40, 41, …
All come from `lang.layout`; `SCRIPT` evaluates the rules of `lang.visibility` on them.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from pasta_jax.decode.trace import Trace
from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.vocabulary import Vocabulary

STYLE = ".pasta-timeline .unseen { opacity: .13 }"

# Without < and &, so that it is the same text in XML and in HTML. One listener serves all timelines of a page.
SCRIPT = """
for (const event of ['pointerover', 'pointerout']) document.addEventListener(event, ({type, target}) => {
  for (const cell of document.querySelectorAll('.pasta-timeline .unseen')) cell.classList.remove('unseen');
  const cell = target.closest('.pasta-timeline .cell');
  if (!cell || type === 'pointerout') return;
  const pairs = text => (text || '').split(' ').filter(Boolean).map(pair => pair.split(':').map(Number));
  const value = (runs, i) => runs.filter(([own]) => i >= own).map(([own, first]) => first + i - own).pop();
  const tokens = [...cell.closest('svg').querySelectorAll('.lane')].flatMap(lane => {
    const [at, rounds, masked] = ['at', 'rounds', 'masked'].map(name => pairs(lane.dataset[name]));
    return [...lane.querySelectorAll('.cell')].map(
      (cell, i) => ({cell, at: value(at, i), round: value(rounds, i), masked}));
  });
  const q = tokens.find(k => k.cell === cell);
  for (const k of tokens) {
    const hidden = k.round >= q.round || k.masked.some(([start, stop]) => q.at >= start ? stop > q.at : false);
    k.cell.classList.toggle('unseen', k === q ? false : k.at > q.at || hidden);
  }
});
"""


def seen_by(trace: Trace, vocabulary: Vocabulary) -> Iterator[str]:
  """The attributes of each lane, in the order of `pieces.by_tree`."""
  laid = layout(trace.main, PositionRule(), vocabulary.table)  # without the prompt, which all tokens see
  for number in range(len(trace.threads)):
    [at] = np.nonzero(laid.threads == number)
    if not len(at):
      yield ""
    elif trace.visibility == "live":
      yield f' data-at="{_runs(at)}" data-rounds="{_runs(laid.rounds[at])}"'
    else:
      masked = " ".join(f"{start}:{stop}" for start, stop in laid.masked_intervals[at[0]] if start < stop)
      yield f' data-at="{_runs(at)}"' + (f' data-masked="{masked}"' if masked else "")


def _runs(values: Sequence[int] | np.ndarray) -> str:
  """Numbers as `own index:value` wherever they do not go up by one."""
  starts = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1] + 1)]
  return " ".join(f"{i}:{values[i]}" for i in starts)
