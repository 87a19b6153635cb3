"""The paper's run: its recipe (`recipe`, which says what is from the paper) for Gemma 7B.

    run="python main.py --config.model.source=/path/to/gemma-7b"   # a Hugging Face folder
    $run --config=configs/paper/gemma_7b.py --mode=train --workdir=runs/gemma_7b/paper/pasta \\
      --config.train.data=annotated.jsonl
    $run --config=configs/paper/gemma_7b.py:baseline --mode=train --workdir=runs/gemma_7b/paper/baseline \\
      --config.train.data=annotated.jsonl
    $run --config=configs/paper/gemma_7b.py --mode=preference --workdir=runs/gemma_7b/preference \\
      --config.preference.prompts=prompts.jsonl --config.eval.prompts=alpaca_eval.json

`annotated.jsonl`: SlimOrca annotated by a language model (not published; it has the form of data/seed.jsonl).
Eight chips divide the rows of a step, so that one of stage two has 8 rows with up to 16 pairs, where the paper
has 8 pairs. Nothing here has been run at this size; a test lowers both training steps for eight TPU chips, and they
compile for v5p:2x2x2 and, with mesh.tensor=2, for v5e:4x4:

    python main.py --mode=compile --config=configs/paper/gemma_7b.py \
      --config.model.source=configs/paper/gemma_7b.json --config.compile.topology=v5p:2x2x2
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: "" for PASTA and stage two, "baseline" for Baseline-SFT, "apar" for APAR."""
  c = smollm2_135m.of_another_model(f"paper_{arg}" if arg else "paper", "gemma-7b", "gemma_7b")
  c.train.update(validate_every=500, checkpoint_every=500)
  c.preference.update(batch_size=8, sample_dtype="bfloat16", checkpoint_every=100)
  return c
