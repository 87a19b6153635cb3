"""Stage two: answers sampled from the policy, scored for speed and quality, and learned from in pairs
(PASTA.md 6)."""
