"""The prompts of the annotating model: instructions, demonstrations, one response; and the question
of the check. The instructions are those of `annotate.rules`."""

from collections.abc import Sequence

from pasta_jax.data.annotate import plan, units
from pasta_jax.data.annotate.contexts import Context
from pasta_jax.utils.jsonl import DataError

Messages = list[dict[str, str]]

SYSTEM = """\
You mark which parts of a finished answer could have been written at the same time, by writers who do not see each \
other's text. The answer is given in numbered units, "[1]", "[2]" and so on. You never change its text: you reply with \
the numbers of units.

A chunk is a run of units that a writer of its own could have written, knowing only the request, the text before \
the chunk that is not in another chunk, the topics of the other chunks, and a topic of one to four words for the \
chunk itself. While chunks are written, the main writer goes on with the units behind them, without seeing them.

A sync stands before a unit whose writer must have read the chunks before it: a conclusion that sums them up, a \
comparison of them, a "therefore". Behind a sync the main writer sees all chunks before it. No sync is needed \
where nothing refers to the chunks.

Good chunks are the items of a list, sections, paragraphs about different aspects, the sides of a comparison, answers \
to several questions: each of a sentence or more. Introductions, transitions and conclusions stay with the main \
writer, and so do the headings and numbers that order the parts.
No chunks: steps that use the results of earlier ones, a story, a proof, a calculation, a single line of argument, \
code, anything in which a part says "this", "also" or "as above" of another part.
If the text of a chunk is made of independent parts of its own, chunks may lie inside it.

Reply with JSON and nothing else:
{"chunks": [{"from": first unit, "to": last unit, "topic": "one to four words"}], "syncs": [unit, …]}
If nothing is independent, reply {"chunks": [], "syncs": []}."""

# Few, full parts, for threads that read along (docs/language.md sections 2.5 and 3.1).
FULL = """\
You mark which parts of a finished answer could have been written at the same time. The answer is given in numbered \
units, "[1]", "[2]" and so on. You never change its text: you reply with the numbers of units.

A chunk is a run of units that a writer of its own could have written, knowing the request, the text before the chunk \
and the head under which it stands. Other writers write the other chunks at the same time. Each reads what stands \
before its own part as it is written, so it keeps to the form of its neighbours, but it may not need how they end. \
While chunks are written, the main writer goes on with the units behind them.

A sync stands before a unit whose writer must have read the chunks before it whole: a conclusion that sums them up, a \
comparison of them, a "therefore". Where the answer closes with such a sentence, a sync stands before it.

Few, full parts: three to six chunks of about 20 words or more are best, and more than eight are none. A part that has \
a list of its own, or several sentences, is one chunk with all of it. A part of a few words stays with the main writer.
Good chunks: items of a list with a sentence or more each, sections, paragraphs about different aspects, sides of a \
comparison, answers to several questions. Introductions, transitions and conclusions stay with the main writer.
No chunks: steps that use the results of earlier ones, a story, a poem, a role play, a proof, a calculation, code, a \
short or plainly factual answer, anything in which a part says "this", "also" or "as above" of another part. No chunk \
lies inside another.

Reply with JSON and nothing else:
{"chunks": [{"from": first unit, "to": last unit, "topic": "one to four words"}], "syncs": [unit, …]}
If nothing is independent, reply {"chunks": [], "syncs": []}."""

# The rules that the paper gives its annotator, in our words, for plans in numbers of units (docs/language.md section
# 6.1).
PAPER = """\
You prepare finished answers for a program that writes parts of an answer in parallel. The answer is given in numbered \
units, "[1]", "[2]" and so on. You never change its text: you reply with the numbers of units.

First decide whether the answer can be written in parallel at all. If it cannot, mark nothing.
If it can, mark chunks: runs of units that are written at the same time as the text after them.

- Mark a chunk only if the rest of the answer after it can be written without it.
- A chunk has at least five words.
- A chunk has a topic of at most three words, from which it can be written.
- Chunks do not overlap, and none lies inside another.

Where later text does need the chunks before it, put a sync before the first unit that does: the program waits there \
for all of them. Waiting costs time: place few syncs, and none that you can do without.

Reply with JSON and nothing else:
{"chunks": [{"from": first unit, "to": last unit, "topic": "at most three words"}], "syncs": [unit, …]}
If the answer cannot be written in parallel, reply {"chunks": [], "syncs": []}."""

INSTRUCTIONS = {"independent": SYSTEM, "full": FULL, "paper": PAPER}  # by `annotate.rules`

CHECK = """\
An answer to a request is written by several writers at the same time. You are told what one of them can see, and \
what they wrote. Places that others are writing are marked ⟦topic⟧: of those only the topic is known. Could this \
writer have written the text from that alone? Say NO if it refers to, relies on or continues something that they \
could not see, or repeats what another writer must have said. Reply with YES or NO and nothing else."""


def question(prompt: str, response: str) -> str:
  return (
    f"The request:\n<request>\n{prompt}\n</request>\n\n"
    f"The answer:\n<answer>\n{units.numbered(response)}\n</answer>"
  )


def demonstrations(rows: Sequence[dict], rules: str = "independent") -> Messages:
  """Annotated rows as turns of a conversation. Raises DataError if spans of a row do not fit its units, or its plan
  not the rules."""
  messages: Messages = []
  for row in rows:
    try:
      answer = plan.write(row["response"], row["chunks"], row["syncs"])
      plan.read(answer, row["response"], rules)
    except (plan.PlanError, KeyError) as error:
      raise DataError(f"row {row.get('id')} is no demonstration: {error}") from None
    messages += [
      {"role": "user", "content": question(row["prompt"], row["response"])},
      {"role": "assistant", "content": answer},
    ]
  return messages


def ask(row: dict, shown: Messages, rules: str = "independent") -> Messages:
  """The messages that ask for the plan of a row."""
  return [
    {"role": "system", "content": INSTRUCTIONS[rules]},
    *shown,
    {"role": "user", "content": question(row["prompt"], row["response"])},
  ]


def ask_again(messages: Messages, answer: str, fault: str) -> Messages:
  """The messages that return an invalid plan to the model, with the error message."""
  return [
    *messages,
    {"role": "assistant", "content": answer},
    {"role": "user", "content": f"That cannot be used: {fault}. Reply with the whole JSON again, mended."},
  ]


def ask_whether(row: dict, context: Context, *, reading: bool = False) -> Messages:
  """The messages that ask whether a piece is independent of what its writer does not see. With `reading` the writer
  reads the parts before it while others write them."""
  task = f'the part about "{context.topic}"' if context.topic is not None else "what follows"
  others = ", ".join(f"⟦{topic}⟧" for topic in context.waiting) or "none"
  seen = row["response"][: context.offset] if reading else context.seen
  others += (
    ". The writer reads these while they are written, and so may not need how they end." if reading else ""
  )
  text = (
    f"The request:\n<request>\n{row['prompt']}\n</request>\n\nWhat the writer sees of the answer:\n<seen>\n"
    f"{seen}\n</seen>\n\nWritten by others at the same time: {others}\n\nThe writer writes {task}:\n"
    f"<text>\n{context.text}\n</text>\n\nCould they have written it from that alone? YES or NO."
  )
  return [{"role": "system", "content": CHECK}, {"role": "user", "content": text}]


def says_yes(answer: str) -> bool | None:
  """Whether the answer is yes; None if it is neither yes nor no."""
  word = answer.strip().strip("*.\"' ").upper()
  return True if word.startswith("YES") else False if word.startswith("NO") else None
