"""An emulation: the layers' linears round as FP8 on Transformer Engine 2.11 would, and compute in fp32. Nothing gets faster or smaller by it."""
