"""The whole chain as a user starts it, on a tiny model and a tiny corpus."""

from minitron_megatron.platform import activate

activate("cpu")
