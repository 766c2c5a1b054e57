"""Where PEFT keeps `hotswap_adapter`."""

from __future__ import annotations

from twofold.peft.helpers import hotswap_adapter

__all__ = ["hotswap_adapter"]
