"""Training on the forward process: no likelihoods, no stored trajectories.

Clean samples come from any sampler and are re-noised; an edge is one noise level of one sample. New methods of the
family change what the network regresses on, and with which weight.

Traps: the loss is a regression on the model's own samples, so its fall is no measure of success. There is no ratio to
guard the size of a step: the behaviour policy and the anchor to the reference do that.
"""
