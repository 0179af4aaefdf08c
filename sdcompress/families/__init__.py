"""The kinds of Stable Diffusion: what each is made of and how it is recognized."""
