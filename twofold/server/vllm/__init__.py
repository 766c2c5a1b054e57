"""vLLM over the same adapter folder: what it can serve, a plugin for its processes, and a launcher."""
