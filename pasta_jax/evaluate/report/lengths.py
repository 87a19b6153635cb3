"""What declared lengths mean, as cells of text: in the report's table and in `evaluate.chunk_figures`."""

from collections.abc import Mapping

from pasta_jax.evaluate.metrics.declared import NEAR

_number = lambda v: f"{round(v, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no −0.00
_percent = lambda v: f"{100 * v:.0f}"
_FIGURES = (  # (heading, key of `metrics.declared.summarise`, format, what stands beside it)
  (
    "declared lengths: rank correlation with true ones, all chunks",
    "length_correlation",
    _number,
    ", {finished_chunks} chunks",
  ),
  (
    "declared lengths: rank correlation with true ones, within answers",
    "length_correlation_within",
    _number,
    ", {answers_with_two_chunks} answers",
  ),
  ("promises with the commonest length", "commonest_length_share", _percent, ", {commonest_length} tokens"),
  (f"chunks that end {NEAR} tokens before their number, or earlier", "ends_earlier_share", _percent, ""),
  (f"chunks that end less than {NEAR} tokens before it, or at it", "ends_before_share", _percent, ""),
  (f"chunks that end 1 to {NEAR} tokens after it", "ends_after_share", _percent, ""),
  ("chunks that end later", "ends_later_share", _percent, ""),
)
HEADINGS = tuple(heading for heading, *_ in _FIGURES)


def cells(figures: Mapping[str, float]) -> dict[str, str]:
  """By heading, each figure with its 95 % interval; of those that the figures of a system have."""
  out = {}
  for heading, key, form, beside in _FIGURES:
    if key in figures:
      between = [form(figures[end]) for end in (f"{key}_low", f"{key}_high") if end in figures]
      interval = f" ({' to '.join(between)})" if between else ""
      unit = " %" if form is _percent else ""
      out[heading] = form(figures[key]) + unit + interval + beside.format(**figures)
  return out
