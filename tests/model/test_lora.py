import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peg.errors import InputError
from peg.model.encoder import WEIGHTS, Encoder
from peg.model.lora import add_adapters, merge_adapters
from peg.model.microbatch import pad_ids
from peg.train.optimizer import adamw
from tests.conftest import make_encoder, make_texts

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None,
    reason="peft is not installed; `pip install -e '.[lora]'`",
)
LINEARS = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
LINEARS += ["intermediate.dense", "output.dense"]


def adapted(*, seed: int = 3) -> Encoder:
    encoder = make_encoder()
    torch.manual_seed(seed)
    add_adapters(encoder, rank=4, alpha=8)
    return encoder


def train(encoder: Encoder, *, steps: int = 3) -> None:
    optimizer = adamw(encoder, learning_rate=1e-2, weight_decay=0.0, layer_decay=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (embed(encoder)[:4] @ embed(encoder)[4:].T).square().mean().backward()
        optimizer.step()


def embed(encoder: Encoder) -> Tensor:
    ids = encoder.tokenize(make_texts(8, seed=1), kind="query")
    rows_ND: Tensor = encoder(*pad_ids(ids, pad_id=encoder.pad_id, device=encoder.device))
    return rows_ND


@needs_peft
def test_adapters_are_in_every_linear_layer_and_alone_trainable() -> None:
    encoder = adapted()
    wanted = {
        f"backbone.encoder.layer.{layer}.{linear}.lora_{side}.default.weight"
        for layer in range(2)
        for linear in LINEARS
        for side in "AB"
    }
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == wanted


@needs_peft
def test_fresh_adapters_change_nothing() -> None:
    assert torch.equal(embed(adapted()), embed(make_encoder()))


@needs_peft
def test_training_moves_adapters_and_leaves_the_weights_bit_for_bit() -> None:
    encoder, before = adapted(), make_encoder()
    train(encoder)
    assert (embed(encoder) - embed(before)).abs().max() > 1e-2
    found = {name.replace("base_layer.", ""): tensor for name, tensor in encoder.state_dict().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in before.state_dict().items())


@needs_peft
def test_the_update_is_alpha_over_rank_times_b_a() -> None:
    encoder, plain = adapted(), make_encoder()
    train(encoder)
    trained = encoder.state_dict()
    with torch.no_grad():
        for layer in range(2):
            for linear in LINEARS:
                name = f"backbone.encoder.layer.{layer}.{linear}"
                a, b = (trained[f"{name}.lora_{side}.default.weight"] for side in "AB")
                plain.get_submodule(name).weight += 8 / 4 * b @ a  # type: ignore[operator]
    torch.testing.assert_close(embed(encoder), embed(plain), rtol=0, atol=1e-6)


@needs_peft
def test_the_merged_encoder_is_an_ordinary_one_with_the_same_output(tmp_path: Path) -> None:
    encoder = adapted()
    train(encoder)
    with torch.no_grad():
        unmerged = embed(encoder)
    merge_adapters(encoder)
    plain = make_encoder()
    assert [(name, type(module)) for name, module in encoder.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(embed(encoder).detach(), unmerged, rtol=0, atol=1e-6)

    encoder.save(tmp_path / "merged")
    plain.save(tmp_path / "plain")
    merged_files = {path.relative_to(tmp_path / "merged") for path in (tmp_path / "merged").rglob("*")}
    assert merged_files == {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*")}
    config = (tmp_path / "merged" / "config.json").read_text()
    assert config == (tmp_path / "plain" / "config.json").read_text()
    assert load_file(tmp_path / "merged" / WEIGHTS).keys() == load_file(tmp_path / "plain" / WEIGHTS).keys()
    assert torch.equal(embed(Encoder.load(str(tmp_path / "merged"))), embed(encoder))


@needs_peft
def test_a_checkpoint_with_adapters_is_loaded_into_an_encoder_with_adapters(tmp_path: Path) -> None:
    encoder = adapted()
    train(encoder)
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    resumed = adapted(seed=9)
    assert not torch.equal(embed(resumed), embed(encoder))
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(embed(resumed), embed(encoder))


@needs_peft
def test_the_same_seed_draws_the_same_adapters() -> None:
    one, other, different = (adapted(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], different[name]) for name in one)


@needs_peft
def test_merging_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_adapters(make_encoder())


def test_without_peft_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install -e '.\[lora\]'"):
        add_adapters(make_encoder(), rank=2, alpha=4)
