"""Twofold: plan, train, see, prove, combine, merge and serve LoRA adapters."""
