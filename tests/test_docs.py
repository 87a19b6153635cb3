"""What the documentation names exists: links, paths, modules, flags, and the commands of continuous
integration."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGES = sorted(
  [
    *(
      ROOT / name for name in ("README.md", "CONTRIBUTING.md", "BUILD.md", "CHANGELOG.md", "launch/README.md")
    ),
    ROOT / "pasta_jax/adapters/README.md",
    *(ROOT / "docs").glob("*.md"),
  ]
)
# What a page may name from inside the package, and folders in which it may leave the package's name out.
PLACES = (ROOT, ROOT / "pasta_jax", ROOT / "docs")
HISTORY = "CHANGELOG.md"
page = pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(text: str) -> list[tuple[str, str]]:
  """(language, content) of each fenced block."""
  return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def prose(text: str) -> str:
  """The text without fenced blocks."""
  return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
  """The anchors of a page's headings, as GitHub makes them."""
  titles = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.M)
  return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> list[str]:
  """Targets of relative links and images."""
  targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
  return [t for t in targets if not re.match(r"[a-z]+:", t)]


def named_paths(text: str) -> list[str]:
  """Words in backticks that look like files or folders of this repository."""
  words = [w for code in re.findall(r"`([^`\n]+)`", prose(text)) for w in code.split()]
  roots = (
    "pasta_jax/",
    "configs/",
    "docs/",
    "tests/",
    "launch/",
    "examples/",
    "data/seed",
    ".ci/",
    ".github/",
  )
  in_package = re.compile(r"(utils|lang|model|weights|data|decode|train|evaluate|preference)/[\w/]+\.py")
  return [w for w in words if w.startswith(roots) or in_package.fullmatch(w)]


@page
def test_relative_links_resolve(path: Path):
  for target in links(path.read_text()):
    file, _, anchor = target.partition("#")
    there = (path.parent / file).resolve() if file else path
    assert there.exists(), f"{path.name} links to {target}"
    assert not anchor or anchor in anchors(there), f"{path.name} links to {target}"


@page
def test_paths_in_backticks_exist(path: Path):
  for name in named_paths(path.read_text()):
    clean = name.split("::")[0].split("=")[0].split(":")[0].rstrip(".,;)")
    assert any((place / clean).exists() for place in PLACES), f"{path.name} names {name}"


@page
def test_modules_that_commands_run_exist(path: Path):
  lines = path.read_text().splitlines()
  if path.name == HISTORY:  # tables from old to new names
    lines = [line.rsplit("|", 2)[-2] for line in lines if line.startswith("|")]
  text = "\n".join(lines)
  for module in re.findall(r"python -m (pasta_jax[\w.]*)", text):
    found = importlib.util.find_spec(module)
    assert found is not None, f"{path.name} runs {module}"
    assert '__name__ == "__main__"' in Path(found.origin or "").read_text(), f"{module} is no command"


@page
def test_scripts_and_configs_of_commands_exist(path: Path):
  for script in re.findall(
    r"(?:^|[\s`])((?:launch|tests|configs|examples)/[\w/]+\.(?:sh|py|json))", path.read_text()
  ):
    assert (ROOT / script).is_file(), f"{path.name} runs {script}"
  for config in re.findall(r"--config=([\w./]+)", path.read_text()):
    assert (ROOT / config).is_file(), f"{path.name} names {config}"


@page
def test_settings_exist(path: Path):
  from configs.smollm2_135m import get_config

  config = get_config()
  for flag in re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)", path.read_text()):
    section, field = flag.split(".")
    assert hasattr(config, section) and hasattr(getattr(config, section), field), f"{path.name} names {flag}"


@page
def test_modes_and_flags_exist(path: Path):
  tree = ast.parse((ROOT / "main.py").read_text())
  words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
  for mode in re.findall(r"--mode=([a-z]+)", path.read_text()):
    assert mode in words, f"{path.name} names the mode {mode}"
  for command in re.findall(r"main\.py (?:[^\n]*\\\n)*[^\n]*", path.read_text()):
    for flag in re.findall(r"--(\w+)(?![\w.])", command.replace("--config.", "")):
      assert flag == "config" or flag in words, f"{path.name}: --{flag}"


def test_the_readme_is_short_and_begins_with_the_two_commands():
  text = (ROOT / "README.md").read_text()
  assert len(text.splitlines()) < 150
  shell = [content.strip() for language, content in blocks(text) if language == "sh"]
  assert len(shell) == 2
  assert shell[0].startswith(
    "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/python main.py"
  )
  tests = re.search(r"^tests='(.*)'$", (ROOT / ".ci/run").read_text(), re.M)
  assert tests and shell[1] == tests[1]


def test_ci_says_when_the_readme_differs(tmp_path: Path):
  (tmp_path / ".ci").mkdir()
  (tmp_path / ".ci/run").write_text((ROOT / ".ci/run").read_text())
  readme = (ROOT / "README.md").read_text().replace("-m pytest -q -n 2", "-m pytest -n 4")
  (tmp_path / "README.md").write_text(readme)
  done = subprocess.run(["bash", str(tmp_path / ".ci/run")], capture_output=True, text=True, timeout=60)
  assert done.returncode == 1
  [line] = (done.stdout + done.stderr).splitlines()
  assert line.startswith("README.md: the second sh block must be: .venv/bin/pip install")


def test_pre_commit_has_the_linters_version():
  dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
  [ruff] = [d for d in dev if d.startswith("ruff")]
  assert (ROOT / ".pre-commit-config.yaml").read_text().count(f'["{ruff}"]') == 2


def test_the_citation_has_the_packages_version():
  import pasta_jax

  assert f"version: {pasta_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_pages_of_the_language_have_the_sections_that_code_cites():
  cited = set()
  for file in [*ROOT.glob("*.py"), *(ROOT / "pasta_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
    text = " ".join(file.read_text().split())
    assert "PASTA.md" not in text, f"{file.name} cites a file that is not here"
    cited |= set(re.findall(r"docs/language\.md section (\d(?:\.\d+)?)", text))
  titles = re.findall(r"^#+ (\d(?:\.\d+)?)\.? ", (ROOT / "docs/language.md").read_text(), re.M)
  assert cited <= set(titles)


def test_build_md_names_every_test_file():
  text = (ROOT / "BUILD.md").read_text()
  for file in (ROOT / "tests").rglob("test_*.py"):
    assert f"`{file.relative_to(ROOT)}`" in text, f"BUILD.md does not name {file.relative_to(ROOT)}"


def test_the_constraints_are_versions_that_the_package_allows():
  """Every dependency, those of the tests too, has one version in constraints.txt, within its bounds."""
  lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
  pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
    wanted = Requirement(text)
    assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text
