"""Shapes in annotations are checked at run time in every test; one thread, since the tensors are tiny."""

import torch

import shapes

torch.set_num_threads(1)
shapes.install()
