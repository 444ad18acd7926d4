"""Shapes in annotations are checked at run time in every test; one thread, since the tensors are tiny; no hub."""

import os
import signal

import torch

import shapes

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub that is not there is given up at once, not after six tries
torch.set_num_threads(1)
shapes.install()

# a shell that starts the tests in the background has Ctrl-C ignored in them and in all that they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
