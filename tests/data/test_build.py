"""Data sets: built from files of several forms, read back row by row, split, counted, reported, and used for
training."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers.folders import with_fields

from pasta_jax.config import Config
from pasta_jax.data import build, dataset, report
from pasta_jax.data.examples import examples, mix, program_of
from pasta_jax.data.sources import read_instructions
from pasta_jax.lang.forms import Forms
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Promise, Sync, Text
from pasta_jax.utils.jsonl import DataError, read_jsonl

SEED = Path(__file__).parents[2] / "data" / "seed.jsonl"
ROWS = read_jsonl(SEED)


@pytest.fixture(scope="module")
def vocabulary(smollm2_checkpoint):
  return smollm2_checkpoint.vocabulary


def built(workdir: Path, vocabulary, avoid=(), **changes) -> dict:
  config = with_fields(Config(), "dataset", **dict(train=str(SEED)) | changes)
  return build.build(config, workdir, vocabulary, list(avoid))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vocabulary):
  folder = tmp_path_factory.mktemp("data")
  return folder, built(folder, vocabulary, validation_share=0.1)


def write(path: Path, rows) -> str:
  path.write_text("".join(json.dumps(r) + "\n" for r in rows))
  return str(path)


def test_chunks_that_need_their_siblings(tmp_path: Path, vocabulary):
  """The mark comes back, and the report counts what the form lays out, which it names."""
  [row] = [r for r in ROWS if r["id"] == "seed1-000"]
  marked = row | {"chunks": [*row["chunks"][:2], row["chunks"][2] | {"needs": "siblings"}]}
  data = write(tmp_path / "rows.jsonl", [marked, ROWS[1]])
  for visibility, chunks in (("promise", 2), ("live", 3)):
    config = with_fields(with_fields(Config(), "dataset", train=data), "language", visibility=visibility)
    folder = tmp_path / visibility
    build.build(config, folder, vocabulary, [])
    form = f"visibility {visibility}, promise topic, number digits, positions pred_10x"
    assert form in (folder / "report.html").read_text()
    [back, plain] = dataset.read(folder / "responses" / "1.0.0")
    assert back["chunks"] == marked["chunks"] and plain["chunks"] == ROWS[1]["chunks"]
    assert report.facts([back], vocabulary, Forms(visibility=visibility)).chunks.tolist() == [chunks]
    [laid] = examples(
      [back], vocabulary, PositionRule(), annotation="plan", max_length=999, visibility=visibility
    ).examples
    assert laid.threads.max() == chunks


def test_a_chunk_that_needs_its_siblings_is_text_under_promise():
  """After a sync that joins them, with its own chunks as the thread's around it; syncs of nothing go."""
  text = "Aa. - Bb. - Cc dd. Ee. Ff."
  chunks = [{"start": s, "end": e, "topic": t} for s, e, t in ((4, 9, "b"), (10, 18, "c"), (15, 17, "d"))]
  plain = {"id": "r", "prompt": "p", "response": text, "chunks": chunks, "syncs": [19, 23]}
  marked = plain | {
    "chunks": [c | ({"needs": "siblings"} if c["topic"] == "c" else {}) for c in plain["chunks"]]
  }
  assert program_of(marked, "live") == program_of(plain, "live") == program_of(plain)
  b, d = Promise("b", None, (Text("Bb."),)), Promise("d", None, (Text("dd"),))
  assert program_of(marked) == (
    Text("Aa. - "), b, Text(" - "), Sync(), Text("Cc "), d, Text(". "), Sync(), Text("Ee. Ff."))  # fmt: skip
  with pytest.raises(DataError, match="chunks.0.needs must be 'siblings', not 'more'"):
    program_of(plain | {"chunks": [chunks[0] | {"needs": "more"}]})


def test_every_row_comes_back(whole):
  folder, found = whole
  target = folder / "responses" / "1.0.0"
  train, held_out = dataset.read(target), dataset.read(target, "validation")
  assert len(train) == found["figures"]["train"]["rows"] and 10 < len(held_out) < 50
  by_id = {r["id"]: r for r in ROWS}
  assert sorted(by_id) == sorted(r["id"] for r in train + held_out)
  for row in train + held_out:
    seed = by_id[row["id"]]
    assert {key: row[key] for key in ("prompt", "response", "chunks", "syncs", "source")} == {
      key: seed[key] for key in ("prompt", "response", "chunks", "syncs", "source")
    }
  mixed = mix([f"{target}*2", f"{target}:validation"])
  assert [{k: v for k, v in r.items() if k != "where"} for r in mixed] == train * 2 + held_out
  assert mixed[0]["where"] == f"{target}, row {train[0]['id']}"
  with pytest.raises(DataError, match="has no split 'test', only train, validation"):
    mix([f"{target}:test"])
  with pytest.raises(DataError, match="is not a data set of --mode=build"):
    mix([str(folder)])
  metadata = json.loads((target / "metadata.json").read_text())
  assert metadata["figures"]["train"]["rows"] == len(train)


def test_a_build_is_the_same_wherever_it_runs(whole, vocabulary, tmp_path: Path):
  built(tmp_path, vocabulary, validation_share=0.1)
  for path in (whole[0] / "responses" / "1.0.0").glob("*.array_record*"):
    assert path.read_bytes() == (tmp_path / "responses" / "1.0.0" / path.name).read_bytes()
  with pytest.raises(DataError, match="exists already"):
    built(tmp_path, vocabulary)


def test_figures_are_those_of_the_rows(vocabulary):
  row = {
    "id": "a",
    "prompt": "p",
    "response": "One two.\n- Three four five.\n- Six seven eight.",
    "syncs": [],
  }
  size = len(row["response"])
  some = row | {"chunks": [{"start": 9, "end": 28, "topic": "x"}, {"start": 28, "end": size, "topic": "y"}]}
  nested = some | {
    "chunks": [{"start": 9, "end": size, "topic": "x"}, {"start": 28, "end": size, "topic": "y"}]
  }
  f = report.facts([row | {"chunks": []}, some, nested], vocabulary, Forms())
  assert f.chunks.tolist() == [0, 2, 2] and f.synced.tolist() == [False] * 3
  assert f.covered.tolist() == pytest.approx(
    [0, 1 - 9 / size, 1 - 9 / size]
  )  # what lies inside a chunk counts once
  assert f.speedup[0] == 1 and f.response[1] > f.response[0]
  found = report.figures(f)
  assert found["rows"] == 3 and found["with_chunks"] == pytest.approx(2 / 3) and found["chunks"] == 2
  assert found["speedup"] == pytest.approx((f.speedup[1] * f.speedup[2]) ** 0.5)
  assert report.figures(report.facts([], vocabulary, Forms()))["rows"] == 0


def test_bad_rows_are_named_and_never_stop_a_build(vocabulary, tmp_path: Path):
  good = [r for r in ROWS if r["chunks"]][:4]
  long = "which of the seven wonders of the world still stands today"
  bad = {
    "overlap": good[0]
    | {"chunks": [{"start": 0, "end": 9, "topic": "a"}, {"start": 5, "end": 12, "topic": "b"}]},
    "outside": good[0] | {"syncs": [10**6]},
    "no topic": good[0] | {"chunks": [{"start": 0, "end": 9}]},
    "lacks": good[0] | {"response": "\x04 is no token", "chunks": [], "syncs": []},
    "known": good[0] | {"prompt": f"Tell me {long}!"},
    "empty": good[0] | {"response": ""},
  }
  files = write(tmp_path / "a.jsonl", [*good, *(r | {"id": name} for name, r in bad.items())])
  twice = write(tmp_path / "b.jsonl", [good[1], good[2] | {"id": "plain", "chunks": [], "syncs": []}])
  held_out = write(tmp_path / "v.jsonl", [good[3] | {"id": "v"}])
  found = built(tmp_path / "run", vocabulary, [f"Say {long}."], train=f"{files},{twice}", validation=held_out)
  rejected = {r["id"]: r["cause"] for r in read_jsonl(tmp_path / "run" / "rejected.jsonl")}
  misfit = "chunks or syncs that do not fit the response"
  assert rejected == {
    "overlap": misfit,
    "outside": misfit,
    "no topic": misfit,
    "lacks": "characters that the vocabulary lacks",
    "known": "shares words with an evaluation prompt",
    "a.jsonl, row 10": "no response",
    good[1]["id"]: "an id that another row has",
    good[3]["id"]: "in the validation split too",
  }
  assert found["rejected"][misfit] == 3 and found["figures"]["train"]["rows"] == 4
  with pytest.raises(DataError, match=r"a.jsonl: a.jsonl, row 10: no response \(8 rows cannot be used\)"):
    built(
      tmp_path / "strict",
      vocabulary,
      [f"Say {long}."],
      train=f"{files},{twice}",
      validation=held_out,
      strict=True,
    )
  assert not (tmp_path / "strict").exists()


def test_unusable_settings_are_one_line(vocabulary, tmp_path: Path):
  for changes, message in (
    (dict(train=""), "dataset.train=FILE"),
    (dict(validation_share=1.0), "validation_share"),
    (dict(train="none.jsonl"), "no such data file: none.jsonl"),
    (dict(validation=str(SEED)), "no row is left for train"),
  ):
    with pytest.raises(ValueError, match=message):
      built(tmp_path / "run", vocabulary, **changes)
  assert not (tmp_path / "run").exists()


def test_the_rest_of_a_killed_build_is_deleted(vocabulary, tmp_path: Path):
  left = tmp_path / "responses" / "incomplete.ABC_1.0.0"
  left.mkdir(parents=True)
  built(tmp_path, vocabulary)
  assert not left.exists() and (tmp_path / "responses" / "1.0.0").is_dir()


@pytest.mark.parametrize("step", ["write_jsonl", "write_atomic", "write"])
def test_a_build_that_was_killed_is_repeated(vocabulary, tmp_path: Path, monkeypatch, step: str):
  """The data set is written last: before it, nothing says that the build is done."""

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(build, step, killed)
    built(tmp_path, vocabulary)
  built(tmp_path, vocabulary)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"responses", "rejected.jsonl", "report.html"}


def test_parquet_and_arrow_folders_are_sources(tmp_path: Path):
  table = pa.Table.from_pylist(
    [{k: r[k] for k in ("id", "prompt", "response", "chunks", "syncs")} for r in ROWS]
  )
  pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
  folder = tmp_path / "arrow"
  folder.mkdir()
  with (
    pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
    pa.ipc.new_stream(sink, table.schema) as out,
  ):
    out.write_table(table)
  for path in (tmp_path / "a.parquet", folder):
    source = read_instructions(path)
    assert [program_of(r) for r in source.rows] == [program_of(r) for r in ROWS] and not source.faults
  (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:1000])
  (folder / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
  (tmp_path / "empty").mkdir()
  for name, message in (
    ("cut.parquet", "cut.parquet: "),
    ("arrow", "data-00000-of-00001.arrow: "),
    ("empty", "contains no .arrow or .parquet file"),
    ("none.parquet", "no such data file"),
  ):
    with pytest.raises(DataError, match=message) as error:
      read_instructions(tmp_path / name)
    assert "\n" not in str(error.value)


class Page(HTMLParser):
  """Counts what opens and closes, and collects the tokens of samples."""

  def __init__(self):
    super().__init__()
    self.open: list[str] = []
    self.tokens: list[dict] = []

  def handle_starttag(self, tag, attributes):
    if tag not in ("meta", "br") and not self.get_starttag_text().endswith("/>"):
      self.open.append(tag)
    if tag == "span" and "t" in (dict(attributes).get("class") or "").split():
      self.tokens.append(dict(attributes))

  def handle_endtag(self, tag):
    if self.open and tag == self.open[-1]:
      self.open.pop()


def test_the_page_shows_tokens_as_training_sees_them(whole):
  text = (whole[0] / "report.html").read_text()
  page = Page()
  page.feed(text)
  assert page.open == [] and text.count("<article>") == report.SAMPLES and "<svg" in text
  assert not re.search(r"(?:src|href)=[\"']?http", text)  # it needs no network
  assert len(page.tokens) > 500
  titles = [t["title"] for t in page.tokens]
  assert {re.match(r"thread (\d+)", t)[1] for t in titles} >= {"0", "1", "2"}
  pale = ["unlearned" in t["class"] for t in page.tokens]
  assert pale == ["target none" in t for t in titles] and 0 < sum(pale) < len(pale) / 4
