"""GGUF files and Ollama's Modelfile."""
