"""peft adapters: LoRA layers, the origin of an adapter, loading and saving, and the updates that a merge adds."""
