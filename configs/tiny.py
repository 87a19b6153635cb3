"""Random weights and a tokenizer of bytes: every mode in seconds, offline, to try a machine or a change. It
writes noise.

    run="python main.py --config=configs/tiny.py"
    $run --mode=train --workdir=runs/tiny/pasta
    python main.py --config=configs/tiny.py:baseline --mode=train --workdir=runs/tiny/baseline
    $run --mode=decode --prompt="Why?"
    $run --mode=eval --workdir=runs/tiny/eval --config.eval.prompts=data/seed.jsonl
    $run --mode=preference --workdir=runs/tiny/preference --config.preference.prompts=data/seed.jsonl \
      --config.eval.prompts=data/seed.jsonl
    $run --mode=export --workdir=runs/tiny/model
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: as of `smollm2_135m`."""
  c = smollm2_135m.of_another_model(arg, "tiny", "tiny")
  c.train.update(
    length=2048, batch_size=2, steps=8, lora_rank=4, dtype="float32", loss_chunk=512, remat="none"
  )
  c.decode.update(dtype="float32", max_new_tokens=96, max_branches=4, temperature=1.0, compare=False)
  c.eval.update(limit=4, batch_size=4, systems="pasta,baseline", judge_dtype="float32")
  c.preference.update(
    limit=4,
    rounds=1,
    weights="1,inf",
    samples=3,
    decode_batch_size=4,
    length=1024,
    batch_size=2,
    dtype="float32",
    loss_chunk=512,
    remat="none",
    guards=False,
    audit=2,
  )
  return c
