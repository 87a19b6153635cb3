"""What every other package shares; it imports none of them but `config`.

`files` (atomic writes) and `jsonl` (rows of data files, `DataError`) are the leaves: open these first.
`records` keeps finished work so that runs can be resumed, `endpoint` is the HTTP client of judges and
annotators, `environment` knows cache folder, machine and version, and `progress` draws the bar.
"""
