"""Runs readers on damaged files, in a process with limits, and says what became of each.

A kind makes a valid input once; each case copies it, damages a file of it and reads it as a mode would. Right
is success, or a ValueError or OSError whose message names the file, within MEMORY and SECONDS. A process that
dies is seen, and another one goes on with the next case.

    python tests/fuzz/harness.py --count 5000 --seed 1 [--kinds gguf_bytes,adapter] [--verbose]
"""

import argparse
import collections
import dataclasses
import importlib
import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz.mutations import mutated  # noqa: E402
from pasta_jax.utils.text import one_line  # noqa: E402

TABLES = ("fuzz.weights", "fuzz.data_kinds", "fuzz.endpoint_kinds")  # modules with a `KINDS`
SECONDS, MEMORY = 10, 2 << 30


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of input.

  make    writes a valid input, of less than 100 kB, to an empty folder
  load    reads a folder as a mode does
  damage  patterns of the files that are damaged, below the folder
  share   how many cases it gets, relative to others: slow readers get fewer
  """

  make: Callable[[Path], object]
  load: Callable[[Path], object]
  damage: Sequence[str]
  share: float = 1.0


def kinds() -> dict[str, Kind]:
  """All kinds, of all tables."""
  return {name: kind for table in TABLES for name, kind in importlib.import_module(table).KINDS.items()}


def cases(names: Sequence[str], count: int) -> list[tuple[str, int]]:
  """About `count` cases, (kind, number), shared among the kinds."""
  table = kinds()
  whole = sum(table[name].share for name in names)
  return [(name, i) for name in names for i in range(max(1, round(count * table[name].share / whole)))]


def run(
  todo: Sequence[tuple[str, int]], seed: int, *, verbose: bool = False
) -> tuple[collections.Counter, list[str]]:
  """(outcomes by kind, what went wrong). A case is the same for the same seed, kind and number."""
  counts: collections.Counter = collections.Counter()
  wrong: list[str] = []
  with tempfile.TemporaryDirectory() as place:
    while todo:
      done = 0
      for name, number, outcome in _in_process(todo, seed, Path(place)):
        done += 1
        counts[name, outcome.partition(":")[0]] += 1
        if not outcome.startswith(("ok", "refused")):
          wrong.append(f"{name} {number} (seed {seed}): {outcome}")
        elif verbose:
          print(name, number, outcome)
      todo = todo[done:]
  return counts, wrong


def _in_process(todo: Sequence[tuple[str, int]], seed: int, place: Path) -> Iterator[tuple[str, int, str]]:
  """Outcomes, until the process ends, dies or hangs; the last one may say that it did."""
  process = subprocess.Popen(
    [sys.executable, __file__, "--worker", str(place), "--seed", str(seed)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE if not os.environ.get("PASTA_DEBUG") else None,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert process.stdin and process.stdout
  lines: queue.Queue[str | None] = queue.Queue()
  tail: collections.deque[str] = collections.deque(maxlen=5)
  out, err = process.stdout, process.stderr or ()
  readers = [
    threading.Thread(target=lambda: [lines.put(line) for line in out] + [lines.put(None)], daemon=True),
    threading.Thread(target=lambda: tail.extend(err), daemon=True),
  ]
  for reader in readers:
    reader.start()
  process.stdin.write(json.dumps(todo))
  process.stdin.close()
  try:
    for name, number in todo:
      try:
        line = lines.get(timeout=60 + 3 * SECONDS)
      except queue.Empty:
        yield name, number, "hangs"
        return
      if line is None:
        process.wait()
        readers[1].join(5)
        if number == todo[0][1] and name == todo[0][0] and "valid" in " ".join(tail):
          raise ValueError(f"the input is not valid: {' '.join(tail)}")
        yield name, number, f"dies: exit code {process.returncode}: {one_line(' '.join(tail))}"
        return
      yield name, number, json.loads(line)
  finally:
    process.kill()
    process.wait()
    out.close()
    if process.stderr:
      process.stderr.close()


# --- the process with limits ---


def worker(todo: Sequence[tuple[str, int]], seed: int, place: Path) -> None:
  """Prints the outcome of each case."""
  table = kinds()
  valid = {}
  for name in dict.fromkeys(name for name, _ in todo):
    valid[name] = place / "valid" / name
    if not valid[name].exists():
      valid[name].mkdir(parents=True)
      table[name].make(valid[name])
    table[name].load(valid[name])  # fails here if the input is not valid; and imports what is imported late
  with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
  for name, number in todo:
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid[name], folder)
    print(json.dumps(outcome_of(table[name], folder, random.Random(f"{seed} {name} {number}"))), flush=True)


def outcome_of(kind: Kind, folder: Path, rng: random.Random) -> str:
  """Damages a file of a valid input, and reads the folder: "ok", "refused", or what is wrong."""
  files = sorted(path for pattern in kind.damage for path in folder.glob(pattern) if path.is_file())
  path = rng.choice(files)
  path.write_bytes(mutated(path.name, path.read_bytes(), rng))
  start = time.monotonic()
  try:
    kind.load(folder)
    outcome = "ok"
  except (ValueError, OSError) as error:
    message = one_line(str(error))
    known = str(folder) in message or path.name in message
    outcome = f"{'refused' if known else 'nameless'}: {path.name}: {type(error).__name__}: {message}"
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # a Rust library's panic is no Exception
    outcome = f"raises: {path.name}: {type(error).__name__}: {one_line(str(error))}"
  if (seconds := time.monotonic() - start) > SECONDS:
    outcome = f"slow: {path.name}: {seconds:.0f} s"
  return outcome


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--count", type=int, default=5000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kinds", default="", help="names, separated by commas")
  parser.add_argument("--verbose", action="store_true", help="print every outcome")
  parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    worker(json.loads(sys.stdin.read()), args.seed, Path(args.worker))
    return
  names = args.kinds.split(",") if args.kinds else list(kinds())
  counts, wrong = run(cases(names, args.count), args.seed, verbose=args.verbose)
  for name in names:
    print(
      f"{name:18}", ", ".join(f"{n} {what}" for (kind, what), n in sorted(counts.items()) if kind == name)
    )
  print("\n".join(wrong) or "nothing went wrong")
  sys.exit(bool(wrong))


if __name__ == "__main__":
  main()
