"""Without padding, the same numbers as transformers' own padded forward."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from peg.model import packed
from peg.model.encoder import Encoder, Prompts
from peg.model.microbatch import pad_ids
from tests.conftest import make_encoder, make_texts

CPU = torch.device("cpu")
FAMILY = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
}
POOLINGS = ["mean", "cls", "last"]
PAD = 1
LENGTHS = [5, 1, 9, 5, 12, 1, 3, 9, 7]


def texts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    ids = [generator.integers(2, 40, length).astype(np.uint16) for length in LENGTHS]
    ids[0][2] = PAD  # a text may hold the padding token as its own: RoBERTa does not count it
    return ids


def encoder_of(kind: str, *, pooling: str = "mean", dropout: float = 0.0, **changes: Any) -> Encoder:
    config, model = FAMILY[kind]
    torch.manual_seed(0)
    backbone = model(
        config(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=20,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=PAD,
            **changes,
        ),
        add_pooling_layer=False,
    )
    return wrap(backbone, pooling=pooling)


def wrap(backbone: nn.Module, *, pooling: str = "mean") -> Encoder:
    with torch.no_grad():
        for parameter in backbone.parameters():  # as initialised, attention is all but even
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    return Encoder(backbone, tokenizer, pooling=pooling, prompts=Prompts("", ""), max_length=12).double().eval()  # type: ignore[arg-type]


def naive(encoder: Encoder, ids: list[np.ndarray]) -> Tensor:
    ids_BL, mask_BL = pad_ids(ids, pad_id=PAD, device=CPU)
    hidden = encoder.backbone(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    rows = []
    for text, length in zip(hidden, map(len, ids), strict=True):
        real = text[:length]
        row = {"mean": real.mean(0), "cls": real[0], "last": real[-1]}[encoder.pooling]
        rows.append(row / row.norm())
    return torch.stack(rows)


def gradients(encoder: Encoder, rows: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    (rows * torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).view_as(rows)).sum().backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", FAMILY)
def test_packed_texts_give_the_padded_model_s_rows_and_gradients(kind: str, pooling: str) -> None:
    encoder = encoder_of(kind, pooling=pooling)
    assert encoder.packed
    rows, expected = encoder.embed(texts()), naive(encoder, texts())
    torch.testing.assert_close(rows, expected, atol=1e-9, rtol=0)
    found, wanted = gradients(encoder, rows), gradients(encoder, expected)
    assert found.keys() == wanted.keys() == dict(encoder.named_parameters()).keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=0, msg=name)


def test_rows_come_in_the_order_of_the_texts_as_lists_or_arrays() -> None:
    encoder, ids = encoder_of("bert"), texts()
    order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
    rows = encoder.embed(ids)
    torch.testing.assert_close(encoder.embed([ids[i].tolist() for i in order]), rows[order], atol=1e-12, rtol=0)
    assert (torch.pdist(rows) > 1e-3).all()


def test_encode_gives_the_padded_model_s_rows_in_the_order_of_the_texts() -> None:
    encoder, lines = make_encoder(), make_texts(40, seed=0)
    found = encoder.encode(lines, kind="query", batch_tokens=100)
    ids = encoder.tokenize(lines, kind="query")
    with torch.inference_mode():
        expected = encoder(*pad_ids(ids, pad_id=encoder.pad_id, device=CPU)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_no_texts_give_no_rows_and_a_text_of_no_tokens_is_named() -> None:
    encoder = encoder_of("bert")
    assert encoder.embed([]).shape == (0, 32)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        encoder.embed([np.array([3]), np.array([], dtype=np.uint16)])


@pytest.mark.parametrize(("pooling", "rows"), [("cls", len(LENGTHS)), ("last", len(LENGTHS)), ("mean", sum(LENGTHS))])
def test_one_token_of_each_text_goes_through_the_last_layer_where_it_stands_for_the_text(
    pooling: str, rows: int
) -> None:
    encoder, seen = encoder_of("bert", pooling=pooling), []
    for layer in encoder.backbone.encoder.layer:
        layer.output.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    encoder.embed(texts())
    assert seen == [sum(LENGTHS), rows]


def test_modules_put_in_place_of_linear_layers_are_used() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.low = base, nn.Linear(base.in_features, base.out_features).double()

        def forward(self, rows: Tensor) -> Tensor:
            return self.base(rows) + self.low(rows)

    for pooling in POOLINGS:
        encoder = encoder_of("roberta", pooling=pooling)
        before = encoder.embed(texts())
        for layer in encoder.backbone.encoder.layer:
            for module in layer.modules():
                for name in ("query", "key", "value", "dense"):
                    if isinstance(getattr(module, name, None), nn.Linear):
                        setattr(module, name, Adapted(getattr(module, name)))
        rows = encoder.embed(texts())
        torch.testing.assert_close(rows, naive(encoder, texts()), atol=1e-9, rtol=0)
        assert (rows - before).abs().max() > 0.01
        assert len([name for name in gradients(encoder, rows) if ".low." in name]) == 2 * 6 * 2


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize(
    "place", ["embeddings.dropout", "attention.self.dropout", "attention.output.dropout", "1.output.dropout"]
)
def test_every_dropout_drops_and_is_replayed_bit_for_bit(place: str, pooling: str) -> None:
    encoder = encoder_of("bert", pooling=pooling).train()
    for name, module in encoder.named_modules():
        if name.endswith(place):
            module.p = 0.3
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(encoder.embed(texts()))
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(encoder.embed(texts()), rows[0])
    assert torch.equal(rows[0], rows[1])
    assert (rows[0] - rows[2]).abs().max() > 0.01
    torch.testing.assert_close(encoder.eval().embed(texts()), naive(encoder, texts()), atol=1e-9, rtol=0)


def test_attention_dropout_keeps_the_expected_value() -> None:
    encoder = encoder_of("bert", dropout=0.0).train()
    for layer in encoder.backbone.encoder.layer:
        layer.attention.self.dropout.p = 0.2
    torch.manual_seed(0)
    attention, packing = encoder.backbone.encoder.layer[0].attention, packed.pack(texts(), encoder.backbone, device=CPU)
    hidden = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    seen: list[Tensor] = []
    attention.output.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    layers, layer = packed.Layers(), encoder.backbone.encoder.layer[0]
    for _ in range(200):
        layers(layer, hidden, None, packing)
    mean = torch.stack(seen).mean(0)
    encoder.eval()
    layers(layer, hidden, None, packing)
    assert (mean - seen[-1]).abs().mean() < 0.1 * seen[-1].abs().mean()


def other_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    shared = {"vocab_size": 40, "max_position_embeddings": 20, "pad_token_id": PAD}
    distilbert = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "attention_dropout": 0.2, "dropout": 0.2}
    electra = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    yield "distilbert", lambda: DistilBertModel(DistilBertConfig(**shared, **distilbert))
    yield "electra", lambda: ElectraModel(ElectraConfig(**shared, **electra, intermediate_size=48))
    yield "decoder", lambda: BertModel(BertConfig(**shared, **bert, is_decoder=True), add_pooling_layer=False)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("kind", "make"), list(other_models()))
def test_other_models_are_padded_and_agree(kind: str, make: Callable[[], nn.Module], pooling: str) -> None:
    torch.manual_seed(0)
    encoder = wrap(make(), pooling=pooling)
    assert not encoder.packed
    assert encoder.path_line.startswith("texts are padded: ")
    assert kind in encoder.path_line
    torch.testing.assert_close(encoder.embed(texts()), naive(encoder, texts()), atol=1e-9, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_layers_computed_again_give_the_same_gradients_with_dropout(kind: str, pooling: str) -> None:
    torch.manual_seed(0)
    if kind == "bert":
        encoder = encoder_of("bert", pooling=pooling, dropout=0.2).train()
        last = encoder.backbone.encoder.layer[-1].output.dense
    else:
        encoder = wrap(dict(other_models())[kind](), pooling=pooling).train()
        last = encoder.backbone.transformer.layer[-1].ffn.lin1
    calls: list[None] = []
    last.register_forward_hook(lambda *args: calls.append(None))
    found, counts = [], []
    for wanted in (False, True, False):
        encoder.checkpoint_layers = wanted
        assert encoder.checkpoint_layers == wanted
        calls.clear()
        torch.manual_seed(3)
        found.append(gradients(encoder, encoder.embed(texts())))
        counts.append(len(calls))
    assert counts == [1, 2, 1]
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def reference_kernel(query: Tensor, key: Tensor, value: Tensor, *where: Any, dropout_p: float = 0.0) -> Tensor:
    """What a kernel for texts of any length computes: (R, heads, D) queries, starts of each text's queries and keys."""
    start_query, start, longest_query, longest = where
    assert start_query.dtype == start.dtype == torch.int32
    assert (longest_query, longest) == (int(start_query.diff().max()), int(start.diff().max()))
    out = torch.empty_like(query)
    for (a, b), (c, d) in zip(start_query.unfold(0, 2, 1).tolist(), start.unfold(0, 2, 1).tolist(), strict=True):
        scores = torch.einsum("ihd,jhd->hij", query[a:b], key[c:d]) / query.shape[-1] ** 0.5
        out[a:b] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value[c:d])
    return out


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kernel", ["varlen_attn", "flash_attn"])
def test_kernels_for_any_length_are_given_each_text_s_own_tokens(
    kernel: str, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of("xlm-roberta", pooling=pooling)
    monkeypatch.setattr(packed, "kernel", lambda *args, **kwargs: kernel)
    monkeypatch.setattr(
        packed, {"varlen_attn": "_varlen_attn", "flash_attn": "_flash_attn_varlen"}[kernel], reference_kernel
    )
    torch.testing.assert_close(encoder.embed(texts()), naive(encoder, texts()), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("where", "dropout", "absent", "expected"),
    [
        (("cuda", torch.bfloat16), 0.0, None, "varlen_attn"),
        (("cuda", torch.bfloat16), 0.1, None, "flash_attn"),
        (("cuda", torch.float16), 0.0, "_varlen_attn", "flash_attn"),
        (("cuda", torch.bfloat16), 0.1, "_flash_attn_varlen", "dense"),
        (("cuda", torch.float32), 0.0, None, "dense"),
        (("cpu", torch.bfloat16), 0.0, None, "dense"),
    ],
)
def test_attention_s_kernel_is_chosen_by_device_precision_and_dropout(
    where: tuple[str, torch.dtype], dropout: float, absent: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_varlen_attn", "_flash_attn_varlen"):
        monkeypatch.setattr(packed, name, None if name == absent else reference_kernel)
    assert packed.kernel(torch.device(where[0]), where[1], dropout=dropout) == expected


def test_the_log_line_says_how_attention_is_computed() -> None:
    assert encoder_of("bert").path_line == "texts are packed without padding; attention: dense in bf16, dense in fp32"


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_compiled_layers_give_the_same_rows_and_gradients(pooling: str) -> None:
    encoder = encoder_of("bert", pooling=pooling)
    wanted = gradients(encoder, expected := encoder.embed(texts()))
    encoder.compile_layers()
    rows = encoder.embed(texts())
    torch.testing.assert_close(rows, expected, atol=1e-9, rtol=0)
    found = gradients(encoder, rows)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=0, msg=name)


@pytest.mark.slow
def test_compiled_layers_replay_their_dropout_with_and_without_a_graph() -> None:
    encoder = encoder_of("bert", dropout=0.2).train()
    encoder.compile_layers()
    rows = []
    for grad in (True, False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            rows.append(encoder.embed(texts()).detach())
    assert torch.equal(rows[0], rows[2])
    torch.testing.assert_close(rows[0], rows[1], atol=1e-9, rtol=0)
    assert (rows[0] - encoder.eval().embed(texts())).abs().max() > 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", POOLINGS)
def test_varlen_attention_is_dense_attention_in_bf16(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_of("bert", pooling=pooling).float().cuda()
    found = []
    for kernel in ("varlen_attn", "dense"):
        assert packed.kernel(encoder.device, torch.bfloat16, dropout=0.0) == kernel
        with torch.autocast("cuda", dtype=torch.bfloat16):
            rows = encoder.embed(texts())
        weight = torch.linspace(-1, 1, rows.numel(), device=rows.device).view_as(rows)
        encoder.zero_grad()
        (rows * weight).sum().backward()
        grads = [parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]
        found.append((rows.detach(), torch.cat(grads)))
        monkeypatch.setattr(packed, "_varlen_attn", None)
        monkeypatch.setattr(packed, "_flash_attn_varlen", None)
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-2, rtol=0)
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.99
