"""Cross-checks of a recipe against its model: each problem with its mend, all of them in one error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.checks.target import target_architecture
from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import RecipeError

Recipes = Callable[..., Path]
# 12 heads in 4 groups: 3 and 6 divide the heads but not the groups
MODEL = Architecture("llama", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0)
EXPERTS = Architecture("mixtral", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0, None, None, 6, 2)
WINDOWED = Architecture("mistral", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0, attention_window=64)


@pytest.fixture
def problems(recipe_file: Recipes) -> Callable[..., list[str]]:
    def check(*overrides: str, model: Architecture = MODEL) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            check_recipe(load_recipe(recipe_file(), list(overrides)), model)
        return caught.value.problems

    return check


CASES = {
    "training.overlap_param_gather=true": [
        "training.overlap_param_gather=true needs training.overlap_grad_reduce=true; set that, or training.overlap_param_gather=false"
    ],
    "prune.target.ffn=61": ["prune.target.ffn=61 is larger than the source's 60"],
    "prune.target.layers=7": ["prune.target.layers=7 is larger than the source's 6"],
    "prune.target.hidden=49": ["prune.target.hidden=49 is larger than the source's 48"],
    "prune.target.heads=16": ["prune.target.heads=16 is larger than the source's 12"],
    "prune.target.heads=10": ["prune.target.heads=10 is not divisible by the model's 4 key/value groups; nearest: 8, 12"],
    "prune.target.heads=2": ["prune.target.heads=2 is not divisible by the model's 4 key/value groups; nearest: 4"],
    "prune.target.hidden=40": [
        "prune.target: hidden=40 is not a multiple of heads=12, and transformers would not load such a llama; nearest hidden: 36, 48"
    ],
    "prune.target={heads: 8, hidden: 44}": [
        "prune.target: hidden=44 is not a multiple of heads=8, and transformers would not load such a llama; nearest hidden: 40, 48"
    ],
    "parallel.tensor=5": [
        "parallel.tensor=5 does not divide the source model's 12 heads; tensor sizes that do: 1, 2, 4",
        "parallel.tensor=5 does not divide the source model's 4 key/value groups (a group belongs to one rank); tensor sizes that do: 1, 2, 4",
        "parallel.tensor=5 does not divide the pruned model's 12 heads; tensor sizes that do: 1, 2, 4",
        "parallel.tensor=5 does not divide the pruned model's 4 key/value groups (a group belongs to one rank); tensor sizes that do: 1, 2, 4",
        "parallel.tensor=5 does not divide the pruned model's 16 ffn; tensor sizes that do: 1, 2, 4",
    ],
    "parallel.tensor=6": [
        "parallel.tensor=6 does not divide the source model's 4 key/value groups (a group belongs to one rank); tensor sizes that do: 1, 2, 4",
        "parallel.tensor=6 does not divide the pruned model's 4 key/value groups (a group belongs to one rank); tensor sizes that do: 1, 2, 4",
        "parallel.tensor=6 does not divide the pruned model's 16 ffn; tensor sizes that do: 1, 2, 4",
    ],
    "parallel.pipeline=7": [
        "parallel.pipeline × virtual = 7 is more than the source model's 6 layers; at most 6",
        "parallel.pipeline × virtual = 7 is more than the pruned model's 6 layers; at most 6",
    ],
    "parallel.virtual=2": ["parallel.virtual=2 needs parallel.pipeline of 2 or more; set parallel.virtual=1"],
    "parallel.context=3": ["distill.sequence_length=32 is not divisible by 6 (two chunks for each of parallel.context=3 ranks); nearest: 30, 36"],
    "parallel={context: 12, tensor: 4, sequence: true}": [
        "distill.sequence_length=32 is not divisible by 48 (two chunks for each of parallel.context=12 ranks, whose tensor ranks share them); "
        "nearest: 48"
    ],
    "parallel={context: 2, teacher: {tensor: 2}}": [
        "parallel.teacher: tensor 2 × context 2 × pipeline 1 = 4 does not divide the 2 processes of parallel; choose sizes whose product does"
    ],
    "parallel.layers_per_stage=[3,3]": [
        "parallel.layers_per_stage=[3, 3] has 2 entries and 6 layers; it needs 1 entries (pipeline × virtual) that add up to 6 layers, or use cost"
    ],
    "parallel.teacher={tensor: 3}": [
        "parallel.teacher.tensor=3 does not divide the source model's 4 key/value groups (a group belongs to one rank); "
        "tensor sizes that do: 1, 2, 4",
        "parallel.teacher: tensor 3 × pipeline 1 = 3 does not divide the 1 processes of parallel; choose sizes whose product does",
    ],
    "parallel.sequence=true": ["parallel.sequence=true needs parallel.tensor of 2 or more; set parallel.sequence=false"],
    "importance.sequence_length=129": ["importance.sequence_length=129 is beyond the model's 128 positions; at most 128"],
    "distill.sequence_length=200": ["distill.sequence_length=200 is beyond the model's 128 positions; at most 128"],
    "evaluate.sequence_length=129": ["evaluate.sequence_length=129 is beyond the model's 128 positions; at most 128"],
    "distill.micro_batch=3": ["distill.global_batch=4 is not divisible by micro_batch × parallel.data = 3; nearest: 3, 6"],
    "parallel.data=8": ["distill.global_batch=4 is not divisible by micro_batch × parallel.data = 8; nearest: 8"],
    "distill.steps=40": ["distill.learning_rate.warmup_steps=40 must be less than distill.steps=40"],
    "distill.learning_rate.minimum=1e-3": ["distill.learning_rate.minimum is above its peak"],
    "distill.loss={forward_kl: 0}": ["distill.loss={'forward_kl': 0.0} needs weights ≥ 0 and one above 0"],
    "distill.loss={forward_kl: 1, cross_entropy: -1}": ["distill.loss={'forward_kl': 1.0, 'cross_entropy': -1.0} needs weights ≥ 0 and one above 0"],
    "distill.loss={mse: {from: 0, to: 0}}": ["distill.loss={'mse': {'from': 0.0, 'to': 0.0, 'kind': 'cosine'}} needs weights ≥ 0 and one above 0"],
    "distill.loss={cross_entropy: dynamic, forward_kl: 1}": [
        "distill.loss.cross_entropy=dynamic follows the first loss and is the first itself; put one with a number ahead of it"
    ],
    "distill.loss={mse: 0, cross_entropy: dynamic, forward_kl: 1}": [
        "distill.loss: dynamic weights follow the first loss, mse, whose weight is 0; put one that is trained on ahead of it"
    ],
    "distill={top_k: 5, loss: {mse: 1, cosine: 1}}": [
        "distill.top_k is of forward_kl, which distill.loss lacks; add forward_kl, or leave top_k out",
        "distill.top_k knows the teacher outside its 5 likeliest tokens as one class only, and mse, cosine needs it token by token; "
        "leave out one of the two",
    ],
    "distill={top_k: 5, loss: {forward_kl: 0, cross_entropy: 1}}": [
        "distill.top_k is of forward_kl, which distill.loss lacks; add forward_kl, or leave top_k out"
    ],
    "distill.top_k=131": ["distill.top_k=131 leaves no tail of the source model's 131 tokens; give less, or leave it out"],
}


HIDDEN = {
    "pairs: [[6, 0], [5, 4]]": [
        "distill.hidden.pairs: [6, 0] names layer 6 of the source model, which has layers 0 to 5",
        "distill.hidden.pairs: [5, 4] names layer 4 of the pruned model, which has layers 0 to 3",
    ],
    "pairs: [[-1, 0]]": ["distill.hidden.pairs: [-1, 0] names layer -1 of the source model, which has layers 0 to 5"],
    "pairs: [[5, 3], [1, 1], [5, 3]]": ["distill.hidden.pairs: [5, 3] is there 2 times; name each pair once"],
    "pairs: []": ["distill.hidden compares nothing; give distill.hidden.pairs or set embeddings=true, or leave distill.hidden out"],
}
SHALLOW = {
    "last_minus_2": (2, "distill.hidden.pairs=last_minus_2 needs 3 layers, the pruned model has 2; give pairs such as [[0, 0]]"),
    "proportional": (1, "distill.hidden.pairs=proportional needs 2 layers, the pruned model has 1; give pairs such as [[0, 0]]"),
    "kept": (6, "distill.hidden.pairs=kept needs dropped layers, and no layer is pruned; use last_minus_2 or give pairs"),
}


@pytest.mark.parametrize("section", HIDDEN)
def test_hidden_losses_name_layers_that_both_models_have(section: str, problems: Callable[..., list[str]]) -> None:
    assert problems("prune.target.layers=4", f"distill.hidden={{{section}}}") == HIDDEN[section]


@pytest.mark.parametrize("rule", SHALLOW)
def test_a_rule_for_pairs_needs_the_layers_it_speaks_of(rule: str, problems: Callable[..., list[str]], recipe_file: Recipes) -> None:
    layers, problem = SHALLOW[rule]
    assert problems(f"prune.target.layers={layers}", f"distill.hidden.pairs={rule}") == [problem]
    enough = 5 if rule == "kept" else layers + 1
    check_recipe(load_recipe(recipe_file(), [f"prune.target.layers={enough}", f"distill.hidden.pairs={rule}"]), MODEL)


def test_kept_pairs_need_a_kept_layer_behind_a_dropped_one(problems: Callable[..., list[str]], recipe_file: Recipes) -> None:
    kept = "distill.hidden.pairs=kept"
    assert problems("prune.drop_layers=[4-5]", kept) == [
        f"{kept}: prune.drop_layers are the last layers, and no kept one follows; use last_minus_2 or give pairs"
    ]
    check_recipe(load_recipe(recipe_file(), ["prune.drop_layers=[3,4]", kept]), MODEL)


def test_a_dynamic_weight_needs_the_loss_that_it_follows(problems: Callable[..., list[str]], recipe_file: Recipes) -> None:
    without = ["distill.loss={cross_entropy: 1}", "distill.hidden.embeddings=true"]
    assert problems(*without) == [
        "distill.hidden.weight=dynamic follows the losses against the teacher's logits, of which distill.loss has none; "
        "give a number as weight, or add forward_kl"
    ]
    check_recipe(load_recipe(recipe_file(), [*without, "distill.hidden.weight=0.5"]), MODEL)


@pytest.mark.parametrize("override", CASES)
def test_each_mistake_is_told_with_its_mend(override: str, problems: Callable[..., list[str]]) -> None:
    assert problems(override) == CASES[override]


EXPERT_CASES = {
    "parallel.context=2": [
        "parallel.context=2 is not supported for the source model, which has experts; set parallel.context=1",
        "parallel.context=2 is not supported for the pruned model, which has experts; set parallel.context=1",
    ],
    "prune.target.experts=7": ["prune.target.experts=7 is larger than the source's 6"],
    "export.format=nemo": ["export.format=nemo: .nemo archives of mixtral, which has experts, are not written; set export.format=huggingface"],
    "prune.target.experts=1": ["prune.target.experts=1 is less than the 2 that each token is sent to; at least 2"],
    "prune.target={ffn: 20, hidden: 47}": [
        "prune.target.hidden=47 is not a multiple of 8, and transformers would not run such experts; nearest: 40, 48",
        "prune.target.ffn=20 is not a multiple of 8, and transformers would not run such experts; nearest: 16, 24",
    ],
    "parallel={data: 4, expert: 4}": [
        "parallel.expert=4 does not divide the source model's 6 experts; nearest: 3, 6",
        "parallel.expert=4 does not divide the pruned model's 6 experts; nearest: 3, 6",
    ],
    "parallel={pipeline: 2, teacher: {pipeline: 1}}": [
        "parallel.teacher: a layout of its own is not supported for a source model with experts; set parallel.teacher=student"
    ],
    "parallel={data: 2, expert: 3}": ["parallel.expert=3 does not divide parallel.data=2; nearest: 2"],
    "parallel.tensor=2": [
        f"parallel.tensor=2: tensor parallelism is not supported for {whose} model, which has experts; "
        "set parallel.tensor=1 and use parallel.expert and parallel.pipeline"
        for whose in ("the source", "the pruned")
    ],
}


@pytest.mark.parametrize("override", EXPERT_CASES)
def test_each_mistake_with_experts_is_told_with_its_mend(override: str, problems: Callable[..., list[str]]) -> None:
    assert problems(override, "distill.global_batch=12", model=EXPERTS) == EXPERT_CASES[override]


def test_the_pruned_number_of_experts_must_divide_too(problems: Callable[..., list[str]]) -> None:
    found = problems("parallel={data: 2, expert: 2}", "prune.target.experts=5", model=EXPERTS)
    assert found == ["parallel.expert=2 does not divide the pruned model's 5 experts; nearest: 1, 5"]


def test_experts_of_a_dense_model_are_refused(problems: Callable[..., list[str]]) -> None:
    assert problems("prune.target.experts=4") == ["prune.target.experts=4: the family llama has no experts; leave it out"]
    assert problems("parallel={data: 2, expert: 2}") == [
        "parallel.expert=2, but the source model has no experts; set parallel.expert=1",
        "parallel.expert=2, but the pruned model has no experts; set parallel.expert=1",
    ]


def test_tensor_parallel_must_divide_the_pruned_ffn_even_where_it_divides_the_source(problems: Callable[..., list[str]]) -> None:
    assert problems("parallel.tensor=4", "prune.target.ffn=18", "distill.global_batch=4") == [
        "parallel.tensor=4 does not divide the pruned model's 18 ffn; tensor sizes that do: 1, 2"
    ]


def test_pipeline_must_fit_the_pruned_depth(problems: Callable[..., list[str]]) -> None:
    assert problems("parallel.pipeline=4", "prune.target.layers=3") == [
        "parallel.pipeline × virtual = 4 is more than the pruned model's 3 layers; at most 3"
    ]


def test_lengths_stop_at_the_attention_window(problems: Callable[..., list[str]]) -> None:
    assert problems("distill.sequence_length=65", model=WINDOWED) == ["distill.sequence_length=65 is beyond the model's 64 positions; at most 64"]


def test_sequence_parallel_asks_for_lengths_that_tensor_parallel_divides(problems: Callable[..., list[str]]) -> None:
    found = problems("parallel.tensor=4", "parallel.sequence=true", "evaluate.sequence_length=30")
    assert found == ["evaluate.sequence_length=30 is not divisible by parallel.tensor=4 (sequence parallel); nearest: 28, 32"]


def test_all_mistakes_are_in_one_error(problems: Callable[..., list[str]]) -> None:
    overrides = [
        "prune.target.ffn=61",
        "prune.target.heads=10",
        "parallel.pipeline=7",
        "importance.sequence_length=129",
        "distill.micro_batch=3",
        "distill.steps=40",
    ]
    found = problems(*overrides)
    expected = {problem for override in overrides for problem in CASES[override]}
    assert len(found) == len(set(found))
    # sizes of a target that does not exist are not checked against the layout
    assert set(found) == {problem for problem in expected if "the pruned model" not in problem}


def test_limits_themselves_are_allowed(recipe_file: Recipes) -> None:
    overrides = [
        "prune.target={layers: 6, hidden: 48, heads: 12, ffn: 60}",
        "parallel.tensor=4",
        "parallel.pipeline=6",
        "parallel.sequence=true",
        "importance.sequence_length=128",
        "distill.sequence_length=128",
        "evaluate.sequence_length=128",
        "distill.learning_rate.warmup_steps=99",
    ]
    assert check_recipe(load_recipe(recipe_file(), overrides), MODEL) == MODEL


def test_other_families_may_have_any_hidden_size(recipe_file: Recipes) -> None:
    assert check_recipe(load_recipe(recipe_file(), ["prune.target.hidden=41"]), WINDOWED).hidden == 41


def test_the_target_has_the_named_sizes_and_the_sources_others(recipe_file: Recipes) -> None:
    recipe = load_recipe(recipe_file(), ["prune.target={layers: 4, hidden: 40, heads: 8, ffn: 44}"])
    target = target_architecture(recipe, MODEL)
    assert (target.layers, target.hidden, target.heads, target.ffn) == (4, 40, 8, 44)
    assert target.resized(layers=6, hidden=48, heads=12, ffn=60) == MODEL


def test_criteria_that_a_model_cannot_be_ranked_by_are_refused(problems: Callable[..., list[str]], recipe_file: Recipes) -> None:
    assert problems("prune.aggregations.experts.batch=mean") == ["prune.aggregations.experts: the family llama has no experts; leave it out"]
    assert problems("prune.criteria.ffn=before_activation", model=EXPERTS) == [
        "prune.criteria.ffn=before_activation: neurons of experts are scored behind the router's weight, which comes after the activation; "
        "set prune.criteria.ffn=input_of_second"
    ]
    check_recipe(load_recipe(recipe_file(), ["prune.criteria.ffn=before_activation"]), MODEL)
    check_recipe(load_recipe(recipe_file(), ["prune.aggregations.experts.batch=mean", "prune.criteria.heads=per_token_norm"]), EXPERTS)


def test_sums_that_prune_ranks_by_and_the_importance_pass_does_not_keep_are_refused(problems: Callable[..., list[str]], recipe_file: Recipes) -> None:
    for asked, told in (
        (["prune.criteria.heads=behind_projection"], "prune.criteria.heads=behind_projection"),
        (["prune.aggregation.sequence=l2"], "sequence=l2"),
        (["prune.aggregations.ffn.sequence=variance"], "sequence=variance"),
    ):
        problem = f"importance.sums=default does not measure what prune ranks by ({told}); set importance.sums=all"
        assert problems("importance.sums=default", *asked) == [problem]
        check_recipe(load_recipe(recipe_file(), ["importance.sums=default", "prune.scores=magnitude", *asked]), MODEL)
    check_recipe(load_recipe(recipe_file(), ["importance.sums=default", "prune.aggregation.batch=mean"]), MODEL)
