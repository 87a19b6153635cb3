"""Evaluation: how fast systems are, how good their responses are, and the report of both.

`run.py` is `--mode=eval` and the file to open first: it lets every system answer the prompts of a benchmark,
times the responses, has them judged, and writes the report. Four rooms do the parts:

    systems/   what is compared: an adapter and a way of decoding it
    judges/    which of two responses is better
    metrics/   figures of sets of responses, and the length-controlled win rate
    report/    tables, plots and an HTML page from a run's folder

`identity.py` says which settings a file of responses depends on; `benchmark.py` measures decode steps.
"""
