"""What benchmarks/step_overhead.py measures: two Llama shapes, the layouts, how often."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.parallel import Parallel

TEACHER = Architecture("llama", 16, 512, 8, 4, 64, 1536, 32768, False, 512, 1e-5, 10000.0)
STUDENT = TEACHER.resized(hidden=384, ffn=1152)
MICRO_BATCHES, ROUNDS = 4, 5
SETTINGS = Distill(steps=1000, sequence_length=192, global_batch=MICRO_BATCHES, micro_batch=1)
LAYOUTS = {
    "one process": Parallel(),
    "PP=2": Parallel(pipeline=2, teacher="student"),
    "PP=2 × VPP=2": Parallel(pipeline=2, virtual=2, teacher="student"),
    "TP=2": Parallel(tensor=2, teacher="student"),
}
"""Teacher and student in the same one: the baselines have no other."""
WITH_PEER = "PP=2"
OURS, TEACHER_ALONE, STUDENT_ALONE, PEER = "distillation step", "teacher with output layer", "student with cross-entropy", "ModelOpt"
WHOLE_TEACHER = "distillation step, teacher whole on each rank"
"""What parallel.teacher=auto chooses where its weights fit; at WITH_PEER's layout."""
