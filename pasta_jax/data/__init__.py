"""Training data, from files of responses to the batches of a step.

Open `examples` first: a row of an annotated response becomes a program, then a laid-out example. Before it
come `sources` (files of several forms), `structure` (annotation by form), `annotate/` (annotation by a model)
and `build`, which writes a data set (`dataset`) and its `report`; after it `packing`, `pairs` and `pipeline`,
which feed the trainers. `prompts` reads the prompts of evaluations. Nothing here imports decode, train or
evaluate.
"""
