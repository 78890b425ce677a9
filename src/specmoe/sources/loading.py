"""Loading a Hugging Face model for capture: what it is, what it weighs, and how it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import regular_file
from specmoe.sources.families import Family, family_of, not_certain, router_sites
from specmoe.sources.model_shape import layer_order, tokenizer_hash, topology_of_model, weights_hash
from specmoe.sources.refusals import not_loaded, other_shapes, refuse_without_experts
from specmoe.topology import Topology

__all__ = ["DTYPES", "LoadedModel", "load_model", "untrained_like"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be captured.

    Attributes:
        model: in evaluation mode. tokenizer: its tokenizer. family: how it routes.
        topology: of the stack that is captured by default. stack: name of that stack.
        tokenizer_id: short content hash of the tokenizer.
        settings: how the model runs, for the trace's manifest: routes depend on it.
    """

    model: Any
    tokenizer: Any
    family: Family
    topology: Topology
    stack: str
    tokenizer_id: str
    settings: dict[str, Any]


def load_model(
    model: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    stack: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer from a local directory or from the hub.

    A local directory never touches the network, and no code of a checkpoint is ever run. A quantised checkpoint is
    loaded as its configuration says, with whatever package that takes; one in MXFP4 is decoded to ``dtype``.

    Args:
        model: directory, or hub id such as ``allenai/OLMoE-1B-7B-0924``.
        dtype: one of :data:`DTYPES`, what the model computes in; ``auto`` for what the checkpoint is stored in.
        device: a torch device. device_map: ``auto``, ``balanced`` and the like spread the model over several
            GPUs (and take ``device``'s place); needs the package accelerate.
        stack: the stack whose shape the topology describes; None for the family's first.

    Raises:
        SpecmoeError: nothing is there, it is no model, its family is not supported, weights are missing or
            damaged, a package is missing, or the hub cannot be reached.
    """
    return _load(str(model), _Run(dtype, device, device_map), stack, seed=None)


def untrained_like(
    model: str | Path, seed: int = 0, *, dtype: str = "float32", device: str = "cpu", stack: str | None = None
) -> LoadedModel:
    """The same configuration with random weights: a control that shows what training put into the routing.

    Raises:
        SpecmoeError: as :func:`load_model`.
    """
    return _load(str(model), _Run(dtype, device, None), stack, seed=seed)


@dataclass(frozen=True)
class _Run:
    """How a model is to compute: dtype, device, and how it is spread over several."""

    dtype: str
    device: str
    device_map: str | None

    @property
    def torch_dtype(self) -> Any:
        return self.dtype if self.dtype == "auto" else DTYPES[self.dtype]


def _load(model: str, run: _Run, stack: str | None, seed: int | None) -> LoadedModel:
    if run.dtype != "auto" and run.dtype not in DTYPES:
        raise unknown_name("dtype", run.dtype, [*DTYPES, "auto"])
    local = _is_local(model)
    with _quiet():
        checkpoint = _described(model, local)
        refuse_without_experts(model, checkpoint.content)
        family = family_of(checkpoint.model_type, checkpoint.text_type)
        if stack is not None and stack not in family.stacks:
            raise unknown_name("stack", stack, family.stacks)
        tokenizer = _tokenizer(model, local)
        try:
            live = _trained(model, local, run, checkpoint) if seed is None else _untrained(model, local, run, seed)
            live = live.eval()
        except SpecmoeError:
            raise
        except Exception as error:
            raise not_loaded("", model, local, error) from error
        stack = stack or next(iter(family.stacks))
        topology, order = _shape(live, family, stack, Path(model) if local else None)
    name = Path(model).resolve().name if local else model
    revision = weights_hash(Path(model)) if local else str(getattr(live.config, "_commit_hash", None) or "")
    if seed is not None:
        name, revision = f"{name}-untrained", f"seed-{seed}"
    return LoadedModel(
        model=live,
        tokenizer=tokenizer,
        family=family,
        topology=topology.model_copy(update={"model_id": name, "revision": revision}),
        stack=stack,
        tokenizer_id=tokenizer_hash(tokenizer),
        settings=_settings(live, family, run, stack, seed, checkpoint.quantisation) | order,
    )


def _shape(live: Any, family: Family, stack: str, directory: Path | None) -> tuple[Topology, dict[str, Any]]:
    """Topology, and for a looped transformer the order of its layers, as a setting."""
    try:
        topology = topology_of_model(live, family, stack, directory)
        looped = topology.layers > len(router_sites(live, family, stack))
        return topology, {"layer_order": list(layer_order(live, family, stack))} if looped else {}
    except Exception as error:
        if not family.listed:
            raise not_certain(family, _reason(error)) from error
        if isinstance(error, SpecmoeError):
            raise
        raise SpecmoeError(f"the model does not run: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tokenizer(model: str, local: bool) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        raise not_loaded("the tokenizer of", model, local, error) from error
    # Where the files are missing, transformers makes an empty tokenizer that knows no word.
    if len(set(tokenizer("Six words become different token ids", add_special_tokens=False)["input_ids"])) < 5:
        raise SpecmoeError(f"{model} has no tokenizer, or one without a vocabulary; put tokenizer.json there")
    return tokenizer


def _trained(model: str, local: bool, run: _Run, checkpoint: _Checkpoint) -> Any:
    from transformers.utils import is_accelerate_available

    config, quantised = _config(model, local), checkpoint.quantisation is not None
    # Where shapes differ, transformers would only say that they do; what it then fills at random is refused below.
    options: dict[str, Any] = {
        "dtype": run.torch_dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        **_dequantising(checkpoint.quantisation),
    }
    # A quantised checkpoint is decoded where it will run, which takes accelerate; MXFP4 can do without.
    if run.device_map is not None or (quantised and (checkpoint.quantisation != "mxfp4" or is_accelerate_available())):
        options["device_map"] = run.device_map or run.device
    with _loaded_buffers_stay():
        live, info = _auto_class(config).from_pretrained(
            model, config=config, local_files_only=local, trust_remote_code=False, **options
        )
    if (differing := other_shapes(model, info["mismatched_keys"])) is not None:
        raise differing
    missing = sorted(info["missing_keys"])
    # transformers fills weights that a checkpoint lacks at random and only warns about it.
    if missing:
        raise SpecmoeError(f"{model} lacks {len(missing)} weights, {missing[0]} among them; get the model again")
    if quantised and not _is_quantised(live):
        # transformers gives the dtype to what it dequantised and leaves the rest as it is stored.
        _cast(live, live.get_input_embeddings().weight.dtype if run.dtype == "auto" else run.torch_dtype)
    return live if "device_map" in options else live.to(device=run.device)


def _dequantising(quantisation: str | None) -> dict[str, Any]:
    """How to load a checkpoint so that the family's own modules run, which are the ones that are watched.

    With the package kernels, transformers would run MXFP4 experts as they are stored, in a block that calls neither
    its router nor its experts.
    """
    from transformers.utils.quantization_config import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)} if quantisation == "mxfp4" else {}


def _is_quantised(live: Any) -> bool:
    return getattr(live.config, "quantization_config", None) is not None


def _cast(live: Any, dtype: torch.dtype) -> None:
    """Parameters to a dtype, but for those that the model's class keeps in float32; buffers are left alone.

    A correction bias or a rotary frequency is a buffer; in half precision it would be another one.
    """
    kept = [re.compile(re.escape(pattern).replace(r"\*", ".*")) for pattern in live._get_dtype_plan(dtype)]
    for name, parameter in live.named_parameters():
        if parameter.is_floating_point() and not any(pattern.search(name) for pattern in kept):
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _loaded_buffers_stay() -> Iterator[None]:
    """Keep what a checkpoint says about a buffer, such as a correction bias.

    After loading, transformers initialises every module and spares the tensors that were loaded; but a module that
    writes by hand, not through ``transformers.initialization``, is not held back. So Zaya's routers lose the trained
    bias of their skip expert (5.23).
    """
    from transformers import PreTrainedModel

    initialise = PreTrainedModel._initialize_weights

    def guarded(self: Any, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        loaded = [each for each in module.buffers(recurse=False) if getattr(each, "_is_hf_initialized", False)]
        before = [each.clone() for each in loaded]
        initialise(self, module, is_custom_code)
        for each, value in zip(loaded, before, strict=True):
            each.copy_(value)

    PreTrainedModel._initialize_weights = guarded
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialise


def _untrained(model: str, local: bool, run: _Run, seed: int) -> Any:
    config = _config(model, local)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        live = _auto_class(config).from_config(config)
    if run.dtype != "auto":
        _cast(live, run.torch_dtype)
    return live.to(device=run.device)


def _config(model: str, local: bool) -> Any:
    """A model's configuration; of one that thinks and talks in two parts, that of the part that reads text."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, local_files_only=local, trust_remote_code=False)
    part = getattr(config, "thinker_config", None)
    if part is None:
        return config
    for name in ("quantization_config", "_commit_hash"):
        if getattr(config, name, None) is not None:
            setattr(part, name, getattr(config, name))
    return part


def _auto_class(config: Any) -> Any:
    """The first of transformers' auto classes that knows a configuration; those with a language-model head first."""
    import transformers

    for name in (
        "AutoModelForCausalLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForTokenClassification",
        "AutoModel",
    ):
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            return auto
    raise SpecmoeError(f"transformers {transformers.__version__} has no model class for {config.model_type}")


def _settings(
    live: Any, family: Family, run: _Run, stack: str, seed: int | None, quantisation: str | None
) -> dict[str, Any]:
    import transformers

    quantisation = quantisation if seed is None else None
    text = live.config.get_text_config()
    return {
        "dtype": str(live.dtype).removeprefix("torch."),
        "quantization": quantisation,
        "dequantized": quantisation is not None and not _is_quantised(live),
        "device": torch.cuda.get_device_name(run.device) if run.device.startswith("cuda") else run.device,
        "device_map": run.device_map,
        "attention": str(getattr(text, "_attn_implementation", None)),
        "experts": str(getattr(text, "_experts_implementation", None)),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "family": family.name,
        "scoring": family.scoring,
        "correction_bias": family.bias,
        "group_limited": family.groups,
        "stack": stack,
        "untrained_seed": seed,
    }


def _is_local(model: str) -> bool:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SpecmoeError(f"{model} is not a model directory: it has no config.json")
        for file in sorted(path.iterdir()):
            regular_file(file)
        return True
    if path.exists() or model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise SpecmoeError(f"model {model} is not a directory; name a directory with a config.json, or a hub id")
    return False


@dataclass(frozen=True)
class _Checkpoint:
    """What a config file says before any of its types is known.

    Attributes:
        model_type: of the model. text_type: of its text part, None if it has none.
        quantisation: method by which the weights are quantised, None if they are not. content: all of it.
    """

    model_type: str
    text_type: str | None
    quantisation: str | None
    content: dict[str, Any]


def _described(model: str, local: bool) -> _Checkpoint:
    from transformers import PretrainedConfig

    try:
        content, _ = PretrainedConfig.get_config_dict(model, local_files_only=local)
    except Exception as error:
        raise not_loaded("", model, local, error) from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(model_type, str):
        raise SpecmoeError(f"{model} is not a model: its config.json names no model_type")
    text = content.get("text_config")
    text = text if isinstance(text, dict) else {}
    text_type = text.get("model_type")
    quantisation = content.get("quantization_config") or text.get("quantization_config")
    method = quantisation.get("quant_method", "unnamed") if isinstance(quantisation, dict) else None
    return _Checkpoint(model_type, text_type if isinstance(text_type, str) else None, method and str(method), content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes off the terminal; problems come as exceptions."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
