"""Plans: the annotator's answer, in numbers of units, validated and converted to character spans.

A plan is `{"chunks": [{"from": 2, "to": 4, "topic": "cost"}, …], "syncs": [6]}`: a chunk is units `from` to
`to`, a sync precedes a unit. The result has the form of annotated rows (`data.examples`).

The paper's rules (`annotate.rules=paper`) allow less: no chunk inside another, at least FEWEST_WORDS words in a chunk,
and at most MOST_TOPIC_WORDS in a topic. Rules for few, full parts (`annotate.rules=full`) allow no chunk inside
another, at most MOST_PARTS, and none of fewer than FEWEST_FULL words. What else they ask for, `prompts` alone can say.
"""

import itertools
import json
from collections.abc import Iterator, Sequence

from pasta_jax.data.annotate import units
from pasta_jax.data.separators import skip_blanks
from pasta_jax.lang.joins import Unjoined
from pasta_jax.utils.json_io import parse_json, to_json

MAX_TOPIC = 60  # characters
MAX_NESTING = 20  # chunks inside each other
FEWEST_WORDS, MOST_TOPIC_WORDS = 5, 3  # by the paper's rules; words have blanks between them
MOST_PARTS, FEWEST_FULL = 8, 10  # by the rules for few, full parts


class PlanError(ValueError):
  """An invalid plan. `cause` is one of a few, to be counted; the message goes to the annotator."""

  def __init__(self, cause: str, message: str):
    super().__init__(message)
    self.cause = cause


def read(answer: str, response: str, rules: str = "independent") -> tuple[list[dict], list[int]]:
  """Chunks (`start`, `end`, `topic`; outer ones first) and syncs (offsets) of a plan, by `rules`
  (`sections.ANNOTATION_RULES`). Raises PlanError."""
  try:
    plan = parse_json(_unfenced(answer))
  except ValueError as error:
    at = error.__context__
    told = f"{at.msg} at character {at.pos}" if isinstance(at, json.JSONDecodeError) else str(error)
    raise PlanError("not JSON", f"not JSON: {told}") from None
  if (
    not isinstance(plan, dict)
    or plan.keys() != {"chunks", "syncs"}
    or not all(isinstance(x, list) for x in plan.values())
  ):
    raise PlanError("another form", 'expected {"chunks": […], "syncs": […]} and nothing else')
  spans = units.split(response)
  chunks = sorted((_chunk(c, len(spans)) for c in plan["chunks"]), key=lambda c: (c[0], -c[1]))
  if len(chunks) > 2 * len(spans):  # more than can lie inside each other
    raise PlanError("chunks overlap", f"{len(chunks)} chunks of {len(spans)} units overlap")
  for i, (start, end, _) in enumerate(chunks if _overlap(chunks) else ()):
    for later, its_end, _ in chunks[i + 1 :]:
      if later <= end < its_end or (start, end) == (later, its_end):
        raise PlanError(
          "chunks overlap",
          f"chunks {start}-{end} and {later}-{its_end} overlap: one must end before "
          "the other, or lie inside it",
        )
  if _nesting(chunks) > MAX_NESTING:
    raise PlanError("another form", f"chunks lie inside each other more than {MAX_NESTING} deep")
  if any(c[:2] == (1, len(spans)) for c in chunks):
    raise PlanError(
      "a chunk of everything", "a chunk holds the whole response: nothing is left to run beside it"
    )
  syncs = sorted({_unit(s, "a sync", len(spans)) for s in plan["syncs"]})
  offsets = [{"start": spans[a - 1][0], "end": spans[b - 1][1], "topic": topic} for a, b, topic in chunks]
  if wrong := fault(response, offsets, rules):
    raise wrong
  useful = useful_syncs(offsets, [spans[s - 1][0] for s in syncs])
  for s in syncs:
    if spans[s - 1][0] not in useful:
      raise PlanError("a sync of nothing", f"the sync before unit {s} joins no chunk")
  return offsets, useful


def fault(response: str, chunks: Sequence[dict], rules: str) -> PlanError | None:
  """What `rules` (`sections.ANNOTATION_RULES`) do not allow of the chunks of a response; None if they allow all."""
  if rules == "independent":
    return None
  if rules == "full" and len(chunks) > MOST_PARTS:
    return PlanError("too many chunks", f"{len(chunks)} chunks: at most {MOST_PARTS} are worth their writers")
  fewest = FEWEST_WORDS if rules == "paper" else FEWEST_FULL
  ordered = sorted(chunks, key=lambda c: (c["start"], -c["end"]))
  for chunk, after in itertools.zip_longest(ordered, ordered[1:]):
    about = to_json(chunk["topic"])
    if after and after["start"] < chunk["end"]:
      inner = to_json(after["topic"])
      return PlanError(
        "a chunk inside another", f"chunk {inner} lies inside {about}: chunks follow each other"
      )
    if rules == "paper" and len(chunk["topic"].split()) > MOST_TOPIC_WORDS:
      return PlanError("an unfit topic", f"the topic {about} has more than {MOST_TOPIC_WORDS} words")
    if (n := len(response[chunk["start"] : chunk["end"]].split())) < fewest:
      return PlanError("a short chunk", f"chunk {about} has {n} words: at least {fewest} are needed")
  return None


def _unfenced(answer: str) -> str:
  """What is inside a Markdown fence, if the answer is one."""
  text = answer.strip()
  fenced = len(text) >= 6 and text.startswith("```") and text.endswith("```")
  return text[3:-3].removeprefix("json").strip() if fenced else answer


def _around(chunks: Sequence[tuple[int, int, str]]) -> Iterator[tuple[tuple, list[tuple]]]:
  """Each of the sorted chunks, and those before it that have not ended where it starts."""
  open_ones: list[tuple] = []
  for chunk in chunks:
    while open_ones and open_ones[-1][1] < chunk[0]:
      open_ones.pop()
    yield chunk, open_ones
    open_ones.append(chunk)


def _overlap(chunks: Sequence[tuple[int, int, str]]) -> bool:
  """Whether two chunks overlap without one lying inside the other, or are the same."""
  return any(o and (o[-1][1] < c[1] or o[-1][:2] == c[:2]) for c, o in _around(chunks))


def _nesting(chunks: Sequence[tuple[int, int, str]]) -> int:
  return max((len(o) + 1 for _, o in _around(chunks)), default=0)


def write(response: str, chunks: Sequence[dict], syncs: Sequence[int]) -> str:
  """The inverse of `read`. Raises PlanError if a span starts or ends inside a unit."""
  spans = units.split(response)
  begins = {skip_blanks(response, start): n for n, (start, _) in enumerate(spans, 1)} | {
    len(response): len(spans) + 1
  }

  def unit(offset: int) -> int:
    if (at := begins.get(skip_blanks(response, offset))) is None:
      raise PlanError("inside a unit", f"character {offset} is inside a unit")
    return at

  plan = {
    "chunks": [{"from": unit(c["start"]), "to": unit(c["end"]) - 1, "topic": c["topic"]} for c in chunks],
    "syncs": [unit(s) for s in syncs if skip_blanks(response, s) < len(response)],
  }
  return json.dumps(plan, ensure_ascii=False)


def _chunk(entry: object, count: int) -> tuple[int, int, str]:
  """(first unit, last unit, topic) of an entry, validated separately."""
  if not isinstance(entry, dict) or entry.keys() != {"from", "to", "topic"}:
    raise PlanError("another form", 'a chunk has "from", "to" and "topic" and nothing else')
  start, end = (_unit(entry[key], f'"{key}"', count) for key in ("from", "to"))
  if start > end:
    raise PlanError("another form", f"a chunk cannot run from {start} to {end}")
  topic = entry["topic"]
  if not isinstance(topic, str) or not topic.strip() or len(topic) > MAX_TOPIC or "\n" in topic:
    raise PlanError("an unfit topic", f"a topic is a few words on one line, not {to_json(topic)[:80]}")
  return start, end, topic.strip()


def _unit(number: object, what: str, count: int) -> int:
  if not isinstance(number, int) or isinstance(number, bool):
    raise PlanError("another form", f"{what} must be the number of a unit, not {to_json(number)[:80]}")
  if not 1 <= number <= count:
    raise PlanError("no such unit", f"{what} = {str(number)[:80]}: units are numbered from 1 to {count}")
  return number


def useful_syncs(chunks: Sequence[dict], syncs: Sequence[int]) -> list[int]:
  """The syncs that join a chunk. A sync inside a chunk, not at its start, is that chunk's own thread's."""
  kept: list[int] = []

  def thread(inside: Sequence[dict], own: Sequence[int]) -> list[dict]:
    """Reads one thread's chunks and syncs in order; returns the chunks that it leaves unjoined."""
    unjoined: Unjoined[dict] = Unjoined()
    left = sorted(own)
    for chunk, nested in _outermost(inside):
      while left and left[0] <= chunk["start"]:
        if unjoined.sync():
          kept.append(left[0])
        left.pop(0)
      within = [s for s in left if s < chunk["end"]]
      left = left[len(within) :]
      unjoined.promise(chunk, thread(nested, within))
    kept.extend(s for s in left if unjoined.sync())
    return unjoined.chunks

  thread(chunks, sorted(set(syncs)))
  return sorted(kept)


def _outermost(chunks: Sequence[dict]) -> list[tuple[dict, list[dict]]]:
  """The chunks that no other contains, in order, each with those inside it."""
  found: list[tuple[dict, list[dict]]] = []
  for c in sorted(chunks, key=lambda c: (c["start"], -c["end"])):
    if found and c["start"] < found[-1][0]["end"]:
      found[-1][1].append(c)
    else:
      found.append((c, []))
  return found
