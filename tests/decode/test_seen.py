"""What the lanes of a timeline say of who sees whom, against the rules of `lang`; the page's script, in a browser."""

import dataclasses
import shutil
import subprocess

import numpy as np
import pytest
from helpers.programs import NESTED
from test_views import RULE, TRIP, VOCABULARY, as_trace, find

from pasta_jax.decode.trace import Trace
from pasta_jax.decode.views.timeline import timeline_html, timeline_svg
from pasta_jax.lang.layout import layout
from pasta_jax.lang.program import Promise, Sync, Text
from pasta_jax.lang.visibility import is_visible, is_visible_live
from pasta_jax.lang.vocabulary import Vocabulary


def random_program(rng: np.random.Generator, depth: int = 0) -> tuple:
  """Chunks three deep, syncs anywhere: joined, adopted and never joined."""
  nodes: list = [Text("ab " * int(rng.integers(1, 4)))]
  for _ in range(rng.integers(1, 4)):
    kind = rng.integers(4)
    if kind < 2 and depth < 3:
      nodes.append(Promise("t", None, random_program(rng, depth + 1)))
    nodes.append(Sync() if kind == 2 else Text("c d "))
  return tuple(nodes)


def seen_pairs(svg: str) -> np.ndarray:
  """[tokens, tokens] whether the query (row) sees the key, by the numbers on the lanes; tokens lane by lane."""
  at, rounds, masked = [], [], []
  for lane in find(svg, "lane"):
    runs = lambda name, lane=lane: [tuple(map(int, p.split(":"))) for p in lane.get(name, "").split()]
    n = sum("cell" in e.get("class", "").split() for e in lane.iter())
    value = lambda name, i, runs=runs: [first + i - own for own, first in runs(name) if own <= i][-1]
    at += [value("data-at", i) for i in range(n)]
    rounds += [value("data-rounds", i) if lane.get("data-rounds") else 0 for i in range(n)]
    masked += [runs("data-masked")] * n
  live = any(rounds)
  return np.array([
    [k == q or at[k] < at[q] and (rounds[k] < rounds[q] if live else not any(
      start <= at[q] < stop for start, stop in masked[k])) for k in range(len(at))]
    for q in range(len(at))
  ])  # fmt: skip


def by_layout(trace: Trace, vocabulary: Vocabulary) -> np.ndarray:
  """The same by the rules of `lang.visibility`."""
  laid = layout(trace.main, RULE, vocabulary.table)
  order = np.lexsort((laid.index, laid.threads))  # lane by lane
  q, k = order[:, None], order[None, :]
  if trace.visibility == "live":
    return is_visible_live(q, k, laid.rounds[q], laid.rounds[k])
  return is_visible(q, k, laid.masked_intervals[k])


@pytest.mark.parametrize("visibility", ["promise", "live"])
def test_lanes_say_what_each_token_could_see(visibility):
  chunks = 0
  for seed in range(12):
    trace = as_trace(random_program(np.random.default_rng(seed)))
    for t in (trace, as_trace(TRIP, 9 * seed + 1)):
      t = dataclasses.replace(t, visibility=visibility)
      np.testing.assert_array_equal(seen_pairs(timeline_svg(t, VOCABULARY)), by_layout(t, VOCABULARY))
    chunks += len(trace.threads) - 1
  assert chunks > 20


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POINT = """<script>
  const cells = [...document.querySelectorAll('.cell')];
  const rows = cells.map(cell => {
    cell.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
    const row = cells.map(k => Number(!k.classList.contains('unseen'))).join('');
    cell.dispatchEvent(new PointerEvent('pointerout', {bubbles: true}));
    return row + ' ' + document.querySelectorAll('.unseen').length;
  });
  document.body.innerHTML = '@' + rows.join(';') + '@';
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("visibility", ["promise", "live"])
def test_pointing_at_a_token_fades_what_it_could_not_see(visibility, tmp_path):
  """The page's own script, for every token; nothing stays faded."""
  trace = dataclasses.replace(as_trace(NESTED), visibility=visibility)
  page = tmp_path / "page.html"
  page.write_text(timeline_html(trace, VOCABULARY).replace("</body>", f"{POINT}</body>"))
  options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
  done = subprocess.run(
    [CHROMIUM, *options, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120, text=True
  )
  rows = [row.split() for row in done.stdout.split("@")[-2].split(";")]
  assert {left for _, left in rows} == {"0"}
  shown = np.array([[c == "1" for c in row] for row, _ in rows])
  np.testing.assert_array_equal(shown, by_layout(trace, VOCABULARY))
