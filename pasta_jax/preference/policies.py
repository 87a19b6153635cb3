"""The policies that `config.preference` asks for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Policy:
  """One model that is trained over all rounds."""

  name: str
  weights: tuple[float, ...]  # quality weights λ; one, unless the policy is conditioned
  conditioned: bool  # whether its prompts say which speed is wanted

  def speed(self, weight: float) -> int:
    """The speed in the prompt: 0 for the largest quality weight, then 1, 2, …; -1: none."""
    return sorted(self.weights, reverse=True).index(weight) if self.conditioned else -1


def policies(config) -> list[Policy]:
  """One policy for each quality weight of `config.preference`, or one for all of them if `conditioned`."""
  c = config.preference
  if c.conditioned:
    return [Policy("conditioned", c.weights, True)]
  return [Policy(f"weight_{w:g}", (w,), False) for w in c.weights]
