"""The paper's recipe, in one place: `--config=configs/smollm2_135m.py:paper`, the same of other models' files, and
`gemma_7b`, the paper's run (docs/preference.md, "The paper's recipe").

From the paper: forms and positions of the language; the annotator, its rules and seven demonstrations; SFT of every
parameter, 8 rows a step, rate 1e-5 falling linearly to 0, four epochs, rows as they come; greedy decoding and nothing
else, 2,048 tokens at most; in stage two ten samples at temperature 1, quality as a win-loss ratio by Gemini 1.5 Pro in
both orders, theoretical speedup, summed log-likelihoods, BoNBoN with alpha 0.005, rate 5e-7, 8 pairs a step, two
rounds, quality weights 1, 2, 4, 8 and inf.

Chosen here, because the paper does not say: beta (`train.losses.default_beta`), stage two's warmup, and the lengths of
packed rows. Rows of SFT are packed, so that 8 of them hold more than 8 examples. The guard against ill-formed tags
stays on while decoding. The paper chose rate and epochs for 7B parameters; a smaller model keeps them, and learns less
from the same rows (`--config.train.learning_rate`).
"""

from typing import Any

# By dotted name, for `pasta_jax.config.with_changes`.
RECIPE: dict[str, Any] = {
  "positions.strategy": "pred_10x",
  "language.visibility": "promise",
  "language.promise": "topic",
  "language.number": "digits",
  "annotate.kind": "gemini",
  "annotate.model": "gemini-1.5-flash",
  "annotate.rules": "paper",
  "train.length": 2048,
  "train.batch_size": 8,
  "train.grad_accum_steps": 1,
  "train.epochs": 4.0,
  "train.learning_rate": 1e-5,
  "train.warmup": 0.0,
  "train.lora_rank": 0,
  "train.min_speedup": 0.0,
  "train.plain_share": 1.0,
  "decode.max_new_tokens": 2048,
  "decode.kv_capacity": 4096,
  "decode.temperature": 0.0,
  "decode.repetition_penalty": 1.0,
  "decode.no_repeat": 0,
  "decode.promise_bias": 0.0,
  "eval.judges": ("llm",),
  "judge.kind": "gemini",
  "judge.model": "gemini-1.5-pro",
  "judge.orders": "both",
  "preference.weights": (1.0, 2.0, 4.0, 8.0, float("inf")),
  "preference.rounds": 2,
  "preference.samples": 10,
  "preference.temperature": 1.0,
  "preference.quality": "ratio",
  "preference.score": "theoretical",
  "preference.guards": False,
  "preference.loss": "bonbon",
  "preference.alpha": 0.005,
  "preference.beta": 0.0,  # 25.46 = 1/beta for ten samples
  "preference.per_token": False,
  "preference.length": 2560,
  "preference.batch_size": 4,  # rows, with 8 pairs at most
  "preference.grad_accum_steps": 1,
  "preference.epochs": 1.0,
  "preference.learning_rate": 5e-7,
  "preference.lora_rank": 0,
}
