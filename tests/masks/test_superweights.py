import math

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ssrctl.errors import UserError
from ssrctl.masks.published_superweights import published_superweights, superweights_of
from ssrctl.masks.spikes import down_projections, strongest_channels
from ssrctl.masks.superweights import (
    AblationProbe,
    ablated,
    collect_candidates,
    largest_weights,
    prompt_gradient,
    split_subsets,
)
from ssrctl.text.prompt_tokens import tokenise_prompts


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def prompts(num: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(31, (5 + place,), generator=generator) for place in range(num)]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(before: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    return all(
        torch.equal(before[n].view(torch.int32), p.detach().view(torch.int32)) for n, p in model.named_parameters()
    )


# gradients


def test_gradient_is_that_of_the_mean_over_prompts_of_the_models_own_loss(model: LlamaForCausalLM) -> None:
    texts = prompts(3)
    losses = [model(input_ids=ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss for ids in texts]
    names = [name for name, _ in model.named_parameters()]
    expected = torch.autograd.grad(sum(losses) / 3, list(model.parameters()))
    found = prompt_gradient(model, texts)
    for name, gradient in zip(names, expected, strict=True):
        # Only the order of float32 sums differs.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    again = prompt_gradient(model, texts)  # nothing is left over from the call before
    torch.testing.assert_close(again[names[0]], expected[0], rtol=1e-4, atol=1e-7)


def test_candidates_and_ranks_match_a_full_sort(model: LlamaForCausalLM) -> None:
    texts = prompts(4)
    subsets = [texts[:2], texts[2:]]
    name = "model.layers.1.mlp.down_proj.weight"
    passes = [collect_candidates(model, one, num_members=50, keep=20, watched=[(name, 7)]) for one in subsets]
    assert all(p.grad is None for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    for subset, passed in zip(subsets, passes, strict=True):
        found, (rank,) = passed.candidates, passed.ranks
        gradients = {n: g.clone() for n, g in prompt_gradient(model, subset).items()}
        everything = torch.cat([g.flatten() for g in gradients.values()]).abs()
        threshold = everything.sort(descending=True).values[49]
        for tensor, indices in found.members.to_indices().items():
            assert indices.tolist() == (gradients[tensor].flatten().abs() >= threshold).nonzero().flatten().tolist()
        assert sum(i.numel() for i in found.indices.values()) == 20
        assert rank == int((everything > gradients[name].flatten()[7].abs()).sum()) / total
    assert passes[0].ranks != passes[1].ranks


def test_a_gradient_that_is_zero_everywhere_is_a_user_error(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(UserError, match="0 everywhere"):
        collect_candidates(model, prompts(1), num_members=5, keep=5)
    assert all(p.grad is None for p in model.parameters())


def test_subsets_partition_the_prompts() -> None:
    subsets = split_subsets(10, 4, seed=3)
    assert sorted(place for subset in subsets for place in subset) == list(range(10))
    assert sorted(map(len, subsets)) == [2, 2, 3, 3]
    assert subsets == split_subsets(10, 4, seed=3) != split_subsets(10, 4, seed=4)
    assert [len(subset) for subset in split_subsets(3, 4, seed=0)] == [1, 1, 1]


def test_largest_weights(model: LlamaForCausalLM) -> None:
    found = largest_weights(model, 40)
    everything = torch.cat([p.detach().flatten() for p in model.parameters()]).abs()
    threshold = everything.sort(descending=True).values
    magnitudes = torch.cat([p.detach().flatten()[found[n]] for n, p in model.named_parameters()]).abs()
    assert torch.equal(magnitudes.sort(descending=True).values, threshold[:40])


# ablation


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_bit_for_bit_even_after_an_interrupt(model: LlamaForCausalLM, how: type) -> None:
    with torch.no_grad():
        model.lm_head.weight.view(-1)[3] = -0.0  # adding back would turn this into +0.0
    before = weights(model)
    name = "model.embed_tokens.weight"
    indices = {
        name: torch.tensor([3, 5]),
        "model.norm.weight": torch.tensor([0]),
        "model.layers.0.mlp.up_proj.weight": torch.tensor([], dtype=torch.int64),
    }
    with pytest.raises(how), ablated(model, indices):
        flat = dict(model.named_parameters())[name].flatten()
        assert flat[3] == flat[5] == 0 and flat[4] != 0
        assert model.lm_head.weight.flatten()[5] == 0  # tied: one tensor, zeroed in both places
        raise how
    assert same_bits(before, model)


def test_probe_measures_eq_1_over_all_positions(model: LlamaForCausalLM) -> None:
    texts = prompts(3, seed=5)
    name, index = "model.layers.0.mlp.down_proj.weight", torch.arange(0, 384, 3)
    probe = AblationProbe(model, texts)
    before = weights(model)
    found = probe.measure({name: index})
    assert same_bits(before, model)

    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for place in index.tolist():
            row, column = divmod(place, 24)
            other.model.layers[0].mlp.down_proj.weight[row, column] = 0.0
    forward = backward = 0.0
    for ids in texts:
        with torch.no_grad():
            p = other(input_ids=ids.unsqueeze(0)).logits[0].double().softmax(-1)
            q = model(input_ids=ids.unsqueeze(0)).logits[0].double().softmax(-1)
        forward += float((p * (p.log() - q.log())).sum())
        backward += float((q * (q.log() - p.log())).sum())
    num_positions = sum(ids.numel() for ids in texts)
    assert found.num_positions == num_positions
    assert found.masked_reference == pytest.approx(forward / num_positions, rel=1e-6)
    assert found.reference_masked == pytest.approx(backward / num_positions, rel=1e-6)
    assert abs(forward - backward) / num_positions > 1e-5 * forward  # so a swap would show


def test_nothing_ablated_is_zero_and_a_repeat_is_equal(model: LlamaForCausalLM) -> None:
    probe = AblationProbe(model, prompts(2))
    assert probe.measure({}).masked_reference == 0.0
    index = {"model.norm.weight": torch.tensor([1])}
    assert probe.measure(index) == probe.measure(index)


def test_no_distribution_left_counts_as_an_infinite_divergence(model: LlamaForCausalLM) -> None:
    probe = AblationProbe(model, prompts(2))
    # The final norm divides by this weight's neighbours only after its hook turned a zero into NaN.
    handle = model.model.norm.register_forward_hook(
        lambda module, args, output: output / (module.weight[0] != 0).float() * (module.weight[0] != 0).float()
    )
    found = probe.measure({"model.norm.weight": torch.tensor([0])})
    handle.remove()
    assert found.masked_reference == found.reference_masked == math.inf
    assert found.num_undefined == found.num_positions == 11
    assert found.to_dict() == {"kl_masked_reference": None, "kl_reference_masked": None, "num_undefined": 11}


def test_a_model_that_is_nan_by_itself_is_a_user_error(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        AblationProbe(model, prompts(1))
    with pytest.raises(UserError, match="next-token loss of a prompt is nan"):
        prompt_gradient(model, prompts(1))


# spikes


def test_planted_spike_is_found(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.up_proj.weight[17] *= 3000
        mlp.down_proj.weight[5, 17] = 40.0
    spikes = strongest_channels(model, prompts(3))
    assert [spike.parameter for spike in spikes] == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    found = spikes[1]
    assert (found.out_channel, found.in_channel, found.index, found.weight) == (5, 17, 5 * 24 + 17, 40.0)
    assert found.ratio > 20 > spikes[0].ratio
    assert not model.model.layers[1].mlp.down_proj._forward_hooks


def test_ratios_are_over_the_median_channel_of_all_prompts(model: LlamaForCausalLM) -> None:
    texts = prompts(3)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda m, args, out: seen.append(out[0].detach())
    )
    found = strongest_channels(model, texts)[0]
    handle.remove()
    maxima = torch.cat(seen).abs().amax(0)
    assert found.output_max == float(maxima.max())
    assert found.output_ratio == pytest.approx(float(maxima.max() / maxima.sort().values[7]))


def test_conv1d_of_gpt2_is_read_transposed_and_attention_is_left_out() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=32)).eval()
    assert list(down_projections(gpt2)) == ["transformer.h.0.mlp.c_proj"]
    with torch.no_grad():
        gpt2.transformer.h[0].mlp.c_fc.bias[3] = 500.0
        gpt2.transformer.h[0].mlp.c_proj.weight[3, 6] = 9.0  # [in, out]
    found = strongest_channels(gpt2, prompts(2))[0]
    assert (found.in_channel, found.out_channel, found.weight) == (3, 6, 9.0)
    assert dict(gpt2.named_parameters())[found.parameter].flatten()[found.index] == 9.0


def test_no_down_projection() -> None:
    with pytest.raises(UserError, match="no MLP down projection found in Linear"):
        down_projections(torch.nn.Linear(2, 2))


# prompts


def letters(unknown: str | None) -> PreTrainedTokenizerFast:
    vocab = {token: place for place, token in enumerate(["<unk>", "a", "b", "<pad>"])}
    # Without an unknown token, BPE drops what it does not know.
    backend = Tokenizer(models.WordLevel(vocab, unk_token=unknown) if unknown else models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, pad_token="<pad>")


def test_tokenise_cuts_and_counts() -> None:
    found = tokenise_prompts(letters("<unk>"), ["abab", "ab"], max_tokens=3)
    assert [ids.tolist() for ids in found.ids] == [[1, 2, 1], [1, 2]]
    assert (found.num_cut_tokens, found.num_tokens) == (1, 5)


def test_unknown_tokens() -> None:
    tokenise_prompts(letters("<unk>"), ["ababababax"], max_tokens=99)  # exactly 10%
    with pytest.raises(UserError, match=r"11% of the tokens of prompt 2 .*--prompts FILE"):
        tokenise_prompts(letters("<unk>"), ["ab", "ababababx"], max_tokens=99)


def test_characters_that_get_no_token_are_unknown_too() -> None:
    with pytest.raises(UserError, match="20% of the tokens of prompt 1"):
        tokenise_prompts(letters(None), ["abab x"], max_tokens=99)  # the space is no loss, the x is


def test_one_token_is_too_short() -> None:
    with pytest.raises(UserError, match="prompt 1 has 1 tokens"):
        tokenise_prompts(letters("<unk>"), ["a"], max_tokens=9)


def test_published_super_weights_are_recognised() -> None:
    known = superweights_of("/models/Llama-7B/")
    assert known is not None and known.model == "huggyllama/llama-7b" and "table 2" in known.source
    name = "model.layers.{}.mlp.down_proj.weight"
    assert known.found({(name.format(2), 3968, 7003)}) == [True]
    assert known.found({(name.format(12), 3968, 7003), (name.format(2), 3968, 7004)}) == [False]
    assert superweights_of("tiny-reasoner") is None
    assert [len(one.weights) for one in published_superweights()] == [1, 2, 3, 1, 1, 1, 2, 4, 6]
