"""What the forms of visibility cost: kernels of a compiled decode step, and arrays of the state."""

import re

import jax
import numpy as np
import pytest
from helpers import tiny

from pasta_jax.decode.interpreter import Interpreter
from pasta_jax.decode.sampling import as_arrays
from pasta_jax.decode.settings import Limits, SamplingConfig, StepFeatures, specialise

THREADS, WIDTH, ENTRIES = (
  24,
  4,
  96,
)  # no other axis of the tiny model has one of these lengths but 24, its width
SAMPLING = SamplingConfig(repetition_penalty=1.1)
# Not kernels: names, views and control.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional"}


@pytest.fixture(scope="module")
def built():
  """{visibility: (interpreter, its state)}"""
  limits = Limits(max_threads=THREADS, branch_widths=(WIDTH,), kv_buckets=(ENTRIES,))
  make = lambda form: Interpreter(
    tiny.model(), tiny.VOCABULARY, limits, StepFeatures(visibility=form, no_repeat=16)
  )
  return {form: (it := make(form), it.prefill([1, 2, 3], capacity=ENTRIES)) for form in ("promise", "live")}


def kernels(it: Interpreter, state) -> int:
  """Instructions of the compiled loop that compute or move something; those inside a fusion are one."""
  features = specialise(it.features, SAMPLING)
  arguments = it.params, state, as_arrays(SAMPLING), np.int32(9)
  text = it._segment.lower(*arguments, width=WIDTH, features=features, look=1).compile().as_text()
  inner = set(re.findall(r"(?:calls|to_apply)=(%[\w.-]+)", text))
  computations = [c for c in re.split(r"\n\n", text) if c.split(" (")[0] not in inner]
  kinds = [kind for c in computations for kind in re.findall(r" = (?:\(.*?\)|\S+) ([a-z-]+)\(", c)]
  return sum(kind not in FREE for kind in kinds)


def test_a_step_of_live_has_no_more_kernels_than_one_of_promise(built):
  live, promise = (kernels(*built[form]) for form in ("live", "promise"))
  assert 100 < live <= promise  # 100: the text was read


def test_live_keeps_no_row_over_the_pool(built):
  rows = {form: [x.shape for x in jax.tree.leaves(state) if x.shape in ((THREADS, ENTRIES), (WIDTH, ENTRIES))]
          for form, (_, state) in built.items()}  # fmt: skip
  assert rows == {"promise": [(THREADS, ENTRIES)], "live": []}
  assert built["live"][1].sight.shape == (THREADS, THREADS)
