"""Tables of `evaluate.benchmark`: measured medians as rows, and the ratios that count.

A median's key says what was measured:

    bandwidth                       bytes per second of a plain sum
    DTYPE, BRANCHES, POOL           a parallel step
    sequential, DTYPE               a step of ordinary decoding
    requests, DTYPE, REQUESTS       a step of several requests in a batch, one token each
    prefill, DTYPE                  the prefill of a prompt of PROMPT tokens
    transformers, DTYPE             one token by transformers
    llama.cpp, KIND, SEQUENCES      a step of llama.cpp, one token of each sequence
    llama.cpp, KIND, prefill        its prefill of the same prompt
    AGAINST, …                      one of the above under AGAINST; "AGAINST to PLAIN", …: the median of ratios
"""

from collections.abc import Mapping, Sequence

import rich.box
import rich.console
import rich.table

MAIN_POOL, MAIN_BRANCHES = 512, 1  # of the step that others are compared with
PROMPT = 512  # tokens of a timed prefill
LLAMA_CPP = "llama.cpp"

Medians = Mapping[tuple, float]  # seconds, but for the bandwidth and ratios


def show(
  console: rich.console.Console,
  median: Medians,
  floors: Mapping[str, float],
  against: tuple[str, str] | None = None,
) -> None:
  """Prints all tables, in 80 columns.

  `floors`: seconds to read the weights once, by dtype; a table for each. `against`: what each step was measured
  against, and what it is called without.
  """
  for dtype, floor in floors.items():
    console.print(
      f"{dtype}: floor of a step {1e3 * floor:.1f} ms; pool of {MAIN_POOL} unless a row names another"
    )
    console.print(_steps(median, dtype, floor, against))
  if any(key[0] == LLAMA_CPP for key in median):
    console.print(f"{LLAMA_CPP}, whose sequences share {MAIN_POOL // 2} tokens")
    console.print(_llama_cpp(median))
  console.print("ratios of times, and in the last row of tokens/s")
  console.print(_ratios(median, floors))


def _table(columns: Sequence[str]) -> rich.table.Table:
  """An empty table, whose first column has names and the others numbers."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  for name in columns:
    table.add_column(name, justify="right" if table.columns else "left", no_wrap=True)
  return table


def _steps(median: Medians, dtype: str, floor: float, against: tuple[str, str] | None) -> rich.table.Table:
  """The steps of one dtype."""
  columns = ["step", "ms", "floor,\n%", "to 1\nbranch", "tokens/s"]
  columns += [f"{against[0]},\nms", "ratio"] if against else []
  table, one = _table(columns), median[dtype, MAIN_BRANCHES, MAIN_POOL]
  for key, t in median.items():
    name, tokens = _row(key, dtype)
    if not name:
      continue
    is_step = key[0] in (
      dtype,
      "sequential",
      "transformers",
    )  # which reads the weights once, and does little else
    cells = [
      name, f"{1e3 * t:.1f}", f"{100 * floor / t:.0f}" if is_step else "",
      "" if key[0] == "prefill" else f"{t / one:.2f}", f"{tokens / t:.0f}",
    ]  # fmt: skip
    if against and (against[0], *key) in median:
      cells += [f"{1e3 * median[against[0], *key]:.1f}", f"{median[' to '.join(against), *key]:.2f}"]
    table.add_row(*cells)
  return table


def _row(key: tuple, dtype: str) -> tuple[str, int]:
  """(name, tokens) of a measurement in the table of a dtype; ("", 0) for one that is not in it."""
  match key:
    case (name, int(branches), int(pool)) if name == dtype:
      plural = "es" if branches > 1 else ""
      return f"{branches} branch{plural}" + (f", pool {pool}" if pool != MAIN_POOL else ""), branches
    case ("requests", name, int(requests)) if name == dtype:
      return f"{requests} request{'s' if requests > 1 else ''}", requests
    case ("prefill", name) if name == dtype:
      return f"prefill of {PROMPT} tokens", PROMPT
    case (("sequential" | "transformers") as what, name) if name == dtype:
      return what, 1
  return "", 0


def _llama_cpp(median: Medians) -> rich.table.Table:
  """The kinds of llama.cpp."""
  keys = [key[1:] for key in median if key[0] == LLAMA_CPP]
  sequences = sorted({n for _, n in keys if isinstance(n, int)})
  columns = ["kind", *(f"{n} sequence{'s' if n > 1 else ''},\nms" for n in sequences)]
  columns += [*(f"tokens/s\nof {n}" for n in sequences), f"prefill of\n{PROMPT}, ms"]
  table = _table(columns)
  for kind in dict.fromkeys(kind for kind, _ in keys):
    seconds = {n: median[LLAMA_CPP, kind, n] for n in (*sequences, "prefill")}
    ms = {n: f"{1e3 * t:.1f}" for n, t in seconds.items()}
    rates = [f"{n / seconds[n]:.0f}" for n in sequences]
    table.add_row(kind, *(ms[n] for n in sequences), *rates, ms["prefill"])
  return table


def ratios(median: Medians, floors: Mapping[str, float]) -> dict[str, dict[str, float]]:
  """The ratios that count, by name, then by dtype: only those whose parts were measured. The last one is of tokens per
  second, of which more is better; the others are of times."""
  found: dict[str, dict[str, float]] = {}
  for dtype, floor in floors.items():
    times: Medians = {**median, ("floor",): floor}
    one, eight = (dtype, 1, MAIN_POOL), (dtype, 8, MAIN_POOL)
    parts: dict[str, tuple[tuple, tuple, float]] = {
      "1 branch / its floor": (one, ("floor",), 1),
      "8 branches / the floor of 1": (eight, ("floor",), 1),
      "1 branch / llama.cpp Q4_1": (one, (LLAMA_CPP, "Q4_1", 1), 1),
      "8 branches / llama.cpp BF16, 8 sequences": (eight, (LLAMA_CPP, "BF16", 8), 1),
      "pool 4096 / pool 512": ((dtype, 1, 4096), (dtype, 1, 512), 1),
      "prefill / llama.cpp BF16": (("prefill", dtype), (LLAMA_CPP, "BF16", "prefill"), 1),
      "tokens/s of 24 requests / of 1": (("sequential", dtype), ("requests", dtype, 24), 24),
    }
    for name, (above, below, factor) in parts.items():
      if above in times and below in times:
        found.setdefault(name, {})[dtype] = factor * times[above] / times[below]
  return found


def _ratios(median: Medians, floors: Mapping[str, float]) -> rich.table.Table:
  table = _table(["", *floors])
  table.add_row("floor of 1 branch, ms", *(f"{1e3 * floor:.1f}" for floor in floors.values()))
  for name, values in ratios(median, floors).items():
    table.add_row(name, *(f"{values[d]:.2f}" if d in values else "" for d in floors))
  return table
