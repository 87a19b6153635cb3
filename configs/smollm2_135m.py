"""SmolLM2-135M-Instruct: the default for every mode.

python main.py --mode=decode --prompt="Compare trains and planes."
python main.py --mode=train --config=configs/smollm2_135m.py --workdir=runs/pasta
python main.py --mode=train --config=configs/smollm2_135m.py:baseline --workdir=runs/baseline
python main.py --mode=train --config=configs/smollm2_135m.py:apar --workdir=runs/apar
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: "" for PASTA; "baseline" for Baseline-SFT (same rows, tags removed); "apar" for APAR (same rows,
  chunks by their form, no joins)."""
  if arg not in ("", "baseline", "apar"):
    raise ValueError(f"smollm2_135m: unknown argument {arg!r}; leave it out, or write ':baseline' or ':apar'")
  c = ConfigDict()
  c.model = ConfigDict(
    dict(
      source="smollm2-135m-instruct",  # or a .gguf file, or a Hugging Face folder
      adapter=arg
      or "pasta",  # the package's (pasta_fast, pasta_quality: behind stage two); a file; "": the base model
    )
  )
  c.mesh = ConfigDict(
    dict(data=1, fsdp=-1, tensor=1)
  )  # devices of training by axis (train.sharding); -1: all others
  c.positions = ConfigDict(dict(strategy="pred_10x", fixed=60))  # of training; decoding takes the adapter's
  c.train = ConfigDict(
    dict(
      annotation={"": "plan", "baseline": "none", "apar": "structure"}[arg],  # of the rows of `data`
      data="data/seed.jsonl",  # files or built data sets, comma-separated; "FILE*2" counts twice an epoch
      validation="",
      min_speedup=1.4,  # annotated responses that save less are left out
      plain_share=0.15,  # of the examples, at most this share without chunks
      workers=0,  # processes that lay the rows out when training begins (some milliseconds each); 0: this one
      length=640,  # tokens of a packed row; longer examples are left out
      batch_size=3,
      grad_accum_steps=1,
      steps=0,  # 0: as many as `epochs` needs
      epochs=3.0,
      learning_rate=4e-4,
      warmup=0.05,  # share of the steps
      weight_decay=0.0,
      adam_b2=0.99,
      max_grad_norm=1.0,
      lora_rank=16,  # 0: train every parameter
      lora_alpha=32.0,
      dtype="bfloat16",
      remat="full",  # of a layer, the backward pass computes again: full, attention, products, none (model.decoder)
      attention="auto",  # kernels on TPU and GPU, blocks in plain JAX on CPU (train.attention)
      loss_chunk=1024,
      seed=0,
      validate_every=50,
      checkpoint_every=25,
    )
  )
  c.decode = ConfigDict(
    dict(
      parallel=arg != "baseline",  # False: the same weights one token at a time, no promises
      dtype="bfloat16",  # float32: parallel equals sequential token by token, whatever the width
      max_new_tokens=512,
      max_branches=8,  # branches that a step holds
      kv_capacity=4096,  # entries of the key-value pool
      max_threads=24,
      max_depth=1,  # levels of chunks; more is understood, but what the adapters learned from hardly nests
      max_topic=12,
      guard=True,  # only well-formed tags can be written
      temperature=0.0,
      top_k=0,
      top_p=1.0,
      min_p=0.0,
      repetition_penalty=1.1,
      no_repeat=16,  # no topic and no run of so many tokens that any thread wrote before comes again; 0: off
      promise_bias=1.5,  # added to the logit of a promise's opening tag
      speed=-1,  # 0: the best answer, more: faster ones; for adapters that were trained for it; -1: not asked for
      seed=0,
      live=True,  # show the branches while they are written, where standard output is a terminal
      compare=True,  # one prompt: decode it without promises as well, for the measured speed-up
      batch_size=4,  # prompts at once for --prompts_file
    )
  )
  # What can be compared: an adapter and a way of decoding it.
  adapter = "pasta" if arg else c.model.get_ref("adapter")
  c.systems = ConfigDict(
    dict(
      pasta=dict(adapter=adapter, decode="parallel"),
      sequential=dict(adapter=adapter, decode="sequential"),  # the same weights without promises
      fast=dict(adapter="pasta_fast", decode="parallel"),  # behind stage two, with little weight on quality
      quality=dict(adapter="pasta_quality", decode="parallel"),  # with much
      baseline=dict(adapter="baseline", decode="sequential"),  # Baseline-SFT
      apar=dict(adapter="apar", decode="parallel"),  # chunks by form, no joins
      sot=dict(adapter="", decode="skeleton"),  # Skeleton-of-Thought: an outline, its points side by side
      base=dict(adapter="", decode="sequential"),  # the model as it is
    )
  )
  c.skeleton = ConfigDict(dict(max_points=10, outline_tokens=160, point_tokens=128))
  c.eval = ConfigDict(
    dict(
      prompts="",  # JSON lines with "prompt" (or MT-Bench's "turns"), or AlpacaEval's JSON
      limit=0,  # so many prompts, spread evenly over the file; 0: all
      categories="",  # comma-separated; "": all
      systems="pasta,baseline",  # of c.systems
      baseline="baseline",  # the system that the others are measured against
      batch_size=48,  # answered at once; responses for quality and theoretical figures
      branch_width=2,  # branches of each in a step
      dtype="float32",  # of those responses: the same, however many are answered at once
      timed=0,  # prompts that are answered once more, one at a time by the clock, in decode.dtype; -1: all
      timed_prompts="",  # a file that says which; "": the first ones of `prompts`
      repeats=0,  # decode each timed prompt so often, the last one counts; 0: once on CPU, else twice
      judges="local",  # comma-separated: local, llm, or files of preferences; "": none
      judge_dtype="bfloat16",  # of the local judge's model
      difficulty="",  # file of instruction difficulties for the length-controlled win rate; "": without
      min_quality=0.0,  # --mode=pilot: win rate in per cent that must be reached; 0: none
      min_speedup=0.0,  # --mode=pilot: speed-up by the clock that must be reached; 0: none
    )
  )
  c.preference = ConfigDict(
    dict(
      prompts="",  # to sample answers to; --mode=eval's are for the evaluation behind each round
      limit=0,
      rounds=2,
      weights="1,2,4,8,inf",  # of quality in speedup + weight * quality; a policy each
      conditioned=False,  # one policy for all weights: its prompts say which speed is wanted (decode.speed)
      stages="sample,judge,train,eval",
      share="",  # "2/3": of the sample stage, the second of three shares of the prompts, beside the others
      samples=10,  # answers a prompt, of which the best and the worst make a pair
      temperature=0.5,  # at 0.8 a small model's samples lose nearly always, and a judge tells them apart no more
      sample_dtype="float32",
      decode_batch_size=48,  # prompts decoded at once
      branch_width=2,
      audit=8,  # so many samples a round: their log-probabilities against the trainer's, and against the start's
      score="delivered",  # or theoretical (the paper's), parallelism, arithmetic, harmonic, clock (preference.score)
      cost="",  # file of the step cost (evaluate.benchmark --cost=FILE)
      guards=True,  # a broken answer cannot be the best one
      loss="bonbon",  # or ipo, dpo
      alpha=0.005,  # share of the likelihood of the best answer
      beta=0.0,  # 0: from the number of samples (train.preference_loss)
      per_token=True,  # compare answers of different lengths by the token; False: by their sums, as in the paper
      length=768,  # tokens of a packed row; samples that are longer are left out
      batch_size=3,  # rows, which hold about as many pairs
      grad_accum_steps=2,
      steps=0,
      epochs=1.0,
      learning_rate=5e-5,
      warmup=0.1,
      weight_decay=0.0,
      adam_b2=0.99,
      max_grad_norm=1.0,
      lora_rank=16,  # of new updates, where the start has none; 0: train every parameter
      lora_alpha=32.0,
      dtype="bfloat16",
      remat="full",
      attention="auto",
      loss_chunk=1024,
      seed=0,
      checkpoint_every=10,
    )
  )
  c.judge = ConfigDict(
    dict(  # of eval.judges=llm
      kind="openai",  # any OpenAI-compatible endpoint; or "gemini"
      url="",  # "": the provider's own; a local server: http://localhost:8000/v1
      model="",
      key_env="",  # environment variable with the key; "": OPENAI_API_KEY or GEMINI_API_KEY
      max_tokens=1,  # more where the answer begins with something else than its letter
      logprobs=True,  # ask for token probabilities; False for servers that refuse
      concurrency=8,
      retries=6,
      timeout=60.0,
      cache="",  # file of paid calls, for several runs; "": in the run's folder
    )
  )
  c.annotate = ConfigDict(
    dict(
      data="",  # JSON lines: prompt and response; Alpaca's fields; SlimOrca's conversations; messages
      limit=0,  # rows, spread over the file; 0: all
      avoid="",  # a file of evaluation prompts: rows that share eight words in a row with one are left out
      kind="openai",  # any OpenAI-compatible endpoint; "gemini"; "structure": no model, by lists and headings
      url="",  # as of the judge, and so are the next ones
      model="",
      key_env="",
      max_tokens=1500,
      concurrency=8,
      per_minute=0,  # calls, at most; 0: no limit
      retries=6,
      timeout=120.0,
      tries=3,  # answers asked for where one cannot be used
      check=True,  # ask of each chunk whether its writer could have written it
      demonstrations="data/seed.jsonl",
      against="",  # a file with other annotations of the same responses, to compare with
      price_read=0.0,  # of a million tokens
      price_written=0.0,
    )
  )
  c.dataset = ConfigDict(
    dict(  # of --mode=build
      train="",  # files of annotated rows, comma-separated (or of plain responses): JSON lines, parquet, Arrow folders
      validation="",
      validation_share=0.0,  # where no file is named: so much of `train`, chosen by the prompt
      avoid="",  # a file of evaluation prompts, as of annotate
      strict=False,  # stop at a row that cannot be used, instead of naming it
    )
  )
  c.compile = ConfigDict(
    dict(  # of --mode=compile: training steps for TPUs that are not here (train.ahead)
      topology="v5e:2x2",
      stages="train",  # or "train,preference"
    )
  )
  c.export = ConfigDict(
    dict(
      form="merged",  # a Hugging Face folder with the adapter in the weights; or "peft", the adapter alone
      dtype="float32",
    )
  )
  return c


def of_another_model(arg: str, source: str, name: str, released: tuple[str, ...] = ()) -> ConfigDict:
  """The same settings for other weights. Their adapters are those that --mode=train leaves in runs/`name`;
  those of systems that are `released` are in this package."""
  c = get_config(arg)
  c.model.source = source
  adapter = lambda system: (
    f"{name}_{system}" if system in released else f"runs/{name}/{system}/adapter.safetensors"
  )
  c.model.adapter = adapter(arg or "pasta")
  for system, trained in (
    ("pasta", "pasta"),
    ("sequential", "pasta"),
    ("baseline", "baseline"),
    ("apar", "apar"),
  ):
    c.systems[system].adapter = adapter(trained)
  for system in ("fast", "quality"):  # SmolLM2's
    del c.systems[system]
  c.train.loss_chunk = c.preference.loss_chunk = 256  # their vocabularies are several times SmolLM2's
  return c
