"""Multiple-choice tasks through lm-eval: its prompts, its metrics and its standard errors; our model behind them.

lm-eval is imported on use: 0.6 to 1.3 s, nearly all of it for `datasets`, which its task module needs (not for torch).
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from minitron_megatron.errors import DataError
from minitron_megatron.tasks.files import TaskFile, read_task_file, task_files_outside

__all__ = ["task_accuracies", "task_files_outside"]

Tokens = list[int]
Pair = tuple[Tokens, Tokens]
"""Context, which is not empty, and continuation."""
Scored = tuple[float, bool]
"""Sum of the continuation's log-probabilities (nats), and whether each of its tokens is the most likely one."""
METRICS = ("acc", "acc_norm")
NOISY_LOGGERS = ("lm_eval", "datasets")


def task_accuracies(
    task_files: list[str],
    *,
    items: int | None,
    tokenize: Callable[[str], Tokens],
    eod: int,
    loglikelihoods: Callable[[list[Pair]], list[Scored]],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Accuracy of the choice with the highest log-likelihood (acc), also over its length in characters (acc_norm).

    items: the first ones of each task, all where None. tokenize: without special tokens. eod: the token that stands for
    an empty context. loglikelihoods: called once for each task, with every (context, continuation) of it.
    Returns {task: {metric: {"value", "stderr"}}} as fractions; stderr is lm-eval's, None of a single item.
    Raises DataError for a task file or data that cannot be used, before the model is asked for that task.
    """
    tasks = [read_task_file(path) for path in task_files]
    if items is not None and items < 1:
        raise DataError(f"task_items={items} must be at least 1, or 'all'")
    if len({task.name for task in tasks}) < len(tasks):
        listed = ", ".join(task_files)
        raise DataError(f"two of the tasks {listed} have the same task name; give each its own `task`")
    return {task.name: _accuracies(task, items, tokenize, eod, loglikelihoods) for task in tasks}


def _accuracies(
    task: TaskFile,
    items: int | None,
    tokenize: Callable[[str], Tokens],
    eod: int,
    loglikelihoods: Callable[[list[Pair]], list[Scored]],
) -> dict[str, dict[str, float | None]]:
    asked: list[int] = []
    console = sys.stderr

    def ask(pairs: list[Pair]) -> list[Scored]:
        asked.append(len(pairs))
        with redirect_stderr(console):  # the model may report; only lm-eval is silenced
            return loglikelihoods(pairs)

    try:
        with _silence(), tempfile.TemporaryDirectory(prefix="minitron-tasks-", ignore_cleanup_errors=True) as cache:
            return _evaluate(task, items, _language_model(tokenize, eod, ask), cache)
    except Exception as error:
        if asked or isinstance(error, DataError):
            raise
        # until the model is asked, only the task file and its data can be at fault
        reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
        kind = type(error).__name__
        raise DataError(f"{task.path}: lm-eval cannot use this task or its data: {kind}: {reason}") from error


def _evaluate(task: TaskFile, items: int | None, model: Any, cache: str) -> dict[str, dict[str, float | None]]:
    import datasets
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    # else a request to a hub even for a local file, which waits 3 s where there is no network
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    fields = load_yaml(task.path)
    fields["dataset_kwargs"] = {**fields["dataset_kwargs"], "cache_dir": cache}
    loaded = TaskManager(include_defaults=False).load([fields])
    scored_items = min(items or sys.maxsize, len(loaded["tasks"][task.name].eval_docs))
    # the error of a mean is a closed form: any number of draws asks for it; that of a single item would divide by zero
    results = evaluate(model, loaded, limit=items, bootstrap_iters=1 if scored_items > 1 else 0, log_samples=False)
    scores = results["results"][task.name]
    return {metric: _with_error(scores, metric) for metric in METRICS if f"{metric},none" in scores}


def _with_error(scores: dict[str, Any], metric: str) -> dict[str, float | None]:
    stderr = scores.get(f"{metric}_stderr,none")
    return {
        "value": float(scores[f"{metric},none"]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
    }


def _language_model(tokenize: Callable[[str], Tokens], eod: int, ask: Callable[[list[Pair]], list[Scored]]) -> Any:
    """An lm-eval model; TemplateLM brings the boundary rule.

    Trailing spaces of the context go to the continuation; context and context + continuation are tokenized, and the
    latter is split at the former's length; an empty context becomes eod.
    """
    from lm_eval.api.model import TemplateLM

    class LanguageModel(TemplateLM):  # type: ignore[misc, unused-ignore]
        eot_token_id = eod

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
            return tokenize(string)

        def _loglikelihood_tokens(self, requests: list[tuple[Any, Tokens, Tokens]], **_: Any) -> list[Scored]:
            return ask([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError("only multiple choice")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError("only multiple choice")

    return LanguageModel()


@contextmanager
def _silence() -> Iterator[None]:
    """Progress bars and log lines of lm-eval and datasets go nowhere; errors arrive as exceptions."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
