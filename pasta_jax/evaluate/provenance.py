"""Where a system comes from: what its adapter's metadata say, kept in run.json so that a report needs no adapter."""

import dataclasses

from pasta_jax.decode.generator import metadata_with
from pasta_jax.evaluate.systems.registry import SYSTEMS
from pasta_jax.lang import forms


def provenance(config, name: str) -> dict[str, str]:
  """Of `config.systems[name]`: `annotator` of the training rows and `teacher`, which chose the pairs of stage two, as
  far as they are known; `forms` of the language, if its answers may have promises.

  Raises ValueError, one line, for an adapter that cannot be read.
  """
  config = config.of_system(name)
  entry = config.systems[name]
  metadata = metadata_with(config, entry.adapter)
  about: dict[str, str] = {key: metadata[key] for key in ("annotator", "teacher") if key in metadata}
  if SYSTEMS[entry.decode].promises:
    form = forms.from_metadata(metadata, forms.from_config(config).positions)
    form = dataclasses.replace(form, visibility=config.decode.visibility or form.visibility)
    about["forms"] = str(form)
  return about
