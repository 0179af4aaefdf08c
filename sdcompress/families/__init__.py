"""The kinds of Stable Diffusion: the components of each and how its UNets are recognized."""
