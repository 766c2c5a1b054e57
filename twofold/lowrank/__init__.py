"""Pure tensor functions of low-rank factors: no modules, no models."""
