"""A model that runs without fitting into memory: each layer holds its weights during its own forward pass only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack
from trsp_fast.models.tensor_stream import StoredTensor


class StreamedModel:
    """A causal language model on the meta device, whose weights come from files, a layer at a time, as fp32.

    What transformers does to the names and the form of a checkpoint's tensors when it loads a model is done here by the
    same function, `convert_and_load_state_dict_in_model`, to the tensors of one layer.

    Args:
        config: of the model.
        weights: tensors under the names that they have in a checkpoint of this model.
        path: the prefix of the layers' tensors among these names.
        remote_code: run code that the checkpoint brings along.

    Attributes:
        problems: keys that are missing, unexpected or mismatched, by kind, as `from_pretrained` reports them.
    """

    def __init__(self, config: Any, weights: dict[str, StoredTensor], path: str, *, remote_code: bool = False) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        with torch.device("meta"):
            options = {"dtype": torch.float32, "trust_remote_code": remote_code}
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options).eval()
        self.stack = layer_stack(self.model)
        self._conversions = get_model_conversion_mapping(self.model)
        self._groups: dict[str, dict[str, StoredTensor]] = {str(index): {} for index in range(len(self.stack))}
        self._groups[""] = {}
        for name, tensor in weights.items():
            number = name[len(path) + 1 :].partition(".")[0] if name.startswith(f"{path}.") else ""
            self._groups[number if number in self._groups else ""][name] = tensor
        info = self._load({name: tensor.meta() for name, tensor in weights.items()}, "meta")
        self._absent = set(info.missing_keys)
        self.model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        self.model._adjust_missing_and_unexpected_keys(info)
        found = {kind: sorted(map(str, getattr(info, kind))) for kind in ("missing_keys", "unexpected_keys")}
        found["mismatched_keys"] = sorted(str(key) for key, *_ in info.mismatched_keys)
        self.problems = {kind: keys for kind, keys in found.items() if keys}

    def first_used(self, names: list[str], weights: dict[str, StoredTensor]) -> str | None:
        """The first of the names that transformers makes something of, if any; it ignores many a key of old files."""
        keys = set(self.model.state_dict())

        def used(some: list[str]) -> bool:
            return bool(keys - self._load({name: weights[name].meta() for name in some}, "meta").missing_keys)

        return next((name for name in names if used([name])), None) if used(names) else None

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """The model, able to run inside: what is outside the layers is loaded, each layer comes and goes by hooks.

        Afterwards nothing is held, but what was tied by loading stays so on the meta device.

        Raises:
            UserError: at the forward pass, if a layer's weights are not all there.
        """
        handles = [
            handle
            for index, layer in enumerate(self.stack.layers)
            for handle in (
                layer.register_forward_pre_hook(self._arrival(str(index)), prepend=True),
                layer.register_forward_hook(self._departure(layer), always_call=True),
            )
        ]
        try:
            self._compute_buffers()
            self._load(self._groups[""], "cpu")
            self.model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)
            yield self.model
        finally:
            for handle in handles:
                handle.remove()
            _forget(self.model)

    def _arrival(self, number: str) -> Any:
        def hook(layer: nn.Module, _args: Any) -> None:
            if "forward" in vars(layer):  # bypassed: it needs no weights
                return
            self._load(self._groups[number], "cpu")
            if absent := [name for name, tensor in layer.named_parameters() if tensor.is_meta]:
                raise UserError(f"layer {number} has no weights for {absent[0]}; give a complete checkpoint.")

        return hook

    def _departure(self, layer: nn.Module) -> Any:
        weightless = [entry for entry in _tensors(layer) if entry[1] not in _own_buffers(entry[0])]

        def hook(_layer: nn.Module, _args: Any, _output: Any) -> None:
            _restore(weightless)

        return hook

    def _load(self, weights: dict[str, Any], device: str) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        how = LoadStateDictConfig(device_map={"": device}, dtype=torch.float32, weight_mapping=self._conversions)
        return convert_and_load_state_dict_in_model(self.model, weights, how)[0]

    def _compute_buffers(self) -> None:
        """Rotary frequencies and the like stand in no file: the model's own initialisation makes them.

        All of it runs, as a module may fill the buffers of another; parameters are on the meta device still.
        """
        for module in self.model.modules():
            for name in _own_buffers(module):
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            module._is_hf_initialized = False
        self.model.initialize_weights()


def _own_buffers(module: nn.Module) -> list[str]:
    """Names of the module's buffers that are in no checkpoint."""
    return [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]


# A module, the name of one of its tensors, the tensor, and whether that is a parameter.
_Entry = tuple[nn.Module, str, Tensor, bool]


def _tensors(module: nn.Module) -> list[_Entry]:
    return [
        (owner, name, tensor, kind == "_parameters")
        for owner in module.modules()
        for kind in ("_parameters", "_buffers")
        for name, tensor in getattr(owner, kind).items()
        if tensor is not None
    ]


def _forget(model: nn.Module) -> None:
    """Everything to the meta device; what was one tensor stays one."""
    entries = _tensors(model)
    empty = {
        id(tensor): nn.Parameter(tensor.to("meta")) if is_one else tensor.to("meta") for *_, tensor, is_one in entries
    }
    _restore([(owner, name, empty[id(tensor)], is_one) for owner, name, tensor, is_one in entries])


def _restore(entries: list[_Entry]) -> None:
    for owner, name, tensor, parameter in entries:
        getattr(owner, "_parameters" if parameter else "_buffers")[name] = tensor
