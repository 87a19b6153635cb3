"""What every other package shares; it imports none of them but `config`.

`files` (atomic writes) and `jsonl` (rows of data files, `DataError`) are the leaves: open these first.
`records` keeps finished work so that runs can be resumed, `endpoint` is the language model of judges and
annotators (`protocols`: what is sent and read, `calls`: the HTTP client), `environment` knows cache folder,
machine and version, `progress` draws the bar, and `distributed` is what several processes say to each other.
"""
