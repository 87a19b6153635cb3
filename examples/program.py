"""Parses a PASTA program and prints its layout: positions, which tokens each token sees, and what it costs.

python examples/program.py
"""

import numpy as np

from pasta_jax.lang.cost import cost
from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.syntax import parse
from pasta_jax.lang.visibility import is_visible
from pasta_jax.weights.checkpoint import load_checkpoint

SOURCE = (
  'Hi: <promise topic="a" tokens="10"/><async>cat</async><promise topic="b" tokens="10"/><async>dog</async>'
  "<sync/>end"
)


def main() -> None:
  vocabulary = load_checkpoint("tiny").vocabulary  # a tokenizer of bytes: no download
  rule = PositionRule("pred_10x")
  thread = vocabulary.encode(parse(SOURCE), rule)
  laid = layout(thread, rule, vocabulary.table)
  at = np.arange(len(laid))
  visible = is_visible(at[:, None], at[None, :], laid.masked_intervals[None])

  print("token  thread  position  sees")
  for i, token in enumerate(laid.tokens):
    seen = "".join("x" if v else "." for v in visible[i, : i + 1])
    print(f"{vocabulary.label(int(token)).strip()[:5]:5}  {laid.threads[i]:6}  {laid.positions[i]:8}  {seen}")
  figures = cost(thread, vocabulary.table)
  print(f"\n{figures.total_tokens} tokens, {figures.longest_path} steps with a branch for every chunk")


if __name__ == "__main__":
  main()
