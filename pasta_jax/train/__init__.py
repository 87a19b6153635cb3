"""Training: one `Trainer` and a task for each stage, supervised finetuning and preference pairs.

Open `trainer` first: `Task` is what differs between tasks, `Trainer` is the rest. Then `sft` and
`preference`, the two tasks; `losses` and `attention`, what they compute; `state`, `checkpoints`, `loop` and
`metrics`, what a run keeps. `ahead` (`--mode=compile`),
`flops` and `benchmark` measure the cost of steps.
"""
