"""Answers a prompt in parallel, and draws which thread wrote what when.

python examples/generate.py "Compare trains and planes."
"""

import argparse

import pasta_jax


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("prompt", nargs="?", default="Compare trains and planes.")
  parser.add_argument("--source", default="smollm2-135m-instruct", help="name, file or folder of a model")
  parser.add_argument("--adapter", help="name or file; the source's own if not given")
  parser.add_argument("--timeline", default="timeline.html", help=".html or .svg file to draw")
  parser.add_argument("--tokens", type=int, default=256, help="the answer's longest length")
  args = parser.parse_args()

  model = pasta_jax.load(args.source, args.adapter, max_new_tokens=args.tokens)
  answer = model.generate(args.prompt)
  print(answer.text)
  answer.timeline(args.timeline)

  print(f"\n{answer.record['total_tokens']} tokens in {answer.trace.steps} steps, {answer.seconds:.1f} s")
  for thread in answer.trace.threads[1:]:
    print(f"  {thread.topic!r}: {thread.length} tokens, promised {thread.declared}")
  print(f"timeline: {args.timeline}")


if __name__ == "__main__":
  main()
