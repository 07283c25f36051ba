"""Networks, distributions, normalisers and optimisers that the agents and models share."""
