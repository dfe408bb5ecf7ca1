"""Adapters, peft's side: layers, what an adapter was trained on, reading, and what merging adds."""
