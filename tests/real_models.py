"""A script, too long for every run of the tests: a released model's greedy answers against those of
transformers.

    python tests/real_models.py smollm2-135m-instruct
    python tests/real_models.py gemma3-270m

64 tokens to each of 20 prompts, float32, from weights that `export` wrote and transformers read.
"""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (0, 1)]  # as a script

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from pasta_jax.config import Config, with_changes  # noqa: E402
from pasta_jax.decode.generator import Model  # noqa: E402
from pasta_jax.decode.scheduler import Scheduler  # noqa: E402
from pasta_jax.utils.jsonl import read_jsonl  # noqa: E402
from pasta_jax.weights.checkpoint import load_checkpoint  # noqa: E402
from pasta_jax.weights.export import export  # noqa: E402

PROMPTS, TOKENS = 20, 64
ROOT = Path(__file__).parent.parent


def main(source: str) -> None:
  rows = read_jsonl(ROOT / "data" / "seed.jsonl")
  prompts = [rows[i * len(rows) // PROMPTS]["prompt"] for i in range(PROMPTS)]
  decode = dict(dtype="float32", repetition_penalty=1.0, no_repeat=0, promise_bias=0.0, max_new_tokens=TOKENS)
  changes = {"model.source": source} | {f"decode.{name}": value for name, value in decode.items()}
  config = with_changes(Config(), changes)
  generator = Model(config, adapter="")
  encoded = [generator.encode(p) for p in prompts]
  traces = Scheduler(generator.interpreter(False), batch_size=10, branch_width=1).run(
    encoded, generator.sampling
  )
  with tempfile.TemporaryDirectory() as folder:
    export(Path(folder) / "model", load_checkpoint(source), None, form="merged", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
    equal, first = 0, []
    for prompt, trace in zip(encoded, traces):
      ours = trace.threads[0].tokens.tolist()
      with torch.inference_mode():
        ids = torch.tensor([prompt])
        out = theirs.generate(
          ids,
          attention_mask=torch.ones_like(ids),
          do_sample=False,
          max_new_tokens=TOKENS,
          eos_token_id=list(generator.vocabulary.tags.eos),
          pad_token_id=0,
        )
      wanted = out[0, len(prompt) :].tolist()[: len(ours)]
      equal += ours == wanted
      if ours != wanted:
        first.append(int(np.argmin([a == b for a, b in zip(ours, wanted)])))
  print(
    f"{source}: {equal} of {PROMPTS} answers are equal over {TOKENS} tokens"
    + (f"; the others differ from token {', '.join(map(str, first))} on" if first else "")
  )


if __name__ == "__main__":
  main(sys.argv[1])
