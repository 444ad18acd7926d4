"""One page about one run or several: ``difftilt report``.

``reading`` (with ``samples`` and ``tolerant``) takes what a run directory still holds, ``views`` turns it into tables
and charts, ``pictures`` into samples before and after, ``page`` puts them into the template of ``pages``.

Traps: a run may be unfinished or damaged in any file, and every text in it may be hostile.
"""
