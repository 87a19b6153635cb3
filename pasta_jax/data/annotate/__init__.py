"""`--mode=annotate`: which parts of a finished response could have been written at the same time.

Open `run` first: it asks a language model for the plan of each response (`prompts`, in numbers of `units`),
reads it strictly (`plan`), checks each chunk against what its writer sees (`check`, `contexts`), and compares
the result with another annotation (`measure`).
"""
