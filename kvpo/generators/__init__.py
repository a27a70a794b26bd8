"""Video generators: a stock Wan transformer driven block by block over a frame-paged KV cache."""
