"""Exports models for other engines: a Hugging Face folder with the adapter merged, or the adapter for PEFT.

In both, the tags are tokens of the tokenizer (`lang.syntax.TOKEN_TEXTS`). An engine without an interpreter
for PASTA must ban them, by a logit bias or as bad words, and then writes ordinary answers: the chunk of a
promise is written by another thread, which such an engine does not start.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pasta_jax import __version__
from pasta_jax.config.sections import DTYPES, EXPORTS
from pasta_jax.lang.syntax import token_texts
from pasta_jax.utils.files import atomic_folder
from pasta_jax.utils.locks import locked
from pasta_jax.weights.adapter import Adapter, Merged, form_of, has_tags, read_adapter
from pasta_jax.weights.checkpoint import Checkpoint
from pasta_jax.weights.hf_folder import fill_hf_folder, hf_name, peft_prefix
from pasta_jax.weights.model_files import read_json, save_tensors, write_json

# What an exported folder was made of, in that folder: the same export again has nothing to do.
_MADE_OF = "export.json"
# Metadata of an adapter's file itself, not of its training.
_FILE_METADATA = ("format", "scale", "model", "storage", "base", "base's sha256")


def export(folder: Path, checkpoint: Checkpoint, adapter: Path | None, *, form: str, dtype: str) -> str:
  """Writes the weights of `checkpoint` with `adapter` to `folder`, atomically; returns a description of what
  was written and of what a user must know to load it.

  Args:
    form: "merged": a Hugging Face folder with the adapter merged, if there is one. "peft": only the adapter.
    dtype: "float32" or "bfloat16".

  Raises:
    ValueError: one line, for settings that cannot be used, a folder that is there already and is not this
      export, or an adapter that does not fit (AdapterError).
    LockedError: another process exports there.
    OSError: the files cannot be written; nothing is left of them.
  """
  if form not in EXPORTS or dtype not in DTYPES:
    raise ValueError(
      f"export.form is {' or '.join(EXPORTS)} and export.dtype {' or '.join(DTYPES)}, not {form!r} and "
      f"{dtype!r}"
    )
  if form == "peft" and adapter is None:
    raise ValueError("export.form=peft needs an adapter: name --config.model.adapter")
  folder = folder.resolve()
  with locked(folder.with_name(folder.name + ".lock")):  # the folder itself is replaced
    return _export(folder, checkpoint, adapter, form, dtype)


def _export(folder: Path, checkpoint: Checkpoint, adapter: Path | None, form: str, dtype: str) -> str:
  made_of = {"form": form, "dtype": dtype, **_identity(checkpoint, adapter)}
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    if (folder / _MADE_OF).is_file() and read_json(folder / _MADE_OF) == made_of:
      return "was written before, by the same settings"
    raise ValueError(f"{folder} already exists: choose another --workdir")
  checkpoint = checkpoint.speaking(form_of(adapter)) if adapter and has_tags(adapter) else checkpoint
  merge = read_adapter(adapter, checkpoint.config) if adapter else None
  if form == "peft" and merge is not None:
    return _save_peft(folder, checkpoint, merge, dtype, made_of)
  metadata = merge.metadata if merge else {}
  pasta = checkpoint.pasta | {k: v for k, v in metadata.items() if k not in _FILE_METADATA}
  with_tags = bool(checkpoint.pasta) or merge is not None and merge.tags is not None
  whole = Merged(checkpoint.config, checkpoint.params, merge)
  with atomic_folder(folder) as temporary:
    fill_hf_folder(
      temporary, whole.config, whole, checkpoint.tokenizer, dtype=dtype, pasta=pasta if with_tags else None
    )
    write_json(temporary / _MADE_OF, made_of)
  return f"a Hugging Face folder in {dtype}"


def _identity(checkpoint: Checkpoint, adapter: Path | None) -> dict[str, str]:
  """What the files of an export depend on, beside its settings."""
  source = Path(checkpoint.source)
  files = sorted(source.rglob("*")) if source.is_dir() else [source] if source.is_file() else []
  stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
  return {
    "version": __version__,
    "source": checkpoint.source,
    "source's state": hashlib.sha256(repr(stats).encode()).hexdigest(),
    "adapter's sha256": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter else "",
  }


def _save_peft(
  folder: Path, checkpoint: Checkpoint, adapter: Adapter, dtype: str, made_of: Mapping[str, str]
) -> str:
  """Writes adapter_config.json, adapter_model.safetensors and the tokenizer; returns as `export`."""
  tensors: dict[str, np.ndarray] = {}
  config: dict[str, object] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": checkpoint.source,
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
  }
  prefix = peft_prefix(Path(checkpoint.source))

  def store(name: str, x: np.ndarray) -> None:
    tensors[f"base_model.model.{name}"] = np.ascontiguousarray(x.astype(dtype))

  if not adapter.factors:
    raise ValueError(
      "this adapter has no low-rank updates, because all weights were trained: use export.form=merged"
    )
  targets = set()
  for name, (a, b) in adapter.factors.items():
    theirs = hf_name(checkpoint.config, f"{name}.kernel").removesuffix(".weight").replace("model.", prefix, 1)
    targets.add(theirs.rpartition(".")[2])
    store(f"{theirs}.lora_A.weight", a.T)
    store(f"{theirs}.lora_B.weight", b.T)
    config |= {"r": a.shape[1], "lora_alpha": adapter.scale * a.shape[1]}
  names = sorted(targets)
  # The vision part of a model has modules of the same names: a regular expression selects those of the text
  # part.
  config["target_modules"] = names if prefix == "model." else f"{re.escape(prefix)}.*({'|'.join(names)})"
  vocabulary = checkpoint.vocabulary
  ids = vocabulary.tag_ids
  tags = {}
  if adapter.tags is not None:
    tags["embed_tokens"] = ids
    store(f"{prefix}embed_tokens.token_adapter.trainable_tokens_delta", adapter.tags)
  if adapter.head_tags is not None:
    tags["lm_head"] = ids
    store("lm_head.token_adapter.trainable_tokens_delta", adapter.head_tags.T)
  if tags:
    config["trainable_token_indices"] = tags
  with atomic_folder(folder) as temporary:
    save_tensors(temporary / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(temporary / "adapter_config.json", config)
    write_json(temporary / _MADE_OF, made_of)
    checkpoint.tokenizer.save(temporary, token_texts(ids, vocabulary.promise) if tags else None)
  description = f"an adapter for PEFT in {dtype}"
  if tags and (rows := max(ids) + 1) > checkpoint.config.vocab_size:
    description += (
      f"; its tags need rows: call the model's resize_token_embeddings({rows}) before "
      "PeftModel.from_pretrained"
    )
  return description
