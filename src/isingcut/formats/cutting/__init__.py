"""Write cut models: `checkpoint` a smaller safetensors checkpoint, `gguf` a smaller GGUF file."""
