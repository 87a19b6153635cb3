"""The systems that are compared: an adapter and a way of decoding it, with the methods of `system.System`.

Open `registry.py` first: it maps the `decode` field of an entry of `config.systems` to a class.
`interpreter.py` decodes one response, with promises or without; `skeleton.py` is Skeleton-of-Thought, which
asks several times.

To compare another adapter, add an entry to `config.systems`. To add a baseline that decodes in another way,
write one class with `System`'s methods, add one line to `registry.SYSTEMS`, and its name to
`config.sections.DECODINGS`.
"""
