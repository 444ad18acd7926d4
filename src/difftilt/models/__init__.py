"""Denoisers and their weights: closed-form and small networks, guidance, roles, saving."""
