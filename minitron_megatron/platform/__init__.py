"""The only room that knows whether it runs on CPU over gloo or on CUDA over NCCL, and on which megatron-core."""

from minitron_megatron.platform.activate import Platform, activate

__all__ = ["Platform", "activate"]
