"""A bounded share of the damaged files of `tests.fuzz`, the same ones each time."""

import pytest

from fuzz.harness import cases, kinds, run


@pytest.mark.parametrize("names", [list(kinds())], ids=["all"])
def test_damaged_files_are_refused_in_one_line(names: list[str]):
  counts, wrong = run(cases(names, 300), seed=0)
  assert not wrong, "\n".join(wrong)
  for name in names:
    assert counts[name, "refused"], f"{name}: no damage was noticed: {counts}"
