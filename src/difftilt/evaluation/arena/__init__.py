"""Methods and steerers on one task at equal cost: ``difftilt compare``.

``config`` types a recipe, ``cost`` is the currency, ``stage`` is what all members share, ``members`` runs one of them,
``records`` are results on disk, ``run`` goes through members and seeds. To add an arena, add a recipe under
``recipes/arena``; to add a kind of member, give it a ``Plan`` (what a unit of it costs) and a ``MemberRun``.

Traps: training is paid once and steering for every sample, so an order at equal cost holds for a number of samples; two
budgets cannot be met by one setting, so every member is read twice.
"""
