"""Tests in several processes over gloo.

megatron.core wants its platform chosen before its first import: that is here, for workers and pytest alike.
"""

from minitron_megatron.platform import activate

activate("cpu")
