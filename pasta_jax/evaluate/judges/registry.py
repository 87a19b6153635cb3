"""The judges that `config.eval.judges` names."""

from pasta_jax.evaluate.judges.files import FileJudge
from pasta_jax.evaluate.judges.judge import Judge, NamedJudge
from pasta_jax.evaluate.judges.llm import LlmJudge
from pasta_jax.evaluate.judges.local import LocalJudge

JUDGES: dict[str, type[NamedJudge]] = {"local": LocalJudge, "llm": LlmJudge}


def judges_of(config) -> list[Judge]:
  """The judges of `config.eval.judges`: keys of `JUDGES`, or files of preferences."""
  return [
    JUDGES[name].from_config(config) if name in JUDGES else FileJudge(name, config.eval.baseline)
    for name in config.eval.judges
  ]
