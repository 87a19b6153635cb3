"""SmolLM2-135M-Instruct: the default for every mode.

    python main.py --mode=decode --prompt="Compare trains and planes."
    python main.py --mode=train --config=configs/smollm2_135m.py --workdir=runs/pasta
    python main.py --mode=train --config=configs/smollm2_135m.py:baseline --workdir=runs/baseline
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: "" for PASTA, "baseline" for Baseline-SFT (same data, tags removed)."""
  if arg not in ("", "baseline"):
    raise ValueError(f"smollm2_135m: unknown argument {arg!r}; leave it out, or write ':baseline'")
  c = ConfigDict()
  c.model = ConfigDict(dict(
      source="smollm2-135m-instruct",  # or a .gguf file, or a Hugging Face folder
      adapter="baseline" if arg == "baseline" else "pasta",  # the package's own; a file; "" for the base model
  ))
  c.positions = ConfigDict(dict(strategy="pred_10x", fixed=60))  # of training; decoding takes the adapter's
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
  c.decode = ConfigDict(dict(
      parallel=arg != "baseline",  # False: the same weights one token at a time, no promises
      dtype="bfloat16",  # float32: parallel equals sequential token by token, whatever the width
      max_new_tokens=512,
      slots=8,  # branches that a step holds
      capacity=4096,  # entries of the key-value pool
      max_threads=24,
      max_depth=2,
      max_topic=12,
      guard=True,  # only well-formed tags can be written
      temperature=0.0,
      top_k=0,
      top_p=1.0,
      min_p=0.0,
      repetition_penalty=1.1,
      no_repeat=16,  # no topic and no run of so many tokens that any thread wrote before comes again; 0: off
      promise_bias=1.5,  # added to the logit of a promise's opening tag
      seed=0,
      live=True,  # show the branches while they are written, where standard output is a terminal
      compare=True,  # one prompt: decode it without promises as well, for the measured speed-up
      requests=4,  # prompts at once for --prompts_file
  ))
  c.eval = ConfigDict(dict(
      prompts="",  # file of JSON lines with "prompt" and "id"
      limit=0,  # 0: all
      systems="pasta,sequential",  # of pasta, sequential, baseline, base
      baseline_adapter="baseline",  # of the system "baseline": the package's own, or a file
      timed=True,  # one response at a time, by the clock; False: many at once, theoretical figures only
      repeats=0,  # timed: decode each prompt so often, the last one counts; 0: once on CPU, else twice
      requests=8,  # not timed: prompts at once
      width=4,  # not timed: branches of each in a step
  ))
  return c
