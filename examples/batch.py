"""Answers several prompts at once, and shows their progress: what a server does with a `Scheduler`.

python examples/batch.py "Plan a trip to Lisbon." "Why do cats purr?" "Name three birds."
"""

import argparse

import pasta_jax
from pasta_jax.decode.scheduler import DecodeRequest


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("prompts", nargs="*", default=["Plan a trip to Lisbon.", "Why do cats purr?"])
  parser.add_argument("--source", default="smollm2-135m-instruct", help="name, file or folder of a model")
  parser.add_argument("--adapter", help="name or file; the source's own if not given")
  parser.add_argument("--tokens", type=int, default=256, help="the longest length of an answer")
  args = parser.parse_args()

  model = pasta_jax.load(args.source, args.adapter, max_new_tokens=args.tokens)
  scheduler = model.scheduler(batch_size=4)

  def submit(prompt: str) -> int:
    progress = lambda trace: print(f"{prompt}: {trace.cost.total_tokens} tokens")
    return scheduler.submit(DecodeRequest(model.encode(prompt), model.sampling, on_step=progress, every=32))

  prompts = {submit(prompt): prompt for prompt in args.prompts}
  while scheduler.step():  # requests may be submitted and cancelled between two steps, or by another thread
    for id, trace in scheduler.results():
      print(f"\n# {prompts[id]} ({trace.finish_reason})\n\n{trace.text}\n")


if __name__ == "__main__":
  main()
