"""fastasync: learns when to denoise each representation, and trains and samples latent diffusion with it."""

__version__ = "0.1.0"
