"""The error tree: every class below MinitronError is a user's mistake, shown as one line (exit code 2), never as a traceback."""

from __future__ import annotations


class MinitronError(Exception):
    """What is wrong, where, and how to mend it, in one line."""

    keeps_work = False
    """Whether what the stage has done so far is kept for the next start; a mistake in the input leaves nothing behind."""


class RecipeError(MinitronError):
    """One or more problems of a recipe, all reported at once, one line each."""

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ArchitectureError(MinitronError):
    """A shape that is no model of a known family."""


class PlatformError(MinitronError):
    """The machine or an installed package cannot do what is asked."""


class LayoutError(MinitronError):
    """Parallel sizes that do not divide the model or the processes."""


class CheckpointError(MinitronError):
    """A checkpoint that is missing, truncated or of another shape."""


class DataError(MinitronError):
    """A corpus or tokenizer that cannot be used."""


class PlanError(MinitronError):
    """A pruning plan that does not fit the scores or the source model."""


class ArtifactError(MinitronError):
    """A stage's input that is missing, unfinished or made for another model."""


class TrainingError(MinitronError):
    """A training run that cannot go on, such as a loss that is not finite."""

    keeps_work = True


class ProcessDiedError(MinitronError):
    """A helper process that was killed, most often for want of memory."""

    keeps_work = True
