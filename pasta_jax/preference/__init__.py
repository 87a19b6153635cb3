"""Stage two: samples of the policy are scored for speed and quality, and it is trained on pairs of the best
and the worst (docs/language.md section 6).

`rounds.py` is `--mode=preference` and the file to open first. A round runs `rollout.py` (draws samples), `quality.py`
(has them judged), `selection.py` (scores them, chooses pairs), `train.preference` (trains on the pairs) and `audit.py`
(checks samples and gains under the trainer's forward pass). `score.py` defines speedups, defects and the choice of a
pair: a new score is an entry of `score.SPEEDUPS` and a name in `config.sections.SCORES`.
`policies.py` says what is trained; `report.py` prints the rounds' figures and `pareto_front.py` draws them.
"""
