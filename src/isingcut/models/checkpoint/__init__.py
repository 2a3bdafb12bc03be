"""Model files by their headers, no tensor decoded: `read` and `write` safetensors,
`gguf_header` GGUF.
"""
