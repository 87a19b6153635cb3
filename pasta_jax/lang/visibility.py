"""Who sees whom (docs/language.md section 3): one rule for training, kernels and tests."""


def is_visible(q, k, intervals_k):
  """Whether the query at index `q` sees the key at index `k` of the same example; broadcasts.

  `intervals_k` [..., levels, 2] are the keys' masked intervals; its leading axes broadcast with q and k.
  Works on NumPy and JAX arrays.
  """
  levels = range(intervals_k.shape[-2])
  return outside(q, k, [(intervals_k[..., level, 0], intervals_k[..., level, 1]) for level in levels])


def outside(q, k, intervals):
  """The same with the keys' masked intervals as pairs (start, stop): causal, and outside all of them."""
  seen = k <= q
  for start, stop in intervals:
    seen = seen & ~((start <= q) & (q < stop))
  return seen
