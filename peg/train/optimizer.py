"""AdamW and a running mean of the weights; their state as named tensors that safetensors holds.

A parameter's name is the encoder's own, so that a checkpoint can be read by eye, and does not hang on an order.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peg.errors import InputError
from peg.model.encoder import Encoder

_UPDATES = "updates"


def adamw(encoder: Encoder, *, learning_rate: float, weight_decay: float, layer_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient.

    Weight decay is on matrices alone: biases and normalisation have one dimension. The top layer learns at the full
    rate, each below it at `layer_decay` times the rate of the one above, embeddings slowest (Howard & Ruder 2018, 3.2).
    Every parameter group has its factor under "scale"; `set_learning_rate` heeds it.
    Raises InputError where layer_decay is below 1 and the encoder's layers cannot be told apart.
    """
    scales = _scales(encoder, layer_decay=layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scales[name], parameter.ndim > 1), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay if is_matrix else 0.0, "scale": scale}
            for (scale, is_matrix), parameters in groups.items()
        ],
        fused=encoder.device.type == "cuda",  # one kernel, and no temporary copies of all weights
    )
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step learn at `rate`, times each group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, encoder: Encoder) -> dict[str, Tensor]:
    """The optimizer's state, each tensor under its parameter's name and its own: "….weight.exp_avg"."""
    return {
        f"{name}.{key}": value
        for name, parameter in encoder.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, encoder: Encoder, tensors: Mapping[str, Tensor]) -> None:
    """Take the state that `optimizer_tensors` gave. Raises ValueError where it belongs to other parameters."""
    name_of = {parameter: name for name, parameter in encoder.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {name_of[parameter]: index for index, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, what = key.rpartition(".")
        if name not in index_of:
            raise ValueError(f"the state holds {key}, the encoder no such trainable parameter; load its own checkpoint")
        state.setdefault(index_of[name], {})[what] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Ema:
    """A running mean of the trainable weights, in fp32 or their own precision if that is higher.

    Update t (from 1) is mean += (1 - d_t)·(weights - mean), with d_t = min(decay, (1 + t)/(10 + t)). Until the decay is
    reached the mean thus covers about the last tenth of the steps. Correcting the bias as Adam does would give
    the plain mean of all steps meanwhile, in which the weights of the start count for as much as the newest.
    """

    def __init__(self, encoder: Encoder, *, decay: float) -> None:
        self._parameters = {name: one for name, one in encoder.named_parameters() if one.requires_grad}
        self._means = {
            name: one.detach().to(torch.promote_types(one.dtype, torch.float32), copy=True)
            for name, one in self._parameters.items()
        }
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step into the mean."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        for name, mean in self._means.items():
            mean.lerp_(self._parameters[name].to(mean.dtype), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the mean into the encoder; the weights come back bit for bit at the end."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._put(self._means)
        try:
            yield
        finally:
            self._put(weights)

    def tensors(self) -> dict[str, Tensor]:
        """The mean by parameter name, and the number of updates."""
        return {**self._means, _UPDATES: torch.tensor(self._updates)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` gave. Raises ValueError where it belongs to other parameters."""
        if differing := set(tensors) ^ {*self._means, _UPDATES}:
            raise ValueError(
                f"the means differ from the trainable parameters by {sorted(differing)[:3]}; load their own"
            )
        for name, mean in self._means.items():
            mean.copy_(tensors[name])
        self._updates = int(tensors[_UPDATES])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _scales(encoder: Encoder, *, layer_decay: float) -> dict[str, float]:
    """The factor of the learning rate of every parameter, by name."""
    names = [name for name, _ in encoder.named_parameters()]
    if layer_decay == 1:
        return dict.fromkeys(names, 1.0)
    prefix, num_layers = _layer_stack(encoder)
    embeddings = tuple(f"{name}." for name, module in encoder.named_modules() if isinstance(module, nn.Embedding))
    scales: dict[str, float] = {}
    below = num_layers  # how many layers stand above, and so slow a parameter down
    for name in names:
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).partition(".")[0])
            scales[name] = layer_decay ** (num_layers - 1 - layer)
            below = 0  # what is registered behind the layers, a last norm for example, is on top of them
        else:
            scales[name] = layer_decay ** (num_layers if name.startswith(embeddings) else below)
    return scales


def _layer_stack(encoder: Encoder) -> tuple[str, int]:
    """Where the backbone's layers are: the prefix of their parameters' names, and how many there are."""
    count = getattr(encoder.backbone.config, "num_hidden_layers", None)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}.", len(module)
    raise InputError(
        f"train.layer_decay needs a stack of layers, and this {encoder.backbone.config.model_type} encoder has no list "
        f"of {count}; set train.layer_decay to 1.0"
    )
