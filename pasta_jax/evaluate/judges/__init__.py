"""Judges: which of two responses to a request is better, and how sure they are.

`judge.py` defines what every judge offers (`Judge`), what one that reads offers besides (`Reader`), and what they
compare (`Pair` of `Answer`); open it first. `llm.py` asks a language model, over HTTP or by file, what `questions.py`
words; `local.py` checks form alone (likelihoods by `likelihood.py`); `files.py` reads preferences that others made.
`judging.py` has a run's responses judged, each pair as often as settings say; `agreement.py` measures how often a judge
agrees with people.

To add a judge, write one class with the methods of `judge.NamedJudge`, add one line to `registry.JUDGES`, and
its name to `config.sections.JUDGES`.
"""
