"""The error of every request that an evaluation cannot fulfil."""


class EvalError(ValueError):
  """Settings, a run's folder or a judge's file that cannot be used; the message is one line and says what to
  change."""
