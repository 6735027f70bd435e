"""What the operations share: products with the rank as one side, and the wide GEMM with a tail."""
