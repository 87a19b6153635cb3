"""The report of an evaluation: everything that is computed from a run's folder, without model weights.

Open `write.py` first (`--mode=report`). `run_record.py` reads the folder, `summary.py` computes all figures
(`summary.json`), `tables.py` turns them into rows of text (terminal, `report.md`), `figures.py` chooses the
plots that `plots.py` draws, and `page.py` puts everything into `report.html`, with `report.css` and
`report.js`.
"""
