"""What the TensorRT target adds to the compiler: kernels of a bundle, networks and plans."""
