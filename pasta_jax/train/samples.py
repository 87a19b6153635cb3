"""Answers that a policy wrote, as examples to train on: tags, lengths and all stand as it wrote them."""

from collections.abc import Sequence

from pasta_jax.decode.trace import from_json
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.layout import Layout, layout
from pasta_jax.lang.vocabulary import Vocabulary


def lay_out_sample(
  sample: dict, vocabulary: Vocabulary, form: Forms, prompt: Sequence[int] | None = None
) -> Layout:
  """The layout of a sample's answer, a row with a `trace`, after its own prompt, or after `prompt`."""
  trace = from_json(sample["trace"], vocabulary, form.positions)
  prompt = trace.prompt.tolist() if prompt is None else prompt
  return layout(trace.main, form.positions, vocabulary.table, prompt)
