"""Imports run one way, between packages and between modules; every package says what lives there."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pasta_jax"
# A module imports from its own package and from those before it.
ORDER = (
  "config",
  "utils",
  "lang",
  "cpu",
  "model",
  "weights",
  "data",
  "decode",
  "train",
  "evaluate",
  "preference",
)
# What two packages must not know of each other, whatever the order: decoding needs no data sets.
APART = {("decode", "data")}
SITTING = 1720  # lines of the language, the step and the loop


def modules() -> dict[str, Path]:
  """Module name without the package's -> file."""
  files = sorted(PACKAGE.rglob("*.py"))
  parts = {file: file.relative_to(PACKAGE).with_suffix("").parts for file in files}
  return {".".join(p for p in parts[file] if p != "__init__"): file for file in files}


MODULES = modules()


def imports(name: str) -> set[str]:
  """The modules of the package that a module imports, inside functions too."""
  found: set[str] = set()
  for node in ast.walk(ast.parse(MODULES[name].read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pasta_jax":
      base = (node.module or "").removeprefix("pasta_jax").lstrip(".")
      for alias in node.names:
        whole = f"{base}.{alias.name}".lstrip(".")
        found.add(whole if whole in MODULES else base)
    elif isinstance(node, ast.Import):
      found |= {a.name.removeprefix("pasta_jax.") for a in node.names if a.name.startswith("pasta_jax.")}
  return found - {name}


def test_no_import_runs_up():
  wrong = []
  for name in MODULES:
    package = name.split(".")[0]
    if not name:  # the public API
      continue
    for other in imports(name) - {""}:
      of = other.split(".")[0]
      if ORDER.index(of) > ORDER.index(package) or (package, of) in APART:
        wrong.append(f"{name} imports {other}")
  assert not wrong, "\n".join(sorted(wrong))


def test_no_import_circles():
  done: set[str] = set()

  def visit(name: str, path: tuple[str, ...]) -> None:
    assert name not in path, " -> ".join((*path[path.index(name) :], name))
    if name not in done:
      for other in sorted(imports(name)):
        visit(other, (*path, name))
      done.add(name)

  for name in MODULES:
    visit(name, ())


@pytest.mark.parametrize("package", sorted(n for n, f in MODULES.items() if f.name == "__init__.py" and n))
def test_every_package_says_what_lives_there(package):
  text = ast.get_docstring(ast.parse(MODULES[package].read_text())) or ""
  assert len(text.split()) >= 15, f"pasta_jax.{package}: a paragraph that names the file to open first"


def test_language_step_and_loop_are_read_in_one_sitting():
  names = [n for n in MODULES if n.split(".")[0] == "lang" and n != "lang.syntax"]
  names += [f"decode.{n}" for n in ("state", "threads", "step", "interpreter")]
  lines = {n: len(MODULES[n].read_text().splitlines()) for n in names}
  assert sum(lines.values()) <= SITTING, lines
