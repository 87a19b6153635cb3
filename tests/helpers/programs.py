"""Programs that several tests share."""

from pasta_jax.lang.program import Promise, Sync, Text

# Chunks in chunks, joined, left to the promising thread to join, and never joined.
NESTED = (
  Text("Intro. "),
  Promise("a", None, (Text("first "), Promise("b", None, (Text("inner one"),)), Text("mid "),
                      Promise("c", None, (Text("inner two"),)), Sync(), Text("tail"))),
  Promise("d", None, (Text("second "), Promise("e", None, (Text("orphan"),)))),
  Text("meanwhile"), Sync(), Text("joined "), Promise("f", None, (Text("never joined"),)), Text("end"),
)  # fmt: skip
