"""Modules: the 4-bit linear and the LoRA layer that peft puts around it."""
