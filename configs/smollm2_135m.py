"""SmolLM2-135M-Instruct: the default for every mode.

python main.py --mode=decode --prompt="Compare trains and planes."
python main.py --mode=train --config=configs/smollm2_135m.py --workdir=runs/pasta
python main.py --mode=train --config=configs/smollm2_135m.py:baseline --workdir=runs/baseline
python main.py --mode=train --config=configs/smollm2_135m.py:apar --workdir=runs/apar

`pasta_jax.config` documents the settings and has their defaults. A file of your own takes this one's
`get_config` and changes what differs.
"""

from ml_collections import ConfigDict

from pasta_jax.config import Config, to_flags, with_changes

_PASTA = {"systems.pasta.adapter": "pasta", "systems.sequential.adapter": "pasta"}
# Parts that read along: --mode=train teaches these forms of the language (docs/language.md sections 2.5, 2.6, 3.1).
# A released adapter has its own, which decoding and stage two take from it.
_READ_ALONG = {"language.visibility": "live", "language.promise": "head", "language.number": "token"}
_CHANGES = {
  "": _READ_ALONG,
  "baseline": _PASTA | {"model.adapter": "baseline", "train.annotation": "none", "decode.parallel": False},
  "apar": _PASTA | {"model.adapter": "apar", "train.annotation": "structure"},
}


def get_config(arg: str = "") -> ConfigDict:
  """`arg`: "" for PASTA; "baseline" for Baseline-SFT (the same rows without tags); "apar" for APAR (the same
  rows, chunks by form, no joins, the paper's form of promises)."""
  if arg not in _CHANGES:
    raise ValueError(f"smollm2_135m: unknown argument {arg!r}; leave it out, or write ':baseline' or ':apar'")
  return to_flags(with_changes(Config(), _CHANGES[arg]))


def of_another_model(arg: str, source: str, name: str, released: tuple[str, ...] = ()) -> ConfigDict:
  """The same settings for other weights. Their adapters are those that --mode=train leaves in runs/`name`;
  those of systems in `released` are in this package."""
  c = get_config(arg)
  c.model.source = source
  adapter = lambda system: (
    f"{name}_{system}" if system in released else f"runs/{name}/{system}/adapter.safetensors"
  )
  c.model.adapter = adapter(arg or "pasta")
  for system in ("pasta", "sequential", "baseline", "apar"):
    c.systems[system].adapter = adapter("pasta" if system == "sequential" else system)
  for system in ("fast", "quality"):  # adapters of SmolLM2
    del c.systems[system]
  c.train.loss_chunk = c.preference.loss_chunk = 256  # vocabularies are several times SmolLM2's
  return c
