"""Annotation: units and plans of real rows, what each writer sees against the masks of training, and runs
against a faulty server."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import loopback
from helpers.folders import with_fields
from helpers.loopback import KEY
from hypothesis import given
from hypothesis import strategies as st
from test_language import BYTES

from pasta_jax.config import Config
from pasta_jax.config.sections import ANNOTATION_RULES
from pasta_jax.data.annotate import check, measure, plan, prompts, units
from pasta_jax.data.annotate.contexts import contexts
from pasta_jax.data.annotate.run import _spread, annotate
from pasta_jax.data.examples import program_of
from pasta_jax.lang.layout import layout
from pasta_jax.lang.positions import PositionRule
from pasta_jax.lang.program import Promise, reading_order
from pasta_jax.lang.visibility import is_visible
from pasta_jax.utils.endpoint import EndpointError
from pasta_jax.utils.jsonl import DataError, read_jsonl
from pasta_jax.utils.waiting import Waiting

SEED = Path(__file__).parents[2] / "data" / "seed.jsonl"
ROWS = read_jsonl(SEED)
TEXT = (
  "There are two ways.\n\n1. By train: It is slow. It is cheap.\n2. By plane: It is fast, and dear.\n\n"
  "So take the cheap one, as shown above."
)  # units 1 to 8


# --- units and plans ---

PARTS = st.sampled_from(["\n", " ", "1. ", "A b. C", "```x\ny```", "Dr. X", "e.g. Y", ": "])


@given(st.lists(st.text() | PARTS).map("".join))
def test_units_are_the_text(text: str):
  spans = units.split(text)
  assert "".join(text[a:b] for a, b in spans) == text and all(a < b for a, b in spans)
  assert all(text[a:b].strip() for a, b in spans) or not text.strip()


def test_units_are_sentences_lines_and_heads():
  assert [TEXT[a:b].strip() for a, b in units.split(TEXT)] == [
    "There are two ways.",
    "1. By train:",
    "It is slow.",
    "It is cheap.",
    "2. By plane:",
    "It is fast, and dear.",
    "So take the cheap one, as shown above.",
  ]
  assert len(units.split("Dr. Who met Mr. X, e.g. Here.")) == 1
  assert len(units.split("See:\n```python\na = 1\n\nb = 2\n```\nDone.")) == 3


def test_plans_express_every_seed_row():
  """The spans of every row are units, and its plan is read back as the same program."""
  for row in ROWS:
    chunks, syncs = plan.read(plan.write(row["response"], row["chunks"], row["syncs"]), row["response"])
    assert program_of(row | {"chunks": chunks, "syncs": syncs}) == program_of(
      row | {"syncs": plan.useful_syncs(row["chunks"], row["syncs"])}
    ), row["id"]
    assert reading_order(program_of(row | {"chunks": chunks, "syncs": syncs})) == row["response"]


def chunk(start, end, topic="x"):
  return {"from": start, "to": end, "topic": topic}


@pytest.mark.parametrize(
  "answer, cause",
  [
    ("Sure! {}", "not JSON"),
    ('{"chunks": [', "not JSON"),
    ("[]", "another form"),
    ('{"chunks": []}', "another form"),
    ({"chunks": [{"from": 1, "to": 2}], "syncs": []}, "another form"),
    ({"chunks": [chunk(3, 2)], "syncs": []}, "another form"),
    ({"chunks": [chunk("2", 3)], "syncs": []}, "another form"),
    ({"chunks": [chunk(True, 3)], "syncs": []}, "another form"),
    ({"chunks": [chunk(2, 8)], "syncs": []}, "no such unit"),
    ({"chunks": [chunk(0, 2)], "syncs": []}, "no such unit"),
    ({"chunks": [chunk(2, 4), chunk(4, 6)], "syncs": []}, "chunks overlap"),
    ({"chunks": [chunk(2, 4), chunk(2, 4)], "syncs": []}, "chunks overlap"),
    ({"chunks": [chunk(1, 7)], "syncs": []}, "a chunk of everything"),
    ({"chunks": [chunk(2, 4, "")], "syncs": []}, "an unfit topic"),
    ({"chunks": [chunk(2, 4, "a\nb")], "syncs": []}, "an unfit topic"),
    ({"chunks": [chunk(2, 4, "w " * 40)], "syncs": []}, "an unfit topic"),
    ({"chunks": [chunk(2, 4)], "syncs": [2]}, "a sync of nothing"),
    ({"chunks": [chunk(2, 4)], "syncs": [5, 6]}, "a sync of nothing"),
    ({"chunks": [chunk(2, 4)], "syncs": [3]}, "a sync of nothing"),
    ({"chunks": [], "syncs": [9]}, "no such unit"),
    ({"chunks": [chunk(2, 3 + i % 2) for i in range(50_000)], "syncs": []}, "chunks overlap"),
    ({"chunks": [chunk(1, 10**400)], "syncs": []}, "no such unit"),
    ('{"chunks": ' + "[" * 5000, "not JSON"),
    ('{"chunks": [' + "9" * 5000 + "]}", "not JSON"),
    ('{"chunks": "\ud83d"}', "another form"),
    ({"chunks": [chunk(2, 4, "\ud83d" * 61)], "syncs": []}, "an unfit topic"),
  ],
)
def test_plans_are_read_strictly(answer, cause: str):
  with pytest.raises(plan.PlanError) as error:
    plan.read(answer if isinstance(answer, str) else json.dumps(answer), TEXT)
  assert error.value.cause == cause and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "chunks, cause, message",
  [
    (
      [chunk(2, 4, "going by slow train")],
      "an unfit topic",
      'topic "going by slow train" has more than 3 words',
    ),
    ([chunk(3, 3, "speed")], "a short chunk", 'chunk "speed" has 3 words: at least 5 are needed'),
    ([chunk(2, 6, "both"), chunk(5, 6, "plane")], "a chunk inside another", '"plane" lies inside "both"'),
  ],
)
def test_the_papers_rules_allow_less(chunks, cause: str, message: str):
  answer = json.dumps({"chunks": chunks, "syncs": []})
  assert len(plan.read(answer, TEXT)[0]) == len(chunks)
  with pytest.raises(plan.PlanError, match=message) as error:
    plan.read(answer, TEXT, "paper")
  assert error.value.cause == cause


def test_plans_by_the_papers_rules_are_read_as_others():
  answer = json.dumps({"chunks": [chunk(2, 4, "the slow train"), chunk(5, 6, "plane")], "syncs": [7]})
  assert plan.read(answer, TEXT, "paper") == plan.read(answer, TEXT)
  assert plan.read('{"chunks": [], "syncs": []}', TEXT, "paper") == ([], [])
  assert set(prompts.INSTRUCTIONS) == set(ANNOTATION_RULES)


def test_rules_for_few_full_parts_allow_less():
  full = "One two three four five six seven eight nine ten. " * 12
  answer = lambda *chunks: json.dumps({"chunks": chunks, "syncs": []})
  eight = answer(*(chunk(n, n) for n in range(2, 10)))
  assert plan.read(eight, full, "full") == plan.read(eight, full)
  with pytest.raises(plan.PlanError, match="9 chunks: at most 8") as error:
    plan.read(answer(*(chunk(n, n) for n in range(2, 11))), full, "full")
  assert error.value.cause == "too many chunks"
  with pytest.raises(plan.PlanError, match="lies inside"):
    plan.read(answer(chunk(2, 4), chunk(3, 3)), full, "full")
  with pytest.raises(plan.PlanError, match="has 3 words: at least 10"):
    plan.read(answer(chunk(3, 3)), TEXT, "full")


def test_plans_that_lie_deep_in_each_other_are_refused():
  """Later code follows them by recursion."""
  text = "A b. " * 1000
  nested = lambda n: json.dumps({"chunks": [chunk(2, 900 - i) for i in range(n)], "syncs": []})
  assert len(plan.read(nested(20), text)[0]) == 20
  with pytest.raises(plan.PlanError, match="more than 20 deep"):
    plan.read(nested(800), text)


def test_good_plans_are_read():
  answer = {
    "chunks": [chunk(2, 4, " by train "), chunk(3, 3, "pace"), chunk(5, 6, "by plane")],
    "syncs": [4, 7],
  }
  for text in (json.dumps(answer), f"```json\n{json.dumps(answer)}\n```"):
    chunks, syncs = plan.read(text, TEXT)
    assert [(TEXT[c["start"] : c["end"]].strip(), c["topic"]) for c in chunks] == [
      ("1. By train: It is slow. It is cheap.", "by train"),
      ("It is slow.", "pace"),
      ("2. By plane: It is fast, and dear.", "by plane"),
    ]
    assert [TEXT[s:].split(",")[0] for s in syncs] == [
      "It is cheap.\n2. By plane: It is fast",
      "So take the cheap one",
    ]
  assert plan.read('{"chunks": [], "syncs": []}', TEXT) == ([], [])


# --- what a writer sees ---


def seen_by_layout(row: dict) -> list[str]:
  """Of each chunk, in reading order: the texts that its first row sees, by the masks of training."""
  program, rule = program_of(row), PositionRule("pred_10x")
  thread = BYTES.encode(program, rule)
  laid = layout(thread, rule, BYTES.table, [])
  at = np.arange(len(laid))
  visible = is_visible(at[:, None], at[None, :], laid.masked_intervals[None])
  is_text, state = np.zeros(len(laid), bool), []
  inside = False
  for i, token in enumerate(laid.tokens.tolist()):  # tags, topics and numbers are no text
    inside = inside or token == BYTES.tags.open
    is_text[i] = not inside and token < 256
    inside = inside and token != BYTES.tags.close
    if token == BYTES.tags.async_:
      state.append(i)
  return [bytes(laid.tokens[is_text & visible[i]].astype(np.uint8)).decode() for i in state]


def test_writers_see_what_the_masks_of_training_show():
  import re

  compared = 0
  for row in ROWS:
    found = [re.sub("⟦[^⟧]*⟧", "", c.seen) for c in contexts(row) if c.topic is not None]
    assert found == seen_by_layout(row), row["id"]
    compared += len(found)
  assert compared > 900


def test_contexts_name_the_unseen_parts():
  chunks, syncs = plan.read(
    json.dumps({"chunks": [chunk(3, 4, "train"), chunk(6, 6, "plane")], "syncs": []}), TEXT
  )
  row = {"id": "a", "prompt": "p", "response": TEXT, "chunks": chunks, "syncs": syncs}
  found = contexts(row)
  assert [(c.topic, c.at, c.waiting) for c in found] == [
    ("train", 0, ()),
    (None, 1, ("train",)),
    ("plane", 1, ("train",)),
    (None, 2, ("train", "plane")),
  ]
  assert found[2].seen == "There are two ways.\n\n1. By train: ⟦train⟧\n2. By plane: "
  assert all(TEXT[c.offset :].startswith(c.text.strip() if c.topic else c.text) for c in found if not c.topic)
  assert [c.topic for c in check.of_chunks(row)] == ["plane"]  # the first one misses nothing
  assert [c.text.strip() for c in check.of_texts(row)] == [TEXT[TEXT.index("So") :]]


def test_failed_pieces_become_text_or_get_a_sync():
  answer = {"chunks": [chunk(3, 4, "train"), chunk(6, 6, "plane")], "syncs": [7]}
  chunks, syncs = plan.read(json.dumps(answer), TEXT)
  row = {"id": "a", "prompt": "p", "response": TEXT, "chunks": chunks, "syncs": syncs}
  left = check.without_chunks(row, {1})
  assert [c["topic"] for c in left["chunks"]] == ["train"] and left["syncs"] == syncs
  assert check.without_chunks(row, {0, 1})["syncs"] == []
  bare = row | {"syncs": []}
  mended = check.with_syncs(bare, check.of_texts(bare))
  assert mended["syncs"] == syncs and reading_order(program_of(mended)) == TEXT


def test_demonstrations_are_of_every_kind():
  chosen = _spread(ROWS)
  assert len(chosen) == 7 and len({r["id"] for r in chosen}) == 7
  assert any(not r["chunks"] for r in chosen) and any(r["syncs"] for r in chosen)
  assert any(
    isinstance(n, Promise) and any(isinstance(b, Promise) for b in n.body)
    for r in chosen
    for n in program_of(r)
  )
  assert len(prompts.demonstrations(chosen)) == 14
  with pytest.raises(DataError, match="row x is no demonstration: character 3 is inside a unit"):
    prompts.demonstrations([ROWS[0] | {"id": "x", "chunks": [{"start": 3, "end": 40, "topic": "t"}]}])


# --- runs ---


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, smollm2_checkpoint):
  monkeypatch.setattr("pasta_jax.data.annotate.run.load_checkpoint", lambda source: smollm2_checkpoint)


class Server(loopback.Server):
  """Knows the seed rows' plans; finds chunks and texts with a word of `refuses` dependent."""

  refuses: tuple[str, ...] = ()
  unread: tuple[str, ...] = ()  # the same, unless the writer reads the parts before
  stubborn: tuple[str, ...] = ()  # ids of rows to which it says nothing usable

  def answer(self, body, path):
    gemini = path.endswith(":generateContent")
    said = (
      [c["parts"][0]["text"] for c in body["contents"]]
      if gemini
      else [m["content"] for m in body["messages"] if m["role"] != "system"]
    )
    asked = next(text for text in reversed(said) if "<answer>" in text or "<text>" in text)
    if "<text>" in asked:
      text = asked.split("<text>\n")[1].split("\n</text>")[0]
      blind = () if "reads these while they are written" in asked else self.unread
      reply = "NO" if any(word in text for word in (*self.refuses, *blind)) else "Yes."
    else:
      row = next(r for r in ROWS if asked == prompts.question(r["prompt"], r["response"]))
      useful = plan.useful_syncs(row["chunks"], row["syncs"])
      reply = (
        "I will not." if row["id"] in self.stubborn else plan.write(row["response"], row["chunks"], useful)
      )
    if gemini:
      return {
        "candidates": [{"content": {"parts": [{"text": reply}]}}],
        "usageMetadata": {"promptTokenCount": 100, "candidatesTokenCount": 10},
      }
    return {
      "choices": [{"message": {"content": reply}}],
      "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("GEMINI_API_KEY", KEY)
  loopback.without_waiting(monkeypatch)
  s = Server()
  yield s
  s.close()


def config_for(server, tmp_path: Path, rows, **changes):
  data = tmp_path / "raw.jsonl"
  data.write_text("".join(json.dumps({k: r[k] for k in ("id", "prompt", "response")}) + "\n" for r in rows))
  fields = dict(data=str(data), model="m", url=server.url, demonstrations=str(SEED)) | changes
  return with_fields(Config(), "annotate", **fields)


@pytest.mark.parametrize("kind", ["openai", "gemini"])
def test_plans_become_rows(server, tmp_path: Path, kind: str):
  rows = ROWS[20:40]
  report = annotate(
    config_for(server, tmp_path, rows, kind=kind, against=str(SEED), price_read=1.0), tmp_path / "run"
  )
  done = read_jsonl(tmp_path / "run" / "annotated.jsonl")
  assert [r["id"] for r in done] == [r["id"] for r in rows] and {r["annotator"] for r in done} == {"m"}
  for row, made in zip(rows, done):
    assert program_of(made) == program_of(row | {"syncs": plan.useful_syncs(row["chunks"], row["syncs"])})
  calls = len(server.calls)
  assert calls == 20 + sum(len(check.of_chunks(r)) + len(check.of_texts(r)) for r in done) > 60
  assert report["agreement"] == {"responses": 20, "precision": 1.0, "recall": 1.0, "same_choice": 1.0}
  assert report["calls"] == {
    "paid now": calls,
    "tokens read": 100 * calls,
    "tokens written": 10 * calls,
    "price": round(calls * 1e-4, 4),
  }
  assert report["figures"]["speedup"] > 1.3 and report["rejected"] == {}
  assert KEY not in "".join(p.read_text() for p in (tmp_path / "run").glob("*"))
  assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
  again = annotate(config_for(server, tmp_path, rows, kind=kind, against=str(SEED)), tmp_path / "run")
  assert (
    len(server.calls) == calls and again["calls"]["paid now"] == 0 and again["figures"] == report["figures"]
  )


def test_plans_and_checks_by_file_are_those_of_a_server(server, tmp_path: Path):
  """A stop for the plans, one for those to be mended, one for each check; the last run writes the rows."""
  rows = ROWS[20:30]
  server.stubborn, server.refuses = (rows[3]["id"],), ("the",)
  of_server = annotate(config_for(server, tmp_path, rows, tries=2), tmp_path / "http")
  config = config_for(server, tmp_path, rows, kind="batch", url="", tries=2)
  stops = []
  while True:
    try:
      report = annotate(config, tmp_path / "file")
      break
    except Waiting:
      requests = read_jsonl(tmp_path / "file" / "requests.jsonl")
      stops.append(len(requests))
      assert not (tmp_path / "file" / "annotated.jsonl").exists() and len(stops) < 9
      done = [
        {"custom_id": r["custom_id"], "response": {"status_code": 200, "body": server.answer(r["body"], "")}}
        for r in requests
      ]
      append_rows(tmp_path / "file" / "answers.jsonl", done)
  assert stops[:2] == [10, 1] and len(stops) == 5
  for name in ("annotated.jsonl", "rejected.jsonl"):
    assert read_jsonl(tmp_path / "file" / name) == read_jsonl(tmp_path / "http" / name)
  assert report["figures"] == of_server["figures"] and report["check"] == of_server["check"]


def append_rows(path: Path, rows) -> None:
  with path.open("a") as file:
    file.write("".join(json.dumps(r) + "\n" for r in rows))


def test_the_papers_rules_ask_for_plans_alone(server, tmp_path: Path):
  """Another instruction, demonstrations that follow it, and no check; a plan against the rules is asked for again."""
  rows = [r for r in ROWS[20:60] if plan.fault(r["response"], r["chunks"], "paper") is None][:8]
  broken = next(r for r in ROWS if plan.fault(r["response"], r["chunks"], "paper"))
  config = config_for(server, tmp_path, [*rows, broken], rules="paper")
  report = annotate(config, tmp_path / "run")
  done = read_jsonl(tmp_path / "run" / "annotated.jsonl")
  assert [r["id"] for r in done] == [r["id"] for r in rows] and report["check"] == {}
  assert sum(report["asked again because"].values()) == 2 and sum(report["rejected"].values()) == 1
  assert len(server.calls) == len(rows) + 3  # tries of the last one
  system, *shown = server.calls[0]["messages"]
  assert system["content"] == prompts.PAPER != prompts.SYSTEM and len(shown) == 15
  for asked, answered in zip(shown[::2], shown[1::2]):
    row = next(r for r in ROWS if asked["content"] == prompts.question(r["prompt"], r["response"]))
    assert plan.read(answered["content"], row["response"], "paper")[0] or not row["chunks"]
  made = json.loads((tmp_path / "run" / "settings.json").read_text())
  assert made["rules"] == "paper" and made["check"] is False
  with pytest.raises(DataError, match="was made with"):
    annotate(config_for(server, tmp_path, [*rows, broken]), tmp_path / "run")


def test_settings_of_older_runs_say_nothing_of_rules(server, tmp_path: Path):
  annotate(config_for(server, tmp_path, ROWS[20:21]), tmp_path / "run")
  made = json.loads((tmp_path / "run" / "settings.json").read_text())
  assert set(made) == {"annotator", "check", "rows", "rows' digest"} and made["check"] is True


def test_a_faulty_server_loses_no_row(server, tmp_path: Path):
  """Statuses, broken answers and hang-ups are tried again; a plan that cannot be used is asked for again,
  with the fault named; a row that never gets one is rejected, and named."""
  rows = ROWS[20:26]
  server.stubborn = (rows[3]["id"],)
  wrong = lambda text: json.dumps({"choices": [{"message": {"content": text}}]}).encode()
  server.faults = [
    429,
    500,
    "hang up",
    b'{"choices": [{"mess',
    wrong("no plan"),
    None,
    wrong(json.dumps({"chunks": [chunk(1, 99)], "syncs": []})),
  ]
  report = annotate(config_for(server, tmp_path, rows, concurrency=1, check=False), tmp_path / "run")
  assert len(read_jsonl(tmp_path / "run" / "annotated.jsonl")) == 5
  assert report["asked again because"] == {"not JSON": 3, "no such unit": 1} and report["rejected"] == {
    "not JSON": 1
  }
  (lost,) = read_jsonl(tmp_path / "run" / "rejected.jsonl")
  assert lost == {"id": rows[3]["id"], "cause": "not JSON", "answer": "I will not."}
  asked_again = [c["messages"] for c in server.calls if "cannot be used" in c["messages"][-1]["content"]]
  assert any("units are numbered from 1 to" in m[-1]["content"] for m in asked_again)
  assert all(m[-2]["role"] == "assistant" for m in asked_again)


def test_answers_without_a_plan_or_a_verdict_are_counted(server, tmp_path: Path, capsys):
  """By cause; a plan is asked for again only where that is of use, and no restart pays again or fails."""
  said = lambda content, finish="stop": json.dumps(
    {"choices": [{"message": {"content": content}, "finish_reason": finish}]}
  ).encode()
  rows = ROWS[20:27]
  server.status_body = b'{"error": {"message": "blocked", "code": "content_filter"}}'
  server.faults = [
    said(None),
    said('{"chunks": [', "length"),
    400,
    said([{"type": "text"}]),
    said("\ud83d"),
    None,
  ]
  config = config_for(server, tmp_path, rows, concurrency=1)
  for calls in (8, 0):
    server.calls.clear()
    report = annotate(config, tmp_path / "run")
    plans = [c for c in server.calls if "<text>" not in c["messages"][-1]["content"]]
    assert len(plans) == calls and report["calls"]["paid now"] == len(server.calls)
    assert report["rejected"] == {"no text": 2, "cut off": 1, "refused": 1}
    assert report["asked again because"] == {"not JSON": 1} and report["checked without a verdict"] == {}
    assert "give more --config.annotate.max_tokens" in capsys.readouterr().out
    assert len(read_jsonl(tmp_path / "run" / "annotated.jsonl")) == 3
  server.faults = [None, said("Perhaps."), said(None, "length")]
  row = next(r for r in ROWS if len(check.of_chunks(r)) > 2)
  report = annotate(config_for(server, tmp_path, [row], concurrency=1), tmp_path / "other")
  assert report["checked without a verdict"] == {"neither yes nor no": 1, "cut off": 1}


def test_a_restarted_run_repeats_no_paid_call(server, tmp_path: Path):
  config = config_for(server, tmp_path, ROWS[20:30], concurrency=1)
  server.faults = [None] * 14 + [401]
  with pytest.raises(EndpointError, match="refused, status 401"):
    annotate(config, tmp_path / "run")
  assert not (tmp_path / "run" / "annotated.jsonl").exists()
  paid = len((tmp_path / "run" / "calls.jsonl").read_text().splitlines())
  before = len(server.calls)
  report = annotate(config, tmp_path / "run")
  assert paid >= 14 and report["calls"]["paid now"] == len(server.calls) - before
  whole = annotate(config_for(server, tmp_path, ROWS[20:30]), tmp_path / "other")
  assert whole["calls"]["paid now"] == report["calls"]["paid now"] + paid
  name = "annotated.jsonl"
  assert (tmp_path / "run" / name).read_text() == (tmp_path / "other" / name).read_text()


def test_the_check_removes_chunks_and_adds_syncs(server, tmp_path: Path):
  row = next(
    r
    for r in ROWS
    if len(r["chunks"]) > 3
    and len(r["syncs"]) == 1
    and not any(
      c["start"] <= d["start"] < d["end"] <= c["end"] for c in r["chunks"] for d in r["chunks"] if c is not d
    )
  )
  third = row["response"][row["chunks"][2]["start"] : row["chunks"][2]["end"]].strip()
  server.refuses = (third[-30:],)
  report = annotate(config_for(server, tmp_path, [row]), tmp_path / "run")
  (made,) = read_jsonl(tmp_path / "run" / "annotated.jsonl")
  assert [c["topic"] for c in made["chunks"]] == [c["topic"] for i, c in enumerate(row["chunks"]) if i != 2]
  # What was a chunk is its promising thread's now, which has not seen the others: it gets a sync.
  assert report["check"] == {"chunks given up": 1, "syncs placed": 1} and len(made["syncs"]) == 2
  assert reading_order(program_of(made)) == row["response"]
  # The same chunk, if it fails only for want of the others: one more call, which shows them.
  server.refuses, server.unread, before = (), (third[-30:],), len(server.calls)
  report = annotate(config_for(server, tmp_path, [row]), tmp_path / "along")
  (made,) = read_jsonl(tmp_path / "along" / "annotated.jsonl")
  assert [c.get("needs") for c in made["chunks"]] == [
    "siblings" if i == 2 else None for i in range(len(row["chunks"]))
  ]
  assert report["check"] == {"chunks given up": 0, "syncs placed": 0, "chunks that need their siblings": 1}
  [second] = [c for c in server.calls[before:] if "reads these while" in c["messages"][-1]["content"]]
  seen = second["messages"][-1]["content"].split("<seen>\n")[1].split("\n</seen>")[0]
  assert row["response"].startswith(seen) and third not in seen and seen + third in row["response"]
  promises = lambda *visibility: sum(isinstance(n, Promise) for n in program_of(made, *visibility))
  assert promises("live") == len(row["chunks"]) == promises() + 1


def test_form_alone_needs_no_server(tmp_path: Path):
  config = with_fields(Config(), "annotate", data=str(SEED), kind="structure", against=str(SEED))
  report = annotate(config, tmp_path / "run")
  assert {r["annotator"] for r in read_jsonl(tmp_path / "run" / "annotated.jsonl")} == {"structure"}
  assert report["figures"]["rows"] == 270 and report["figures"]["with_syncs"] == 0
  assert 0.2 < report["agreement"]["precision"] < 0.9 and 0.2 < report["agreement"]["recall"] < 0.9
  config = with_fields(config, "annotate", limit=30)
  with pytest.raises(DataError, match="was made with"):
    annotate(config, tmp_path / "run")


def test_agreement_by_hand():
  row = lambda chunks: {"id": "a", "prompt": "p", "response": "one two three", "chunks": chunks, "syncs": []}
  ours = row([{"start": 0, "end": 4, "topic": "x"}, {"start": 4, "end": 13, "topic": "y"}])  # 0, 4, 13
  theirs = row([{"start": 0, "end": 3, "topic": "x"}, {"start": 8, "end": 13, "topic": "y"}])  # 0, 4, 8, 13
  found = measure.agreement([ours], [theirs | {"id": "b"}])
  assert (found["precision"], found["recall"]) == (1.0, 0.75)
  with pytest.raises(DataError, match="no response in common"):
    measure.agreement([ours], [theirs | {"prompt": "q"}])


def test_unusable_settings_are_one_line(server, tmp_path: Path, monkeypatch):
  monkeypatch.delenv("OPENAI_API_KEY")
  for changes, message in (
    (dict(data=""), "annotate.data=FILE"),
    (dict(tries=0), "annotate.tries"),
    (dict(model=""), "config.annotate.model"),
    (dict(kind="x"), "annotate.kind"),
    (dict(url=""), r"annotate: the key is read from \$OPENAI_API_KEY"),
    (dict(per_minute=-1), "per_minute"),
    (dict(demonstrations="none.jsonl"), "no such data file"),
  ):
    with pytest.raises(ValueError, match=message):
      annotate(config_for(server, tmp_path, ROWS[:2], **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists() and not server.calls
