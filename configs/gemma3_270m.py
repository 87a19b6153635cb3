"""Gemma 3 270M, a base model of the paper's family: fetched under Gemma's terms, and taught to answer by SFT.

    python main.py --config=configs/gemma3_270m.py --mode=decode --prompt="Compare trains and planes."
    python main.py --config=configs/gemma3_270m.py --mode=train --workdir=runs/gemma3_270m/pasta
    python main.py --config=configs/gemma3_270m.py:baseline --mode=train --workdir=runs/gemma3_270m/baseline

The package has adapters of PASTA-SFT and Baseline-SFT (their card: pasta_jax/adapters/README.md).
"""

from ml_collections import ConfigDict

from configs import smollm2_135m


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: as of `smollm2_135m`."""
  return smollm2_135m.of_another_model(arg, "gemma3-270m", "gemma3_270m", released=("pasta", "baseline"))
