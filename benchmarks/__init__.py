"""What is fast, by how much, and against what: installed as `vdu_fast.benchmarks`, run by `vdu-fast benchmark`.

`case` says what a question is and keeps the registry, `cases/` has one file per question with its fair baselines,
`measure` takes the times, `suite` runs questions and holds them to their budgets, `tables` and `roofline` show the
answers. `run.py` is what `make bench` and `make gpu` call. The other scripts here answer one question each.
"""
