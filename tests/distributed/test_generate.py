"""Continuations of batches under every layout: greedy against transformers' own generate, sampled against the layout of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.hf_config import SIZES
from minitron_megatron.checkpoint.huggingface import write_huggingface
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.model.build import build_model
from minitron_megatron.model.generate import generate
from minitron_megatron.model.sampling import Sampling, sampled_tokens
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World

from .pool import Pool
from .tiny import DP2, EP2, LLAMA, MIXTRAL, ONE, PP2, TP2, TP2_SP, VOCAB, layout_name, name_of, write_random

PROMPT_TOKENS, NEW = 6, 9
SAMPLED = Sampling(temperature=0.9, top_p=0.8, seed=3)
# five texts: unlike shares of ranks, and a smaller last batch
PROMPTS = torch.randint(VOCAB, (5, PROMPT_TOKENS), generator=torch.Generator().manual_seed(4))


def write_texts(
    world: World, parallel: Parallel, arch: Architecture, folder: Path, sampling: Sampling, micro_batch: int, eod: int
) -> list[list[int]]:
    layout = global_layout(parallel, world)
    model = build_model(arch, layout, world.platform, torch.float32, variable_lengths=True)
    load_model(model, folder)
    ids = [11, 12, 13, 14, 15]
    return generate(model, PROMPTS, new_tokens=NEW, eod=eod, micro_batch=micro_batch, sampling=sampling, sample_ids=ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("generate")
    write_random(models / "llama", LLAMA, seed=2)
    write_random(models / "mixtral", MIXTRAL, seed=2)
    return models


@pytest.fixture(scope="module")
def endless(folder: Path) -> list[list[int]]:
    """transformers' greedy generate with its own cache, prompt by prompt, without an end."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    (folder / "hf").mkdir()
    write_huggingface(folder / "hf", MegatronSource(folder / "llama", LLAMA), LLAMA)
    fields = {theirs: getattr(LLAMA, ours) for ours, theirs in SIZES.items()}
    config = LlamaConfig(**fields, vocab_size=VOCAB, rms_norm_eps=LLAMA.norm_eps, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config.save_pretrained(folder / "hf")
    model = AutoModelForCausalLM.from_pretrained(str(folder / "hf"), dtype=torch.float32)
    return [
        model.generate(prompt[None], attention_mask=torch.ones(1, PROMPT_TOKENS), max_new_tokens=NEW, do_sample=False)[0, PROMPT_TOKENS:].tolist()
        for prompt in PROMPTS
    ]


def ended(texts: list[list[int]], eod: int) -> list[list[int]]:
    return [text[: text.index(eod) + 1] if eod in text else text for text in texts]


@pytest.mark.parametrize(("parallel", "micro_batch"), [(ONE, 1), (ONE, 2), (TP2, 2), (TP2_SP, 2), (PP2, 2), (DP2, 1)], ids=name_of)
def test_greedy_texts_are_those_of_transformers(pool: Pool, folder: Path, endless: list[list[int]], parallel: Parallel, micro_batch: int) -> None:
    """A cache that is off by one token, a wrong mask or position, another text's cache: each changes the text."""
    assert len(set(map(tuple, endless))) == len(endless) and len({token for text in endless for token in text}) > 10
    eod = endless[0][3]
    expected = ended(endless, eod)
    assert {len(text) for text in expected} >= {4, NEW}  # one ends while the others of its batch go on
    found = pool.run(write_texts, parallel, LLAMA, folder / "llama", Sampling(), micro_batch, eod, processes=parallel.processes)
    assert found == [expected] * parallel.processes


@pytest.mark.parametrize("parallel", [TP2, PP2, DP2], ids=layout_name)
def test_sampled_texts_are_the_same_under_every_layout_and_micro_batch(pool: Pool, folder: Path, parallel: Parallel) -> None:
    expected = pool.run(write_texts, ONE, LLAMA, folder / "llama", SAMPLED, 1, -1, processes=1)[0]
    greedy = pool.run(write_texts, ONE, LLAMA, folder / "llama", Sampling(), 1, -1, processes=1)[0]
    assert all(a != b for a, b in zip(expected, greedy, strict=True))
    found = pool.run(write_texts, parallel, LLAMA, folder / "llama", SAMPLED, 2, -1, processes=parallel.processes)
    assert found == [expected] * parallel.processes


def test_texts_of_a_model_whose_experts_are_shared_out(pool: Pool, folder: Path) -> None:
    """Five texts on two ranks: one has none in the last round, and its experts are asked all the same."""
    expected = pool.run(write_texts, ONE, MIXTRAL, folder / "mixtral", Sampling(), 2, -1, processes=1)[0]
    assert pool.run(write_texts, EP2, MIXTRAL, folder / "mixtral", Sampling(), 1, -1, processes=2) == [expected] * 2


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.01)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, top_p: float) -> None:
    """A fine comb of draws meets each token as often as its share of the nucleus is long."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 1.1, -4.0])
    comb = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    found = sampled_tokens(logits.expand(20_000, 6), comb, Sampling(temperature, top_p)).bincount(minlength=6) / 20_000
    probability = (logits.double() / temperature).softmax(-1)
    kept, held = torch.zeros(6, dtype=torch.float64), 0.0
    for token in sorted(range(6), key=lambda token: (-float(probability[token]), token)):
        if held < top_p:
            kept[token] = probability[token]
        held += float(probability[token])
    assert torch.allclose(found.double(), kept / kept.sum(), atol=1e-4)  # the comb's teeth


def test_the_draws_of_a_text_are_its_own() -> None:
    together, alone = Sampling(1.0, seed=5).draws([7, 8], 4), Sampling(1.0, seed=5).draws([8], 4)
    assert torch.equal(together[1:], alone) and not torch.equal(together[0], together[1])
    assert not torch.equal(alone, Sampling(1.0, seed=6).draws([8], 4))
