"""Kernels of our own for a decoder's forward pass on CPUs, compiled where a compiler is to be had."""
