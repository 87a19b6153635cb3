"""Figures of promises and chunks, counted by hand."""

from pasta_jax.decode.record import ResponseRecord
from pasta_jax.evaluate.chunk_figures import figures, show
from pasta_jax.lang.syntax import parse

FACTS = dict(
  text="", finish_reason="stop", total_tokens=9, steps=9, longest_path=9, peak_parallelism=2, depth=1,
  ill_formed=0, refused=0, topic_twice=False, loops=False,
)  # fmt: skip


def test_promises_and_chunks_are_counted(capsys):
  one = "1. A:<promise/><async> b\n2. C: d</async>\n- E:<promise/><async> f 3. g\nplain - h</async>"
  two = "<promise/><async>a<promise/><async>b\n* c</async></async>"  # the outer chunk has the item too
  records = [
    ResponseRecord(**FACTS, text_tokens=20, promises=2, lengths=((30, 31), (30, 30)), unseparated=1),
    ResponseRecord(**FACTS, text_tokens=10, promises=2, lengths=((10, 12),), unseparated=0),
    ResponseRecord(**FACTS, text_tokens=90, promises=0, lengths=(), unseparated=0),
  ]
  assert figures(records, [parse(one), parse(two), parse("1. a\n2. b")]) == {
    "promises an answer": "1.33",
    "chunks that run into a next item": "3 of 4",
    "joins without a separator": "1 of 4",
    "text tokens, median": "20",
    "chunks longer than promised": "2 of 3",
    "declared lengths: rank correlation with true ones, all chunks": "0.87 (0.87 to 0.87), 3 chunks",
    "promises with the commonest length": "67 % (0 to 100), 30 tokens",
    "chunks that end 10 tokens before their number, or earlier": "0 % (0 to 0)",
    "chunks that end less than 10 tokens before it, or at it": "33 % (0 to 50)",
    "chunks that end 1 to 10 tokens after it": "67 % (50 to 100)",
    "chunks that end later": "0 % (0 to 0)",
  }
  assert figures(records[2:], [()]).keys() == {
    "promises an answer", "chunks that run into a next item", "joins without a separator", "text tokens, median",
  }  # fmt: skip
  show({"one": figures(records, [parse(one), parse(two), ()]), "plain": figures(records[2:], [()])})
  assert (
    "chunks longer than promised" in (shown := capsys.readouterr().out) and "2 of 3" in shown and "–" in shown
  )
