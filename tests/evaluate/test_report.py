"""Reports of any text: names, categories and answers are shown as they are, by every renderer; and files that
a report cannot be made of are one line."""

import json
import re
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pasta_jax.config import Config
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges.files import FileJudge
from pasta_jax.evaluate.metrics.length_control import read_difficulty, read_preferences
from pasta_jax.evaluate.report import page, paper, plots, separators, speed_quality, tables
from pasta_jax.evaluate.report.write import write_report
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Promise, Text
from pasta_jax.lang.vocabulary import Vocabulary
from pasta_jax.preference import pareto_front
from pasta_jax.preference.pareto_front import points
from pasta_jax.train.metrics import MetricWriter, last_scalars
from pasta_jax.utils.jsonl import append_row

TEXTS = [
  "[/INST]", "price in $US and $AU", "$\\frac{x}$", "a_b^c", "_a_", "数学", "<b>&amp;</b>", "x" * 200, "line\nbreak",
  "a|b", "*c* `d` \\", "\x1b[31mred\x07", "half \ud83d", "\u202eabc", ":smile:", "[bold]", "{task}", "%s",
]  # fmt: skip
SYSTEMS = ["[bold]x $a$ *y*|z", "_under", "baseline"]
JUDGE = "gpt-4.1 [red] $j$"


def record(number: int, text: str, **changes) -> dict:
  return {
    "schema": 2, "id": f"{number} {text}", "prompt": f"Say {text}", "category": text, "text": f"answer {text}",
    "finish_reason": "stop", "text_tokens": 20, "total_tokens": 30, "steps": 15, "longest_path": 10 + number,
    "peak_parallelism": 2, "promises": 1, "depth": 1, "ill_formed": 0, "refused": 0, "topic_twice": False,
    "loops": False, "lengths": [[10, 12]], "theoretical_parallelism": 2.0, "tokens_per_round": 3.0,
    "trace": {"threads": []},
  } | changes  # fmt: skip


def finished_run(workdir: Path) -> Path:
  """What an evaluation leaves, whose every name and text is one of the above."""
  rows = [record(i, text) for i, text in enumerate(TEXTS)]
  for folder in ("responses", "timed", f"judgements/{JUDGE}"):
    (workdir / folder).mkdir(parents=True)
  (workdir / "config.json").write_text(Config().to_json())
  about = {"requests": [r["id"] for r in rows], "judges": [JUDGE], "machines": ["[m]"], "versions": ["1"]}
  (workdir / "run.json").write_text(json.dumps(about))
  for k, system in enumerate(SYSTEMS):
    for row in rows:
      append_row(workdir / "responses" / f"{system}.jsonl", row)
      append_row(workdir / "timed" / f"{system}.jsonl", row | {"seconds": 1.0 + k})
      judged = {"id": row["id"], "texts": "", "preference": 0.4}
      append_row(workdir / "judgements" / JUDGE / f"{system}-against-baseline.jsonl", judged)
  return workdir


@pytest.fixture
def workdir(tmp_path: Path, smollm2_checkpoint, monkeypatch) -> Path:
  monkeypatch.setattr(page, "load_checkpoint", lambda *_, **__: smollm2_checkpoint)
  return finished_run(tmp_path)


def test_any_text_makes_a_report_with_that_text_in_it(workdir: Path, capsys):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    summary = write_report(workdir)
  assert set(summary["systems"][SYSTEMS[0]]["responses_by_category"]) == {*TEXTS}
  printed = capsys.readouterr().out
  assert "\x1b" not in printed and "[bold]x" in re.sub(r"\s", "", printed)
  svg = (workdir / "figures" / "speedups_by_category.svg").read_text()
  drawn = [
    " ".join(t.itertext()).strip()
    for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
  ]
  for text in (
    "[/INST]",
    "price in $US and $AU",
    "$\\frac{x}$",
    "a_b^c",
    "数学",
    "<b>&amp;</b>",
    "line break",
    ":smile:",
  ):
    assert text in drawn
  assert SYSTEMS[1] in drawn  # in the legend, although matplotlib leaves such names out
  assert (workdir / "figures" / f"speed_quality_{JUDGE}.png").is_file()  # ".1" is no suffix
  cells = {
    c.strip()
    for line in (workdir / "report.md").read_text().split("\n")
    for c in re.split(r"(?<!\\)\|", line)
  }
  for text in ("\\[/INST\\]", "price in \\$US and \\$AU", "\\<b\\>\\&amp;\\</b\\>", "a\\|b", "\\*c\\* \\`d\\` \\\\",
               "\\_a\\_", "a_b^c", "line break", "x" * 200, "\\\\x1b\\[31mred\\\\x07"):  # fmt: skip
    assert text in cells, text
  html = (workdir / "report.html").read_text()
  assert "<b>&amp;</b>" not in html and "&lt;b&gt;&amp;amp;&lt;/b&gt;" in html and "\x1b" not in html
  assert (
    json.loads((workdir / "alpaca_eval" / f"{SYSTEMS[1]}.json").read_text())[12]["dataset"] == "half \ud83d"
  )


def test_joins_of_older_rows_are_counted_from_their_traces(workdir: Path, smollm2_checkpoint, monkeypatch):
  """A row says it itself, or its trace does, or nobody knows."""
  monkeypatch.setattr(separators, "load_checkpoint", lambda *_, **__: smollm2_checkpoint)
  vocabulary, rule = Vocabulary(smollm2_checkpoint.tokenizer), PositionRule()
  main = vocabulary.encode((Text("Two:"), Promise("b", None, (Text("one"),))), rule)
  thread = lambda t, **place: {
    "topic": "", "declared": None, "finished": True, "tokens": list(t.tokens),
    "positions": [0] * len(t.tokens), "rounds": [1] * len(t.tokens), **place,
  }  # fmt: skip
  trace = {"steps": 9, "finish_reason": "stop", "refused": 0, "prompt": [1]}
  trace["threads"] = [
    thread(main, path=[], parent=-1, fork_index=-1),
    thread(main.forks[0].child, path=[0], parent=0, fork_index=main.forks[0].at),
  ]
  path = workdir / "responses" / f"{SYSTEMS[1]}.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[0] |= {"trace": trace, "text": "Two:one"}
  rows[1] |= {
    "trace": trace,
    "text": "Two:\n1. b: one",
  }  # made of the trace's parts, as Skeleton-of-Thought's
  rows[2] |= {"unseparated": 0}
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  systems = write_report(workdir)["systems"]
  assert systems[SYSTEMS[1]]["responses"]["unseparated_share"] == 0.5
  assert "unseparated_share" not in systems[SYSTEMS[0]]["responses"]
  line = next(x for x in (workdir / "report.md").read_text().splitlines() if "joins without" in x)
  assert line == "| joins without a separator | – | – | 50.0 % |"


def judged_run(workdir: Path) -> None:
  """Adds a reader whose judgements have every key, defects, and where the systems come from."""
  ids = [
    json.loads(line)["id"] for line in (workdir / "responses" / "baseline.jsonl").read_text().splitlines()
  ]
  (workdir / "judgements" / "reader" / "defects").mkdir(parents=True)
  for system, readings in ((SYSTEMS[0], [0.9, 0.2]), (SYSTEMS[1], [0.9, 0.9])):
    for k, i in enumerate(ids):
      preference = 0.5 if readings[1] < 0.5 else 0.9
      row = {"id": i, "texts": "", "preference": preference, "orders": readings, "readings": 2}
      if k < 3:
        row |= {"first": 0, "repeated": 0.8, "readings": 3}
      append_row(workdir / "judgements" / "reader" / f"{system}-against-baseline.jsonl", row)
      named = ["said twice", "cut off"] if k == 0 and system == SYSTEMS[0] else []
      append_row(
        workdir / "judgements" / "reader" / "defects" / f"{system}.jsonl",
        {"id": i, "text": "", "defects": named},
      )
  equal = {"id": ids[0], "texts": "", "preference": 0.5, "orders": [], "readings": 2}
  append_row(workdir / "judgements" / "reader" / f"{SYSTEMS[1]}-against-baseline.jsonl", equal)
  about = json.loads((workdir / "run.json").read_text())
  systems = {
    SYSTEMS[1]: {"annotator": "who|ever", "teacher": "someone", "forms": "live, head, token, pred_10x"}
  }
  (workdir / "run.json").write_text(json.dumps(about | {"judges": ["reader", JUDGE], "systems": systems}))


def test_what_readers_say_is_reported(workdir: Path, capsys):
  judged_run(workdir)
  path = workdir / "responses" / f"{SYSTEMS[1]}.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[1]["finish_reason"], rows[0]["text_tokens"] = "length", 1000
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  summary = write_report(workdir)
  json.dumps(summary, allow_nan=False)
  n = len(TEXTS)
  even, better = (summary["systems"][s]["quality"]["reader"] for s in SYSTEMS[:2])
  assert (even["win_rate"], even["wins"], even["ties"], even["losses"]) == (50, 0, n, 0)
  assert (better["wins"], better["ties"]) == (n - 1, 1) and better["win_rate"] == pytest.approx(90 - 40 / n)
  assert better["win_rate_low"] < better["win_rate"] < better["win_rate_high"]
  assert better["judged_both_finished"] == n - 1 == even["judged_both_finished"] - 1
  assert summary["systems"][SYSTEMS[1]]["responses"]["median_text_tokens"] == 20
  reader = summary["judges"]["reader"]
  [difference] = reader["differences"]
  assert difference["points"] == pytest.approx(50 - better["win_rate"]) and difference["prompts"] == n
  assert (
    reader["position"]["changed"]["found"] == n and reader["repeats"]["found"] == reader["repeats"]["n"] == 5
  )
  assert reader["defects"][SYSTEMS[1]] == {"any": reader["defects"][SYSTEMS[1]]["any"]}
  text = (workdir / "report.md").read_text()
  rows_of_table = [
    [c.strip() for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in text.splitlines() if x[:1] == "|"
  ]
  by_heading = {r[0]: r[1:] for r in rows_of_table}
  assert [*summary["systems"]] == ["baseline", *SYSTEMS[:2]]
  assert by_heading["annotator"] == ["–", "–", "who\\|ever"]
  assert by_heading["teacher"] == ["–", "–", "someone"]
  assert by_heading["form of the language"][2] == "live, head, token, pred_10x"
  assert by_heading["read by"][1:] == [f"reader, {tables._escaped(JUDGE)}"] * 2
  assert by_heading["wins, ties, losses (reader)"] == ["–", f"0, {n}, 0", f"{n - 1}, 1, 0"]
  assert by_heading["said twice"] == [f"1 of {n} (0 to 27)", f"0 of {n} (0 to 19)"]
  html, printed = (workdir / "report.html").read_text(), " ".join(capsys.readouterr().out.split())
  for words in ("Differences in win rate (reader)", "Asked again, it gave the same verdict in 5 of 5"):
    assert words in html and words in printed and words in text


def test_a_judge_that_decides_by_the_place_is_called_that(workdir: Path):
  path = workdir / "judgements" / JUDGE / f"{SYSTEMS[0]}-against-baseline.jsonl"
  rows = [json.loads(line) | {"orders": [0.8, 0.2]} for line in path.read_text().splitlines()]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  write_report(workdir)
  assert (
    "DECIDES BY THE PLACE OF AN ANSWER: it takes the one shown first" in (workdir / "report.md").read_text()
  )


def test_speed_and_quality_have_a_panel_for_each_measure():
  """One for each speed that any system has; the paper's points and a front are drawn, and no two labels overlap."""
  speeds = {"theoretical_parallelism": 1.5, "speedup_over_baseline": 1.8}
  point = lambda k, rate, speeds: speed_quality.Point(
    {m: s + 0.2 * k for m, s in speeds.items()}, {}, rate, (rate - 5, rate + 5)
  )
  points = {f"a_{k}": point(k, 48 - 2 * k, speeds) for k in range(3)} | {"other": point(0, 47, speeds)}
  palette = plots.colours([*points, "baseline"])
  draw = lambda points, **more: speed_quality.draw(
    points, rate="win rate (r)", palette=palette, baseline="baseline",
    **{"fronts": [{f"a_{k}": f"a {k}" for k in range(3)}], "with_paper": True, **more},
  )  # fmt: skip
  figure = draw(points)
  assert [ax.get_xlabel() for ax in figure.axes] == [
    "theoretical speedup (times)",
    "theoretical parallelism (times)",
  ]
  assert figure.axes[0].get_ylabel() == "win rate (r) against baseline, %"
  for ax, measure in zip(figure.axes, ("speedup_over_baseline", "theoretical_parallelism")):
    texts = {t.get_text(): t for t in ax.texts}
    assert texts.keys() == {"a 0", "a 1", "a 2", "other", "baseline", *(p.label for p in paper.POINTS)}
    front = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in front] == [
      [points[f"a_{k}"].speeds[measure] for k in range(3)]
    ]
    boxes = [t.get_window_extent() for t in texts.values()]
    overlaps = sum(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    assert overlaps <= 1
  timed = points | {"other": point(0, 47, speeds | {"realised_speedup": 1.1})}
  assert len(draw(timed).axes) == 3
  alone = draw(points, with_paper=False, fronts=[])
  assert {t.get_text() for t in alone.axes[0].texts} == {*points, "baseline"} and not alone.axes[0].get_title(
    loc="left"
  )


def test_calibration_shows_medians_by_declared_length():
  lengths = {"a": [(10, 8), (10, 12), (10, 30), (40, 20)], "b": [(20, 20)]}
  figure = plots.calibration(lengths, palette=plots.colours(["a", "b"]))
  medians = [list(line.get_ydata()) for line in figure.axes[0].lines[:2]]
  assert medians == [[12, 20], [20]]
  heights, edges, _ = figure.axes[1].patches[0].get_data()  # of "a": 2 and 20 before, 2 and 20 after
  assert {edges[k]: h for k, h in enumerate(heights) if h} == dict.fromkeys((-29.5, -9.5, 0.5, 10.5), 25)
  assert [t.get_text().strip() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b"]


def test_a_chunk_far_from_its_number_is_in_the_outer_bars():
  lengths = {"a": [(500, 20), (40, 900), (40, 40), (40, 41)]}
  late = plots.calibration(lengths, palette=plots.colours(["a"])).axes[1].patches[0]
  heights, edges, _ = late.get_data()
  at = {edge: height for edge, height in zip(edges, heights) if height}
  assert at == {edges[0]: 25, -9.5: 25, 0.5: 25, edges[-2]: 25}


def test_wins_are_reported_by_number_of_parts(workdir: Path, capsys):
  """Planted: the more parts, the fewer wins; the local judge, and a system without parts, have no such table."""
  promises = [0] * 4 + [1, 2] * 2 + [3, 4] * 2 + [5, 6] + [7, 40] * 2
  preferences = [1.0] * 4 + [0.75] * 4 + [0.5] * 4 + [1.0, 0.0] + [0.0] * 4
  for system, counts in ((SYSTEMS[0], promises), (SYSTEMS[1], [0] * len(promises))):
    path = workdir / "responses" / f"{system}.jsonl"
    rows = [json.loads(line) | {"promises": n} for line, n in zip(path.read_text().splitlines(), counts)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for judge in ("reader", "local"):
      (workdir / "judgements" / judge).mkdir(exist_ok=True)
      for r, p in [*zip(rows, preferences)][:-1]:  # the last one is not judged
        judged = {"id": r["id"], "texts": "", "preference": p}
        append_row(workdir / "judgements" / judge / f"{system}-against-baseline.jsonl", judged)
  summary = write_report(workdir)
  assert "parts" not in summary["judges"]["local"]
  [(system, parts)] = summary["judges"]["reader"]["parts"].items()
  assert system == SYSTEMS[0]
  assert {name: (f["judged"], f["win_rate"], f["wins"], f["ties"], f["losses"]) for name, f in parts.items()} == {
    "0": (4, 100, 4, 0, 0), "1–2": (4, 75, 4, 0, 0), "3–4": (4, 50, 0, 4, 0), "5–6": (2, 50, 1, 0, 1),
    "7 or more": (3, 0, 0, 0, 3),
  }  # fmt: skip
  assert [*parts] == ["0", "1–2", "3–4", "5–6", "7 or more"]
  assert (parts["5–6"]["win_rate_low"], parts["5–6"]["win_rate_high"]) == (0, 100)
  heading = "Win rate (reader) by number of promises or points"
  text, html = ((workdir / f"report.{form}").read_text() for form in ("md", "html"))
  assert "| 5–6 | 50.0 % (0.0 to 100.0), 2 |" in text and "| 7 or more | 0.0 % (0.0 to 0.0), 3 |" in text
  assert html.count(heading) == 2 and heading in " ".join(capsys.readouterr().out.split())  # table and figure
  figures = {path.name for path in (workdir / "figures").iterdir()}
  assert {"parts_reader.svg", "parts_reader.png"} <= figures and "parts_local.svg" not in figures
  svg = (workdir / "figures" / "parts_reader.svg").read_text()
  assert "1–2" in svg and SYSTEMS[1] not in svg


def test_declared_lengths_are_in_the_table_of_systems_that_promise(workdir: Path):
  path = workdir / "responses" / "baseline.jsonl"
  rows = [json.loads(line) | {"promises": 0, "lengths": []} for line in path.read_text().splitlines()]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  path = workdir / "responses" / f"{SYSTEMS[1]}.jsonl"
  rows = [json.loads(line) | {"lengths": [[10, 5], [30, 60]]} for line in path.read_text().splitlines()]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  of_systems = {n: entry["responses"] for n, entry in write_report(workdir)["systems"].items()}
  assert of_systems[SYSTEMS[1]]["length_correlation_within"] == pytest.approx(1)
  assert "length_correlation" not in of_systems[SYSTEMS[0]]  # one length everywhere
  assert "ends_after_share" in of_systems[SYSTEMS[0]] and "ends_after_share" not in of_systems["baseline"]
  lines = (workdir / "report.md").read_text().splitlines()
  n = len(TEXTS)
  for heading, cells in (
    (
      "declared lengths: rank correlation with true ones, within answers",
      f"– | – | 1.00 (1.00 to 1.00), {n} answers",
    ),
    ("promises with the commonest length", "– | 100 % (100 to 100), 10 tokens | 50 % (50 to 50), 10 tokens"),
    ("chunks that end 1 to 10 tokens after it", "– | 100 % (100 to 100) | 0 % (0 to 0)"),
  ):
    assert f"| {heading} | {cells} |" in lines


def test_the_local_judge_has_no_win_rate_on_the_front_of_stage_two(tmp_path: Path):
  for judge, name in (("local", "check of form (likelihood)"), ("gpt", "win rate (gpt)")):
    system = {"responses": {"theoretical_parallelism": 1.5}, "quality": {judge: {"win_rate": 40.0}}}
    (tmp_path / "summary.json").write_text(json.dumps({"systems": {"start": system, "a_round1": system}}))
    figure = pareto_front.draw(points([tmp_path]))
    assert figure.axes[0].get_ylabel() == f"{name} against the baseline, %"


def test_a_figure_of_thousands_of_groups_can_be_drawn():
  figures = {"a": {f"group {i}": 1.0 for i in range(5000)}}
  assert plots.groups(figures, speed="x", palette=plots.colours(["a"])).get_figheight() < 30
  plots.svg(plots.distribution({"a": [1.1, 1.2]}, speed="x", palette=plots.colours(["a"])))


def test_labels_have_no_mathematics():
  text = plots.svg(plots.distribution({"a": [1.01, 1.02, 1.9]}, speed="x", palette=plots.colours(["a"])))
  assert "mathdefault" not in text and "1.9" not in re.sub(r"<(?!text)[^>]*>", "", text).replace("×", "")


@pytest.mark.parametrize(
  "name, edit, message",
  [
    ("config.json", lambda v: v.pop("eval"), "config.json: eval field required"),
    ("config.json", lambda v: v["eval"].update(baseline=3), "config.json: eval.baseline must be a valid string"),
    ("run.json", lambda v: v.update(requests={}), "run.json: requests must be a valid list"),
    ("responses/baseline.jsonl", lambda v: v.update(longest_path="9"), "baseline.jsonl, row 0 .*longest_path must be"),
    ("timed/baseline.jsonl", lambda v: v.update(seconds=None, lengths=3), "baseline.jsonl, row 0 .*lengths must be"),
    (f"judgements/{JUDGE}/baseline-against-baseline.jsonl", lambda v: v.update(preference=float("nan")),
     "row 0 .*preference must be a valid number"),
    (f"judgements/{JUDGE}/baseline-against-baseline.jsonl", lambda v: v.update(orders=[0.5, 2]),
     "row 0 .*orders.1 must be less than or equal to 1"),
    ("run.json", lambda v: v.update(systems={"a": {"teacher": 3}}), "systems.a.teacher must be a valid string"),
  ],
)  # fmt: skip
def test_a_run_that_cannot_be_reported_is_one_line(workdir: Path, name: str, edit, message: str):
  path = workdir / name
  first, *rest = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
  value = json.loads(first)
  edit(value)
  path.write_text("\n".join([json.dumps(value), *rest]) + "\n")
  with pytest.raises(EvalError, match=message):
    write_report(workdir)
  (workdir / "run.json").write_text("{")
  with pytest.raises(EvalError, match="run.json: not JSON"):
    write_report(workdir)


OURS = {"id": "a", "system": "pasta", "preference": 0.5}
THEIRS = {"instruction": "x", "generator_2": "pasta", "preference": 1.5}


@pytest.mark.parametrize(
  "row, message",
  [
    (OURS | {"preference": float("nan")}, "preference must be a valid number, not None"),
    (OURS | {"preference": None}, "preference must be a valid number"),
    (OURS | {"preference": "0.5"}, "preference must be a valid number, not '0.5'"),
    (OURS | {"preference": 1.01}, "preference must be less than or equal to 1"),
    (OURS | {"preference": 10**400}, "preference must be "),
    ({"preference": 0.5}, "id field required"),
    (THEIRS | {"preference": -1}, "preference must be greater than or equal to 0"),
    (THEIRS | {"instruction": 3}, "instruction must be a valid string"),
  ],
)
def test_preferences_that_are_none_are_refused(tmp_path: Path, row: dict, message: str):
  path = tmp_path / "p.jsonl"
  path.write_text(json.dumps(OURS | {"id": "b"}) + "\n" + json.dumps(row) + "\n")
  with pytest.raises(EvalError, match=rf"p\.jsonl, row 2: {message}"):
    FileJudge(str(path), "baseline")


def test_infinite_preferences_and_difficulties_are_refused(tmp_path: Path):
  path = tmp_path / "p.jsonl"
  path.write_text('{"id": "a", "system": "pasta", "preference": 1e999}\n')
  with pytest.raises(EvalError, match=r"p\.jsonl, row 1: preference must be a finite number"):
    FileJudge(str(path), "baseline")
  path.write_text('{"id": "a", "difficulty": 1e999}\n')
  with pytest.raises(ValueError, match=r"p\.jsonl, row 1: difficulty must be a finite number"):
    read_difficulty(path)
  path.write_text('{"id": "a", "baseline_chars": 1, "preference": {"m": NaN}, "output_chars": {"m": 3}}\n')
  assert np.isnan(read_preferences(path).preference).all()


def test_figures_that_are_not_finite_are_read_back(tmp_path: Path):
  writer = MetricWriter(tmp_path, 0)
  writer.write(1, {"loss": float("nan"), "accuracy": 0.5})
  writer.close()
  found = last_scalars(tmp_path)
  assert np.isnan(found["loss"]) and found["accuracy"] == 0.5
  system = {"responses": {"theoretical_parallelism": None}, "quality": {"local": {"win_rate": None}}}
  (tmp_path / "summary.json").write_text(json.dumps({"systems": {"start": system, "a_round1": system}}))
  assert points([tmp_path]) == []
  (tmp_path / "summary.json").write_text('{"systems": {"a_round1": {"quality": {"local": 3}}}}')
  with pytest.raises(ValueError, match="has no finished evaluation .*systems.a_round1.quality.local must be"):
    points([tmp_path])


def test_markdown_escapes_only_markup():
  assert tables._escaped("pasta_fast, 95 % (1.2×)") == "pasta_fast, 95 % (1.2×)"
  assert tables._escaped("a\n* b") == "a \\* b"
