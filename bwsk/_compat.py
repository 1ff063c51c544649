"""Every private name of torch and transformers that bwsk depends on, and nothing else: what a new release may break.

A name is private here if neither project documents it: an underscore, an internal module, a class recognised by its
name. Each has one line that says what needs it, and one test in `tests/unit/test_compat.py`, so that a release without
it, or with another meaning for it, fails there and not in a gradient. All exist in the versions of `SEEN`. A missing
name raises a `BwskError` of one line where it is needed, and is a line of `bwsk doctor`.

Objects are imported on first use (`from bwsk._compat import tree_leaves`), so importing this module costs nothing.

Used elsewhere without a line here: a module's own dictionaries, which subclasses of `nn.Module` have worked with for
years (`_modules`, `_parameters`, `_buffers`, `_forward_hooks` and its kin); the names of T5's submodules, which are
those of its weights; the operators that witness cases are about; and the public functions of `torch.nn.functional` that
are replaced while a step is predicted.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata, util
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from bwsk.errors import BwskError

if TYPE_CHECKING:
    from torch import Tensor, nn

# The oldest and the newest version in which every name of this file was seen.
SEEN = {"torch": ("2.11", "2.14"), "transformers": ("5.17", "5.24")}

_COLLECTING = "transformers.utils.output_capturing"
# Name -> (where it is, what needs it).
_OBJECTS = {
    # Running operators without values, and seeing each one that is dispatched.
    "TorchDispatchMode": ("torch.utils._python_dispatch.TorchDispatchMode", "classify, trace and predict_memory"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor.FakeTensorMode", "trace and predict_memory"),
    "FakeTensor": ("torch._subclasses.fake_tensor.FakeTensor", "predict_memory and make_reversible"),
    "DataDependentOutputException": (
        "torch._subclasses.fake_tensor.DataDependentOutputException",
        "predict_memory, to refuse a step that depends on values",
    ),
    "DynamicOutputShapeException": (
        "torch._subclasses.fake_tensor.DynamicOutputShapeException",
        "predict_memory, to refuse a step that depends on values",
    ),
    "tree_leaves": ("torch.utils._pytree.tree_leaves", "classify and trace"),
    "tree_iter": ("torch.utils._pytree.tree_iter", "predict_memory"),
    "tree_map_only": ("torch.utils._pytree.tree_map_only", "trace"),
    "flop_registry": ("torch.utils.flop_counter.flop_registry", "counting FLOPs"),
    "WeakIdKeyDictionary": ("torch.utils.weak.WeakIdKeyDictionary", "trace"),
    # Operators that autograd dispatches: the reversible engine calls the same ones, to be bit-identical.
    "native_dropout": ("torch.native_dropout", "make_reversible and trace"),
    "native_dropout_backward": ("torch.ops.aten.native_dropout_backward", "make_reversible"),
    "softmax_backward_out": ("torch.ops.aten._softmax_backward_data.out", "make_reversible"),
    "log_softmax_backward": ("torch._log_softmax_backward_data", "make_reversible"),
    "threshold_backward_out": ("torch.ops.aten.threshold_backward.grad_input", "make_reversible"),
    "embedding_backward": ("torch.ops.aten.embedding_dense_backward", "make_reversible"),
    "nll_loss_forward": ("torch.ops.aten.nll_loss_forward", "make_reversible"),
    "nll_loss_backward": ("torch.ops.aten.nll_loss_backward", "make_reversible"),
    "mm_out": ("torch.ops.aten.mm.out", "fast products on AMD processors"),
    # Base classes of layers.
    "AdaptiveAvgPoolNd": ("torch.nn.modules.pooling._AdaptiveAvgPoolNd", "classify"),
    "AdaptiveMaxPoolNd": ("torch.nn.modules.pooling._AdaptiveMaxPoolNd", "classify"),
    "AvgPoolNd": ("torch.nn.modules.pooling._AvgPoolNd", "classify"),
    "LPPoolNd": ("torch.nn.modules.pooling._LPPoolNd", "classify"),
    "MaxPoolNd": ("torch.nn.modules.pooling._MaxPoolNd", "classify"),
    "BatchNorm": ("torch.nn.modules.batchnorm._BatchNorm", "classify and make_reversible"),
    "InstanceNorm": ("torch.nn.modules.instancenorm._InstanceNorm", "classify"),
    "ConvNd": ("torch.nn.modules.conv._ConvNd", "classify"),
    "DropoutNd": ("torch.nn.modules.dropout._DropoutNd", "classify"),
    "Loss": ("torch.nn.modules.loss._Loss", "classify"),
    # What transformers' models are made of.
    "ALL_ATTENTION_FUNCTIONS": ("transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS", "make_reversible"),
    "GradientCheckpointingLayer": ("transformers.modeling_layers.GradientCheckpointingLayer", "make_reversible"),
    "DynamicLayer": ("transformers.cache_utils.DynamicLayer", "make_reversible"),
    "DynamicSlidingWindowLayer": ("transformers.cache_utils.DynamicSlidingWindowLayer", "make_reversible"),
    "LOSS_MAPPING": ("transformers.loss.loss_utils.LOSS_MAPPING", "make_reversible"),
    "ForCausalLMLoss": ("transformers.loss.loss_utils.ForCausalLMLoss", "make_reversible"),
    "CONFIG_MAPPING": ("transformers.models.auto.configuration_auto.CONFIG_MAPPING", "reading a config.json"),
    "CONFIG_MAPPING_NAMES": (
        "transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES",
        "reading a config.json",
    ),
    "LabelSmoother": ("transformers.trainer_pt_utils.LabelSmoother", "plans for a Trainer with label smoothing"),
    "masking_utils": ("transformers.masking_utils", "train.backend: graph"),
    "create_causal_mask": ("transformers.masking_utils.create_causal_mask", "the training step of a study"),
    "output_capturing": (_COLLECTING, "make_reversible, to tell transformers' own hooks"),
}
_ATTRIBUTES: dict[str, str] = {}  # where it is -> what needs it
# Without these bwsk does the same, with more memory or time.
_OPTIONAL = (
    "torch._C._storage_Use_Count",
    "transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket",
)

# The method by which `nn.DataParallel` makes a replica of a module.
REPLICATE = "_replicate_for_data_parallel"
# Classes that transformers does not export, told by their names: encoders and decoders of the T5 family.
T5_STACKS = ("T5Stack", "MT5Stack", "UMT5Stack")
# Attentions whose position buckets depend on the lengths alone; UMT5's method of that name has another signature.
T5_ATTENTIONS = ("T5Attention", "MT5Attention")
# Heads to try, in this order, for a config that does not name its class: a T5 becomes its sequence-to-sequence model,
# a BERT its masked language model, a GPT-2 its causal one. These are the classes that the publication counted.
HEADS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
_OBJECTS |= {head: (f"transformers.models.auto.modeling_auto.{head}", "choosing a model's class") for head in HEADS}


def __getattr__(name: str) -> Any:
    if name not in _OBJECTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path, need = _OBJECTS[name]
    try:
        found = _resolve(path)
    except AttributeError:
        raise _error(path, need) from None
    globals()[name] = found
    return found


class Missing(NamedTuple):
    """A name that the installed version lacks: the finding, the advice, and whether bwsk works without it."""

    found: str
    advice: str
    optional: bool


def missing() -> list[Missing]:
    """The names of this file that torch and transformers lack or cannot import, as far as they are installed."""
    found: dict[str, Missing] = {}
    for path, need in [*_OBJECTS.values(), *_ATTRIBUTES.items()]:
        package = path.partition(".")[0]
        try:
            if util.find_spec(package) is not None:
                _resolve(path)
        except AttributeError:
            found[path] = _fault(path, need)
        except ImportError as error:  # of the package's own: one line, not one for each name
            text = f"{package} {metadata.version(package)}: {' '.join(str(error).split())[:160]}"
            found[package] = Missing(text, f"install {package} again", False)
    return list(found.values())


def _resolve(path: str) -> Any:
    """The object at a dotted path; AttributeError if there is none."""
    package, *names = path.split(".")
    found: Any = import_module(package)
    for name in names:
        package += f".{name}"
        try:
            found = getattr(found, name)
        except AttributeError:
            if not isinstance(found, ModuleType):
                raise
            try:
                found = import_module(package)
            except ModuleNotFoundError as error:
                if error.name != package:  # it is there, and lacks something itself
                    raise
                raise AttributeError(path) from None
    return found


def _fault(path: str, need: str) -> Missing:
    package = path.partition(".")[0]
    first, last = SEEN[package]
    found = f"{package} {metadata.version(package)}: has no {path}, needed by {need}"
    return Missing(found, f"install a {package} from {first} to {last}", path in _OPTIONAL)


def _error(path: str, need: str) -> BwskError:
    fault = _fault(path, need)
    return BwskError(f"{fault.found}; {fault.advice}")


def _attribute(path: str, need: str) -> Callable[..., Any]:
    """A function that reads this attribute of its argument; a second argument is returned if there is no attribute.

    `path` is where every class or module of the kind has it.
    """
    name = path.rpartition(".")[2]
    _ATTRIBUTES[path] = need

    def read(owner: Any, *default: Any) -> Any:
        try:
            return getattr(owner, name, *default)
        except AttributeError:
            raise _error(path, need) from None

    return read


# --- torch ---

# How often a tensor was written to: one that changed between forward and backward must not be used again.
tensor_version = _attribute("torch.Tensor._version", "make_reversible, to see weights changed in place")
# Whether an operator only looks at its input's memory in another way.
is_view = _attribute("torch.ops.aten.mm.default.is_view", "trace")
_cdata = _attribute("torch.UntypedStorage._cdata", "trace and predict_memory")
_schema = _attribute("torch.ops.aten.mm.default._schema", "classify and trace")
_graph_task = _attribute("torch._C._current_graph_task_id", "make_reversible, to see uses that share a cast")
_use_count = _attribute("torch._C._storage_Use_Count", "the loss head, to know when it may write over the logits")
_global_hooks = [
    _attribute(f"torch.nn.modules.module._global_{kind}_hooks", "make_reversible, to see hooks for all modules")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def storage_key(tensor: Tensor) -> int:
    """A number that tensors share exactly if they share their memory, for as long as that memory lives."""
    return _cdata(tensor.untyped_storage())


def storage_holders(tensor: Tensor) -> int:
    """How many tensors share the memory of this one; -1 if this torch does not report it."""
    import torch

    count = _use_count(torch._C, None)
    return -1 if count is None else count(storage_key(tensor))


def current_backward() -> int:
    """The number of the backward pass that this thread is in; -1 outside of one."""
    import torch

    return _graph_task(torch._C)()


def operator_name(func: Any) -> str:
    """'aten::mm' for `torch.ops.aten.mm.default`."""
    return _schema(func).name


def mutates(func: Any) -> bool:
    """Whether an operator writes into one of its arguments."""
    return _schema(func).is_mutable


def globally_hooked() -> bool:
    """Whether hooks for all modules are registered, which expect to see every single one."""
    from torch.nn.modules import module

    return any(hooks(module) for hooks in _global_hooks)


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """The model inside what torch.compile returned; None if it is not compiled."""
    return getattr(model, "_orig_mod", None)


def fake_tensor_log() -> logging.Logger:
    """The logger to which torch writes, with a traceback, what does not run on fake tensors."""
    return logging.getLogger("torch._subclasses.fake_tensor")


def onednn_linear() -> Callable[..., Tensor] | None:
    """oneDNN's x · wᵀ, called as (x, w, None, "none", [], ""); None if this torch lacks it."""
    import torch

    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return torch.ops.mkldnn._linear_pointwise.default


# --- transformers ---

# How attention is computed, by name ("eager", "sdpa", …), and the same for experts: of a config.
attention_kind = _attribute("transformers.PreTrainedConfig._attn_implementation", "make_reversible and trace")
experts_kind = _attribute("transformers.PreTrainedConfig._experts_implementation", "trace")
# A model class's constructor from a config, with `attn_implementation`: `from_config(cls)(config, …)`.
from_config = _attribute("transformers.PreTrainedModel._from_config", "building a model without weights")
# A T5's decoder inputs from its labels: `shift_right(model)(labels)`.
shift_right = _attribute("transformers.T5ForConditionalGeneration._shift_right", "make_reversible")
# Of a T5Attention: the bucket of each distance between positions.
relative_position_bucket = _attribute(
    "transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket", "training"
)


def set_attention_kind(config: Any, kind: str | None) -> None:
    """Have a config name another attention, which need not be one that transformers would accept from a user."""
    config._attn_implementation_internal = kind
    if attention_kind(config) != kind:
        raise _error("transformers.PreTrainedConfig._attn_implementation_internal", "make_reversible")


def looks_up_attention(module: nn.Module) -> bool:
    """Whether the module's forward asks `ALL_ATTENTION_FUNCTIONS` for the attention function that its config names."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "get_interface" in code.co_names and hasattr(module, "config")


def routes_to_experts(module: nn.Module) -> bool:
    """Whether the module sends each token to some of several experts."""
    return "expert" in type(module).__name__.lower()


def own_loss(model: nn.Module) -> Callable[..., Any] | None:
    """The loss function set on this very model; None if it has its class's."""
    return vars(model).get("_loss_function")


def set_loss(model: Any, loss: Callable[..., Any] | None) -> None:
    """Set this model's own loss function; None removes it."""
    if loss is None:
        del model._loss_function
        return
    model._loss_function = loss
    if model.loss_function is not loss:
        del model._loss_function
        raise _error("transformers.PreTrainedModel._loss_function", "make_reversible")


def enable_checkpointing(model: Any, *, use_reentrant: bool = False) -> None:
    """transformers' own checkpointing; its method is to be called `activation_checkpointing_enable` from version 6 on.

    Raises what transformers raises for a model without it: ValueError or NotImplementedError.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@cache
def cache_argument() -> str:
    """The argument that passes a generation cache: "past_key_values", which transformers 5.24 renamed to "cache"."""
    stack = _resolve("transformers.models.t5.modeling_t5.T5Stack")
    return "cache" if "cache" in inspect.signature(stack.forward).parameters else "past_key_values"


def with_cache_argument(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with a generation cache under this version's name; callers may give either, as with stock models."""
    if cache_argument() in kwargs or "past_key_values" not in kwargs:
        return kwargs
    others = {name: value for name, value in kwargs.items() if name != "past_key_values"}
    return {cache_argument(): kwargs["past_key_values"], **others}


def collects_outputs(hook: Any) -> bool:
    """Whether a forward hook is one by which transformers collects hidden states and attentions.

    Those stay on a model for good once outputs were asked for, and do nothing in calls that ask for none.
    """
    return getattr(hook, "__module__", None) == _COLLECTING
