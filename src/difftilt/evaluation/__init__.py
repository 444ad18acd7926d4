"""What is done with finished parts: methods compared at equal cost (``arena``), and pages about runs (``report``).

Last but for checks and commands, for it runs whole trainings. How one model is measured (reward, drift and diversity
side by side, at fixed prompts and noise) is ``training.measure``, and ``difftilt evaluate`` shows it.
"""
