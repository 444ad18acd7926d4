"""Rewards that live in another process: on a server (``difftilt serve-reward``) or in actors of Ray.

``service`` answers bytes with bytes and is the same for both; ``client`` splits samples into batches, waits, tries
again and joins the scores; ``server`` and ``remote`` are the two ends of HTTP, ``ray_actors`` is Ray. What travels is
an npz archive with JSON inside (``wire``).

Traps: nothing is unpickled by either end of HTTP, so a condition or metadata that JSON and arrays cannot hold is
refused. A served reward has no gradient. It stands in a recipe as ``reward: {name: remote, url: ...}``.
"""

from difftilt.rewards.served.client import ServedReward
from difftilt.rewards.served.remote import RemoteReward
from difftilt.rewards.served.server import RewardServer
from difftilt.rewards.served.service import Service

__all__ = ["RemoteReward", "RewardServer", "ServedReward", "Service"]
