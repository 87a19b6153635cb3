"""SmolLM2-135M-Instruct: the default for every mode.

    python main.py --mode=decode --prompt="Compare trains and planes."
    python main.py --mode=train --config=configs/smollm2_135m.py --workdir=runs/pasta
    python main.py --mode=train --config=configs/smollm2_135m.py:baseline --workdir=runs/baseline
"""

from ml_collections import ConfigDict, config_dict


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: "" for PASTA, "baseline" for Baseline-SFT (same data, tags removed)."""
  if arg not in ("", "baseline"):
    raise ValueError(f"smollm2_135m: unknown argument {arg!r}; leave it out, or write ':baseline'")
  c = ConfigDict()
  c.model = ConfigDict(dict(source="smollm2-135m-instruct"))
  c.positions = ConfigDict(dict(strategy="pred_10x", fixed=60))
  c.train = ConfigDict(dict(
      annotated=arg != "baseline",
      data="data/seed.jsonl",  # files, comma-separated; "FILE*2" counts twice an epoch
      validation="",
      min_speedup=1.4,  # annotated responses that save less are left out
      plain_share=0.15,  # of the examples, at most this share without chunks
      length=640,  # tokens of a packed row; longer examples are left out
      batch_size=3,
      accumulate=1,
      steps=0,  # 0: as many as `epochs` needs
      epochs=3.0,
      learning_rate=4e-4,
      warmup=0.05,  # share of the steps
      weight_decay=0.0,
      adam_b2=0.99,
      clip=1.0,
      lora_rank=16,  # 0: train every parameter
      lora_alpha=32.0,
      dtype="bfloat16",
      remat=True,
      loss_chunk=1024,
      seed=0,
      validate_every=50,
      checkpoint_every=25,
  ))
  return c
