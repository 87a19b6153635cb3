"""Chat templates: code that comes with weights and renders a conversation as text, run as in Hugging Face."""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from pasta_jax.utils.text import one_line
from pasta_jax.weights.template_limits import LimitedEnvironment, allowance

_ROLES = ("system", "user", "assistant", "tool")
# Gemma's base models have the turn tokens of the tuned ones, but no template.
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m.role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
  "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
  "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ASKED, _ANSWERED = "Is this asked?", "This-is-what-was-answered"  # to find out what ends a turn


def template_in(entry: Any) -> str:
  """The template in the "chat_template" of a tokenizer_config.json: a string, or a list of records with
  "name" and "template".

  Raises ValueError for any other form.
  """
  if entry is None or isinstance(entry, str):
    return entry or ""
  if isinstance(entry, list) and all(isinstance(each, dict) for each in entry):
    chosen = next((each.get("template") for each in entry if each.get("name") == "default"), "")
    if isinstance(chosen, str):
      return chosen
  raise ValueError("chat_template is neither a text nor a list of named texts")


def template_without_one(vocabulary: Container[str]) -> str:
  """The template of a model that came without one: Gemma's if the vocabulary has its turn tokens, otherwise
  ""."""
  return _GEMMA_TEMPLATE if all(turn in vocabulary for turn in _GEMMA_TURNS) else ""


def shielded(messages: Sequence[Mapping[str, str]], controls: str) -> tuple[list[dict[str, str]], str]:
  """(messages whose contents have no text of a control token, the marker that breaks up such texts).

  The marker is inserted after the first character of each such text, overlapping ones included. Contents are
  otherwise unchanged, so that a template may trim or search them. The marker is random, so that it cannot be
  forged.

  Args:
    controls: a regular expression that matches any control token.

  Raises:
    ValueError: a message has no valid role or no text as content.
  """
  mark = f"\ue000{secrets.token_hex(16)}\ue000"
  out = []
  for message in messages:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES or not isinstance(content, str):
      given = f"{role!r} and {type(content).__name__}"
      raise ValueError(f"a message is a role ({', '.join(_ROLES)}) and a text as content, not {given}")
    content = re.sub(f"(?s)(?={controls})(.)", lambda found: found[1] + mark, content)
    out.append({"role": role, "content": content})
  return out, mark


def render(
  template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], *, to_answer: bool = True
) -> str:
  """The conversation as text.

  Args:
    tokens: texts of the named tokens ("bos_token"); other names are undefined in the template.
    to_answer: end where the assistant begins to write, not after the last message.

  Raises:
    ValueError: the template refuses the conversation, or fails; one line.
  """
  try:
    with allowance(sum(len(message["content"]) for message in messages)):
      return _compile(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=to_answer, **tokens
      )
  except Exception as error:  # foreign code may fail in any way
    raise ValueError(f"chat template: {one_line(str(error)) or type(error).__name__}") from error


def end_of_turn(template: str, tokens: Mapping[str, str], controls: str) -> str | None:
  """The control token that a template writes after an assistant's text; None if there is none, or if the
  template fails."""
  asked = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
  try:
    text = render(template, asked, tokens, to_answer=False)
  except ValueError:
    return None
  _, answered, rest = text.rpartition(_ANSWERED)
  found = re.search(controls, rest) if answered else None
  return found[0] if found else None


class _Generation(Extension):
  """`{% generation %}` marks the assistant's text for training; the rendered text is the same without it."""

  tags = {"generation"}

  def parse(self, parser: Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body, lineno=line)  # variables that are set inside are local, as in Hugging Face


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
  """A chat template in the same environment as in Hugging Face. Templates come with weights: they are
  untrusted code, so they run in a sandbox. Cached here because a compiled template cannot be pickled, and a
  `Tokenizer` is (for data workers)."""

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
  ) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = LimitedEnvironment(
    {"tojson": tojson},
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols", _Generation],
  )
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)
