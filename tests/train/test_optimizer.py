from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peg.errors import InputError
from peg.model.encoder import Encoder
from peg.train.optimizer import Ema, adamw, load_optimizer, optimizer_tensors, set_learning_rate
from tests.conftest import make_encoder

SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.1, "layer_decay": 0.5}


def step(encoder: Encoder, optimizer: torch.optim.Optimizer, *, seed: int) -> None:
    """An optimizer step on gradients drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def weights(encoder: Encoder) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}


def scales(encoder: Encoder, layer_decay: float) -> dict[str, float]:
    optimizer = adamw(encoder, **{**SETTINGS, "layer_decay": layer_decay})
    name_of = {parameter: name for name, parameter in encoder.named_parameters()}
    return {name_of[one]: group["scale"] for group in optimizer.param_groups for one in group["params"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_groups_hold_every_trainable_parameter_once(layer_decay: float) -> None:
    encoder = make_encoder()
    encoder.backbone.embeddings.requires_grad_(False)
    optimizer = adamw(encoder, **{**SETTINGS, "layer_decay": layer_decay})
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trainable)) and len(held) < len(list(encoder.parameters()))


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    encoder = make_encoder()
    name_of = {parameter: name for name, parameter in encoder.named_parameters()}
    for group in adamw(encoder, **SETTINGS).param_groups:
        for name in (name_of[parameter] for parameter in group["params"]):
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name


def test_each_layer_learns_slower_than_the_one_above_and_embeddings_slowest() -> None:
    found = scales(make_encoder(layers=3), 0.5)
    wanted = {"layer.2.": 1.0, "layer.1.": 0.5, "layer.0.": 0.25, "embeddings.": 0.125}
    for name, scale in found.items():
        assert scale == next(value for part, value in wanted.items() if part in name), name


def test_a_norm_behind_the_layers_learns_at_the_full_rate() -> None:
    from transformers import ModernBertConfig, ModernBertModel

    encoder = make_encoder()
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    encoder.backbone = ModernBertModel(ModernBertConfig(vocab_size=16, **size, **tokens))
    found = scales(encoder, 0.5)
    assert found["backbone.final_norm.weight"] == 1.0
    assert found["backbone.layers.1.attn.Wqkv.weight"] == 1.0 and found["backbone.layers.0.mlp.Wi.weight"] == 0.5
    assert {scale for name, scale in found.items() if ".embeddings." in name} == {0.25}


def test_an_encoder_without_a_list_of_its_layers_is_refused() -> None:
    encoder = make_encoder()
    encoder.backbone.config.num_hidden_layers = 5
    adamw(encoder, **{**SETTINGS, "layer_decay": 1.0})
    with pytest.raises(InputError, match=r"no list of 5; set train.layer_decay to 1.0"):
        adamw(encoder, **SETTINGS)


def test_a_layer_decay_of_1_is_plain_adamw() -> None:
    ours, theirs = make_encoder(), make_encoder()
    optimizer = adamw(ours, **{**SETTINGS, "layer_decay": 1.0})
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
    )
    for seed in range(3):
        step(ours, optimizer, seed=seed)
        step(theirs, plain, seed=seed)
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_rate_is_the_schedule_s_times_the_layer_s() -> None:
    encoder = make_encoder()
    optimizer = adamw(encoder, **{**SETTINGS, "weight_decay": 0.0})
    before = weights(encoder)
    set_learning_rate(optimizer, 1e-3)
    step(encoder, optimizer, seed=0)  # Adam's first step moves every weight by its rate, whatever the gradient
    for name, moved in weights(encoder).items():
        rate = 1e-3 * (0.25 if "embeddings." in name else 0.5 if "layer.0." in name else 1.0)
        torch.testing.assert_close((moved - before[name]).abs(), torch.full_like(moved, rate), rtol=1e-2, atol=0)


def test_state_put_back_in_mid_training_gives_the_same_bits(tmp_path: Path) -> None:
    straight = make_encoder()
    optimizer, ema = adamw(straight, **SETTINGS), Ema(straight, decay=0.99)
    for seed in range(6):
        step(straight, optimizer, seed=seed)
        ema.update()
        if seed == 2:
            save_file(straight.state_dict(), tmp_path / "model.safetensors")
            save_file(optimizer_tensors(optimizer, straight), tmp_path / "optimizer.safetensors")
            save_file(ema.tensors(), tmp_path / "ema.safetensors")

    resumed = make_encoder(seed=1)
    optimizer_2, ema_2 = adamw(resumed, **SETTINGS), Ema(resumed, decay=0.99)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    load_optimizer(optimizer_2, resumed, load_file(tmp_path / "optimizer.safetensors"))
    ema_2.load(load_file(tmp_path / "ema.safetensors"))
    for seed in range(3, 6):
        step(resumed, optimizer_2, seed=seed)
        ema_2.update()
    for one, other in (
        (weights(straight), weights(resumed)),
        (optimizer_tensors(optimizer, straight), optimizer_tensors(optimizer_2, resumed)),
        (ema.tensors(), ema_2.tensors()),
    ):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_state_is_named_after_its_parameters_and_refused_by_others() -> None:
    encoder, taller = make_encoder(), make_encoder(layers=3)
    optimizer, ema = adamw(taller, **SETTINGS), Ema(taller, decay=0.9)
    step(taller, optimizer, seed=0)
    tensors = optimizer_tensors(optimizer, taller)
    assert "backbone.encoder.layer.2.attention.self.query.weight.exp_avg_sq" in tensors
    assert len(tensors) == 3 * len(list(taller.parameters()))
    with pytest.raises(ValueError, match=r"layer\.2.*no such trainable parameter"):
        load_optimizer(adamw(encoder, **SETTINGS), encoder, tensors)
    with pytest.raises(ValueError, match="differ from the trainable parameters"):
        Ema(encoder, decay=0.9).load(ema.tensors())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_mean_is_the_naive_recursion_s(dtype: torch.dtype, tolerance: float) -> None:
    encoder = make_encoder().to(dtype)
    optimizer, ema = adamw(encoder, **SETTINGS), Ema(encoder, decay=0.6)
    naive = {name: weight.double() for name, weight in weights(encoder).items()}
    for t in range(1, 16):
        step(encoder, optimizer, seed=t)
        ema.update()
        decay = min(0.6, (1 + t) / (10 + t))  # 0.6 is reached at t = 13
        naive = {name: decay * naive[name] + (1 - decay) * weights(encoder)[name].double() for name in naive}
    found = ema.tensors()
    assert int(found.pop("updates")) == 15 and found.keys() == naive.keys()
    for name, mean in found.items():
        assert mean.dtype == dtype
        torch.testing.assert_close(mean.double(), naive[name], rtol=0, atol=tolerance)


def test_early_means_have_forgotten_the_start() -> None:
    encoder = make_encoder()
    ema = Ema(encoder, decay=0.9999)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(1.0)
    start = ema.tensors()["backbone.embeddings.word_embeddings.weight"].clone()
    for _ in range(10):
        ema.update()
    left = (ema.tensors()["backbone.embeddings.word_embeddings.weight"] - 1).abs().max() / (start - 1).abs().max()
    assert float(left) < 1e-4


def test_the_mean_is_in_the_encoder_inside_and_the_weights_after_even_if_it_fails() -> None:
    encoder = make_encoder()
    optimizer, ema = adamw(encoder, **SETTINGS), Ema(encoder, decay=0.9)
    step(encoder, optimizer, seed=0)
    ema.update()
    after = weights(encoder)
    with pytest.raises(RuntimeError, match="stop"), ema.swapped():
        inside = encoder.state_dict()
        assert all(torch.equal(inside[name], ema.tensors()[name]) for name in after)
        assert not all(torch.equal(inside[name], after[name]) for name in after)
        raise RuntimeError("stop")
    assert all(torch.equal(weight, after[name]) for name, weight in weights(encoder).items())


def test_weights_below_fp32_have_their_mean_in_fp32() -> None:
    encoder = make_encoder().to(torch.bfloat16)
    ema = Ema(encoder, decay=0.9)
    before = weights(encoder)
    ema.update()
    assert {mean.dtype for name, mean in ema.tensors().items() if name != "updates"} == {torch.float32}
    with ema.swapped():
        pass
    assert all(torch.equal(weight, before[name]) for name, weight in weights(encoder).items())


def test_frozen_parameters_have_neither_state_nor_mean() -> None:
    encoder = make_encoder()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("layer.1." in name)
    optimizer, ema = adamw(encoder, **SETTINGS), Ema(encoder, decay=0.9)
    frozen = {name: weight for name, weight in weights(encoder).items() if "layer.1." not in name}
    step(encoder, optimizer, seed=0)
    ema.update()
    assert all("layer.1." in name for name in optimizer_tensors(optimizer, encoder))
    assert all("layer.1." in name for name in ema.tensors() if name != "updates")
    assert frozen and all(torch.equal(weights(encoder)[name], weight) for name, weight in frozen.items())
