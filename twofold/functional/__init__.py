"""Pure tensor functions of a decoder, with hand-written backward formulas."""
