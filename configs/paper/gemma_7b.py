"""The paper's run: Gemma 7B, every parameter trained, SFT and two rounds of preference optimisation
(docs/language.md sections 6 and 7).

    run="python main.py --config.model.source=/path/to/gemma-7b"   # a Hugging Face folder
    $run --config=configs/paper/gemma_7b.py --mode=train --workdir=runs/gemma_7b/pasta \\
      --config.train.data=annotated.jsonl
    $run --config=configs/paper/gemma_7b.py:baseline --mode=train --workdir=runs/gemma_7b/baseline \\
      --config.train.data=annotated.jsonl
    $run --config=configs/paper/gemma_7b.py --mode=preference --workdir=runs/gemma_7b/preference \\
      --config.preference.prompts=prompts.jsonl --config.eval.prompts=alpaca_eval.json

From the paper: the model; SlimOrca annotated by a language model (not published: `annotated.jsonl` has the
form of data/seed.jsonl); 8 rows a step, 1e-5 falling linearly to 0, four epochs; ten samples a prompt at
temperature 1, the quality weights 1, 2, 4, 8 and inf, two rounds, theoretical speedup, alpha 0.005, rate
5e-7, Gemini 1.5 Pro as the judge of samples, greedy answers to AlpacaEval's 805 prompts. Chosen here:
lengths, beta (`train.losses`), and 32 rows of pairs a step in stage two where the paper has 8 pairs. Nothing
here has been run at this size; a test lowers both training steps for eight TPU chips, and they compile for
v5p:2x2x2 and, with mesh.tensor=2, for v5e:4x4:

    python main.py --mode=compile --config=configs/paper/gemma_7b.py \
      --config.model.source=configs/paper/gemma_7b.json --config.compile.topology=v5p:2x2x2
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: "" for PASTA and stage two, "baseline" for Baseline-SFT."""
  if arg not in ("", "baseline"):
    raise ValueError(f"gemma_7b: unknown argument {arg!r}; leave it out, or write ':baseline'")
  c = smollm2_135m.get_config(arg)
  c.model.source = "gemma-7b"
  c.model.adapter = f"runs/gemma_7b/{arg or 'pasta'}/adapter.safetensors"
  c.systems.pasta.adapter = c.systems.sequential.adapter = "runs/gemma_7b/pasta/adapter.safetensors"
  c.systems.baseline.adapter = "runs/gemma_7b/baseline/adapter.safetensors"
  for system in ("apar", "fast", "quality"):  # their adapters would be SmolLM2's
    del c.systems[system]
  c.language.update(visibility="promise", promise="topic", number="digits")  # the paper's forms
  c.train.update(
    length=2048,
    batch_size=8,
    grad_accum_steps=1,
    epochs=4.0,
    learning_rate=1e-5,
    warmup=0.0,
    lora_rank=0,
    min_speedup=0.0,
    plain_share=1.0,  # rows as they come
    validate_every=500,
    checkpoint_every=500,
  )
  # Greedy decoding and nothing else, as in the paper.
  c.decode.update(
    max_new_tokens=2048, kv_capacity=4096, repetition_penalty=1.0, no_repeat=0, promise_bias=0.0
  )
  c.preference.update(
    score="theoretical",
    per_token=False,  # as published; the defaults are ours
    weights="1,2,4,8,inf",
    rounds=2,
    samples=10,
    temperature=1.0,
    length=2560,
    batch_size=8,
    grad_accum_steps=4,
    learning_rate=5e-7,
    lora_rank=0,
    sample_dtype="bfloat16",
    checkpoint_every=100,
  )
  c.eval.judges = "llm"
  c.judge.update(kind="gemini", model="gemini-1.5-pro")
  return c
