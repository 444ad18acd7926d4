"""Comparing methods at equal cost (``arena``), and pages about runs (``report``).

Last but for checks and commands, for it runs whole trainings. How one model is measured (reward, drift and diversity
side by side, at fixed prompts and noise) is ``training.measure``, and ``difftilt evaluate`` shows it; an arena adds what
the samples cost (``cost``) and a distance to the base that every member has. To add an arena, add a recipe under
``recipes/arena``; to add a kind of member, give it a ``Plan`` (what a unit of it costs) and a ``MemberRun``.

Traps: training is paid once and steering for every sample, so an order at equal cost holds for a number of samples; two
budgets cannot be met by one setting, so every member is read twice.
"""
