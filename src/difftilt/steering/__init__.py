"""One file per steerer, and the parts they share: particles, resampling, potentials, guides.

Beside methods; weights stay frozen. The loop is propose, value, select, gather, over ``Particles``, which hold all
that moves together; ``loop.search`` runs it, and a particle steerer is a file with a ``CARD`` and a ``Rule``: how many
children, where to value, who goes on.

Traps: log-weights are carried, in float64, where nothing is resampled. Noise belongs to the slot: copies of one parent
must draw different noise. A deterministic kernel makes copies equal for ever. One particle is plain sampling, bit for
bit; weighing only at the end is importance sampling: both are tests.
"""

from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.protocol import Particles, Steered, Steerer

__all__ = ["BestOfN", "BestOfNConfig", "FKSteering", "FKSteeringConfig", "Particles", "Steered", "Steerer"]
