"""Decoding, prompts, memory and start-up, next to the peers and the floors."""
