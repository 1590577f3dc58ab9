"""FP8: flags for megatron-core, the memory of delayed scaling, weights that are FP8 themselves, and the emulation."""
