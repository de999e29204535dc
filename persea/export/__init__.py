"""Export a student: a Hugging Face folder, adapters, a GGUF file, a folder for Ollama."""
