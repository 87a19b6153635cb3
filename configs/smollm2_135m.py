"""SmolLM2-135M-Instruct: the default for every mode.

python main.py --mode=decode --prompt="Compare trains and planes."
python main.py --mode=train --config=configs/smollm2_135m.py --workdir=runs/pasta
python main.py --mode=train --config=configs/smollm2_135m.py:baseline --workdir=runs/baseline
python main.py --mode=train --config=configs/smollm2_135m.py:apar --workdir=runs/apar
python main.py --mode=train --config=configs/smollm2_135m.py:paper --workdir=runs/smollm2_135m/paper/pasta

`pasta_jax.config` documents the settings and has their defaults. A file of your own takes this one's
`get_config` and changes what differs.
"""

from ml_collections import ConfigDict

from configs.paper.recipe import RECIPE
from pasta_jax.config import Config, to_flags, with_changes

_PASTA = {"systems.pasta.adapter": "pasta", "systems.sequential.adapter": "pasta"}
_BASELINE = _PASTA | {"model.adapter": "baseline", "train.annotation": "none", "decode.parallel": False}
_APAR = _PASTA | {"model.adapter": "apar", "train.annotation": "structure"}
# Parts that read along: --mode=train teaches these forms of the language (docs/language.md sections 2.5, 2.6, 3.1).
# A released adapter has its own, which decoding and stage two take from it.
_READ_ALONG = {"language.visibility": "live", "language.promise": "head", "language.number": "token"}
_CHANGES = {
  "": _READ_ALONG,
  "baseline": _BASELINE,
  "apar": _APAR,
  "paper": RECIPE,
  "paper_baseline": RECIPE | _BASELINE,
  "paper_apar": RECIPE | _APAR,
}


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: "" for PASTA; "baseline" for Baseline-SFT (the same rows without tags); "apar" for APAR (the same
  rows, chunks by form, no joins, the paper's form of promises); "paper", "paper_baseline" and "paper_apar" for the
  same three by the paper's recipe."""
  c = _settings(arg)
  return _with_adapters(c, arg, "smollm2_135m") if arg.startswith("paper") else c


def _settings(arg: str) -> ConfigDict:
  if arg not in _CHANGES:
    known = ", ".join(f"':{a}'" for a in _CHANGES if a)
    raise ValueError(f"smollm2_135m: unknown argument {arg!r}; leave it out, or write one of {known}")
  return to_flags(with_changes(Config(), _CHANGES[arg]))


def of_another_model(arg: str, source: str, name: str, released: tuple[str, ...] = ()) -> ConfigDict:
  """The same settings for other weights. Their adapters are those that --mode=train leaves in runs/`name`;
  those of systems in `released` are in this package."""
  c = _with_adapters(_settings(arg), arg, name, released)
  c.model.source = source
  c.train.loss_chunk = c.preference.loss_chunk = 256  # vocabularies are several times SmolLM2's
  return c


def _with_adapters(c: ConfigDict, arg: str, name: str, released: tuple[str, ...] = ()) -> ConfigDict:
  """`c` with adapters of the model `name`: those that --mode=train leaves in runs/`name`, or in runs/`name`/paper by
  the paper's recipe, by which none is `released`."""
  paper, system = arg.startswith("paper"), arg.removeprefix("paper").removeprefix("_")
  folder = f"runs/{name}/paper" if paper else f"runs/{name}"
  adapter = lambda system: (
    f"{name}_{system}" if system in released and not paper else f"{folder}/{system}/adapter.safetensors"
  )
  c.model.adapter = adapter(system or "pasta")
  for other in ("pasta", "sequential", "baseline", "apar"):
    c.systems[other].adapter = adapter("pasta" if other == "sequential" else other)
  for other in ("paper", "fast", "quality"):  # adapters of SmolLM2's own recipe
    del c.systems[other]
  return c
