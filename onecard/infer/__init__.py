"""Using a model: generate, chat, evaluate."""
