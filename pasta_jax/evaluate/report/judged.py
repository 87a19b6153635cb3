"""What judges say of a run, as rows of text and in words: who read what, rates, differences, defects, noise."""

from collections.abc import Mapping

from pasta_jax.evaluate.metrics import wins
from pasta_jax.evaluate.metrics.measures import natural
from pasta_jax.evaluate.report.readings import FORM_CHECK, parts_name, rate_name, reads

Rows = list[list[str]]
NOTHING = "–"

_ABOUT_FORM = (
  f"The {FORM_CHECK} compares how likely each answer is under the baseline model, and counts plain defects "
  "(loops, answers that are cut off, lengths that the prompt forbids). It sees whether a text is coherent; it "
  "does not see whether it is true or useful, and it favours the baseline's own answers. It is no win rate."
)
_signed = lambda v: f"{v:+.1f}".replace("-", "−")
_percent = lambda share: f"{100 * share:.1f} %"


def _judges(summary: Mapping) -> list[str]:
  return list(dict.fromkeys(j for entry in summary["systems"].values() for j in entry["quality"]))


def provenance(summary: Mapping) -> Rows:
  """Who read each system's answers, who annotated its training rows, what taught it, and its form of the language."""
  systems = summary["systems"].values()
  about = lambda key: [entry["about"].get(key, NOTHING) for entry in systems]
  readers = [", ".join(filter(reads, entry["quality"])) or NOTHING for entry in systems]
  return [
    ["read by", *readers],
    ["annotator", *about("annotator")],
    ["teacher", *about("teacher")],
    ["form of the language", *about("forms")],
  ]


def rates(summary: Mapping) -> Rows:
  """The rows of each judge, readers first."""
  out: Rows = []
  for judge in sorted(_judges(summary), key=lambda j: not reads(j)):
    found = [entry["quality"].get(judge, {}) for entry in summary["systems"].values()]
    row = lambda heading, form, of=found: [heading, *map(form, of)]
    out.append(row(f"answers judged ({judge})", lambda f: str(f["judged"]) if f else NOTHING))
    if not reads(judge):
      out += [
        row(rate_name(judge), lambda f: _with_error(f, "win_rate")),
        row("check of form, length-controlled", lambda f: _with_error(f, "length_controlled")),
      ]
      continue
    out += [
      row(rate_name(judge), lambda f: _with_interval(f, "win_rate")),
      row(
        f"wins, ties, losses ({judge})",
        lambda f: f"{f['wins']}, {f['ties']}, {f['losses']}" if f else NOTHING,
      ),
      row(f"length-controlled {rate_name(judge)}", lambda f: _with_error(f, "length_controlled")),
      row(f"{rate_name(judge)} where both answers finished", _both_finished),
    ]
  return out


def _with_error(figures: Mapping, key: str) -> str:
  if key not in figures:
    return NOTHING
  error = f" ± {figures[key + '_error']:.1f}" if key + "_error" in figures else ""
  return f"{figures[key]:.1f} %{error}"


def _with_interval(figures: Mapping, key: str) -> str:
  if key not in figures:
    return NOTHING
  low = figures.get(f"{key}_low")
  return f"{figures[key]:.1f} %" + ("" if low is None else f" ({low:.1f} to {figures[f'{key}_high']:.1f})")


def _both_finished(figures: Mapping) -> str:
  key = "win_rate_both_finished"
  rate = _with_interval(figures, key)
  return f"{rate}, {figures['judged_both_finished']} answers" if key in figures else rate


def tables(summary: Mapping) -> dict[str, Rows]:
  """By heading, of each reader: differences between systems, wins by number of parts, and defects that it named."""
  out: dict[str, Rows] = {}
  for judge, figures in summary["judges"].items():
    if not figures["reads"]:
      continue
    if differences := figures.get("differences"):
      head = ["", "points", "95 % interval", "prompts"]
      out[f"Differences in {rate_name(judge)}, paired by prompt"] = [head, *map(_difference, differences)]
    if parts := figures.get("parts"):
      classes = sorted({name for of_system in parts.values() for name in of_system}, key=natural)
      rates_of = lambda name, of=parts: [_by_parts(of_system.get(name)) for of_system in of.values()]
      out[f"{parts_name(judge)}: % (95 % interval), answers"] = [
        ["", *parts],
        *([name, *rates_of(name)] for name in classes),
      ]
    if defects := figures.get("defects"):
      names = dict.fromkeys(d for of_system in defects.values() for d in of_system)
      cells = lambda d, of=defects: [_count(of_system.get(d), of_system["any"]) for of_system in of.values()]
      body = [["answers with a defect" if d == "any" else d, *cells(d)] for d in names]
      out[f"Defects named by {judge}: answers (exact 95 % interval, %)"] = [["", *defects], *body]
  return out


def _difference(found: Mapping) -> list[str]:
  interval = (
    f"{_signed(found['points_low'])} to {_signed(found['points_high'])}" if "points_low" in found else NOTHING
  )
  return [
    f"{found['system']} less {found['less']}",
    _signed(found["points"]),
    interval,
    str(found["prompts"]),
  ]


def _by_parts(found: Mapping | None) -> str:
  return f"{_with_interval(found, 'win_rate')}, {found['judged']}" if found else NOTHING


def _count(share: Mapping | None, answers: Mapping) -> str:
  """`share` is None where no answer of the system has the defect: its interval is that of none of `answers`."""
  counted = share or wins.share(0, answers["n"])._asdict()
  return f"{counted['found']} of {counted['n']} ({100 * counted['low']:.0f} to {100 * counted['high']:.0f})"


def notes(summary: Mapping) -> list[str]:
  """What one must know of each judge, in words."""
  out = []
  for judge, figures in summary["judges"].items():
    if not figures["reads"]:
      out.append(_ABOUT_FORM)
    elif said := [*_position(figures.get("position")), *_repeats(figures.get("repeats"))]:
      out.append(f"{judge}: {' '.join(said)}")
  return out


def _share(found: Mapping) -> str:
  return f"{found['found']} of {found['n']} ({_percent(found['share'])}, {_between(found)})"


def _between(found: Mapping) -> str:
  return f"95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f}"


def _position(found: Mapping | None) -> list[str]:
  if not found:
    return []
  out = []
  if changed := found["changed"]:
    out.append(f"The other order changed the verdict of {_share(changed)} pairs read in both.")
  place = f"The answer shown first has a mean preference of {_percent(found['first_preference'])}"
  if first := found["first"]:
    place += f", and wins {_share(first)} of the pairs that tell"
  out.append(f"{place}.")
  if found["decides"]:
    out.append(
      f"THIS JUDGE DECIDES BY THE PLACE OF AN ANSWER: it takes the one shown {found['lean']}. Its rates say nothing."
    )
  elif found["lean"]:
    out.append(f"It prefers the answer shown {found['lean']} beyond chance: read pairs in both orders.")
  else:
    out.append("A preference for a place is not found.")
  return out


def _repeats(found: Mapping | None) -> list[str]:
  return [f"Asked again, it gave the same verdict in {_share(found)} readings."] if found else []
