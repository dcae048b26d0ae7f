"""Merges an adapter onto its base shard by shard: memory holds one module and the adapter, never the model.

The base is made with weights that take no memory, and peft puts the adapter around them. Then each file of the base is
written anew, tensor by tensor: of a module that the adapter changes the weights are read in float32, peft merges them,
and they are rounded once, to the dtype of the export; all else is copied. Files and names of tensors stay the base's.

What transformers makes of several tensors when it reads a base (experts that it stacks, e.g. Mixtral's) can be copied,
but not merged so: then NotByShard says why, and the caller merges in memory.
"""

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import _TYPES
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import _get_resolved_checkpoint_files

from sft.errors import ModelError
from sft.model.allocator import give_freed_memory_back
from sft.model.load import load_config, load_on_meta
from sft.model.lora import load_adapter
from sft.model.source import find_model, first_line, local_or_hub
from sft.recipe import Recipe
from sft.terminal import bar

Tensors = Iterator[tuple[str, torch.Tensor]]  # (name, tensor)
TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}  # what safetensors calls torch's dtypes

ZERO = torch.zeros((), dtype=torch.float32)  # what every weight without memory is a view of


class NotByShard(Exception):
    """Why an adapter cannot be merged shard by shard."""


class BaseTensor(NamedTuple):
    """A tensor in the base's files. weight: what the model calls the weight that it is, or is a part of."""

    file: "BaseFile"
    name: str
    weight: str
    is_whole: bool


class BaseFile:
    """A file of weights, whose tensors are read when they are asked for; of a .bin weights only, no other pickle."""

    def __init__(self, path: Path):
        if path.suffix == ".safetensors":
            opened = safe_open(path, framework="pt", backend="pread")  # mapped pages would count as this process's
            self.tensor = opened.get_tensor
            self.shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            self.tensor = tensors.__getitem__
            self.shapes = {name: tensor.shape for name, tensor in tensors.items()}


class ShardMerger:
    """An adapter on a base without weights, ready to be merged.

    model: the base, with the adapter around its modules. size: of its weights as exported, in bytes. is_untied: known
    after `write`, whether the output embeddings have come to differ from the input embeddings, which were one weight.

    Raises: NotByShard; RecipeError: base or adapter do not load.
    """

    def __init__(self, recipe: Recipe, adapter: Path):
        if getattr(load_config(recipe), "quantization_config", None):
            raise NotByShard("the base's files hold quantised weights")
        self.model, missing = load_on_meta(recipe)
        _require_plain(recipe, self.model, missing)
        self.size = sum(weight.nbytes for weight in self.model.parameters())
        self._dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        self._files = [BaseFile(path) for path in _weight_files(recipe, self.model)]
        self._names = _Names(self.model)
        found = (self._names.locate(file, name) for file in self._files for name in file.shapes)
        # What the model has no use for stays behind, as when it is saved: old rotary tables, heads for other tasks.
        self._tensors = [tensor for tensor in found if tensor.weight in self._dtypes]
        self._sources = {tensor.weight: tensor for tensor in self._tensors if tensor.is_whole}
        self._brought: dict[str, torch.Tensor] = {}  # of the base's weights by the adapter
        self._ties = self._find_ties()
        modules = dict(self.model.named_modules())
        _take_no_memory(self.model)
        self.adapted = load_adapter(self.model, str(adapter), recipe, key="output_dir", assign=True)
        weights = (
            (f"{path}.{name}", w) for path, m in modules.items() for name, w in m.named_parameters(recurse=False)
        )
        self._brought = {name: weight.detach() for name, weight in weights if not _takes_no_memory(weight)}
        self._wrappers = {path: (wrapper, modules[path]) for path, wrapper in self._find_wrappers(modules)}
        self._owners = {
            f"{path}.{name}": path for path, (_, module) in self._wrappers.items() for name in module.state_dict()
        }
        self._require_whole()
        self._merged: dict[str, torch.Tensor] = {}  # of a module whose tensors are not all written yet
        self._untied: list[str] = []

    @property
    def is_untied(self) -> bool:
        return bool(self._untied)

    def _find_ties(self) -> dict[str, str]:
        """{weight: the weight that it shares its memory with}, of which the files hold the second only."""
        ties = {}
        for one, other in getattr(self.model, "all_tied_weights_keys", {}).items():
            if one in self._sources and other in self._sources:
                if not torch.equal(self._read(one), self._read(other)):
                    continue  # transformers does not tie them then
                self._tensors.remove(self._sources.pop(one))
            ties.update({one: other} if other in self._sources else {other: one})
        return ties

    def _find_wrappers(self, modules: Mapping[str, nn.Module]) -> list[tuple[str, Any]]:
        wrappers = list(_wrappers(self.adapted))
        if not wrappers:
            raise NotByShard("the adapter changes no weights")
        if any(getattr(config, "layer_replication", None) for config in self.adapted.peft_config.values()):
            raise NotByShard("the adapter repeats layers of the base")
        if added := [path for path, _ in wrappers if path not in modules]:
            raise NotByShard(f"the adapter brings a module of its own, {added[0]}")
        return wrappers

    def _require_whole(self) -> None:
        """Raises: NotByShard: a weight to be merged is not one tensor of one file."""
        for weight in self._owners:
            if weight not in self._sources and self._ties.get(weight) not in self._sources:
                raise NotByShard(f"{weight} is made of several tensors when the base is read")
        for weight, source in self._ties.items():
            if {weight, source} & self._owners.keys() and self._names.weight_of(weight) != (weight, True):
                raise NotByShard(f"{weight} has another name in the base's files")

    def _read(self, weight: str) -> torch.Tensor:
        """A weight of the base in the dtype of the export, in which it is trained if it is not quantised.

        What the adapter brings of the base's weights, such as trained biases, takes their places, as peft has it.
        """
        if weight in self._brought:
            return self._brought[weight].to(self._dtypes[weight])
        source = self._sources.get(weight) or self._sources[self._ties[weight]]
        return source.file.tensor(source.name).to(self._dtypes[weight])

    def write(
        self, folder: Path, renamed: Callable[[str, torch.Tensor], Tensors] = lambda *named: iter([named])
    ) -> None:
        """Writes the merged weights as safetensors. renamed: what is written of a named tensor instead.

        Raises: ModelError: a merged weight is no number. OSError: they cannot be written.
        """
        with give_freed_memory_back(), bar("merging", len(self._tensors)) as advance:
            self._write(folder, renamed, advance)

    def _write(
        self, folder: Path, renamed: Callable[[str, torch.Tensor], Tensors], advance: Callable[[int], None]
    ) -> None:
        self._find_untied()
        files = [file for file in self._files if any(tensor.file is file for tensor in self._tensors)]
        weight_map: dict[str, str] = {}
        for number, file in enumerate(files, start=1):
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            outputs = self._outputs(file)
            layout = {new: tensor for old, empty, _ in outputs for new, tensor in renamed(old, empty)}
            _save(folder / name, layout, (tensor for old, _, make in outputs for _, tensor in renamed(old, make())))
            weight_map |= dict.fromkeys(layout, name)
            advance(len(outputs))
        if len(files) > 1:
            size = sum(tensor.nbytes for file in files for _, tensor, _ in self._outputs(file))
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _outputs(self, file: BaseFile) -> list[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]]:
        """What is written of a file: name, tensor without contents, and what makes it; the widest numbers first."""
        outputs: list[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]] = []
        for tensor in (tensor for tensor in self._tensors if tensor.file is file):
            empty = torch.empty(file.shapes[tensor.name], dtype=self._dtypes[tensor.weight], device="meta")
            outputs.append((tensor.name, empty, partial(self._result, tensor)))
            if tensor.is_whole:
                tied = [weight for weight in self._untied if self._ties[weight] == tensor.weight]
                outputs += [(weight, empty, partial(self._take, weight)) for weight in tied]
        return sorted(outputs, key=lambda output: -output[1].itemsize)  # so each lies at a multiple of its width

    def _find_untied(self) -> None:
        for weight, source in self._ties.items():
            is_changed = {weight, source} & self._owners.keys()
            if is_changed and not torch.equal(self._exported(weight), self._exported(source)):
                self._untied.append(weight)

    def _result(self, tensor: BaseTensor) -> torch.Tensor:
        """What is written of a tensor of the base."""
        if tensor.is_whole:
            return self._take(tensor.weight)
        return tensor.file.tensor(tensor.name).to(self._dtypes[tensor.weight])

    def _take(self, weight: str) -> torch.Tensor:
        """A weight as it is exported, which is then forgotten."""
        exported = self._exported(weight)
        self._merged.pop(weight, None)
        return exported

    def _exported(self, weight: str) -> torch.Tensor:
        if weight not in self._owners:
            return self._read(weight)
        if weight not in self._merged:
            self._merge(self._owners[weight])
        return self._merged[weight]

    @torch.no_grad()
    def _merge(self, path: str) -> None:
        """Lets peft merge a module; what comes of it goes to `_merged`, and its memory is let go of."""
        wrapper, module = self._wrappers[path]
        weights = {name: self._read(f"{path}.{name}").to(torch.float32, copy=True) for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)
        del weights
        module = _merged(path, wrapper)
        dtypes = {name: self._dtypes[f"{path}.{name}"] for name in module.state_dict()}
        _round(path, module, dtypes)
        self._merged |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        _take_no_memory(module)


@torch.no_grad()
def refuse_unmergeable(recipe: Recipe, adapted: PeftModel) -> None:
    """Merges an adapter without weights, before it is trained. Raises: RecipeError: peft cannot merge it."""
    try:
        for path, wrapper in _wrappers(adapted):
            _merged(path, wrapper)
    except ModelError as error:
        raise recipe.error(
            "adapter_name_or_path" if recipe.adapter_name_or_path else "lora_config", str(error)
        ) from None


@torch.no_grad()
def merge_in_memory(adapted: PeftModel, dtypes: Mapping[str, torch.dtype] | None = None) -> PreTrainedModel:
    """The base with its adapter merged into it, module by module, in float32.

    Args: dtypes: of the base's weights by name, to which the merged are rounded; None: they stay float32.
    Raises: ModelError: peft cannot merge it, or a merged weight is no number.
    """
    model: Any = adapted.get_base_model()
    for path, wrapper in list(_wrappers(adapted)):
        _part(wrapper, model)
        module = _merged(path, wrapper)
        if dtypes is not None:
            _round(path, module, {name: dtypes[f"{path}.{name}"] for name in module.state_dict()})
        model.set_submodule(path, module)
    for one, other in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if torch.equal(model.get_parameter(one), model.get_parameter(other)):
            model.get_submodule(one.rpartition(".")[0]).weight = model.get_parameter(other)
        else:
            untie(model)
    return model


def untie(model: PreTrainedModel) -> None:
    """Says in the config that the output embeddings are a weight of their own, as `modules_to_save` may make them."""
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _part(wrapper: nn.Module, model: nn.Module) -> None:
    """Gives the wrapped module its own weights where it shares them: what is merged into it is not for the others."""
    times = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for module in wrapper.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if times[id(weight)] > 1:
                setattr(module, name, nn.Parameter(weight.clone(), requires_grad=False))


def _merged(path: str, wrapper: Any) -> nn.Module:
    """The module that a wrapper of peft's stands for, merged in float32. Raises: ModelError: peft cannot."""
    wrapper.float()
    try:
        if hasattr(wrapper, "unload_and_optionally_merge_module"):
            return wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        wrapper.merge(safe_merge=False)
        return wrapper.get_base_layer()
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be merged: {first_line(error)}; set export.merge: false") from None


def _round(path: str, module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raises: ModelError: a weight is no number."""
    rounded = {name: tensor.to(dtypes[name]) for name, tensor in module.state_dict().items()}
    if wrong := [name for name, tensor in rounded.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(f"{path}.{wrong[0]} has values that are no numbers once the adapter is merged into it")
    module.load_state_dict(rounded, assign=True)


class _Names:
    """What the model calls the tensors of its files, by the rules that transformers reads them by."""

    def __init__(self, model: PreTrainedModel):
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix, self._weights = model.base_model_prefix, model.state_dict()

    def weight_of(self, name: str) -> tuple[str, bool]:
        """Returns: the weight, and whether the tensor is it, not a part of it."""
        weight, converter = rename_source_key(name, self._renamings, self._converters, self._prefix, self._weights)
        if weight not in self._weights and name in self._weights:
            return name, True
        return weight, converter is None

    def locate(self, file: BaseFile, name: str) -> BaseTensor:
        return BaseTensor(file, name, *self.weight_of(name))


def _weight_files(recipe: Recipe, model: PreTrainedModel) -> list[Path]:
    """The base's files of weights, as from_pretrained chooses them."""
    options = recipe.model_init
    keys = ("cache_dir", "local_files_only", "revision", "subfolder")
    reach = {key: options[key] for key in keys if key in options} | find_model(recipe.model_name_or_path, recipe)
    files, _ = _get_resolved_checkpoint_files(
        local_or_hub(recipe.model_name_or_path, recipe),
        variant=options.get("variant"),
        gguf_file=None,
        use_safetensors=options.get("use_safetensors"),
        user_agent=None,
        is_remote_code=model.is_remote_code(),
        transformers_explicit_filename=getattr(model.config, "transformers_weights", None),
        download_kwargs=cast(Any, reach),
    )
    return [Path(file) for file in files or []]


def _require_plain(recipe: Recipe, model: PreTrainedModel, missing: set[str]) -> None:
    """Raises: NotByShard: the base's files are not simply its weights."""
    if model.is_remote_code() or "key_mapping" in recipe.model_init:
        raise NotByShard("how the base's weights are read is its own code's to say")
    if missing:
        raise NotByShard(f"{min(missing)} is in no file of the base")


def _save(path: Path, layout: Mapping[str, torch.Tensor], tensors: Iterator[torch.Tensor]) -> None:
    """Writes a safetensors file of tensors as they come, none of which is held then; save_file asks for all at once.

    Args: layout: their names and, by tensors without contents, their types and shapes, in the same order.
    Source: the format, https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, empty in layout.items():
        start, end = end, end + empty.nbytes
        header[name] = {"dtype": TYPE_NAMES[empty.dtype], "shape": list(empty.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _take_no_memory(module: nn.Module) -> None:
    """Weights that have sizes but one number in memory, so that peft may do with them what it does with real ones.

    In float32, as peft rounds an adapter that it assigns to the dtype of the weights beside it.
    """
    module.load_state_dict({name: ZERO.expand(w.shape) for name, w in module.state_dict().items()}, assign=True)


def _takes_no_memory(weight: torch.Tensor) -> bool:
    return weight.data_ptr() == ZERO.data_ptr()


def _wrappers(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    """The outermost modules that peft has put around those of the base, with the paths of these."""
    outermost = None
    for path, module in adapted.get_base_model().named_modules():
        is_inside = outermost is not None and path.startswith(f"{outermost}.")
        if not is_inside and (hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer")):
            yield path, module
            outermost = path
