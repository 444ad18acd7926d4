"""Published rewards with a frozen network of ``transformers``: one leaf a file, on one base. Extra ``[rewards]``.

A leaf reads its configuration, loads a network (or takes one that is given) and scores one batch. ``pixels`` and
``sound`` prepare media in tensors, as the published processors do, so that gradients flow; ``loading`` reads folders,
the hub and the files that authors publish. Nothing here imports ``transformers`` before it is needed.

Traps: the user's prompt counts, not a rewritten one. Weights are loaded by name, all of them or an error. Processors of
``transformers`` are for tests and for models without a gradient: they round to bytes.
"""
