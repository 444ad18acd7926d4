"""One file per steerer, and the parts they share: particles, resampling, potentials."""
