"""`--mode=eval` on a tiny model: systems, resuming, later turns, the clock, judges, report and pilot."""

import html.parser
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.folders import trained_config, with_fields
from helpers.old_schema import make_old

from pasta_jax.config import Config, sections
from pasta_jax.config.sections import DECODINGS
from pasta_jax.data.prompts import conversation, read_prompts
from pasta_jax.decode.generator import Model
from pasta_jax.decode.scheduler import decode
from pasta_jax.evaluate.errors import EvalError
from pasta_jax.evaluate.judges.likelihood import Likelihood
from pasta_jax.evaluate.judges.registry import JUDGES
from pasta_jax.evaluate.report.run_record import read_run
from pasta_jax.evaluate.report.write import write_report
from pasta_jax.evaluate.run import evaluate, pilot, select_requests
from pasta_jax.evaluate.systems.registry import SYSTEMS
from pasta_jax.evaluate.systems.skeleton import Skeleton, joint_trace, parse_outline
from pasta_jax.utils.jsonl import DataError

ROOT = Path(__file__).parents[2]
PROMPTS = [
  {"id": "a", "prompt": "Plan a trip.", "category": "writing"},
  {"id": "b", "prompt": "Why <b>?", "category": "why"},
  {"id": "c", "turns": ["Name three birds.", "Which of them is the largest?"], "category": "writing"},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A config whose adapter was trained by the trainer for a few steps on the seed data, and its folder."""
  folder = tmp_path_factory.mktemp("evaluate")
  config = trained_config(folder)
  for name in ("baseline", "apar"):
    config = with_fields(config, f"systems.{name}", adapter=config.model.adapter)
  config = with_fields(
    config,
    "decode",
    max_new_tokens=120,
    max_branches=2,
    kv_capacity=1024,
    temperature=1.0,
    dtype="float32",
    promise_bias=5.0,
  )
  config = with_fields(config, "skeleton", outline_tokens=24, point_tokens=16)
  (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
  prompts = str(folder / "prompts.jsonl")
  found = with_fields(
    config, "eval", batch_size=2, branch_width=2, systems="pasta,baseline,sot", prompts=prompts
  )
  return found, folder


def copy_of(config, **changes):
  return with_fields(config, "eval", **changes)


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
  """A whole run's folder and its summary."""
  config, _ = trained
  workdir = tmp_path_factory.mktemp("run")
  return workdir, evaluate(copy_of(config, timed=2), workdir)


def rows_of(path: Path) -> dict[str, dict]:
  return {r["id"]: r for r in map(json.loads, path.read_text().splitlines())}


def test_many_at_a_time_answer_as_one_at_a_time(trained, finished):
  config, _ = trained
  workdir, _ = finished
  generator = Model(config)
  requests = read_prompts(config.eval.prompts)
  promised = 0
  for name in ("pasta", "baseline"):
    rows = rows_of(workdir / "responses" / f"{name}.jsonl")
    texts = {i: r["text"] for i, r in rows.items()}
    assert list(map(len, (rows, requests))) == [4, 4]
    for r in requests:  # the second turn of "c" follows the system's own first answer
      alone = generator.generate(conversation(r, texts), parallel=name == "pasta")
      assert alone.text == rows[r.id]["text"], (name, r.id)
    promised += sum(r["promises"] for r in rows.values())
    timed = rows_of(workdir / "timed" / f"{name}.jsonl")
    assert set(timed) == {"a", "b"} and all(r["seconds"] > 0 for r in timed.values())
    assert {i: r["text"] for i, r in timed.items()} == {i: texts[i] for i in timed}
  assert promised > 0


def test_a_stopped_run_goes_on(trained, finished, tmp_path):
  config, _ = trained
  whole, _ = finished
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  path = workdir / "responses" / "pasta.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # killed while a line was written
  timed = workdir / "timed" / "sot.jsonl"
  timed.write_text(timed.read_text().splitlines(keepends=True)[0])
  write_report(workdir)  # at any time: half a line is no row
  assert json.loads((workdir / "summary.json").read_text())["systems"]["pasta"]["responses"]["prompts"] == 2
  evaluate(copy_of(config, timed=2), workdir)
  assert path.read_text().startswith("".join(lines[:2]))
  assert {i: r["text"] for i, r in rows_of(path).items()} == {
    i: r["text"] for i, r in rows_of(whole / "responses" / "pasta.jsonl").items()
  }
  assert set(rows_of(timed)) == {"a", "b"}
  # What is whole is not made again; where one system was missing, all are timed again side by side.
  before, after = ((d / "timed" / "pasta.jsonl").read_text() for d in (whole, workdir))
  assert after.startswith(before) and [json.loads(x)["id"] for x in after.splitlines()] == ["a", "b", "b"]
  # A judgement of another text does not stand.
  rows = [json.loads(x) for x in path.read_text().splitlines()]
  changed = [r | {"text": r["text"] + " And more."} if r["id"] == "a" else r for r in rows]
  path.write_text("".join(json.dumps(r) + "\n" for r in changed))
  judgements = workdir / "judgements" / "local" / "pasta-against-baseline.jsonl"
  judged = len(judgements.read_text().splitlines())
  evaluate(copy_of(config, timed=2), workdir)
  again = [json.loads(x)["id"] for x in judgements.read_text().splitlines()[judged:]]
  assert "a" in again and len(again) == 1 + sum(r["id"] == "a/2" for r in rows)
  with pytest.raises(DataError, match="made with decode.temperature=1.0, not 0.5"):
    evaluate(with_fields(config, "decode", temperature=0.5), workdir)
  (tmp_path / "other.jsonl").write_text('{"id": "a", "prompt": "Something else?"}')
  with pytest.raises(DataError, match="another prompt with the id 'a'"):
    evaluate(copy_of(config, prompts=str(tmp_path / "other.jsonl")), workdir)


def test_a_run_of_the_old_schema_is_reported_resumed_and_judged(trained, finished, tmp_path):
  """Rows with the old keys and a run.json without judges: the same figures, no row made again."""
  config, _ = trained
  whole, summary = finished
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  assert {"theoretical_speedup", "parallelism", "wall_clock_low", "faults"} <= make_old(workdir)
  assert write_report(workdir) == summary
  judgements = workdir / "judgements" / "local"
  scores = (judgements / "scores.jsonl").read_text()
  (judgements / "pasta-against-baseline.jsonl").unlink()  # judged again, by the scores of the old run
  path = workdir / "responses" / "pasta.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:-1]))
  before = {p: p.read_text() for p in (path, *(workdir / "timed").glob("*.jsonl"))}
  resumed = evaluate(copy_of(config, timed=2), workdir)
  assert resumed["systems"] == summary["systems"]
  assert (judgements / "scores.jsonl").read_text() == scores
  for p, text in before.items():
    assert p.read_text().startswith(text)
    assert len(p.read_text()) > len(text) if p == path else p.read_text() == text
  assert [json.loads(line).get("schema") for line in path.read_text().splitlines()] == [None, None, None, 2]
  assert json.loads((workdir / "run.json").read_text())["judges"] == ["local"]


def test_the_judges_of_the_last_call_come_first(finished, tmp_path):
  """In their order: from run.json, or from the words of an old run's config."""
  whole, _ = finished
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  for name in ("a-model", "people-123abc"):
    shutil.copytree(workdir / "judgements" / "local", workdir / "judgements" / name)
  about, config = (json.loads((workdir / f"{n}.json").read_text()) for n in ("run", "config"))
  assert about["judges"] == ["local"] and [*read_run(workdir).judgements][0] == "local"
  for judges in (["people-123abc", "local"], ["local", "a-model", "people-123abc"]):
    (workdir / "run.json").write_text(json.dumps(about | {"judges": judges}))
    assert [*read_run(workdir).judgements][: len(judges)] == judges
  del about["judges"]
  (workdir / "run.json").write_text(json.dumps(about))
  config["eval"]["judges"], config["judge"]["model"] = "data/people.jsonl, llm", "a/model"
  (workdir / "config.json").write_text(json.dumps(config))
  assert [*read_run(workdir).judgements] == ["people-123abc", "a-model", "local"]


def test_benchmarks_can_be_imported_together():
  """None of them defines a flag before it runs as a program."""
  modules = (
    "evaluate.benchmark",
    "train.benchmark",
    "evaluate.against_llama_cpp",
    "evaluate.metrics.length_control",
    "evaluate.judges.agreement",
  )
  imports = "; ".join(f"import pasta_jax.{m}" for m in modules)
  names = ("config", "data", "json", "model", "rounds", "steps", "workdir")
  code = f"{imports}; from absl import flags; assert not {set(names)} & set(flags.FLAGS)"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
  for module in modules[:2]:
    command = [sys.executable, "-m", f"pasta_jax.{module}", "--helpshort"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "--rounds" in done.stdout and "--json" in done.stdout, done.stderr


def test_the_summary_says_what_the_records_say(finished):
  workdir, summary = finished
  assert json.loads((workdir / "summary.json").read_text()) == summary
  pasta = summary["systems"]["pasta"]
  rows = rows_of(workdir / "responses" / "pasta.jsonl").values()
  assert pasta["responses"]["prompts"] == 4 == summary["prompts"] and summary["timed"] == 2
  assert pasta["responses"]["tokens_per_round"] == pytest.approx(
    float(np.exp(np.mean([np.log(r["tokens_per_round"]) for r in rows])))
  )
  assert summary["schema"] == 2 and all(r["schema"] == 2 for r in rows)
  assert set(pasta["responses_by_category"]) == {"writing", "why"}
  assert sum(g["prompts"] for g in pasta["responses_by_length"].values()) == 4
  judged = rows_of(workdir / "judgements" / "local" / "pasta-against-baseline.jsonl")
  assert pasta["quality"]["local"]["win_rate"] == pytest.approx(
    100 * np.mean([r["preference"] for r in judged.values()])
  )
  clock = [rows_of(workdir / "timed" / f"{n}.jsonl") for n in ("baseline", "pasta")]
  ratios = [clock[0][i]["seconds"] / clock[1][i]["seconds"] for i in ("a", "b")]
  assert pasta["timed"]["realised_speedup"] == pytest.approx(float(np.sqrt(np.prod(ratios))))
  assert summary["systems"]["baseline"]["quality"] == {}
  for heading in (
    "realised speedup",
    "check of form (likelihood)",
    "theoretical speedup",
    "theoretical parallelism",
  ):
    assert heading in (workdir / "report.md").read_text()
  assert "win rate" not in (workdir / "report.md").read_text().replace("It is no win rate.", "")
  about = json.loads((workdir / "run.json").read_text())["systems"]
  assert about["pasta"]["forms"] == "promise, topic, digits, pred_10x"
  assert "forms" not in about["baseline"]


def test_alpaca_evals_own_form(finished):
  workdir, _ = finished
  for name in ("pasta", "baseline", "sot"):
    outputs = json.loads((workdir / "alpaca_eval" / f"{name}.json").read_text())
    assert [set(o) for o in outputs] == [{"dataset", "instruction", "output", "generator"}] * 4
    assert {o["generator"] for o in outputs} == {name}
  assert {r.prompt for r in read_prompts(str(workdir / "alpaca_eval" / "sot.json"))} >= {
    "Plan a trip.",
    "Why <b>?",
  }


class _Well(html.parser.HTMLParser):
  """Counts tags, and finds those that are closed out of order."""

  def __init__(self):
    super().__init__()
    self.open, self.count, self.outside = [], {}, []

  def handle_starttag(self, tag, attrs):
    self.count[tag] = self.count.get(tag, 0) + 1
    self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
    if tag not in ("meta", "input", "br", "path", "use", "rect", "line"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.count[tag] = self.count.get(tag, 0) + 1

  def handle_endtag(self, tag):
    if tag in self.open:
      assert self.open.pop() == tag


def test_the_page_holds_everything_itself(finished):
  workdir, _ = finished
  text = (workdir / "report.html").read_text()
  page = _Well()
  page.feed(text)
  assert not page.open and page.count["svg"] >= 4 and page.count["table"] == 3
  assert page.outside == []
  assert "Why <b>?" not in text.replace("Why &lt;b&gt;?", "")
  for name in (
    "speed_quality_local",
    "speedups",
    "speedups_by_category",
    "speedups_by_length",
  ):
    assert (workdir / "figures" / f"{name}.svg").read_text().startswith("<?xml")
    assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(finished, tmp_path, dark):
  """Its script fills in the chosen response and draws the timeline; light and dark differ."""
  workdir, _ = finished
  options = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--virtual-time-budget=8000",
    "--window-size=1280,2400",
    f"--user-data-dir={tmp_path / 'profile'}",
    *(["--blink-settings=preferredColorScheme=0"] if dark else []),
  ]
  url = (workdir / "report.html").as_uri()
  shot = tmp_path / "page.png"
  subprocess.run(
    [CHROMIUM, *options, f"--screenshot={shot}", url], check=True, capture_output=True, timeout=120
  )
  import matplotlib.image

  pixels = matplotlib.image.imread(shot)[..., :3]
  assert pixels.shape[1] == 1280 and pixels.std() > 0.02
  assert (pixels.mean() < 0.5) == dark
  done = subprocess.run(
    [CHROMIUM, *options, "--dump-dom", url], check=True, capture_output=True, timeout=120, text=True
  )
  explored = done.stdout[done.stdout.index('id="answer"') :]
  assert "pasta-timeline" in explored[: explored.index("<script")] and "theoretical parallelism" in explored


def test_skeletons(trained):
  config, _ = trained
  generator = Model(config, adapter="")
  skeleton = Skeleton(generator, **vars(config.skeleton), batch_size=2)
  one = Skeleton(generator, **vars(config.skeleton), batch_size=1)
  conversations = [[{"role": "user", "content": text}] for text in ("Plan a trip.", "Why?")]
  records = skeleton.answer(conversations)
  assert [r["text"] for r in records] == [one.answer([c])[0]["text"] for c in conversations]
  assert all(r["steps"] == r["longest_path"] for r in records)
  # With an outline given, each point is written by a request of its own, and the figures follow.
  outline = decode(generator.interpreter(False, max_new_tokens=4), generator.encode("x"), generator.sampling)
  points = ["First thing", "Second thing"]
  answers = [
    decode(generator.interpreter(False, max_new_tokens=n), generator.encode(p), generator.sampling)
    for n, p in zip((6, 9), points)
  ]
  record = skeleton.record(outline, points, answers)
  assert record.longest_path == outline.cost.longest_path + max(a.cost.longest_path for a in answers)
  assert (
    record.promises == 2 and record.text.startswith("1. First thing:") and "\n2. Second thing:" in record.text
  )
  threads = joint_trace(outline, points, answers)["threads"]
  assert [t["topic"] for t in threads] == ["", *points]
  assert min(threads[1]["rounds"]) == max(threads[0]["rounds"]) + 1


def test_systems_and_judges_are_those_that_settings_name():
  """A new one is a class, a line of its registry, and its name in the settings."""
  assert tuple(SYSTEMS) == DECODINGS
  assert tuple(JUDGES) == sections.JUDGES
  for name in JUDGES:
    assert with_fields(Config(), "eval", judges=name).eval.judges == (name,)
  assert {s.promises for s in SYSTEMS.values()} == {True, False}


def test_outlines_are_read():
  assert parse_outline("1. Rock\n2. Blues\n3. Pop", 10) == ["Rock", "Blues", "Pop"]
  assert parse_outline("1. The first. 2. The second. 3. Version 4.5 of it", 10) == [
    "The first",
    "The second",
    "Version 4.5 of it",
  ]
  assert parse_outline("1. **A**:\n2. a\n3. B\n4. C", 3) == ["A", "B"]
  assert parse_outline("1. A\n3. B", 10) == ["A"] and parse_outline("No outline at all.", 10) == []


def test_likelihoods_are_the_decoders_own(trained):
  """Packed and batched, the sum of log p is what the interpreter logged for each token."""
  config, _ = trained
  generator = Model(config)
  prompts = [generator.encode(t) for t in ("Plan a trip.", "Why?", "Name three birds.")]
  traces = [decode(generator.interpreter(False), p, generator.sampling) for p in prompts]
  found = {}
  Likelihood(generator)(prompts, [t.threads[0].tokens.tolist() for t in traces], found.__setitem__)
  for i, trace in enumerate(traces):
    assert found[i] == pytest.approx(float(trace.threads[0].log_p.sum()), abs=1e-2)


def test_wrong_settings_are_one_line(trained, tmp_path):
  config, folder = trained
  for changes, words in (
    ({"systems": "pasta,faster"}, "unknown system 'faster'"),
    ({"prompts": ""}, "name a file"),
    ({"limit": -1}, "eval.limit"),
    ({"batch_size": 0}, "eval.batch_size must be 1 to 4096"),
    ({"timed": -2}, "eval.timed"),
    ({"judges": "friend"}, "eval.judges takes local, llm, .* not 'friend'"),
    ({"judges": "llm"}, "name a model: --config.judge.model"),
    ({"categories": "x,why"}, "has no category x"),
    ({"timed": 1, "timed_prompts": str(folder / "none.jsonl")}, "no such data file"),
  ):
    with pytest.raises(ValueError, match=words):
      evaluate(copy_of(config, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "responses" / "pasta.jsonl").exists()
  with pytest.raises(EvalError, match="has no evaluation"):
    write_report(tmp_path / "none")
  with pytest.raises(ValueError, match="systems.pasta.decode must be"):
    with_fields(config, "systems.pasta", decode="sideways")


def test_pilot_says_whether_thresholds_are_met(trained, finished, tmp_path, capsys):
  config, _ = trained
  whole, summary = finished
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  reached = summary["systems"]["pasta"]
  speed, rate = reached["timed"]["realised_speedup"], reached["quality"]["local"]["win_rate"]
  assert pilot(copy_of(config, timed=2, min_speedup=speed - 0.01, min_quality=rate - 0.01), workdir)
  assert "NOT MET" not in capsys.readouterr().out
  assert "not met" not in (workdir / "report.html").read_text()
  assert not pilot(copy_of(config, timed=2, min_speedup=speed + 0.01, min_quality=rate - 0.01), workdir)
  assert not pilot(copy_of(config, timed=2, min_speedup=speed - 0.01, min_quality=rate + 0.01), workdir)
  assert "NOT MET" in capsys.readouterr().out and "not met" in (workdir / "report.html").read_text()
  with pytest.raises(EvalError, match="say what the pilot must reach"):
    pilot(copy_of(config), workdir)
  with pytest.raises(EvalError, match="names no system"):
    pilot(copy_of(config, systems="baseline", min_speedup=1.0), workdir)


def test_one_system_for_each_value_of_a_setting(trained, tmp_path):
  """Each is answered with its value, which its rows' settings have; a system that it does not change stays one."""
  config, _ = trained
  systems = copy_of(config, systems="pasta,sequential,baseline", judges="", limit=2)
  config = with_fields(systems, "eval", vary="decode.promise_bias=-20,5")
  summary = evaluate(config, tmp_path)
  names = ["pasta_promise_bias_-20", "pasta_promise_bias_5"]
  assert set(summary["systems"]) == {*names, "sequential", "baseline"}
  promised = []
  for name, bias in zip(names, (-20.0, 5.0)):
    settings = json.loads((tmp_path / "responses" / f"{name}.settings.json").read_text())
    assert settings["decode.promise_bias"] == bias
    own = Model(with_fields(config, "decode", promise_bias=bias), dtype="float32")
    rows = rows_of(tmp_path / "responses" / f"{name}.jsonl")
    assert {i: r["text"] for i, r in rows.items()} == {
      i: own.generate(conversation(r, {})).text
      for i in rows
      for r in read_prompts(config.eval.prompts)
      if r.id == i
    }
    promised.append(summary["systems"][name]["responses"]["promise_share"])
  assert promised[0] < promised[1]
  about = json.loads((tmp_path / "run.json").read_text())["systems"]
  assert (about[names[0]]["varied"], about[names[0]]["value"]) == ("pasta", "-20")
  before = (tmp_path / "responses" / f"{names[0]}.jsonl").read_text()
  evaluate(with_fields(config, "eval", vary="decode.promise_bias=-20,5,1"), tmp_path)  # one more value
  assert (tmp_path / "responses" / f"{names[0]}.jsonl").read_text() == before
  assert (tmp_path / "responses" / "pasta_promise_bias_1.jsonl").is_file()
  with pytest.raises(EvalError, match="changes none of eval.systems=sequential"):
    evaluate(with_fields(config, "eval", systems="sequential,baseline"), tmp_path)


@pytest.mark.parametrize(
  "vary, words",
  [
    ("promise_bias=1,x", "eval.vary gives decode.promise_bias no usable value"),
    ("decode.promise_bias", "eval.vary gives decode.promise_bias no usable value"),
    ("decode.live=True,False", "eval.vary takes FIELD=VALUE of decode, with one of .*promise_bias"),
    ("decode.temperature=-1", "no usable value .*temperature must be 0 or more"),
    ("decode.guard=yes", "gives decode.guard no usable value"),
    ("decode.promise_bias=1,1.0", "has a value twice"),
  ],
)
def test_what_cannot_be_varied_is_one_line(vary, words):
  with pytest.raises(ValueError, match=words) as error:
    with_fields(Config(), "eval", vary=vary)
  assert "\n" not in str(error.value)


def test_pilots_exit_code(trained, finished, tmp_path):
  """As a shell sees it: 0 met, 3 not met."""
  config, folder = trained
  whole, _ = finished
  shutil.copytree(whole, tmp_path / "run")
  flags = [
    f"--config.{part}.{field}={config.to_dict()[part][field]}"
    for part, fields in {
      "model": ("source", "adapter"),
      "decode": ("max_new_tokens", "max_branches", "kv_capacity", "temperature", "dtype", "promise_bias"),
      "eval": ("batch_size", "branch_width", "systems"),
      "skeleton": ("outline_tokens", "point_tokens"),
    }.items()
    for field in fields
  ]
  flags += [f"--config.systems.{n}.adapter={config.systems[n].adapter}" for n in ("baseline", "apar")]
  command = [
    sys.executable,
    "main.py",
    "--mode=pilot",
    f"--workdir={tmp_path / 'run'}",
    f"--prompts_file={folder / 'prompts.jsonl'}",
    *flags,
  ]
  for extra, code in (
    ("--config.eval.min_quality=0.001", 0),
    ("--config.eval.min_quality=99.9", 3),
    ("--config.eval.limit=-1", 1),
  ):
    done = subprocess.run([*command, extra], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr


def test_which_prompts_are_timed(tmp_path):
  """First turns only; of a file that names them; a limit is then taken from that file."""
  files = [tmp_path / "all.jsonl", tmp_path / "some.jsonl"]
  rows = [{"id": str(i), "prompt": f"Prompt {i}?"} for i in range(10)] + [PROMPTS[2]]
  files[0].write_text("".join(json.dumps(r) + "\n" for r in rows))
  files[1].write_text(
    "".join(json.dumps(r) + "\n" for r in rows[1::3]) + json.dumps({"id": "2", "prompt": "Another?"})
  )

  def ids(**changes):
    found = with_fields(Config(), "eval", prompts=str(files[0]), **changes)
    return tuple([r.id for r in part] for part in select_requests(found.eval))

  everything = [*map(str, range(10)), "c/1", "c/2"]
  assert ids() == (everything, [])
  assert ids(timed=-1) == (everything, everything[:-1])
  assert ids(timed=3) == (everything, ["0", "1", "2"])
  assert ids(timed=-1, timed_prompts=str(files[1])) == (everything, ["1", "4", "7", "c/1"])
  assert ids(timed=2, limit=2, timed_prompts=str(files[1])) == (["1", "7"], ["1", "7"])
