"""Instructions and responses from files of several forms. Unusable rows are counted and named, not dropped
silently.

A file is JSON lines (or one JSON list), parquet, Arrow, or a folder of these (`data.tables`). Rows have `prompt`
and `response`; Alpaca's `instruction`, `input`, `output`; SlimOrca's `conversations`; or OpenAI's `messages`. A
system message is put before the prompt. Null is the same as absent.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pasta_jax.utils.jsonl import BadRow, DataError, parse_lines, parse_list, present, read_bytes
from pasta_jax.utils.text import is_unicode

LONGEST = 100_000  # characters of a prompt or response
_USER, _MODEL = ("user", "human"), ("assistant", "gpt", "model")


@dataclasses.dataclass
class Source:
  """Usable rows (`id`, `prompt`, `response` and their other fields), and the names of unusable ones, by
  cause."""

  rows: list[dict] = dataclasses.field(default_factory=list)
  faults: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

  def counts(self) -> dict[str, int]:
    return {cause: len(names) for cause, names in self.faults.items()}


def read_instructions(path: str | Path) -> Source:
  """The rows of a file. Raises DataError if the file cannot be read or has no usable row."""
  path, source, seen = Path(path), Source(), set()
  for number, row in enumerate(_rows(path), 1):
    where = f"{path.name}, row {number}"
    row = row if isinstance(row, str) else present(row)
    found = row if isinstance(row, str) else _instruction(row)
    if isinstance(row, str) or isinstance(found, str):
      source.faults[str(found)].append(where)
      continue
    name = str(row.get("id", f"{path.name.split('.')[0]}-{number}"))
    if name in seen:
      source.faults["an id that another row has"].append(f"{where} ({name})")
      continue
    seen.add(name)
    source.rows.append({**row, **found, "id": name})  # its other fields stay
  if not source.rows:
    why = ", ".join(f"{n} {cause}" for cause, n in source.counts().items()) or "it is empty"
    raise DataError(f"{path} contains no row with an instruction and a response ({why})")
  return source


def _rows(path: Path) -> Iterator[dict | str]:
  """Each row, or what is wrong with it. Raises DataError if the file cannot be read."""
  if path.is_dir() or path.suffix in (".parquet", ".arrow"):
    from pasta_jax.data.tables import read_tables  # here: only these files need pyarrow

    yield from read_tables(path)
    return
  data = read_bytes(path)
  try:
    parsed = parse_list(data) if data.lstrip()[:1] == b"[" else parse_lines(data)
    yield from (row.cause if isinstance(row, BadRow) else row for _, row in parsed)
  except ValueError as error:
    raise DataError(f"{path}: {error}") from None


def _instruction(row: dict[str, Any]) -> dict[str, str] | str:
  """`prompt` and `response` of a row, or what is wrong with it."""
  if turns := row.get("conversations") or row.get("messages"):
    said = _turns(turns)
    if said is None:
      return "a malformed conversation"
    if (
      len(said) < 2
      or said[-2][0] not in _USER
      or said[-1][0] not in _MODEL
      or len(said) > 3
      or (len(said) == 3 and said[0][0] != "system")
    ):
      return "a conversation of several turns"
    prompt: Any = "\n\n".join(text for _, text in said[:-1] if text)
    response: Any = said[-1][1]
  else:
    prompt, response = row.get("prompt", row.get("instruction")), row.get("response", row.get("output"))
    if isinstance(prompt, str) and isinstance(given := row.get("input"), str) and given.strip():
      prompt = f"{prompt}\n\n{given}"
  if not isinstance(prompt, str) or not prompt.strip():
    return "no prompt"
  if not isinstance(response, str) or not response.strip():
    return "no response"
  if max(len(prompt), len(response)) > LONGEST:
    return f"more than {LONGEST:,} characters"
  if not is_unicode(prompt + response):
    return "invalid Unicode"
  return {"prompt": prompt, "response": response}


def _turns(turns: object) -> list[tuple[str, str]] | None:
  """(role, text) of each message; None if one is malformed."""
  found = []
  for turn in turns if isinstance(turns, list) else [None]:
    if not isinstance(turn, dict):
      return None
    turn = present(turn)
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or not isinstance(text, str):
      return None
    found.append((role, text))
  return found


def ngrams(text: str, n: int = 8) -> set[str]:
  """The n-grams of words, in lower case without punctuation; the whole text if it is shorter."""
  words = re.findall(r"\w+", text.lower())
  return {" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))} if words else set()


def decontaminate(source: Source, prompts: Iterable[str], n: int = 8) -> None:
  """Moves rows whose prompt shares an n-gram of words with one of `prompts` to the faults, in place."""
  known = set().union(*(ngrams(p, n) for p in prompts))
  kept = []
  for row in source.rows:
    if ngrams(row["prompt"], n) & known:
      source.faults["shares words with an evaluation prompt"].append(row["id"])
    else:
      kept.append(row)
  source.rows = kept
