"""Positions (docs/language.md section 4): how far the promising thread jumps over a chunk."""

import dataclasses

from pasta_jax.config.sections import ORACLES, STRATEGIES
from pasta_jax.lang.automaton import MAX_DECLARED
from pasta_jax.lang.thread import Thread


@dataclasses.dataclass(frozen=True)
class PositionRule:
  """What a promise's number says, the gap that it reserves, and where a thread goes on after a sync.

  strategy   number written in a promise   gap reserved                       position after a sync
  pred_10x   length, rounded up to tens    the number, rounded up to tens     unchanged
  pred_1x    length                        the number                         unchanged
  fixed      none                          `fixed`                            unchanged
  oracle     none                          the true length                    unchanged
  oracle_10x length, rounded up to tens    the true length                    unchanged
  oracle_1x  length                        the true length                    unchanged
  max        length, rounded up to tens    none                               after the furthest joined position
  sum        length, rounded up to tens    none                               plus the number of joined tokens

  The three oracles are for teacher forcing: who decodes does not know true lengths (`needs_lengths`).
  Under `pred_10x` and `pred_1x` a promise without a number reserves `fixed` positions. A length above
  `automaton.MAX_DECLARED` is written as the largest number that fits, and the chunk outgrows its gap.
  """

  strategy: str = "pred_10x"
  fixed: int = 60

  def __post_init__(self):
    if self.strategy not in STRATEGIES:
      raise ValueError(f"position strategy {self.strategy!r} is none of {', '.join(STRATEGIES)}")

  @property
  def numbered(self) -> bool:
    """Whether promises carry `tokens="…"`."""
    return self.strategy not in ("fixed", "oracle")

  @property
  def needs_lengths(self) -> bool:
    """Whether gaps are true lengths, so that no interpreter can follow the rule."""
    return self.strategy in ORACLES

  @property
  def in_tens(self) -> bool:
    """Whether these numbers are tens."""
    return self.numbered and self.strategy not in ("pred_1x", "oracle_1x")

  def written(self, length: int, most: int = MAX_DECLARED) -> int | None:
    """The number to write in the promise of a chunk that spans `length` positions, `most` at most."""
    if not self.numbered:
      return None
    return min(-(-length // 10), most // 10) * 10 if self.in_tens else min(length, most)

  def gap(self, declared, true_length=None):
    """Positions reserved for a chunk; `declared` is the promise's number, negative where it has none.

    Works on integers and on arrays of them. Only the oracles read `true_length`.
    """
    if self.needs_lengths:
      if true_length is None:
        raise ValueError(
          f"position strategy {self.strategy!r} needs true lengths: it is for teacher forcing only"
        )
      return true_length
    if self.strategy in ("max", "sum"):
      return declared * 0
    if self.strategy == "fixed":
      return declared * 0 + self.fixed
    given = declared >= 0
    number = (declared + 9) // 10 * 10 if self.strategy == "pred_10x" else declared
    return number * given + self.fixed * (1 - given)

  def at_sync(self, position, furthest, joined):
    """Position of a sync. `position`: its place if it joined nothing; `furthest`: one after the last position
    that it joins; `joined`: the tokens that it joins. Integers or arrays; without chunks both are 0."""
    if self.strategy == "max":
      return position + (furthest - position) * (furthest > position)
    return position + joined if self.strategy == "sum" else position


def span(chunk: Thread, rule: PositionRule) -> int:
  """Positions that a chunk takes: its own tokens with both tags, and the gaps that it reserves itself."""
  gaps = 0
  for fork in chunk.forks:
    declared = -1 if fork.declared is None else fork.declared
    gaps += int(rule.gap(declared, span(fork.child, rule)))
  return len(chunk.tokens) + gaps
