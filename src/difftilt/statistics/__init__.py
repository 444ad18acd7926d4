"""Pure functions on features and samples: distances between sets, diversity, transport, Pareto fronts.

Knows no model and no reward; numpy or torch in, numbers out.
"""
