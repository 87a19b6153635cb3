"""Tables and ratios of the step benchmark, from given medians; llama.cpp itself, where it is installed."""

import dataclasses
import io
from pathlib import Path

import pytest
import rich.console
from helpers.folders import write_gguf
from test_model import logits
from test_weights import CONFIG, random_params

from pasta_jax.evaluate.against_llama_cpp import OURS, THEIRS, figures, shown
from pasta_jax.evaluate.other_programs import (
  LlamaCpp,
  gguf_of,
  hardware,
  llama_cpp_prefill_timer,
  llama_cpp_step_timer,
)
from pasta_jax.evaluate.step_tables import ratios, show
from pasta_jax.weights import build
from pasta_jax.weights.checkpoint import load_checkpoint

MEDIAN = {
  ("bandwidth",): 1e10,
  ("bfloat16", 1, 512): 0.012, ("bfloat16", 8, 512): 0.018, ("bfloat16", 1, 4096): 0.015,
  ("live", "bfloat16", 1, 512): 0.0123, ("live to promise", "bfloat16", 1, 512): 1.05,
  ("requests", "bfloat16", 8): 0.02, ("requests", "bfloat16", 24): 0.032,
  ("sequential", "bfloat16"): 0.016, ("prefill", "bfloat16"): 0.6, ("transformers", "bfloat16"): 0.04,
  ("int8", 1, 512): 0.009, ("int8", 8, 512): 0.0162,
  ("llama.cpp", "BF16", 1): 0.011, ("llama.cpp", "BF16", 8): 0.027, ("llama.cpp", "BF16", "prefill"): 0.5,
  ("llama.cpp", "Q4_1", 1): 0.006, ("llama.cpp", "Q4_1", 8): 0.041, ("llama.cpp", "Q4_1", "prefill"): 1.5,
}  # fmt: skip
FLOORS = {"bfloat16": 0.01, "int8": 0.005}


def test_ratios_of_what_was_measured():
  found = {
    name: {d: round(x, 6) for d, x in values.items()} for name, values in ratios(MEDIAN, FLOORS).items()
  }
  assert found == {
    "1 branch / its floor": {"bfloat16": 1.2, "int8": 1.8},
    "8 branches / the floor of 1": {"bfloat16": 1.8, "int8": 3.24},
    "1 branch / llama.cpp Q4_1": {"bfloat16": 2.0, "int8": 1.5},
    "8 branches / llama.cpp BF16, 8 sequences": {"bfloat16": 0.666667, "int8": 0.6},
    "pool 4096 / pool 512": {"bfloat16": 1.25},
    "prefill / llama.cpp BF16": {"bfloat16": 1.2},
    "tokens/s of 24 requests / of 1": {"bfloat16": 12.0},
  }
  alone = {("bandwidth",): 1e10, ("int8", 1, 512): 0.009}
  assert ratios(alone, {"int8": 0.005}) == {"1 branch / its floor": {"int8": pytest.approx(1.8)}}


@pytest.mark.parametrize("against", [None, ("live", "promise"), ("invariant", "ordinary")])
def test_tables_fit_80_columns(against):
  out = io.StringIO()
  longer = {("bfloat16", 16, 512): 0.1234, ("invariant", "bfloat16", 1, 512): 0.0123}
  longer |= {("invariant to ordinary", "bfloat16", 1, 512): 1.05}
  show(rich.console.Console(file=out, width=80), MEDIAN | longer, FLOORS, against)
  text = out.getvalue()
  assert max(map(len, text.splitlines())) <= 80 and "…" not in text
  cells = {" ".join(line.split()) for line in text.splitlines()}
  compared = " 12.3 1.05" if against else ""
  for row in (
    f"1 branch 12.0 83 1.00 83{compared}",
    "8 branches 18.0 56 1.50 444",
    "16 branches 123.4 8 10.28 130",
    "1 branch, pool 4096 15.0 67 1.25 67",
    "24 requests 32.0 2.67 750",
    "prefill of 512 tokens 600.0 853",
    "transformers 40.0 25 3.33 25",
    "BF16 11.0 27.0 91 296 500.0",
    "floor of 1 branch, ms 10.0 5.0",
    "8 branches / llama.cpp BF16, 8 sequences 0.67 0.60",
    "pool 4096 / pool 512 1.25",
  ):
    assert row in cells, text
  assert ("ratio" in text.split("llama.cpp")[0]) == bool(against)


def test_figures_of_answers():
  """Sums over sums, and an interval in which the ratio is."""
  rows = [
    {OURS: {"text_tokens": 100 + i, "seconds": 1.0}, THEIRS: {"text_tokens": 150, "seconds": 3.0 + i % 2}}
    for i in range(20)
  ]
  found = figures(rows)
  assert found[OURS]["text_tokens"] == 2190 and found[OURS]["tokens_per_second"] == pytest.approx(109.5)
  assert found[THEIRS]["tokens_per_second"] == pytest.approx(3000 / 70)
  assert found[THEIRS]["median_tokens_per_second"] == pytest.approx((50 + 37.5) / 2)
  f = found["tokens_per_second"]
  assert (
    f["ratio"] == pytest.approx(109.5 * 70 / 3000) and f["low"] < f["ratio"] < f["high"] < 1.1 * f["ratio"]
  )
  whole = found["complete_answer"]
  assert whole["ratio"] == pytest.approx(12**0.5) and whole["low"] < whole["ratio"] < whole["high"]
  assert rows[0][OURS]["seconds"] == 1.0
  same = figures([{OURS: rows[0][OURS], THEIRS: rows[0][OURS]}])
  assert same["tokens_per_second"] == {"ratio": 1, "low": 1, "high": 1}


def test_shown_tokens_are_counted_as_ours(tmp_path: Path):
  """As plain text, whatever tokens wrote it, with the end token where it was written."""
  vocabulary = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", CONFIG, random_params(CONFIG))).vocabulary
  encode, [end, *_] = vocabulary.tokenizer.encode, vocabulary.tags.eos
  [h], [e], [he] = encode("h"), encode("e"), encode("he")
  assert shown([h, e], vocabulary) == shown([he], vocabulary) == 1
  assert shown([h, e, end], vocabulary) == 2 and shown([end], vocabulary) == 1


def test_sources_that_llama_cpp_can_read(tmp_path: Path):
  path = tmp_path / "model.gguf"
  assert gguf_of(str(path)) is None and gguf_of("tiny") is None and gguf_of(str(tmp_path)) is None
  path.write_bytes(b"GGUF")
  assert gguf_of(str(path)) == path


def test_the_head_line_names_machine_and_versions():
  text = hardware()
  assert " cores of " in text and "; jax " in text


# --- llama.cpp itself ---

BLOCKS = dataclasses.replace(CONFIG, d_model=64, d_ff=96, n_heads=4, head_dim=16)


@pytest.fixture
def both(tmp_path: Path):
  """(llama.cpp, our model) with the same weights in float32."""
  pytest.importorskip("llama_cpp")
  path = write_gguf(tmp_path / "tiny.gguf", BLOCKS, random_params(BLOCKS))
  checkpoint = load_checkpoint(path)
  ours = build.from_params(checkpoint.config, checkpoint.params)
  return LlamaCpp(path, context=256, sequences=4), ours


def ours_after(model, tokens: list[int]) -> int:
  return int(logits(model, [tokens])[0, -1].argmax())


def test_llama_cpp_finds_our_tokens_in_every_sequence(both):
  theirs, ours = both
  prompt = [5, 9, 12, 7, 30]
  theirs.prefill(prompt)
  theirs.fork(4)
  last = [4, 8, 15, 23]
  theirs.step(last)
  assert theirs.likeliest(4) == [ours_after(ours, [*prompt, token]) for token in last]


def test_llama_cpp_generates_greedily_and_stops(both):
  theirs, ours = both
  prompt = [5, 9, 12, 7, 30]
  expected = list(prompt)
  for _ in range(6):
    expected.append(ours_after(ours, expected))
  expected = expected[len(prompt) :]
  assert theirs.generate(prompt, 6, (), 1.0) == expected
  assert theirs.generate(prompt, 6, (expected[2],), 1.0) == expected[: expected.index(expected[2]) + 1]
  penalised = theirs.generate(prompt, 40, (), 1e6)
  assert len(set(penalised)) > len(set(theirs.generate(prompt, 40, (), 1.0)))


def test_timers_of_llama_cpp(both):
  theirs, _ = both
  for timer in (llama_cpp_step_timer(theirs, 4, 64, 8), llama_cpp_prefill_timer(theirs, 128)):
    assert 0 < timer() < 60
