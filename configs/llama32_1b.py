"""Llama 3.2 1B Instruct, from a Hugging Face folder on disk (or a GGUF file): an example for weights of one's
own.

    run="python main.py --config.model.source=models/Llama-3.2-1B-Instruct"
    $run --config=configs/llama32_1b.py --mode=train --workdir=runs/llama32_1b/pasta --config.train.data=annotated.jsonl
    $run --config=configs/llama32_1b.py:baseline --mode=train --workdir=runs/llama32_1b/baseline \\
      --config.train.data=annotated.jsonl
    $run --config=configs/llama32_1b.py --mode=decode --prompt="Compare trains and planes."

It comes without an adapter: train first. Not run with the released weights.
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: as of `smollm2_135m`."""
  return smollm2_135m.of_another_model(arg, "models/Llama-3.2-1B-Instruct", "llama32_1b")
