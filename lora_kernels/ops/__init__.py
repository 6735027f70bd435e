"""One folder per operation; inside, always the same rooms (definition, kernels, launch, autograd)."""
