"""Who sees whom (docs/language.md section 3): one rule for each form, for training, kernels and tests.

`promise` is told by the keys' masked intervals (`is_visible`), `live` by rounds (`is_visible_live`).
"""


def is_visible(q, k, intervals_k):
  """Whether the query at index `q` sees the key at index `k` of the same example; broadcasts.

  `intervals_k` [..., levels, 2] are the keys' masked intervals; its leading axes broadcast with q and k.
  Works on NumPy and JAX arrays.
  """
  levels = range(intervals_k.shape[-2])
  return outside(q, k, [(intervals_k[..., level, 0], intervals_k[..., level, 1]) for level in levels])


def is_visible_live(q, k, round_q, round_k):
  """Whether the query at index `q`, read in round `round_q`, sees the key at index `k` of the same example under
  `live`: it is the key, or stands after it and was read in a later round. Broadcasts; NumPy and JAX arrays."""
  return (k == q) | ((k < q) & (round_k < round_q))


def outside(q, k, intervals):
  """The same with the keys' masked intervals as pairs (start, stop): causal, and outside all of them."""
  seen = k <= q
  for start, stop in intervals:
    seen = seen & ~((start <= q) & (q < stop))
  return seen
