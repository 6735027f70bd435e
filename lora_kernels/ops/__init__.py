"""One folder per operation, each with the same rooms: definition, kernels, launch, autograd."""
