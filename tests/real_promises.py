"""Parallel responses of a released model against `transformers`: every greedy token, in one dense pass of theirs.

    python tests/real_promises.py smollm2-135m-instruct pasta
    python tests/real_promises.py smollm2-135m-instruct pasta --visibility=live
    python tests/real_promises.py gemma3-270m gemma3_270m_pasta --longer=600

Weights and adapter (a name of the package or a file, in any form of the language) decode some prompts in float32. Of
each response only the threads' tokens, forks, numbers and rounds of reading are taken. From them plain sets and
loops, which share nothing with `pasta_jax.lang` or the interpreter, make positions and what each token sees; and
`transformers` runs the merged weights that `export` wrote, over prompt and response at once, with that mask (eager
attention). A token agrees if it has the largest logit of all rows there; lengths that are tokens count as one. So
nothing may stand between logits and choice: no guard, penalty, blocking or bias. Without the guard adapters write an
ill-formed tag now and then, which is executed like any other. The command fails if a token differs by more than
`--margin`, the noise of float32.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 1)]  # as a script

import torch  # noqa: E402
import transformers  # noqa: E402

import pasta_jax  # noqa: E402
from pasta_jax.config import Config, with_changes  # noqa: E402
from pasta_jax.decode.generator import Model, adapter_path, source_of  # noqa: E402
from pasta_jax.decode.trace import Trace  # noqa: E402
from pasta_jax.utils.jsonl import read_jsonl  # noqa: E402
from pasta_jax.weights.checkpoint import load_checkpoint  # noqa: E402
from pasta_jax.weights.export import export  # noqa: E402

SEED = Path(__file__).parent.parent / "data" / "seed.jsonl"
Key = tuple[int, int]  # (thread, own index); thread -1: the prompt


def read_tokens(trace: Trace) -> list[Key]:
  """The tokens in serialised order that were read: what was chosen last and never read is nobody's key."""
  chunks = {(c.parent, c.fork_index): c.number for c in trace.threads[1:]}

  def of_thread(number: int):
    for i in range(len(trace.threads[number].tokens)):
      if trace.threads[number].read_in[i] > 0:
        yield number, i
      if (number, i) in chunks:
        yield from of_thread(chunks[number, i])

  return [*((-1, i) for i in range(len(trace.prompt))), *of_thread(0)]


def sees_live(trace: Trace, order: list[Key]) -> dict[Key, set[Key]]:
  """Itself, and what stands before it and was read in an earlier round; the prompt's last token is read in round 1."""
  n = len(trace.prompt)
  read_in = {k: k[1] - n + 2 if k[0] < 0 else int(trace.threads[k[0]].read_in[k[1]]) for k in order}
  return {
    q: {q, *(k for k in order[:at] if read_in[k] < read_in[q])} for at, q in enumerate(order)
  }  # fmt: skip


def sees_promise(trace: Trace, order: list[Key], sync: int) -> dict[Key, set[Key]]:
  """Replays the response by rounds, one set a thread: a fork copies it, a sync adds those of the chunks it joins."""
  prompt = {k for k in order if k[0] < 0}
  out = {(-1, i): {(-1, j) for j in range(i + 1)} for _, i in prompt}
  seen = {0: set(prompt)}
  owner: dict[int, int] = {}  # of chunks that no sync joined yet
  chunks = {(c.parent, c.fork_index): c.number for c in trace.threads[1:]}
  for t, i in sorted(order[len(prompt) :], key=lambda k: (trace.threads[k[0]].read_in[k[1]], k[0])):
    thread = trace.threads[t]
    if thread.tokens[i] == sync:
      for chunk in [c for c, o in owner.items() if o == t]:
        seen[t] |= seen[chunk]
        del owner[chunk]
    seen[t].add((t, i))
    out[t, i] = set(seen[t])
    if (t, i) in chunks:
      seen[chunks[t, i]], owner[chunks[t, i]] = set(seen[t]), t
    if t and thread.finished and i == len(thread.tokens) - 1:  # its own chunks go to its owner
      owner |= {c: owner[t] for c, o in owner.items() if o == t}
  return out


def positions(trace: Trace, order: list[Key], strategy: str, fixed: int) -> dict[Key, int]:
  """A chunk begins after its promise, whose thread goes on behind the gap of the number that it wrote."""
  gap = {"pred_10x": lambda n: -(-n // 10) * 10, "pred_1x": lambda n: n, "fixed": lambda n: fixed}[strategy]
  chunks = {(c.parent, c.fork_index): c for c in trace.threads[1:]}
  out, after = {}, {-1: 0, 0: len(trace.prompt)}  # the next position of each thread
  for t, i in order:
    out[t, i] = after[t]
    after[t] += 1
    if chunk := chunks.get((t, i)):
      after[chunk.number] = after[t]
      after[t] += fixed if chunk.declared is None else gap(chunk.declared)
  return out


@torch.inference_mode()
def compare(theirs, trace: Trace, model: Model) -> dict[str, float]:
  """Counts and largest differences of one response."""
  rule, window = model.forms.positions, getattr(theirs.config, "sliding_window", None)
  order, lengths = read_tokens(trace), model.vocabulary.table.lengths.tolist()
  sees = (
    sees_live(trace, order)
    if trace.visibility == "live"
    else sees_promise(trace, order, model.vocabulary.tags.sync)
  )
  at = positions(trace, order, rule.strategy, rule.fixed)
  for t, i in order[len(trace.prompt) :]:
    assert at[t, i] == trace.threads[t].positions[i], f"position of token {i} of thread {t}"
  index = {k: i for i, k in enumerate(order)}
  visible = torch.zeros(len(order), len(order), dtype=torch.bool)
  for q, keys in sees.items():
    visible[index[q], [index[k] for k in keys]] = True
  places = torch.tensor([at[k] for k in order])
  near = places[:, None] - places[None] < window if window else torch.ones_like(visible)
  mask = lambda x: torch.where(x, 0.0, torch.finfo(torch.float32).min)[None, None]
  both = {"full_attention": mask(visible), "sliding_attention": mask(visible & near)}
  ids = [trace.prompt[i] if t < 0 else trace.threads[t].tokens[i] for t, i in order]
  logits = theirs(
    torch.tensor([ids]),
    attention_mask=both if getattr(theirs.config, "layer_types", None) else both["sliding_attention"],
    position_ids=places[None],
    use_cache=False,
    logits_to_keep=len(order) - len(trace.prompt) + 1,
  ).logits[0]
  counts = dict(tokens=0, differ=0, margin=0.0, log_p=0.0, promises=len(trace.threads) - 1)
  counts["tokens beyond the window"] = int((places >= window).sum()) if window else 0
  for (t, i), row in zip(order[len(trace.prompt) - 1 :], logits):
    thread, following = trace.threads[max(t, 0)], 0 if t < 0 else i + 1
    if following == len(thread.tokens):
      continue
    token = int(thread.tokens[following])
    counts["tokens"] += 1
    shared = row.clone()  # lengths that are tokens compete as one entry, and the likeliest of them is taken
    shared[lengths] = row[lengths].logsumexp(0)
    margin = float(shared.max() - shared[token])
    margin = max(margin, float(row[lengths].max() - row[token])) if token in lengths else margin
    counts["differ"] += margin > 0
    counts["margin"] = max(counts["margin"], margin)
    log_p = float(row[token] - row.logsumexp(0))
    counts["log_p"] = max(counts["log_p"], abs(log_p - float(thread.log_p[following])))
  return counts


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("source", help="name of the weights, GGUF file or Hugging Face folder")
  parser.add_argument("adapter", help="an adapter with tags: a name of the package, or a file")
  parser.add_argument("--visibility", default="", help="promise or live; by default the adapter's")
  parser.add_argument("--prompts", default=str(SEED), help="JSON lines with `prompt`")
  parser.add_argument("--count", type=int, default=10, help="prompts, spread over the file")
  parser.add_argument("--tokens", type=int, default=160, help="new tokens a prompt, over all threads")
  parser.add_argument(
    "--longer", type=int, default=0, help="the last prompt comes after texts of this many tokens"
  )
  parser.add_argument("--margin", type=float, default=1e-3, help="largest difference of logits that is noise")
  args = parser.parse_args()
  model = pasta_jax.load(
    args.source, args.adapter, dtype="float32", visibility=args.visibility, max_new_tokens=args.tokens,
    guard=False, repetition_penalty=1.0, no_repeat=0, promise_bias=0.0,
  )  # fmt: skip
  if model.forms.positions.strategy in ("max", "sum"):
    sys.exit("error: positions max and sum, which depend on joins, are not known here: name another adapter")
  rows = read_jsonl(args.prompts)
  prompts = [rows[i * len(rows) // args.count]["prompt"] for i in range(args.count)]
  for row in rows:
    if len(model.encode(prompts[-1])) < args.longer:
      prompts[-1] = f"{row['prompt']}\n\n{prompts[-1]}"
  source = source_of(with_changes(Config(), {"model.source": args.source}), args.adapter)
  totals: dict[str, float] = {}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model"
    export(path, load_checkpoint(source), adapter_path(args.adapter), form="merged", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for number, response in enumerate(model.generate_batch(prompts)):
      found = compare(theirs, response.trace, model)
      print(
        f"prompt {number}, {len(response.trace.prompt)} tokens:", *(f"{k} {v:.6g}," for k, v in found.items())
      )
      for name, value in found.items():
        totals[name] = (
          max(totals.get(name, 0), value) if isinstance(value, float) else totals.get(name, 0) + value
        )
  print(
    f"{args.source}, {args.adapter}, {model.forms}: {totals['tokens'] - totals['differ']} of {totals['tokens']} "
    f"tokens of {totals['promises']} promises and {len(prompts)} responses have the largest logit; largest margin of "
    f"the others {totals['margin']:.2g}, largest difference of log p {totals['log_p']:.2g}"
  )
  if totals["margin"] > args.margin:
    sys.exit("error: decoding and transformers disagree: the lines above name the prompts")


if __name__ == "__main__":
  main()
