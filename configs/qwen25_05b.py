"""Qwen 2.5 0.5B Instruct, from a Hugging Face folder on disk (or a GGUF file): an example for weights of
one's own.

    run="python main.py --config.model.source=models/Qwen2.5-0.5B-Instruct"
    $run --config=configs/qwen25_05b.py --mode=train --workdir=runs/qwen25_05b/pasta --config.train.data=annotated.jsonl
    $run --config=configs/qwen25_05b.py:baseline --mode=train --workdir=runs/qwen25_05b/baseline \\
      --config.train.data=annotated.jsonl
    $run --config=configs/qwen25_05b.py --mode=decode --prompt="Compare trains and planes."

It comes without an adapter: train first. Not run with the released weights.
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: as of `smollm2_135m`."""
  return smollm2_135m.of_another_model(arg, "models/Qwen2.5-0.5B-Instruct", "qwen25_05b")
