"""Everything that tests run in workers, imported once by the server that the workers are forked from."""

import minitron_megatron.distill.stage
import minitron_megatron.evaluate.stage
import minitron_megatron.importance.stage
import minitron_megatron.prune.stage  # noqa: F401
