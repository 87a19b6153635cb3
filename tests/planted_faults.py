"""Do the tests find faults? Plants one fault at a time in a copy of the code and runs the tests that should
fail.

    python tests/planted_faults.py            # all faults, a few minutes each
    python tests/planted_faults.py --only=join

Prints which test caught each fault; exit code 1 if one was not caught, or if its place in the code has moved.
"""

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Fault:
  """`old` in `file` becomes `new`; one of `tests` (pytest arguments) must fail."""

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


EXACTNESS = "tests/decode/test_exactness.py"
LIVE = ("-k", "live", EXACTNESS, "tests/lang/test_layout.py")  # their tests of this form
FAULTS = (
  Fault("visibility: an interval begins one query late", "pasta_jax/lang/visibility.py",
        "(start <= q) & (q < stop)", "(start < q) & (q < stop)", ("tests/lang/test_layout.py", EXACTNESS)),
  Fault("visibility: a sync sees its chunks one query late", "pasta_jax/lang/visibility.py",
        "(start <= q) & (q < stop)", "(start <= q) & (q <= stop)", ("tests/lang/test_layout.py", EXACTNESS)),
  Fault("visibility: a fork does not copy its promise's entry", "pasta_jax/decode/step.py",
        "lanes.entry, after, tables.async_tag)", "lanes.entry, threads.sight, tables.async_tag)", (EXACTNESS,)),
  Fault("positions: a chunk begins ten positions late, in the layout", "pasta_jax/lang/layout.py",
        "after, left = self.thread(fork.child, position, level + 1, None)",
        "after, left = self.thread(fork.child, position + 10, level + 1, None)",
        ("tests/lang/test_layout.py", EXACTNESS)),
  Fault("positions: a chunk begins ten positions late, on the device", "pasta_jax/decode/threads.py",
        "token=async_tag, index=0, position=t.position + 1,", "token=async_tag, index=0, position=t.position + 11,",
        (EXACTNESS,)),
  Fault("join: the host's rule loses the last chunk", "pasta_jax/lang/joins.py",
        "joined, self.chunks = self.chunks, []", "joined, self.chunks = self.chunks[:-1], []",
        ("tests/lang/test_layout.py", EXACTNESS)),
  Fault("join: the device does not merge rows", "pasta_jax/decode/threads.py",
        "return visible | (counts > 0)", "return visible | (counts > 1)", (EXACTNESS,)),
  Fault("join: nobody adopts", "pasta_jax/decode/threads.py",
        "for _ in range(levels - 1):", "for _ in range(0 * levels):", (EXACTNESS,)),
  Fault("heads: one may come twice", "pasta_jax/decode/step.py",
        "repeats=taken.any(axis=1) & features.head", "repeats=taken.any(axis=1) & False", (EXACTNESS, "-k", "head")),
  Fault("heads: one begins before the last promise", "pasta_jax/decode/threads.py",
        "so_far = jnp.where(t.state == A.TEXT, 0, t.topic)", "so_far = t.topic", (EXACTNESS, "-k", "head")),
  Fault("heads: a promise needs none", "pasta_jax/lang/automaton.py",
        "ill[TEXT, opening] = True", "ill[TEXT, opening] = False", ("tests/lang/test_head.py",)),
  Fault("lengths: each competes on its own", "pasta_jax/decode/sampling.py",
        'features.promises and features.length != "apart"', "False", (EXACTNESS, "-k", "token")),
  Fault("lengths: top-k counts each", "pasta_jax/decode/sampling.py",
        "entries = as_one(logits, lengths) if lengths.size else logits", "entries = logits",
        ("tests/decode/test_sampling.py",)),
  Fault("lengths: the device does not read what one says", "pasta_jax/decode/threads.py",
        "jnp.where(t.kind == A.LENGTH, value, t.number)", "t.number", (EXACTNESS, "-k", "token")),
  Fault("lengths: a promise may come where no thread is free", "pasta_jax/decode/limits.py",
        "((t.kind == A.OPEN) | (t.kind == A.LENGTH))", "(t.kind == A.OPEN)",
        ("tests/decode/test_interpreter.py", "-k", "token")),
  Fault("lengths: a text becomes one", "pasta_jax/weights/tokenizer.py",
        're.compile("|".join(cuts)) if cuts else None', "None",
        ("tests/weights/test_export.py", "-k", "lengths")),
  Fault("keys: a chunk's ordinal is not folded in", "pasta_jax/decode/threads.py",
        "jax.random.fold_in(path, t.children + 1)", "path", (EXACTNESS, "tests/decode/test_interpreter.py")),
  Fault("keys: a token's index is not folded in", "pasta_jax/decode/sampling.py",
        "key = jax.random.fold_in(jax.random.wrap_key_data(thread.key), view.index + 1)",
        "key = jax.random.wrap_key_data(thread.key)", (EXACTNESS, "tests/decode/test_interpreter.py")),
  Fault("packing: intervals are not moved with their example", "pasta_jax/data/packing.py",
        "filled + at * (filled[..., 1:] > 0)", "filled", ("tests/data/test_data.py",)),
  Fault("packing: two examples share a segment", "pasta_jax/data/packing.py",
        "segment_ids[0, where] = number", "segment_ids[0, where] = 1", ("tests/data/test_data.py",)),
  Fault("live: a token sees those of its round, by the rule", "pasta_jax/lang/visibility.py",
        "(round_k < round_q)", "(round_k <= round_q)", LIVE),
  Fault("live: a token sees those of its round, on the device", "pasta_jax/decode/sight.py",
        "before = state.used - state.served", "before = state.used", LIVE),
  Fault("live: a chunk sees its promising thread past the fork", "pasta_jax/decode/sight.py",
        "t.fork_entry[:, None] + 1, t.sight", "ALL, t.sight", LIVE),
  Fault("live: a chunk sees a later one", "pasta_jax/decode/sight.py",
        '.get(mode="clip") > t.fork_entry', '.get(mode="clip") >= 0', LIVE),
  Fault("live: the main thread misses a chunk", "pasta_jax/decode/sight.py",
        '.get(mode="clip") > t.fork_entry', '.get(mode="clip") > t.fork_entry + ALL', LIVE),
  Fault("live: a sync's wait is left out of the rounds", "pasta_jax/lang/cost.py",
        "*(w + 1 for w in unjoined.sync())", "*(0 * w for w in unjoined.sync())", LIVE),
  Fault("live: a token that nobody read is seen", "pasta_jax/lang/layout.py",
        "rounds[-1:] = last", "rounds[-1:] += 0", ("tests/lang/test_layout.py",)),
  Fault("live: packed examples have rounds alike", "pasta_jax/data/packing.py",
        "e.rounds + (highest - int(", "e.rounds + (FIRST_ROUND - int(",
        ("-k", "side_by_side", "tests/data/test_data.py")),
  Fault("live: a tile of one round counts as seen", "pasta_jax/model/masks.py",
        "most[:, :, None] < least[:, None, :]", "most[:, :, None] <= least[:, None, :]",
        ("tests/model/test_attention.py",)),
  Fault("live: training keeps the paper's mask", "pasta_jax/train/sft.py",
        "**how, visibility=self.form.visibility", "**how", ("tests/train/test_live.py",)),
)  # fmt: skip


def caught_by(fault: Fault, tree: Path) -> str:
  """The first test that fails in `tree` with the fault planted; "" if none does."""
  path = tree / fault.file
  text = path.read_text()
  if text.count(fault.old) != 1:
    sys.exit(f"{fault.file}: expected once, {text.count(fault.old)} times there: {fault.old}")
  path.write_text(text.replace(fault.old, fault.new))
  try:
    run = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests],
      cwd=tree, capture_output=True, text=True,
    )  # fmt: skip
  finally:
    path.write_text(text)
  failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
  return failed[1] if failed else ""


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("--only", default="", help="faults whose name contains this")
  only = parser.parse_args().only
  missed = 0
  with tempfile.TemporaryDirectory(prefix="planted-") as folder:
    tree = Path(folder) / "tree"
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignore)
    for fault in FAULTS:
      if only in fault.name:
        test = caught_by(fault, tree)
        missed += not test
        print(f"{fault.name}: {f'caught by {test}' if test else 'NOT CAUGHT'}", flush=True)
  return int(missed > 0)


if __name__ == "__main__":
  sys.exit(main())
