"""Text from elsewhere (names, ids, paths, answers), as rich prints it: the text itself, not markup."""

from rich.text import Text

from pasta_jax.utils.text import printable


def as_text(text: str) -> Text:
  """`text` for a table or a console: brackets and colons mean nothing, control characters are escaped."""
  return Text(printable(text))
