"""Judges: which of two responses to a request is better, and how sure they are.

`judge.py` defines what every judge offers (`Judge`) and what it compares (`Pair` of `Answer`); open it first.
`local.py` is the judge that needs no network (likelihoods by `likelihood.py`), `llm.py` asks a language model
at an endpoint, `files.py` reads preferences that others made. `judging.py` has a run's responses judged, each
pair once; `agreement.py` measures how often a judge agrees with people.

To add a judge, write one class with the methods of `judge.NamedJudge`, add one line to `registry.JUDGES`, and
its name to `config.sections.JUDGES`.
"""
