"""What the library costs over the network that it runs: paired, interleaved measurements (``make bench``)."""
