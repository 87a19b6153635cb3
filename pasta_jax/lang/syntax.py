r"""The serialised text form: parser and printer.

`<promise topic="cost" tokens="40"/><async>…</async><sync/>`, each chunk right after its promise; a promise without a
topic is `<promise tokens="40"/>` or `<promise/>`. Text may hold anything, also text that looks like a tag: a tag's
opening that is meant as text carries a backslash (`\<sync/>`), and backslashes right before a tag's opening are
doubled. All other text is unchanged. In a topic, `"` and `\` carry a backslash.

`parse(print_program(p)) == normalise(p)` for every program (chunks at most MAX_DEPTH deep, numbers of at most
nine digits), and `print_program(parse(s)) == s` for every serialised form that the printer can write.
"""

import re
from collections.abc import Iterable, Sequence

from pasta_jax.lang.automaton import LENGTHS
from pasta_jax.lang.program import Node, Program, Promise, Sync, Text, normalise

OPEN, MIDDLE, CLOSE = '<promise topic="', '" tokens="', '"/>'
ASYNC, END, SYNC = "<async>", "</async>", "<sync/>"
TAG_TEXTS = (OPEN, MIDDLE, CLOSE, ASYNC, END, SYNC)  # the fixed parts, one special token each
HEAD_OPEN, HEAD_ONLY = '<promise tokens="', "<promise/>"  # of promises without a topic
# What these tokens are called in a vocabulary for other engines: many have an ordinary token `"/>`.
TOKEN_TEXTS = (OPEN, MIDDLE, '" />', ASYNC, END, SYNC)


def length_texts(promise: str) -> tuple[str, ...]:
  """The texts of the tokens of `automaton.LENGTHS`: a whole promise behind a head, the end of one with a topic."""
  return tuple(f"{HEAD_OPEN if promise == 'head' else MIDDLE}{n}{CLOSE}" for n in LENGTHS)


def token_texts(ids: Sequence[int], promise: str) -> dict[int, str]:
  """By id, what the six tags, or the tags and the lengths, are called in a vocabulary for other engines."""
  return dict(zip(ids, (*TOKEN_TEXTS, *length_texts(promise))))


MAX_DEPTH = 64  # of nested chunks in text that is parsed

# The possessive run, tried at its first backslash only, keeps a long run of them linear.
OPENINGS = (OPEN, HEAD_OPEN, HEAD_ONLY, ASYNC, END, SYNC)  # what text carries a backslash before
_TAG = re.compile(r"(?<!\\)(\\*+)(" + "|".join(map(re.escape, OPENINGS)) + ")")
_TOPIC = re.compile(r'((?:[^"\\]|\\.)*)"(?: tokens="([^"]*)")?/>', re.DOTALL)
_NUMBER = re.compile(r'([^"]*)"/>')
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class PastaSyntaxError(ValueError):
  """Text that is no PASTA-LANG program; the message says where (line, column, both from one)."""

  def __init__(self, message: str, source: str, at: int):
    line = source.count("\n", 0, at) + 1
    column = at - source.rfind("\n", 0, at)
    super().__init__(f"line {line}, column {column}: {message}")
    self.at = at


def print_program(program: Iterable[Node]) -> str:
  """The serialised text of a program."""
  out: list[str] = []
  for node in normalise(program):
    if isinstance(node, Text):
      out.append(_TAG.sub(lambda m: 2 * m[1] + "\\" + m[2], node.text))
      continue
    if out and out[-1].endswith("\\"):  # backslashes before a real tag are doubled
      body = out[-1].rstrip("\\")
      out[-1] = body + (len(out[-1]) - len(body)) * 2 * "\\"
    if isinstance(node, Sync):
      out.append(SYNC)
    else:
      body = print_program(node.body)
      trailing = len(body) - len(body.rstrip("\\"))
      if trailing and node.body and isinstance(normalise(node.body)[-1], Text):
        body += trailing * "\\"
      out.append(f"{_printed_promise(node)}{ASYNC}{body}{END}")
  return "".join(out)


def _printed_promise(node: Promise) -> str:
  if node.topic is None:
    return HEAD_ONLY if node.tokens is None else f"{HEAD_OPEN}{node.tokens}{CLOSE}"
  topic = re.sub(r'(["\\])', r"\\\1", node.topic)
  return f"{OPEN}{topic}{'' if node.tokens is None else f'{MIDDLE}{node.tokens}'}{CLOSE}"


def parse(source: str) -> Program:
  """The program that `source` writes down. Raises PastaSyntaxError with the place of the first fault."""
  nodes, at = _parse_nodes(source, 0, depth=0, opened=0)
  if at < len(source):
    raise PastaSyntaxError(f"{END} without {ASYNC}", source, at)
  return normalise(nodes)


def _parse_nodes(source: str, at: int, depth: int, opened: int) -> tuple[list[Node], int]:
  """Nodes from `at` to the end, or to the `</async>` that closes the chunk opened at `opened`."""
  if depth > MAX_DEPTH:
    raise PastaSyntaxError(f"chunks nest deeper than {MAX_DEPTH}", source, opened)
  nodes: list[Node] = []
  while True:
    match = _TAG.search(source, at)
    if match is None:
      if depth:
        raise PastaSyntaxError(f"{ASYNC} is never closed", source, opened)
      nodes.append(Text(source[at:]))
      return nodes, len(source)
    slashes, tag = match[1], match[2]
    nodes.append(Text(source[at : match.start()] + (len(slashes) // 2) * "\\"))
    at = match.end()
    if len(slashes) % 2:
      nodes.append(Text(tag))
    elif tag == SYNC:
      nodes.append(Sync())
    elif tag == END:
      return nodes, at if depth else match.start(2)
    elif tag == ASYNC:
      raise PastaSyntaxError(f"{ASYNC} without a promise before it", source, match.start(2))
    else:
      promise, at = _parse_promise(source, tag, match.start(2), at, depth)
      nodes.append(promise)


def _parse_promise(source: str, tag: str, start: int, at: int, depth: int) -> tuple[Promise, int]:
  """The promise whose opening `tag` is at [start, at), with its chunk."""
  topic: str | None = None
  number: str | None = None
  if tag != HEAD_ONLY:
    match = (_TOPIC if tag == OPEN else _NUMBER).match(source, at)
    if match is None:
      expected = 'topic="…" tokens="…"/>' if tag == OPEN else 'tokens="…"/>'
      raise PastaSyntaxError(f"promise is never closed: expected {expected}", source, start)
    which = 2 if tag == OPEN else 1
    topic = _ESCAPE.sub(r"\1", match[1]) if tag == OPEN else None
    number, at = match[which], match.end()
    if number is not None and not re.fullmatch(r"[0-9]{1,9}", number):
      raise PastaSyntaxError(f"tokens must be a number, not {number!r}", source, match.start(which))
  if not source.startswith(ASYNC, at):
    raise PastaSyntaxError(f"promise is not followed by {ASYNC}", source, at)
  body, end = _parse_nodes(source, at + len(ASYNC), depth + 1, opened=at)
  return Promise(topic, None if number is None else int(number), tuple(body)), end
