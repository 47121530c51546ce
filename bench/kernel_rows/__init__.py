"""What :mod:`bench.kernels` measures: subjects by kind, the other programs they are held against, and how both are timed."""
