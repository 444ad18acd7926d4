"""Shapes in annotations are checked at run time in every test; one thread, since the tensors are tiny."""

import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
install_import_hook("difftilt", "shapes.check")
