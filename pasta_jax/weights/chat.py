"""Chat templates: code that comes with weights and writes a conversation down, run as Hugging Face runs
it."""

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
from jinja2.sandbox import ImmutableSandboxedEnvironment

_ROLES = ("system", "user", "assistant", "tool")
# Gemma's base models have the turn marks of the tuned ones, but no template.
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if m.role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
  "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
  "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ASKED, _ANSWERED = "Is this asked?", "This-is-what-was-answered"


def template_in(entry: Any) -> str:
  """The template of a tokenizer_config.json, which writes one as a string, and several as records with
  "name".

  Raises ValueError for an entry of any other form.
  """
  if entry is None or isinstance(entry, str):
    return entry or ""
  if isinstance(entry, list) and all(isinstance(each, dict) for each in entry):
    chosen = next((each.get("template") for each in entry if each.get("name") == "default"), "")
    if isinstance(chosen, str):
      return chosen
  raise ValueError("chat_template is neither a text nor a list of named texts")


def template_without_one(vocabulary: Container[str]) -> str:
  """The template of a model that came with none: "", but for Gemma, whose turn marks say enough."""
  return _GEMMA_TEMPLATE if all(turn in vocabulary for turn in _GEMMA_TURNS) else ""


def shielded(messages: Sequence[Mapping[str, str]], controls: str) -> tuple[list[dict[str, str]], str]:
  """Messages whose contents hold no control token, and the mark that breaks up the look-alikes in them.

  The mark goes behind the first character of each look-alike, overlapping ones too. Contents otherwise
  stay as they are, so a template may trim or search them. The mark cannot be guessed, hence not forged.

  Args:
    controls: a regular expression for any of the control tokens.

  Raises:
    ValueError: a message of another form.
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
    tokens: texts of the tokens that have names ("bos_token"); those of others are undefined in the template.
    to_answer: end where the assistant begins to write, not behind the last message.

  Raises:
    ValueError: the template refuses the conversation, or fails.
  """
  try:
    return _compile(template).render(
      messages=messages, tools=None, documents=None, add_generation_prompt=to_answer, **tokens
    )
  except Exception as error:  # foreign code may fail in any way
    raise ValueError(f"chat template: {' '.join(str(error).split()) or type(error).__name__}") from error


def end_of_turn(template: str, tokens: Mapping[str, str], controls: str) -> str | None:
  """The control token that a template puts behind an assistant's text; None if it puts none, or cannot
  say."""
  asked = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
  try:
    text = render(template, asked, tokens, to_answer=False)
  except ValueError:
    return None
  _, answered, behind = text.rpartition(_ANSWERED)
  found = re.search(controls, behind) if answered else None
  return found[0] if found else None


class _Generation(Extension):
  """`{% generation %}` tells trainers what the assistant wrote; the text is the same without it."""

  tags = {"generation"}

  def parse(self, parser: Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.Scope(body, lineno=line)  # what is set inside ends there, as with Hugging Face


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
  """A chat template in the environment that Hugging Face gives it: templates come with weights, so they
  are foreign code and run in a sandbox. Cached here, because a compiled template cannot be pickled and a
  `Tokenizer` must be (data workers)."""

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
  ) -> str:
    # Jinja's own escapes HTML
    return json.dumps(
      value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)
