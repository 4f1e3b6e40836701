"""GPU kernels in Pallas (Mosaic GPU), each with an XLA reference; this package depends on JAX alone."""
