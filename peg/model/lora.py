"""Low-rank adapters (LoRA, Hu et al. 2021) in an encoder's linear layers, by the `peft` library.

An update of rank r stands beside each frozen weight: W·x + (alpha/r)·B·A·x, where B starts at zero, so that training
starts from the encoder as it is. Afterwards B·A is added into W, and the model is an ordinary one again.
"""

import importlib.util
from typing import Any

from torch import nn

from peg.errors import InputError
from peg.model.encoder import Encoder


def check_installed() -> None:
    """Raise InputError with the command that mends it where `peft` is absent."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("train.lora needs the package peft; `pip install -e '.[lora]'`, or set train.lora to null")


def add_adapters(encoder: Encoder, *, rank: int, alpha: float) -> None:
    """Put adapters into all linear layers of attention and feed-forward; they alone are trainable then.

    A is drawn from torch's generator: every rank has to seed it alike before.
    """
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model

    # A pooler is on top of the token vectors, which are what we embed with: an adapter there would never learn.
    names = [
        name
        for name, module in encoder.backbone.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("pooler")
    ]
    scaled: Any = alpha  # a float to us, an int in peft's types alone
    config = LoraConfig(r=rank, lora_alpha=scaled, target_modules=names, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(config, encoder.backbone)


def merge_adapters(encoder: Encoder) -> None:
    """Add the adapters into the weights and take them out: the same modules and names as before `add_adapters`."""
    check_installed()
    from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in encoder.backbone.named_modules() if isinstance(module, LoraLayer)]
    if not adapted:
        raise ValueError("the encoder has no adapters to merge; call add_adapters first")
    for name, module in adapted:
        module.merge()
        encoder.backbone.set_submodule(name, module.get_base_layer())
    del encoder.backbone.peft_config
    encoder.requires_grad_(True)
